"""Write the plan of the load test, and become Locust: MODELS against HOST, with the arguments that follow the script.

Master and workers make the same plan from the same environment, so nothing has to be handed around. Replaces itself by Locust,
so that signals and the exit code are Locust's own.
"""

import os
import sys
from pathlib import Path

from loadtest import run
from loadtest.plan import GRACE_S, make_plan
from tickserve import pipeline
from tickserve.config import LoadtestSettings

FOLDER = Path(os.environ.get("PLAN_FOLDER", "/tmp"))  # noqa: S108 - the pod's own volume


def plan():
    """The plan of this release: every model over HTTP and gRPC."""
    repository, host = Path(os.environ.get("REPOSITORY", "/models")), os.environ["HOST"]
    versions = {name: pipeline.newest_version(repository, name) for name in os.environ["MODELS"].split()}
    users, seconds = int(os.environ["USERS"]), float(os.environ["DURATION_S"])
    settings = LoadtestSettings(users=users, duration_s=seconds)
    http, grpc = os.environ.get("HTTP_PORT", "8000"), os.environ.get("GRPC_PORT", "8001")
    addresses = {"http": f"{host}:{http}", "grpc": f"{host}:{grpc}"}
    return make_plan(addresses, versions, settings, FOLDER / "measured.json")


def command(made, path, arguments):
    """Locust's command line; `arguments` say whether this is the master or a worker."""
    file = Path(run.__file__).with_name("locustfile.py")
    users = str(made.users * len(made.transports))
    master = ["--headless", "--users", users, "--spawn-rate", users, "--run-time", f"{int(made.total_s + GRACE_S)}s"]
    ending = ["--only-summary", *(run.USER_CLASSES[transport] for transport in made.transports)]
    both = [sys.executable, "-m", "locust", "--locustfile", str(file), "--plan", str(path)]
    return [*both, *arguments, *(master if "--master" in arguments else []), *ending]


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = plan()
    path = FOLDER / "plan.json"
    path.write_text(made.to_json())
    line = command(made, path, sys.argv[1:])
    os.chdir(FOLDER)
    os.execve(line[0], line, {**os.environ, "LOCUST_SKIP_MONKEY_PATCH": "1"})
