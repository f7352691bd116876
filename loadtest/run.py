"""Load the served models for a few seconds with Locust, and keep what was measured.

Locust runs in a process of its own, so that gevent never enters this one. It ends by itself, is bounded in time, and is
stopped with this process. Every answer is checked; a wrong one is a failure. Results: `loadtest.json`, `latency.svg`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadtest.plan import GRACE_S, Plan, Transport, make_plan
from loadtest.plot import draw_latency
from tickserve.child import end
from tickserve.config import LoadtestSettings
from tickserve.errors import ComponentError, MissingExtraError
from tickserve.store import check_writable, write_atomic, write_json_atomic

RESULTS_NAME, PLOT_NAME, LOG_NAME = "loadtest.json", "latency.svg", "locust.log"
STOP_S = 5.0
USER_CLASSES: dict[Transport, str] = {"http": "HttpUser", "grpc": "GrpcUser"}
# Requests in flight, as a share of the users, below which a latency may hide time spent waiting elsewhere.
LEAST_IN_FLIGHT = 0.8


def run_load(
    http_url: str, grpc_url: str, version_dirs: Mapping[str, Path], settings: LoadtestSettings, out: Path
) -> dict[str, Any]:
    """Load each model of `version_dirs` (model to repository version folder) over each transport of `settings`.

    The time rule is in `loadtest/plan.py`. Returns what `out/loadtest.json` holds: `rows`, one per transport and
    model, with requests, failures, requests per second, percentiles in microseconds and the histogram; `in_flight` is
    rate times mean latency (Little's law), close to the number of users where no waiting is hidden.

    Raises ComponentError when the server is not there or goes away (after the results are written), or when Locust
    fails or sends nothing in a phase; MissingExtraError without the `loadtest` extra; UsageError without a model.
    """
    if find_spec("locust") is None:
        raise MissingExtraError.of("locust", "loadtest")
    check_writable(out)
    with tempfile.TemporaryDirectory(prefix="tickserve-loadtest-") as scratch:
        measured_path = Path(scratch) / "measured.json"
        plan = make_plan({"http": http_url, "grpc": grpc_url}, version_dirs, settings, measured_path)
        plan_path = Path(scratch) / "plan.json"
        plan_path.write_text(plan.to_json())
        began = time.monotonic()
        _run_locust(plan, plan_path, out / LOG_NAME)
        took_s = time.monotonic() - began
        measured = _read_measured(measured_path, out / LOG_NAME)
    results = _results(plan, settings, measured, took_s)
    write_json_atomic(out / RESULTS_NAME, results)
    write_atomic(out / PLOT_NAME, draw_latency(results["rows"], settings.users))
    _require_served(results, plan)
    return results


def _command(plan: Plan, plan_path: Path) -> list[str]:
    users = plan.users * len(plan.transports)
    return [
        *(sys.executable, "-m", "locust", "--locustfile", str(Path(__file__).with_name("locustfile.py"))),
        *("--headless", "--plan", str(plan_path), "--users", str(users), "--spawn-rate", str(users)),
        *("--run-time", f"{int(plan.limit_s)}s", "--exit-code-on-error", "0", "--only-summary"),
        *(USER_CLASSES[transport] for transport in plan.transports),
    ]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    return {**kept, "LOCUST_SKIP_MONKEY_PATCH": "1"}


def _run_locust(plan: Plan, plan_path: Path, log_path: Path) -> None:
    """Start Locust, wait for it no longer than the plan needs, and stop it whatever happens here."""
    with log_path.open("wb") as log:
        # Its working folder is the scratch folder: a locust.conf of the user's must not change the test.
        process = subprocess.Popen(
            _command(plan, plan_path), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            env=_environment(), cwd=plan_path.parent,
        )  # fmt: skip
        try:
            code = process.wait(plan.limit_s + GRACE_S)
        except subprocess.TimeoutExpired as error:
            raise ComponentError("the load test did not end in time", hint=f"see {LOG_NAME}") from error
        finally:
            end(process, STOP_S)
    if code != 0:
        raise ComponentError(f"Locust ended with exit code {code}: {_last_line(log_path)}", hint=f"see {LOG_NAME}")


def _last_line(log_path: Path) -> str:
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _read_measured(path: Path, log_path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ComponentError(f"Locust left no results: {_last_line(log_path)}", hint=f"see {LOG_NAME}")
    measured: dict[str, Any] = json.loads(path.read_bytes())
    if not measured["complete"]:
        raise ComponentError("the load test was stopped before its end", hint=f"see {LOG_NAME}")
    return measured


def _results(plan: Plan, settings: LoadtestSettings, measured: dict[str, Any], took_s: float) -> dict[str, Any]:
    return {
        "users": settings.users,
        "duration_s": settings.duration_s,
        "took_s": round(took_s, 2),
        "phase_s": round(plan.phase_s, 3),
        "warmup_s": round(plan.warmup_s, 3),
        "deadline_ms": plan.deadline_ms,
        "rule": f"{len(plan.phases)} phases of {plan.phase_s:.2f} s, one after the other; the first "
        f"{plan.warmup_s * 1e3:.0f} ms of each are not measured; closed loop: each of {plan.users} users sends its "
        "next request, one real row, when the last is answered and checked",
        "rows": [_with_rates(row, plan) for row in measured["rows"]],
    }


def _with_rates(row: dict[str, Any], plan: Plan) -> dict[str, Any]:
    window_s = plan.phase_s - plan.warmup_s
    rate = row["measured"] / window_s
    in_flight = rate * (row["mean_us"] or 0.0) / 1e6
    return {
        **{key: row[key] for key in ("transport", "model", "requests", "measured", "failures")},
        "rps": round(rate, 1),
        "in_flight": round(in_flight, 2),
        "queueing_visible": in_flight >= LEAST_IN_FLIGHT * plan.users,
        **row,
    }


def _require_served(results: dict[str, Any], plan: Plan) -> None:
    for row in results["rows"]:
        if row["gave_up"] or not row["measured"]:
            errors = row["errors"]
            first = max(errors, key=errors.__getitem__) if errors else "no request was answered"
            raise ComponentError(
                f"{row['model']} over {row['transport']}: {row['failures']} of {row['requests']} requests failed, "
                f"mostly {first}",
                hint="is the server up?",
            )
    asked = {(row["transport"], row["model"]) for row in results["rows"]}
    for phase in plan.phases:
        if (phase.transport, phase.model) not in asked:
            raise ComponentError(
                f"{phase.model} over {phase.transport}: no request was sent in its {plan.phase_s:.2f} s",
                hint=f"the machine or the server took longer for what came before; see {LOG_NAME}, and use a longer "
                "loadtest.duration_s",
            )
