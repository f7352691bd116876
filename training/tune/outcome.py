"""What a study came to: its trials, the Pareto front, the chosen trial, and the configuration that trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tickserve.config import TuneSettings
from tickserve.errors import GateRefusedError
from tickserve.store import write_atomic, write_json_atomic
from training.tune.study import Search

RESULT, BEST = "result.json", "best.toml"


def outcome(study: Any, wanted: Search) -> dict[str, Any]:
    """The study as JSON values; `chosen` is a trial number.

    Raises GateRefusedError when no trial ended with numbers, or none is as fast as `tune.max_p99_us` asks.
    """
    settings = wanted.config.tune
    trials = [_row(trial, settings) for trial in study.get_trials(deepcopy=False)]
    front = sorted(trial.number for trial in study.best_trials)
    return {
        "study": wanted.name,
        "family": wanted.family,
        "objectives": list(settings.objectives),
        "trials": trials,
        "pareto_front": front,
        "chosen": choose([row for row in trials if row["trial"] in front], settings),
        "tried": sum(row["state"] in ("complete", "pruned") for row in trials),
        "folds_seen": wanted.config.validation.folds - 1,
    }


def _row(trial: Any, settings: TuneSettings) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial.number, "state": trial.state.name.lower(), "values": dict(trial.params)}
    row["seconds"] = trial.duration.total_seconds() if trial.duration else None
    return row | {name: trial.user_attrs.get(name) for name in ("ic", "p99_us", "p50_us", "size_bytes")}


def choose(front: list[dict[str, Any]], settings: TuneSettings) -> int:
    """Of the Pareto front the trial with the highest information coefficient that is fast enough."""
    fast = [row for row in front if not settings.max_p99_us or row["p99_us"] <= settings.max_p99_us]
    if not fast:
        was = "no trial that ended" if not front else f"{min(row['p99_us'] for row in front):,.0f} us at best"
        raise GateRefusedError(
            "no trial to choose", field="tune.max_p99_us", expected=f"at most {settings.max_p99_us:g} us", was=was
        )
    return int(max(fast, key=lambda row: (row["ic"], -row["p99_us"], -row["trial"]))["trial"])


def write_outcome(result: dict[str, Any], wanted: Search) -> Path:
    """Write `result.json` and the chosen trial's `best.toml` into the study's folder; gives the latter's path."""
    chosen = next(row for row in result["trials"] if row["trial"] == result["chosen"])
    write_json_atomic(wanted.folder / RESULT, result)
    path = wanted.folder / BEST
    write_atomic(path, toml_of(chosen["values"], wanted, result).encode())
    return path


def toml_of(values: dict[str, Any], wanted: Search, result: dict[str, Any]) -> str:
    """A configuration file that `tickserve train --config` takes: the chosen values, and what the choice cost."""
    lines = [
        f"# Trial {result['chosen']} of study {wanted.name}, chosen from {result['tried']} tried.",
        f'profile = "{wanted.config.profile}"',
        "",
        f"[{wanted.family}]",
        "enabled = true",
    ]
    lines += [f"{key.partition('.')[2]} = {_written(value)}" for key, value in sorted(values.items())]
    # What was tried before this search counts as well; the search's own first trial is not one more.
    lines += ["", "[validation]", f"trials = {max(1, result['tried']) + wanted.config.validation.trials - 1}"]
    others = [family for family in wanted.config.families if family != wanted.family]
    lines += [line for family in others for line in ("", f"[{family}]", "enabled = false")]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
