"""`tickserve profile`: any other `tickserve` command under a profiler; where its result is, and what opens it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve.child import run_child
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.errors import ComponentError, UsageError
from tickserve.profiling import tools
from tickserve.profiling.inside import EXIT_CODE
from tickserve.profiling.tools import FORMATS, RATE, SEEN, SPY_LOG, TOOLS, Asked
from tickserve.store import check_writable, write_json_atomic

TOP = 25
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def profile(
    command: Annotated[list[str] | None, typer.Argument(help="-- and the tickserve command with its options.")] = None,
    tool: Annotated[str, typer.Option("--tool", help=", ".join(TOOLS))] = "cprofile",
    file_format: Annotated[
        str | None, typer.Option("--format", help="Of py-spy: speedscope (the default) or flamegraph, an SVG.")
    ] = None,
    rate: Annotated[int | None, typer.Option("--rate", min=1, max=10_000, help="Of py-spy: samples a second.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="The profile goes into a folder below it.")] = Path(
        "runs/profile"
    ),
    as_json: options.AsJson = False,
) -> None:
    """Profile a tickserve command, e.g. `tickserve profile --tool py-spy -- train --data FILE`.

    Exits as the command does. With --json the command's own output goes to standard error.
    """
    asked = _asked(command or [], tool, file_format, rate)
    tools.check(asked)
    place = _folder(folder, asked.tool)
    says(f"{asked.tool}: {SEEN[asked.tool]}")
    started = time.perf_counter()
    code = _run(asked, place, as_json)
    if code in INTERRUPTED and not asked.result(place).is_file():
        raise typer.Exit(code)  # before there was anything to profile
    result = {
        "id": place.name,
        "tool": asked.tool,
        "command": ["tickserve", *asked.command],
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 3),
        "folder": str(place),
        "files": [file.to_json() for file in tools.files(asked, place)],
        "top": tools.top(asked, place, TOP),
    }
    write_json_atomic(place / "profile.json", result)
    emit(result, as_json, lambda: _show(result))
    if code:
        raise typer.Exit(code)


def _asked(command: list[str], tool: str, file_format: str | None, rate: int | None) -> Asked:
    chosen = next((name for name in TOOLS if name == tool), None)
    if chosen is None:
        raise UsageError("unknown tool", field="--tool", expected=", ".join(TOOLS), was=tool[:40])
    for option, value in (("--format", file_format), ("--rate", rate)):
        if value is not None and chosen != "py-spy":
            raise UsageError("has no effect", field=option, expected="--tool py-spy", was=chosen)
    form = next((name for name in FORMATS if name == (file_format or FORMATS[0])), None)
    if form is None:
        raise UsageError("unknown format", field="--format", expected=" or ".join(FORMATS), was=str(file_format)[:40])
    return Asked(chosen, command, form, rate or RATE)


def _folder(parent: Path, tool: str) -> Path:
    check_writable(parent)
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{tool}"
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        with suppress(FileExistsError):
            (parent / (name + suffix)).mkdir()
            return parent / (name + suffix)
    raise ComponentError("too many profiles in one second", field="--out")


def _run(asked: Asked, place: Path, as_json: bool) -> int:
    """Run it; returns the command's exit code, which it left in a file, or the profiler's where it could not."""
    output = 2 if as_json else 1
    sys.stdout.flush()
    with _descriptors(output) as descriptors:
        if asked.tool == "py-spy":  # it writes into the same streams as the command: its own lines go into a file
            line = tools.command_line(asked, place, descriptors)
            with (place / SPY_LOG).open("w") as log:
                ended = run_child(line, stdout=log, stderr=log, pass_fds=descriptors)
        else:
            ended = run_child(tools.command_line(asked, place), stdout=descriptors[0])
    said = place / EXIT_CODE
    if not said.is_file():
        return ended.exit_code
    code = int(said.read_text())
    said.unlink()
    return code


@contextmanager
def _descriptors(output: int) -> Iterator[tuple[int, int]]:
    """Copies of this process's output and errors that a child of a child may keep."""
    copies = os.dup(output), os.dup(2)
    try:
        yield copies
    finally:
        for each in copies:
            os.close(each)


def _show(result: dict[str, Any]) -> None:
    rows = result["top"]
    if rows:
        names = list(rows[0])
        shown = [["" if row[name] is None else row[name] for name in names] for row in rows]
        table("most time of their own", [name.replace("_", " ") for name in names], shown)
    elif result["tool"] == "torch":
        out.print("no PyTorch operator ran in this command")
    out.print(f"{result['seconds']:.1f} s under {result['tool']}, exit code {result['exit_code']}")
    for file in result["files"]:
        out.print(f"{file['what']}: {file['path']}", markup=False)
        out.print(f"  open with: {file['open_with']}", markup=False)
