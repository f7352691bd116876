"""Train the symbol of this pod: the JOB_COMPLETION_INDEX-th of SYMBOLS, with the arguments that follow the script.

Replaces itself by the command, so that signals and the exit code are the command's own.
"""

from __future__ import annotations

import os
import sys


def command(symbols: list[str], index: int, arguments: list[str]) -> list[str]:
    """The command line for one symbol."""
    symbol = symbols[index]
    return [
        sys.executable,
        "-m",
        "tickserve.cli",
        "train",
        "--symbol",
        symbol,
        "--out",
        f"bundles/{symbol}",
        *arguments,
    ]


if __name__ == "__main__":
    line = command(os.environ["SYMBOLS"].split(), int(os.environ["JOB_COMPLETION_INDEX"]), sys.argv[1:])
    os.execv(line[0], line)  # noqa: S606 - the command itself, without a shell
