"""How late a thread is woken and how long it is stopped, by clocks that a test turns."""

from __future__ import annotations

import time

import pytest

from tickserve.doctor import jitter

US, MS = 1_000, 1_000_000


class Turned:
    """A clock that takes `tick_ns` to be read; a sleep takes longer by `late`'s next, the last of them for good."""

    def __init__(self, *late_us: int, tick_ns: int = 100) -> None:
        self.now, self.late_us, self.tick_ns = 0, list(late_us), tick_ns
        self.stops: dict[int, int] = {}

    def __call__(self) -> int:
        self.now += self.tick_ns
        for at in [at for at in self.stops if self.now >= at]:
            self.now += self.stops.pop(at)
        return self.now

    def sleep(self, seconds: float) -> None:
        late = self.late_us.pop(0) if len(self.late_us) > 1 else self.late_us[0]
        self.now += int(seconds * 1e9) + late * US


@pytest.mark.parametrize(
    ("late_us", "ok", "found"),
    [
        ((60,), True, "p50 60 us, p99 60 us, most 60 us"),
        ((4_000, 60), True, "most 4,000 us"),  # one late waking is no habit
        ((4_000, 60, 60, 60, 3_000, 2_000, 60), False, "most 4,000 us"),
        ((501,), False, "p99 501 us"),
    ],
)
def test_a_machine_that_wakes_late(late_us: tuple[int, ...], ok: bool, found: str) -> None:
    clock = Turned(*late_us)
    told = jitter.sleeping(clock, clock.sleep)
    assert (told.ok, told.needed) == (ok, False)
    assert found in told.found
    assert "governor" in told.fix
    assert clock.now / 1e9 == pytest.approx(jitter.SLEEPING_S, abs=0.01)


@pytest.mark.parametrize(("stop_ns", "ok", "found"), [(999 * US, True, "999 us"), (4 * MS, False, "4,000 us")])
def test_a_thread_that_is_held_up(stop_ns: int, ok: bool, found: str) -> None:
    clock = Turned(0, tick_ns=US)
    clock.stops = {50 * MS: stop_ns - US, 150 * MS: 10 * US}
    told = jitter.spinning(clock)
    assert (told.ok, told.found) == (ok, f"at most {found}")
    assert "isolated cores" in told.fix


def test_this_machine_is_measured_in_half_a_second() -> None:
    began = time.monotonic()
    sleeping, spinning = jitter.findings()
    assert time.monotonic() - began < 3
    assert {each.ok for each in (sleeping, spinning)} <= {True, False}
    assert not sleeping.found.startswith("p50 0 us")
    assert spinning.found != "at most 0 us"
