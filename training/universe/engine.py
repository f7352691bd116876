"""Where calls run: what every engine offers the schedule, and which threads a process of it may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from tickserve.config import Config
from training.universe.tasks import Answer, Call

Lane = Literal["prepare", "train"]
Say = Callable[[str], None]
# Read when a process starts: by OpenMP (XGBoost, scikit-learn) and by the linear algebra of numpy and scipy.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Engine(Protocol):
    """Runs calls, each in a lane; at most `lanes[lane]` of a lane at the same time."""

    lanes: dict[Lane, int]

    def start(self, lane: Lane, call: Call) -> None:
        """Start a call; the lane has room."""
        ...

    def busy(self, lane: Lane) -> list[Call]:
        """The calls that are running, the oldest first."""
        ...

    def finished(self, timeout_s: float) -> list[tuple[Lane, Call, Answer]]:
        """Calls that ended since the last look; waits for one, for `timeout_s` at most."""
        ...

    def memory_mb(self) -> float | None:
        """What the run takes of this machine now; None where it runs on other machines too."""
        ...

    def spare(self) -> bool:
        """End processes that are idle, for their memory; whether there was one."""
        ...

    def stop(self, lane: Lane, call: Call) -> None:
        """End a running call without an answer."""
        ...

    def close(self) -> None:
        """End everything."""
        ...


def threads_of(config: Config) -> int:
    """Threads of one training process: what the families ask for, shared out among `universe.workers`."""
    asked = max(getattr(config, family).threads for family in config.families)
    return int(max(1, asked // config.universe.workers))


def thread_environment(threads: int) -> dict[str, str]:
    """The variables that hold a process to so many threads. The same everywhere, so that sums add up alike."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))
