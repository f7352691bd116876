"""The `tickserve` command.

Exit codes: 0 done, 1 a gate or SLO refused, 2 bad usage or configuration, 3 bad input data, 4 a component is missing
or unreachable, 130 interrupted (Ctrl-C), 143 told to end (SIGTERM).
"""

# Next to nothing is imported here: until `main` runs, Ctrl-C ends in a traceback.
from __future__ import annotations

import sys

from tickserve.cli import interrupts


def main() -> None:
    """Run the command; a typed error becomes one line on standard error and its exit code, and so does an interrupt."""
    interrupts.at_once()
    from tickserve.cli.commands import app
    from tickserve.cli.output import fail
    from tickserve.errors import TickserveError

    try:
        interrupts.in_order()
        app()
    except BaseException as error:
        number = interrupts.behind(error)
        if number is not None:
            interrupts.leave(number)
        if isinstance(error, TickserveError):
            sys.exit(fail(error))
        raise
