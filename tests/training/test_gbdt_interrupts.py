"""Ctrl-C while trees are trained: the round under way ends first, and the interrupt is not lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tickserve.config import Config
from training.examples import Examples
from training.gbdt import GbdtJob
from training.gbdt.interrupts import deferred


@pytest.fixture(autouse=True)
def _as_in_a_command() -> Iterator[None]:
    """A test runner's workers ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_and_is_raised_there() -> None:
    reached = []

    def work() -> None:
        with deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append("held back")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["held back"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_is_its_own() -> None:
    def work() -> None:
        with deferred():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work()


def test_whoever_handles_the_signal_goes_on_doing_so() -> None:
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append("theirs"))
    with deferred() as check:
        signal.raise_signal(signal.SIGINT)
        check()
    assert seen == ["theirs"]


def test_training_ends_after_the_round_under_way(examples: Examples, config: Config) -> None:
    rounds: list[int] = []

    def watch(step: int, loss: float) -> None:
        rounds.append(step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            rounds.append(step)  # nothing rises inside a callback of the library

    job = GbdtJob(examples, config.gbdt, 0)
    job.watch = watch
    with pytest.raises(KeyboardInterrupt):
        job.fit(examples.folds[0])
    assert rounds == [1, 2, 2]
