"""`tickserve bench`: run one of the project's benchmarks and keep its figures, or compare two results kept before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import __version__, stages
from tickserve.child import run_child
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.errors import ComponentError, GateRefusedError, StageMissingError, UsageError
from tickserve.figures import FORMAT, Change, Result, compare, load_result, same_machine
from tickserve.machine import fingerprint
from tickserve.store import check_writable, write_json_atomic

MARKED_ABOVE = 1.10
FOLDER = Path("runs/bench")


def bench(
    name: Annotated[str | None, typer.Argument(help="A benchmark; without one they are listed.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="What follows the name is the benchmark's.")] = None,
    compared: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Two saved results, or two runs/<id> of demo: before and after."),
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option("--fail-above", min=1.0, help="With --compare: exit 1 when a figure is worse by this factor."),
    ] = None,
    save_to: Annotated[
        Path | None, typer.Option("--out", help=f"File of the result; below {FOLDER} by default.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Run a benchmark and save its figures, or compare two saved results.

    Options of this command come before the benchmark's name: what follows the name is passed on.
    """
    if compared is not None:
        if name is not None or save_to is not None:
            raise UsageError("compares results that are there", field="--compare", expected="no NAME and no --out")
        return _compare(compared, fail_above, as_json)
    if fail_above is not None:
        raise UsageError("goes with --compare", field="--fail-above")
    if name is None:
        return _list(as_json)
    return _run(name, arguments or [], save_to, as_json)


def _folder() -> Path:
    folder = stages.checkout_root() / "benchmarks"
    if not (folder / "__init__.py").is_file():
        raise StageMissingError("benchmarks are not beside the tickserve package", hint="run it from a checkout")
    return folder


def benchmarks() -> dict[str, str]:
    """The benchmarks that give figures, and the first line about each. Raises StageMissingError outside a checkout."""
    found = {}
    for path in sorted(_folder().glob("*.py")):
        text = path.read_text()
        if "__main__" in text and ('"--json"' in text or "= options(" in text):
            found[path.stem] = text.lstrip('"').splitlines()[0]
    return found


def _list(as_json: bool) -> None:
    rows = list(benchmarks().items())
    emit(dict(rows), as_json, lambda: table("benchmarks", ("name", "what it measures"), rows))


def _run(name: str, arguments: list[str], save_to: Path | None, as_json: bool) -> None:
    known = benchmarks()
    if name not in known:
        raise UsageError("unknown benchmark", field="NAME", expected=f"one of {', '.join(known)}", was=name[:40])
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    found = [str(stages.checkout_root()), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))}
    if {"-h", "--help"} & set(arguments):
        raise typer.Exit(run_child(command, environment=environment).exit_code)
    began = datetime.now(UTC)
    path = save_to or FOLDER / f"{began:%Y%m%dT%H%M%SZ}-{name}.json"
    check_writable(path.parent)
    says(f"running benchmarks.{name}; its figures go to {path}")
    own = [] if "--json" in arguments else ["--json"]
    ended = run_child([*command, *own], environment=environment, stdout=subprocess.PIPE)
    saved = {
        "format": FORMAT,
        "benchmark": name,
        "arguments": arguments,
        "created": began.isoformat(timespec="seconds"),
        "fingerprint": fingerprint(),
        "versions": {"tickserve": __version__, "numpy": version("numpy")},
        "exit_code": ended.exit_code,
        "result": _answered(name, ended.output, ended.exit_code),
    }
    write_json_atomic(path, saved)
    emit({"path": str(path), **saved}, as_json, lambda: _show(path))
    if ended.exit_code:
        raise typer.Exit(ended.exit_code)


def _answered(name: str, output: str, code: int) -> Any:
    """The figures a benchmark printed. Ends the command as the benchmark ended where it printed none."""
    try:
        return json.loads(output)
    except (ValueError, RecursionError) as error:
        if code:
            raise typer.Exit(code) from error  # it has said why on standard error
        raise ComponentError("the benchmark printed no JSON", field=name) from error


def _show(path: Path) -> None:
    figures = load_result(path).figures
    table(path.stem, ("figure", "value"), [(name, _number(value)) for name, value in figures.items()])
    out.print(f"saved: {path}", markup=False)
    out.print(f"next: tickserve bench --compare {path} ANOTHER", markup=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1_000 else f"{value:.4g}"


def _compare(paths: tuple[Path, Path], fail_above: float | None, as_json: bool) -> None:
    before, after = (load_result(path) for path in paths)
    bound = fail_above or MARKED_ABOVE
    changes = compare(before, after, bound)
    emit(_told(before, after, changes, bound), as_json, lambda: _show_changes(before, after, changes, bound))
    worse = [change for change in changes if change.worse]
    if fail_above is not None and worse:
        first = max(worse, key=_factor)
        raise GateRefusedError(
            f"{len(worse)} of {len(changes)} figures are worse",
            field=first.name,
            expected=f"at most {fail_above:g} times worse",
            was=f"{_number(first.before)} before, {_number(first.after)} after",
        )


def _factor(change: Change) -> float:
    """How many times worse a figure became."""
    low, high = sorted((abs(change.before), abs(change.after)))
    return high / low if low else float("inf")


def _told(before: Result, after: Result, changes: list[Change], bound: float) -> dict[str, Any]:
    return {
        "benchmark": before.what,
        "before": before.name,
        "after": after.name,
        "same_machine": same_machine(before, after),
        "machines": [before.fingerprint, after.fingerprint],
        "same_arguments": list(before.arguments) == list(after.arguments),
        "bound": bound,
        "figures": [change.to_json() for change in changes],
        "worse": [change.name for change in changes if change.worse],
        "only_before": sorted(set(before.figures) - set(after.figures)),
        "only_after": sorted(set(after.figures) - set(before.figures)),
    }


def _show_changes(before: Result, after: Result, changes: list[Change], bound: float) -> None:
    rows = [
        (
            change.name,
            _number(change.before),
            _number(change.after),
            "" if change.ratio is None else f"{change.ratio:.3f}",
            change.better or "",
            "WORSE" if change.worse else "",
        )
        for change in changes
    ]
    columns = ("figure", "before", "after", "after/before", "better", f"by over {bound:g}")
    table(f"{before.what}: {before.name}, then {after.name}", columns, rows)
    for line in _remarks(before, after):
        out.print(line, markup=False)


def _remarks(before: Result, after: Result) -> list[str]:
    lines = []
    same = same_machine(before, after)
    if same is None:
        lines.append("MACHINE UNKNOWN: at least one result does not say where it was measured.")
    elif not same:
        lines.append(f"DIFFERENT MACHINES: {_machine(before)}; then {_machine(after)}. The ratios are not the code's.")
    if list(before.arguments) != list(after.arguments):
        lines.append(f"DIFFERENT ARGUMENTS: {' '.join(before.arguments)!r}, then {' '.join(after.arguments)!r}.")
    alone = len(set(before.figures) ^ set(after.figures))
    return [*lines, f"{alone} figures are in one of them only."] if alone else lines


def _machine(result: Result) -> str:
    known = result.fingerprint or {}
    gpus = known.get("gpus") or ["no GPU"]
    return f"{known.get('cpu')}, {known.get('cores')} cores, {known.get('memory_gb')} GB, {', '.join(map(str, gpus))}"
