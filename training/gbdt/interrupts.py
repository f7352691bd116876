"""Ctrl-C while XGBoost works: the round under way is finished first.

Rows reach XGBoost through callbacks that its own code makes; an exception that rises inside one leaves its memory in a
state that ends the process.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Check = Callable[[], None]


@contextmanager
def deferred() -> Iterator[Check]:
    """Hold back SIGINT; what is given raises KeyboardInterrupt if one came, and so does the end of the block.

    Nothing is held back outside the main thread, or where somebody else handles the signal.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    came = threading.Event()

    def check() -> None:
        if came.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    check()


def between_rounds(check: Check) -> Any:
    """XGBoost's callback that asks after every round, where its own code is not running."""
    from xgboost.callback import TrainingCallback

    class Asking(TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            check()
            return False

    return Asking()
