"""Figures of a saved result, before and after: of a benchmark, or of a run of `tickserve demo`.

A figure is a number with a path of names, such as `rows.ours HTTP.p50_us`. Whether more of it is better or worse is
read from its unit; a figure without a known one (a count, a ratio) is shown and not judged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tickserve.errors import ArtifactError

FORMAT = "tickserve.benchmark/1"
Better = Literal["lower", "higher"]
# What is said about a run, not measured in it.
NOT_FIGURES = frozenset({"machine", "fingerprint", "versions", "arguments", "seed", "shape"})
HIGHER = re.compile(r"(^|_)(per_s|rps|rate|hit_rate|macro_f1|calls_a_second|signals_counted)$")
LOWER = re.compile(
    r"(^|_)(ns|us|ms|s|seconds|mb|mib|bytes|failed|failures|errors|lost|wrong|stalls)(_by_\w+)?$|^bytes_per_\w+$"
)
PERCENTILES = ("p50_us", "p90_us", "p99_us", "rps", "failures")


@dataclass(frozen=True)
class Result:
    """One saved result: what it is of, its figures by name, and the machine's fingerprint where it was recorded."""

    name: str
    what: str
    figures: Mapping[str, float]
    fingerprint: Mapping[str, Any] | None
    arguments: Sequence[str] = ()


@dataclass(frozen=True)
class Change:
    """A figure on both sides. `ratio` is after / before, None where before is 0; `worse` is by more than the bound."""

    name: str
    before: float
    after: float
    ratio: float | None
    better: Better | None
    worse: bool

    def to_json(self) -> dict[str, Any]:
        """The change as a JSON object."""
        return asdict(self)


def load_result(path: Path) -> Result:
    """A file that `tickserve bench` saved, or the folder of a run of `tickserve demo`.

    Raises ArtifactError naming the file when it is neither, cannot be read, or holds no figure.
    """
    result = _demo(path) if path.is_dir() else _benchmark(path)
    if not result.figures:
        raise ArtifactError("no figure in it", field=path.name)
    return result


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        hint = "a file that 'tickserve bench NAME' saved, or the folder of a run of 'tickserve demo'"
        raise ArtifactError(f"cannot be read: {error.strerror}", field=path.name, hint=hint) from error
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON, or too deep
        raise ArtifactError(f"not JSON: {str(error)[:100]}", field=path.name) from error


def _benchmark(path: Path) -> Result:
    saved = _read(path)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        was = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise ArtifactError("not a saved benchmark", field=path.name, expected=FORMAT, was=str(was)[:80])
    arguments, fingerprint = saved.get("arguments", []), saved.get("fingerprint")
    if not isinstance(saved.get("benchmark"), str) or not isinstance(arguments, list):
        raise ArtifactError("a saved benchmark without its name or arguments", field=path.name)
    figures = dict(_figures(saved.get("result"), ""))
    return Result(
        path.name, saved["benchmark"], figures, _object_or_none(fingerprint), [str(each) for each in arguments]
    )


def _object_or_none(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, dict) else None


def _demo(folder: Path) -> Result:
    run = _read(folder / "run.json")
    if not isinstance(run, dict) or run.get("status") != "done":
        was = run.get("status") if isinstance(run, dict) else type(run).__name__
        raise ArtifactError("not a finished run", field=folder.name, expected="status 'done'", was=str(was)[:80])
    parts: dict[str, Any] = {name: run.get(name) for name in ("total_s", "peak_memory_mb")}
    for name in ("stages", "loadtest", "train", "features"):
        if (folder / f"{name}.json").is_file():
            parts[name] = _read(folder / f"{name}.json")
    try:
        figures = dict(_figures(_of_demo(parts), ""))
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError("a file of the run is not what its stage writes", field=folder.name) from error
    return Result(folder.name, "demo", figures, _object_or_none(run.get("fingerprint")))


def _of_demo(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's files are figures of the code, and not of the data."""
    stages = [
        {name: stage.get(name) for name in ("stage", "seconds", "peak_memory_mb", "rate")}
        for stage in parts.get("stages", [])
    ]
    if parts.get("features", {}).get("reused"):  # finding features is not the work that building them is
        for stage in stages:
            stage["stage"] += " reused" if stage["stage"] == "features" else ""
    served = [
        {name: row[name] for name in ("model", "transport", *PERCENTILES)}
        for row in parts.get("loadtest", {}).get("rows", [])
    ]
    trained = [
        {name: report.get(name) for name in ("model", "seconds", "rows_per_s")}
        | {name: report["pooled"]["model"][name] for name in ("hit_rate", "macro_f1")}
        for report in parts.get("train", [])
        if "pooled" in report
    ]
    run = {name: parts[name] for name in ("total_s", "peak_memory_mb")}
    return {"run": run, "stages": stages, "loadtest": served, "train": trained}


def _figures(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every finite number below `value`, by its path; lists of anything but objects are no figures."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name not in NOT_FIGURES:
                yield from _figures(each, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        for label, each in zip(_labels(value), value, strict=True):
            yield from _figures(each, f"{path}.{label}" if path else label)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield path, float(value)


def _labels(rows: list[dict[str, Any]]) -> list[str]:
    """What tells the rows of a table apart: their texts, then as many of their whole numbers as it takes."""
    parts = [[str(value) for value in row.values() if isinstance(value, str)] for row in rows]
    for name in rows[0]:
        if len({" ".join(each) for each in parts}) == len(rows):
            break
        if all(type(row.get(name)) is int for row in rows):
            for row, each in zip(rows, parts, strict=True):
                each.append(f"{name}={row[name]}")
    labels = [" ".join(each) for each in parts]
    return labels if len(set(labels)) == len(rows) and all(labels) else [str(index) for index in range(len(rows))]


def better(name: str) -> Better | None:
    """Which way a figure is better, by the unit nearest to the end of its path; None where none is known."""
    for part in reversed(name.split(".")):
        if HIGHER.search(part):
            return "higher"
        if LOWER.search(part):
            return "lower"
    return None


def compare(before: Result, after: Result, bound: float) -> list[Change]:
    """Every figure that both have, in the order of `before`. Raises ArtifactError when they are not of one kind."""
    if before.what != after.what:
        raise ArtifactError(
            "results of different benchmarks", field=after.name, expected=before.what, was=after.what[:80]
        )
    common = [name for name in before.figures if name in after.figures]
    if not common:
        raise ArtifactError("no figure is in both results", field=after.name)
    return [_change(name, before.figures[name], after.figures[name], bound) for name in common]


def _change(name: str, before: float, after: float, bound: float) -> Change:
    way = better(name)
    worse_now, was = (before, after) if way == "higher" else (after, before)
    worse = way is not None and worse_now > bound * was and worse_now > was
    return Change(name, before, after, after / before if before else None, way, worse)


def same_machine(before: Result, after: Result) -> bool | None:
    """Whether both were measured on machines of one fingerprint; None where one has none."""
    if before.fingerprint is None or after.fingerprint is None:
        return None
    return before.fingerprint == after.fingerprint
