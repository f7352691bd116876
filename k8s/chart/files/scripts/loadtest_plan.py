"""Write the plan of the load test, and become Locust: MODELS against HOST, with the arguments that follow the script.

Master and workers make the same plan from the same environment, so nothing has to be handed around.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from loadtest import run
from loadtest.plan import Plan, make_plan
from tickserve import pipeline
from tickserve.config import LoadtestSettings

FOLDER = Path(os.environ.get("PLAN_FOLDER", "/tmp"))  # noqa: S108 - the pod's own volume


def plan() -> Plan:
    """The plan of this release: every model over HTTP and gRPC."""
    repository, host = Path(os.environ.get("REPOSITORY", "/models")), os.environ["HOST"]
    versions = {name: pipeline.newest_version(repository, name) for name in os.environ["MODELS"].split()}
    users, seconds = int(os.environ["USERS"]), float(os.environ["DURATION_S"])
    settings = LoadtestSettings(users=users, duration_s=seconds)
    http, grpc = os.environ.get("HTTP_PORT", "8000"), os.environ.get("GRPC_PORT", "8001")
    addresses = {"http": f"{host}:{http}", "grpc": f"{host}:{grpc}"}
    return make_plan(addresses, versions, settings, FOLDER / "measured.json")


def arguments_of(made: Plan, path: Path, arguments: list[str]) -> list[str]:
    """Locust's arguments; those given say whether this is the master or a worker."""
    users = str(made.users * len(made.transports))
    master = ["--headless", "--users", users, "--spawn-rate", users, "--run-time", f"{int(made.limit_s)}s"]
    ending = ["--only-summary", *(run.USER_CLASSES[transport] for transport in made.transports)]
    file = Path(run.__file__).with_name("locustfile.py")
    chosen = [*arguments, *(master if "--master" in arguments else [])]
    return ["--locustfile", str(file), "--plan", str(path), *chosen, *ending]


def main(arguments: list[str]) -> None:
    """Write the plan and run Locust on it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    made, path = plan(), FOLDER / "plan.json"
    path.write_text(made.to_json())
    os.chdir(FOLDER)
    # A worker's users are threads, so its standard library is left as it is. A master that waits for its workers with
    # the plain time.sleep would never hear of them.
    os.environ["LOCUST_SKIP_MONKEY_PATCH"] = "1"
    if "--master" in arguments:
        from gevent import monkey

        monkey.patch_all()
    from locust.main import main as locust

    sys.argv = ["locust", *arguments_of(made, path, arguments)]
    locust()


if __name__ == "__main__":
    main(sys.argv[1:])
