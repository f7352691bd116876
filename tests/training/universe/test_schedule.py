"""The order of work, driven with an engine that answers at once: ahead by one, inside the memory limit."""

from __future__ import annotations

from typing import Any

from training.universe.engine import Lane
from training.universe.schedule import Item, Schedule
from training.universe.tasks import Answer, Call


def nothing(*_: Any) -> dict[str, Any]:
    return {}


def item(name: str, need_mb: float = 10.0) -> Item:
    return Item(Call(name, nothing, ()), need_mb)


class Engine:
    """Ends one call a look, the oldest first; each running call takes `takes[name]` MB."""

    def __init__(self, takes: dict[str, float] | None = None) -> None:
        self.lanes: dict[Lane, int] = {"prepare": 1, "train": 1}
        self.takes, self.running, self.log = takes or {}, [], []
        self.pauses = 0

    def start(self, lane: Lane, call: Call) -> None:
        self.running.append((lane, call))
        self.log.append(f"{lane} {call.subject}")

    def finished(self, timeout_s: float) -> list[tuple[Lane, Call, Answer]]:
        # A training takes longer than a preparation.
        if len(self.running) > 1 and self.pauses:
            self.pauses -= 1
            return []
        order = sorted(self.running, key=lambda at: at[0])
        done = order[:1]
        for at in done:
            self.running.remove(at)
            self.log.append(f"{at[0]} {at[1].subject} done")
        return [(lane, call, Answer(0.1)) for lane, call in done]

    def memory_mb(self) -> float:
        return 100.0 + sum(self.takes.get(f"{lane} {call.subject}", 0.0) for lane, call in self.running)

    def spare(self) -> bool:
        return False

    def stop(self, lane: Lane, call: Call) -> None:
        self.running.remove((lane, call))
        self.log.append(f"{lane} {call.subject} stopped")

    def busy(self, lane: Lane) -> list[Call]:
        return [call for at, call in self.running if at == lane]

    def close(self) -> None: ...


def run(engine: Engine, ahead: int = 1, limit: float = 0, need: float = 10.0) -> tuple[list[Any], Schedule]:
    ends: list[Any] = []
    schedule = Schedule(
        engine,
        ahead=ahead,
        limit_mb=limit,
        prepared=lambda call, _: item(call.subject, need),
        ended=lambda lane, call, answer: ends.append((lane, call.subject, answer.error)),
    )
    schedule.run(prepare=[item(name) for name in "abc"])
    return ends, schedule


def test_one_symbol_is_prepared_while_another_trains_and_no_more() -> None:
    engine = Engine()
    run(engine)
    at = engine.log.index
    assert at("prepare b") < at("train a done")
    assert at("prepare c") > at("train a done")


def test_without_ahead_nothing_is_prepared_meanwhile() -> None:
    engine = Engine()
    run(engine, ahead=0)
    at = engine.log.index
    assert at("prepare b") > at("train a done")
    assert at("prepare c") > at("train b done")


def test_what_would_not_fit_beside_others_waits() -> None:
    engine = Engine({"train a": 80, "train b": 80, "train c": 80})
    ends, schedule = run(engine, limit=185, need=80)
    assert all(error is None for *_, error in ends)
    assert schedule.log.peak_memory_mb <= 185
    assert schedule.log.waited_for_memory
    assert engine.log.index("prepare b") > engine.log.index("train a done")


def test_what_would_not_fit_alone_is_refused_and_the_others_go_on() -> None:
    engine = Engine()
    ends, _ = run(engine, limit=150, need=60)
    errors = [error for lane, _, error in ends if lane == "train"]
    assert len(errors) == 3
    assert {error["field"] for error in errors} == {"universe.memory_mb"}
    assert "was about 160 MB" in errors[0]["message"]
    assert "train a" not in engine.log


def test_an_estimate_too_low_ends_the_youngest_which_is_tried_again_alone() -> None:
    engine = Engine({"train a": 60, "prepare b": 60})
    engine.pauses = 1
    ends, schedule = run(engine, limit=200)
    assert schedule.log.ended_for_memory == 1
    assert "prepare b stopped" in engine.log
    assert all(error is None for *_, error in ends)
    assert len([end for end in ends if end[0] == "train"]) == 3
