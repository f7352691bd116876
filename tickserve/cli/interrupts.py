"""How a command ends that is told to: one line, and 128 and the signal's number as its exit code.

In force before anything else is imported, which takes most of a second: so this imports next to nothing itself.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

Handler = Callable[[int, FrameType | None], object]
LINE = b"interrupted\n"
_codes: list[int] = []  # with which the process ends, once it was told to


class Terminated(SystemExit):
    """SIGTERM came: the command is left through its `finally` blocks, as with KeyboardInterrupt."""


def at_once() -> None:
    """From now on a signal ends the process where it stands, for nothing is started or staged yet."""
    _handle(_end, _end)
    atexit.register(_keep_code)  # before all others, so it runs after them


def in_order() -> None:
    """From now on a signal leaves through the `finally` blocks: what was started is stopped, what was staged goes."""
    _handle(signal.default_int_handler, _terminate)


def behind(error: BaseException) -> int | None:
    """The number of the signal that ended the command with `error`; None where it was none.

    Typer makes an exit code of KeyboardInterrupt, and a library that was interrupted may raise an error of its own.
    """
    if isinstance(error, SystemExit) and error.code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt | Terminated):
            return int(signal.SIGTERM if isinstance(cause, Terminated) else signal.SIGINT)
        cause = cause.__cause__ or cause.__context__
    return None


def leave(number: int) -> NoReturn:
    """End the command that a signal has left: all is stopped and removed. One more signal ends it where it stands."""
    _handle(_end_quietly, _end_quietly)
    _tell()
    _codes.append(128 + number)
    sys.exit(128 + number)


def _handle(interrupt: Handler, terminate: Handler) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)


def _tell() -> None:
    with suppress(OSError):  # nobody listens
        os.write(2, LINE)


def _keep_code() -> None:
    """Python dies of SIGINT, whatever its exit code, once KeyboardInterrupt has passed through the `exec` of a text."""
    if _codes:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(_codes[0])


def _end(number: int, _: FrameType | None) -> None:
    _tell()
    os._exit(128 + number)


def _end_quietly(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def _terminate(number: int, _: FrameType | None) -> None:
    raise Terminated(128 + number)
