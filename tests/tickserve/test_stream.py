"""The stream over a scripted client: when it asks, what it asks, when it starts anew, and how it is carried over."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from tickserve.errors import (
    ArtifactError,
    DeadlineExceededError,
    DigestMismatchError,
    InputRejectedError,
    SchemaError,
    TransportError,
    UsageError,
)
from tickserve.features.spec import Feature, FeatureSpec, default_bars_spec, default_book_spec
from tickserve.manifest import Manifest
from tickserve.stream import AsyncStream, Step, Stream
from tickserve.stream._definition import history_ns
from tickserve.stream._inputs import MAX_PENDING
from tickserve.stream._snapshot import MAGIC
from tickserve.testing import FLAT_ANSWER, UP_ANSWER, Answer, Entry, MockClient, make_manifest, mock_client

MODEL, WARMUP, MS = "mock-model", 4, 10**6
FULL = default_book_spec(1)
# Without features in time: a session of any age is old enough for them, and no signal is flagged for it.
TIMELESS = tuple(each for each in FULL.features if not any(name.endswith("_s") for name, _ in each.params))
SPEC = FeatureSpec("short", "book", 1, TIMELESS, 1_000 * MS, WARMUP)
START = 1_700_000_000 * 10**9
PATIENT_MS = 20_000  # where a test is not about time


def row(step: int) -> np.ndarray:
    price = 100 + 0.01 * (step % 17)
    return np.array([0, 0, 0, 0, price, 1 + step % 3, price + 0.02, 2])


def manifest(**options: Any) -> Manifest:
    return make_manifest(spec=SPEC, **options)


def stateful(**options: Any) -> Manifest:
    return manifest(state=(1, 2), **options)


def stream(made: Manifest, *script: Entry, then: Entry = FLAT_ANSWER, **options: Any) -> tuple[Stream, MockClient]:
    client = mock_client(made, script, then=then, **options)
    return Stream(client, MODEL, deadline_ms=PATIENT_MS), client


def feed(target: Stream, steps: range, *, gap_ms: int = 1) -> list[Step]:
    return [target.feed(START + step * gap_ms * MS, row(step)) for step in steps]


def hidden(client: MockClient, request: int = -1) -> float:
    return float(client.transport.inputs(request)["hidden"].flat[0])


def test_a_warm_up_gives_no_signal_and_says_why() -> None:
    target, client = stream(manifest())
    steps = feed(target, range(WARMUP + 2))
    assert [step.signal is None for step in steps] == [True] * WARMUP + [False] * 2
    assert steps[1].reason == "warming up: 2 of 4 events of the session"
    assert steps[-1].reason == ""
    assert steps[0].features is not None
    np.testing.assert_array_equal(client.transport.inputs()["features"][0], steps[-1].features)


def test_signals_come_at_the_pace_of_training() -> None:
    target, client = stream(manifest(stride=3))
    steps = feed(target, range(WARMUP + 9))
    assert [place for place, step in enumerate(steps) if step.signal] == [4, 7, 10]
    assert steps[5].reason == "between steps: 2 events to the next"
    assert steps[6].reason == "between steps: 1 events to the next"
    assert len(client.transport.requests) == 3
    every = Stream(client, MODEL, stride=1, deadline_ms=PATIENT_MS)
    assert sum(step.signal is not None for step in feed(every, range(WARMUP + 9))) == 9


@pytest.mark.parametrize("kind", [{"window": 3}, {"state": (1, 2)}])
def test_windows_and_states_are_fed_at_no_other_pace(kind: dict[str, Any]) -> None:
    client = mock_client(manifest(stride=3, **kind))
    with pytest.raises(UsageError, match="stride"):
        Stream(client, MODEL, stride=1)
    assert Stream(client, MODEL, stride=3).definition.stride == 3
    with pytest.raises(UsageError, match="stride"):
        Stream(client, MODEL, stride=0)


def test_a_window_holds_the_last_rows_of_one_session() -> None:
    target, client = stream(manifest(window=3))
    steps = feed(target, range(WARMUP + 5))
    assert [step.reason for step in steps[4:6]] == ["the window fills: 1 of 3 rows", "the window fills: 2 of 3 rows"]
    assert all(step.signal for step in steps[6:])
    np.testing.assert_array_equal(
        client.transport.inputs()["window"][0], np.stack([step.features for step in steps[-3:]])
    )
    late = [target.feed(START + 10**13 + step * MS, row(step)) for step in range(WARMUP + 3)]
    assert [step.signal is not None for step in late] == [False] * (WARMUP + 2) + [True]
    np.testing.assert_array_equal(
        client.transport.inputs()["window"][0], np.stack([step.features for step in late[-3:]])
    )


def test_a_session_younger_than_its_features_look_back_says_so_even_after_a_restart() -> None:
    spec = FeatureSpec("timed", "book", 1, (*TIMELESS, Feature.of("mid_return", horizon_s=0.5)), 1_000 * MS, WARMUP)
    client = mock_client(make_manifest(spec=spec), then=FLAT_ANSWER)
    target = Stream(client, MODEL, deadline_ms=PATIENT_MS)

    def flags(*steps: int, of: Stream = target) -> list[tuple[str, ...]]:
        fed = [of.feed(START + step * 100 * MS, row(step)) for step in steps]
        return [step.signal.flags for step in fed if step.signal]

    assert flags(*range(5)) == [("short_history",)]
    polled = target.poll().signal
    assert polled is not None
    assert polled.flags == ("short_history",)
    other = Stream(client, MODEL, deadline_ms=PATIENT_MS)
    other.restore(target.snapshot())
    assert flags(5, 6) == flags(5, 6, of=other) == [(), ()]
    target.reset()
    assert flags(*range(7, 14)) == [("short_history",), (), ()]


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0, float("inf")])
@pytest.mark.parametrize("column", [4, 6], ids=["bid", "ask"])
def test_an_event_without_a_price_says_so_and_the_next_one_does_not(column: int, bad: float) -> None:
    target, _ = stream(manifest())
    feed(target, range(WARMUP))
    spoilt = row(WARMUP)
    spoilt[column] = bad
    flags = []
    for step, event in ((WARMUP, spoilt), (WARMUP + 1, row(WARMUP + 1))):
        signal = target.feed(START + step * MS, event).signal
        assert signal is not None
        flags.append(signal.flags)
    assert flags == [("no_price",), ()]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.longdouble, np.complex128, object])
def test_a_row_of_another_dtype_is_refused_and_nothing_moves(dtype: Any) -> None:
    target, _ = stream(manifest())
    feed(target, range(WARMUP))
    before = target.snapshot()
    with pytest.raises(SchemaError, match="float64"):
        target.feed(START + WARMUP * MS, row(WARMUP).astype(dtype))
    assert target.snapshot() == before
    assert feed(target, range(WARMUP, WARMUP + 1))[0].signal is not None


def test_what_decays_is_looked_back_on_for_five_time_constants() -> None:
    assert history_ns(SPEC) == 0
    assert history_ns(FULL) == 300 * 10**9
    assert history_ns(default_bars_spec()) == 0


def test_a_state_is_carried_from_answer_to_question() -> None:
    target, client = stream(stateful())
    feed(target, range(WARMUP + 5))
    assert [hidden(client, request) for request in range(5)] == [0, 1, 2, 3, 4]


def test_a_session_gap_resets_the_state_and_says_so() -> None:
    target, client = stream(stateful())
    assert feed(target, range(WARMUP + 3))[-1].signal.flags == ()  # type: ignore[union-attr]
    steps = [target.feed(START + 10**12 + step * MS, row(step)) for step in range(WARMUP + 2)]
    assert steps[WARMUP - 1].reason.startswith("warming up")
    assert hidden(client, 3) == 0
    assert steps[WARMUP].signal.flags == ("state_reset",)  # type: ignore[union-attr]
    assert steps[WARMUP + 1].signal.flags == ()  # type: ignore[union-attr]
    assert hidden(client) == 1


def test_a_gap_in_the_numbers_starts_anew_and_a_message_again_is_refused() -> None:
    target, client = stream(stateful())
    for step in range(WARMUP + 3):
        target.feed(START + step * MS, row(step), sequence=10 + step)
    assert hidden(client) == 2
    with pytest.raises(InputRejectedError, match=r"sequence.*expected 17"):
        target.feed(START + 7 * MS, row(7), sequence=16)
    steps = [target.feed(START + (8 + step) * MS, row(step), sequence=18 + step) for step in range(WARMUP + 2)]
    assert steps[0].reason == "warming up: 1 of 4 events of the session"
    assert steps[WARMUP].signal.flags == ("state_reset",)  # type: ignore[union-attr]
    assert hidden(client, 3) == 0


@pytest.mark.parametrize("sequence", [-1, 1.5, "3", True])
def test_numbers_that_are_none(sequence: object) -> None:
    target, _ = stream(manifest())
    with pytest.raises(InputRejectedError, match="sequence"):
        target.feed(START, row(0), sequence=sequence)  # type: ignore[arg-type]


def test_time_that_runs_backwards_is_refused_and_nothing_moves() -> None:
    target, client = stream(stateful())
    other, twin = stream(stateful())
    for step in range(WARMUP + 4):
        if step == 6:
            with pytest.raises(InputRejectedError, match="time runs backwards"):
                target.feed(START + 3 * MS, row(3))
            with pytest.raises(SchemaError):
                target.feed(START + step * MS, row(3)[:4])
        for each in (target, other):
            each.feed(START + step * MS, row(step))
    assert len(client.transport.requests) == 4
    for name, array in client.transport.inputs().items():
        np.testing.assert_array_equal(array, twin.transport.inputs()[name])
    target.feed(START + (WARMUP + 3) * MS, row(1))  # the same time again is no step back


@pytest.mark.parametrize(
    "ts_ns", [0, -5, 1.5, None, "now", True, 2**63, pytest.param(time.time_ns() + 10**15, id="not yet")]
)
def test_times_that_are_none_or_not_yet(ts_ns: object) -> None:
    target, _ = stream(manifest())
    with pytest.raises(InputRejectedError, match="ts_ns"):
        target.feed(ts_ns, row(0))  # type: ignore[arg-type]
    assert target.feed(START, row(0)).reason.startswith("warming up")


def test_a_frozen_feed_is_stale_not_traded_on() -> None:
    now = time.time_ns()
    target, client = stream(manifest(), max_age_ms=60_000)
    fresh = [target.feed(now - 10**9 + step * MS, row(step)) for step in range(WARMUP + 1)]
    assert fresh[-1].signal.status == "OK"  # type: ignore[union-attr]
    frozen, client = stream(manifest(), max_age_ms=1)
    old = [frozen.feed(now - 10**10, row(step)) for step in range(WARMUP + 1)]
    assert old[-1].signal.status == "STALE"  # type: ignore[union-attr]
    assert frozen.poll().signal.status == "STALE"  # type: ignore[union-attr]
    assert not client.transport.requests


def test_poll_asks_the_last_input_again_without_moving_the_state() -> None:
    target, client = stream(stateful())
    assert target.poll() == Step(None, "nothing was scored yet")
    feed(target, range(WARMUP + 3))
    assert target.poll().signal.ok  # type: ignore[union-attr]
    assert hidden(client) == 2
    feed(target, range(WARMUP + 3, WARMUP + 4))
    assert hidden(client) == 3


def test_a_row_without_an_answer_waits_and_the_state_skips_none() -> None:
    errors = [TransportError("gone"), TransportError("gone"), DeadlineExceededError("late")]
    target, client = stream(stateful(), UP_ANSWER, *errors)
    feed(target, range(WARMUP + 1))
    for step in range(WARMUP + 1, WARMUP + 4):
        with pytest.raises((TransportError, DeadlineExceededError)):
            target.feed(START + step * MS, row(step))
    assert [hidden(client, request) for request in range(1, 4)] == [1, 1, 1]
    after = feed(target, range(WARMUP + 4, WARMUP + 5))[0]
    assert after.signal is not None
    assert after.signal.flags == ()
    assert len(client.transport.requests) == 4 + 4  # three rows that waited, and the new one
    assert hidden(client) == 4
    whole, twin = stream(stateful())
    feed(whole, range(WARMUP + 5))
    for name, array in twin.transport.inputs().items():
        np.testing.assert_array_equal(array, client.transport.inputs()[name])


@pytest.mark.parametrize("made", [manifest, stateful])
def test_a_stream_proves_its_features_to_a_client_that_requires_it(made: Any) -> None:
    target, client = stream(made(), require_features=True)
    assert feed(target, range(WARMUP + 2))[-1].signal.ok  # type: ignore[union-attr]
    assert target.poll().signal.ok  # type: ignore[union-attr]
    assert len(client.transport.requests) == 3


def test_poll_catches_up() -> None:
    target, client = stream(stateful(), UP_ANSWER, TransportError("gone"))
    feed(target, range(WARMUP + 1))
    with pytest.raises(TransportError):
        target.feed(START + (WARMUP + 1) * MS, row(WARMUP + 1))
    assert target.poll().signal.ok  # type: ignore[union-attr]
    assert hidden(client) == 1


def test_too_many_rows_without_an_answer_start_anew_and_say_so() -> None:
    target, client = stream(stateful(), UP_ANSWER, *[TransportError("gone")] * (MAX_PENDING + 5))
    feed(target, range(WARMUP + 1))
    for step in range(WARMUP + 1, WARMUP + MAX_PENDING + 6):
        with pytest.raises(TransportError):
            target.feed(START + step * MS, row(step))
    step = feed(target, range(WARMUP + MAX_PENDING + 6, WARMUP + MAX_PENDING + 7))[0]
    assert step.signal is not None
    assert step.signal.flags == ("state_reset",)
    assert hidden(client) == 5
    assert hidden(client, -6) == 0


def test_a_catch_up_ends_with_the_deadline() -> None:
    target, client = stream(stateful(), *[TransportError("gone")] * 50)
    for step in range(WARMUP + 50):
        try:
            target.feed(START + step * MS, row(step))
        except TransportError:
            continue

    def slow(_: object) -> Answer:
        time.sleep(0.02)
        return UP_ANSWER

    client.transport._then = slow
    hasty = Stream(client, MODEL)
    hasty.restore(target.snapshot())
    with pytest.raises(DeadlineExceededError):
        hasty.feed(START + (WARMUP + 50) * MS, row(1))
    assert 50 < len(client.transport.requests) < 95
    client.transport._then = UP_ANSWER
    hasty._deadline_ms = PATIENT_MS
    assert hasty.poll().signal.ok  # type: ignore[union-attr]
    assert hidden(client) == 50


def test_a_fallback_leaves_the_state_where_it_was() -> None:
    target, client = stream(stateful(), UP_ANSWER, TransportError("gone"), fallback="flat")
    assert feed(target, range(WARMUP + 2))[-1].signal.status == "FALLBACK"  # type: ignore[union-attr]
    assert feed(target, range(WARMUP + 2, WARMUP + 3))[0].signal.ok  # type: ignore[union-attr]
    assert [hidden(client, request) for request in (-2, -1)] == [1, 2]


def test_another_model_in_force_starts_from_zeros() -> None:
    target, client = stream(stateful())
    feed(target, range(WARMUP + 3))
    other = stateful(metrics={"better": 1})
    client.repin(other)
    client.transport._manifests[MODEL] = other
    step = feed(target, range(WARMUP + 3, WARMUP + 4))[0]
    assert step.signal is not None
    assert step.signal.bundle_digest == other.digest()
    assert step.signal.flags == ("state_reset",)
    assert hidden(client) == 0
    feed(target, range(WARMUP + 4, WARMUP + 5))
    assert hidden(client) == 1


@pytest.mark.parametrize("kind", [{}, {"window": 3}, {"state": (1, 2)}], ids=["row", "window", "state"])
@pytest.mark.parametrize("cut", [2, WARMUP + 2, WARMUP + 8])
def test_a_snapshot_goes_on_bit_for_bit(kind: dict[str, Any], cut: int) -> None:
    whole, uninterrupted = stream(manifest(stride=2, **kind))
    first, _ = stream(manifest(stride=2, **kind))
    feed(whole, range(30))
    feed(first, range(cut))
    saved = first.snapshot()
    second, client = stream(manifest(stride=2, **kind))
    feed(second, range(7))  # whatever it did before is gone
    second.restore(saved)
    feed(second, range(cut, 30))
    assert second.snapshot() == whole.snapshot()
    for name, array in client.transport.inputs().items():
        assert array.tobytes() == uninterrupted.transport.inputs()[name].tobytes()


def test_a_snapshot_holds_rows_that_wait_and_the_number_of_the_feed() -> None:
    target, _ = stream(stateful(), UP_ANSWER, TransportError("gone"))
    for step in range(WARMUP + 2):
        try:
            target.feed(START + step * MS, row(step), sequence=step)
        except TransportError:
            continue
    again, client = stream(stateful())
    again.restore(target.snapshot())
    assert again.poll().signal.ok  # type: ignore[union-attr]
    assert hidden(client) == 1
    with pytest.raises(InputRejectedError, match="sequence"):
        again.feed(START + 9 * MS, row(9), sequence=WARMUP + 1)
    with pytest.raises(InputRejectedError, match="backwards"):
        again.feed(START, row(9), sequence=WARMUP + 2)


def test_snapshots_that_are_none_change_nothing() -> None:
    target, client = stream(stateful())
    feed(target, range(WARMUP + 2))
    saved = target.snapshot()
    for bad in (b"", b"x" * 100, saved[:10], MAGIC, saved.replace(b"stream 1", b"stream 9"), "text"):
        with pytest.raises(ArtifactError, match="not a snapshot"):
            target.restore(bad)  # type: ignore[arg-type]
    for bad in (saved[:-1], saved + b"\0", saved[:60] + bytes([saved[60] ^ 1]) + saved[61:]):
        with pytest.raises(DigestMismatchError):
            target.restore(bad)
    for other in (manifest(), manifest(window=3), stateful(stride=2)):
        with pytest.raises(ArtifactError, match="another stream"):
            target.restore(stream(other)[0].snapshot())
    feed(target, range(WARMUP + 2, WARMUP + 3))
    assert hidden(client) == 2


def test_a_snapshot_of_sessions_cut_by_another_jump_is_refused() -> None:
    target, _ = stream(manifest())
    feed(target, range(WARMUP + 1))
    saved = target.snapshot()
    target.restore(saved)
    made = manifest()
    assert made.stream is not None
    other, _ = stream(made.model_copy(update={"stream": made.stream.model_copy(update={"jump_factor": 1.25})}))
    with pytest.raises(ArtifactError, match="jump_factor"):
        other.restore(saved)


def test_a_snapshot_of_other_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = stream(manifest())
    saved = target.snapshot()
    target._kernels = "0" * 16
    with pytest.raises(ArtifactError, match="kernels"):
        target.restore(saved)


def test_features_this_build_does_not_compute_are_refused() -> None:
    changed = manifest().stored()
    changed["features"] |= {"digest": "sha256:other"}
    with pytest.raises(ArtifactError, match="feature digest"):
        Stream(mock_client(Manifest.model_validate(changed)), MODEL)
    with pytest.raises(ArtifactError, match="feature digest"):
        Stream(mock_client(manifest()), MODEL, spec=FULL)


def test_manifests_from_before_need_the_spec_or_a_default_one() -> None:
    earlier = {name: value for name, value in manifest(stride=2).stored().items() if name != "stream"}
    client = mock_client(Manifest.model_validate(earlier))
    with pytest.raises(UsageError, match="spec"):
        Stream(client, MODEL)
    assert Stream(client, MODEL, spec=SPEC).definition.stride == 2
    default = {name: value for name, value in make_manifest(spec=FULL).stored().items() if name != "stream"}
    assert Stream(mock_client(Manifest.model_validate(default)), MODEL).definition.spec == FULL


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(UsageError, match=r"model.*mock-model"):
        Stream(mock_client(manifest()), "other")


def test_reset_starts_anew() -> None:
    target, client = stream(stateful())
    for step in range(WARMUP + 2):
        target.feed(START + step * MS, row(step), sequence=step)
    target.reset()
    steps = [target.feed(START + (20 + step) * MS, row(step), sequence=step) for step in range(WARMUP + 1)]
    assert steps[0].reason.startswith("warming up: 1 of")
    assert steps[-1].signal.flags == ("state_reset",)  # type: ignore[union-attr]
    assert hidden(client) == 0


def test_awaited_streams_do_the_same() -> None:
    class Awaited(MockClient):
        async def score(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
            return MockClient.score(self, *arguments, **options)

    made = stateful()
    sync, _ = stream(made, UP_ANSWER)
    mock = mock_client(made, [UP_ANSWER])
    scorer: Any = Awaited(mock.transport, {MODEL: made}, require_features=True)
    target = AsyncStream(scorer, MODEL, deadline_ms=PATIENT_MS)

    async def run() -> list[Step]:
        assert (await target.poll()).signal is None
        steps = [await target.feed(START + step * MS, row(step)) for step in range(WARMUP + 3)]
        assert (await target.poll()).signal.ok  # type: ignore[union-attr]
        return steps

    awaited, plain = asyncio.run(run()), feed(sync, range(WARMUP + 3))
    assert [step.reason for step in awaited] == [step.reason for step in plain]
    assert [step.signal and step.signal.decision for step in awaited] == [
        step.signal and step.signal.decision for step in plain
    ]
    assert target.snapshot() == sync.snapshot()
