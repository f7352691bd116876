"""Fallbacks by name: always labelled, never for bad input, never another model's number, and honest about age."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.relay import Relay
from tickserve.client import Client, Hold, Local
from tickserve.errors import DigestMismatchError, RequestError, UsageError
from tickserve.manifest import load_manifest, write_manifest

MODEL = "hand-l1-gbdt"
NOWHERE = "127.0.0.1:1"
SECONDS_MS = 5_000
BAD = np.full((1, 4), np.inf, np.float32)


@pytest.fixture
def relay(triton: Any) -> Iterator[Relay]:
    with Relay(triton.http) as opened:
        yield opened


def test_flat_is_no_position_and_says_why(make_manifest: Any, rows: np.ndarray) -> None:
    with Client(NOWHERE, manifest=make_manifest(), fallback="flat") as client:
        signal = client.score(MODEL, rows)
        assert (signal.status, signal.fallback, signal.ok) == ("FALLBACK", "flat", False)
        assert signal.score is not None
        assert signal.probabilities is not None
        assert signal.score.tolist() == [0.0, 0.0]
        assert signal.decision == ("flat", "flat")
        assert signal.probabilities.tolist() == [[0.0, 1.0, 0.0]] * 2
        assert not signal.score.flags.writeable
        assert signal.reason is not None
        assert signal.reason.startswith("TransportError: cannot connect")
        assert client.statistics()["signals"] == {"FALLBACK": 1}
        assert client.statistics()["failures"] == {"TransportError": 1}


def test_with_the_breaker_open_flat_comes_at_once(make_manifest: Any, rows: np.ndarray) -> None:
    with Client(NOWHERE, manifest=make_manifest(), fallback="flat") as client:
        taken = []
        for _ in range(30):
            began = time.monotonic_ns()
            signal = client.score(MODEL, rows)
            taken.append(time.monotonic_ns() - began)
            assert signal.fallback == "flat"
        assert min(taken[10:]) < 1_000_000
        assert signal.reason is not None
        assert "no replica is believed to be alive" in signal.reason
        assert signal.attempts == 0


@pytest.mark.parametrize("policy", ["flat", "signal", Hold(ttl_ms=60_000)])
def test_bad_input_never_gets_a_number(triton: Any, rows: np.ndarray, policy: Any) -> None:
    with Client(triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS, fallback=policy) as client:
        assert client.score(MODEL, rows[:1]).ok
        for _ in range(50):  # a burst of nonsense
            signal = client.score(MODEL, BAD)
            assert (signal.status, signal.score, signal.fallback) == ("REJECTED_INPUT", None, None)
        assert client.score(MODEL, rows[:1]).ok
        counted = client.statistics()
        assert counted["signals"] == {"OK": 2, "REJECTED_INPUT": 50}
        assert counted["replicas"][triton.http]["breaker"] == "closed"


@pytest.mark.parametrize("policy", ["flat", Hold(ttl_ms=60_000)])
def test_a_time_that_cannot_be_never_gets_a_number(triton: Any, rows: np.ndarray, policy: Any) -> None:
    with Client(
        triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS, max_age_ms=SECONDS_MS, fallback=policy
    ) as client:
        assert client.score(MODEL, rows, newest_event_ns=time.time_ns()).ok
        ahead = time.time_ns() + 3_600 * 10**9  # the rows are good, their time is not
        signal = client.score(MODEL, rows, newest_event_ns=ahead)
        assert (signal.status, signal.score) == ("REJECTED_INPUT", None)


def test_a_signal_in_place_of_every_error(triton: Any, relay: Relay, rows: np.ndarray) -> None:
    with Client(relay.address, manifest=triton.folder, deadline_ms=SECONDS_MS, fallback="signal") as client:
        assert client.score(MODEL, rows).ok
        relay.order("dark")
        signal = client.score(MODEL, rows, deadline_ms=50)
        assert (signal.status, signal.score) == ("DEADLINE", None)
        assert (signal.replica, signal.attempts) == (relay.address, 1)
        relay.order("refuse")
        assert client.score(MODEL, rows).status == "UNAVAILABLE"
        assert client.score(MODEL, rows, deadline_ms=-1).status == "REJECTED_INPUT"
        assert client.score(MODEL, rows, version=99).status == "UNAVAILABLE"
        with pytest.raises(RequestError):
            client.score("nobody", rows)  # nothing is pinned for it, so there is nothing to say of it


def test_hold_is_the_last_answer_until_its_time(triton: Any, relay: Relay, rows: np.ndarray) -> None:
    with Client(relay.address, manifest=triton.folder, deadline_ms=SECONDS_MS, fallback=Hold(ttl_ms=2_000)) as client:
        assert client.score(MODEL, rows).ok
        event = time.time_ns() - 50_000_000
        last = client.score(MODEL, rows * 0.5, newest_event_ns=event)
        held_from = time.monotonic()
        relay.order("refuse")
        signal = client.score(MODEL, rows, newest_event_ns=time.time_ns())
        assert (signal.status, signal.fallback, signal.version) == ("FALLBACK", "hold", 1)
        assert np.array_equal(signal.probabilities, last.probabilities)
        assert signal.event_age_us is not None
        assert signal.event_age_us >= 50_000  # of the event behind the number, not of the newest
        assert signal.reason is not None
        assert "held since" in signal.reason
        assert client.score(MODEL, rows[:1]).status == "UNAVAILABLE"  # of another number of rows
        time.sleep(max(0.0, held_from + 2.05 - time.monotonic()))
        signal = client.score(MODEL, rows)
        assert (signal.status, signal.score) == ("UNAVAILABLE", None)
        assert signal.reason is not None
        assert "ms old" in signal.reason


def test_hold_gives_nothing_before_the_first_answer(make_manifest: Any, rows: np.ndarray) -> None:
    with Client(NOWHERE, manifest=make_manifest(), fallback=Hold(ttl_ms=1_000)) as client:
        signal = client.score(MODEL, rows)
        assert (signal.status, signal.score) == ("UNAVAILABLE", None)
        assert signal.reason is not None
        assert "nothing is held" in signal.reason


def jump(monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """Move the wall clock, also for modules of the project that hold its function under a name of their own."""
    real = time.time_ns

    def moved() -> int:
        return real() + hours * 3_600 * 10**9

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("time", "tickserve"):
            for attribute in [key for key, value in vars(module).items() if value is real]:
                monkeypatch.setattr(module, attribute, moved)


def test_a_wall_clock_that_jumps_makes_nothing_young_or_late(
    triton: Any, relay: Relay, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(relay.address, manifest=triton.folder, deadline_ms=SECONDS_MS, fallback=Hold(ttl_ms=200)) as client:
        for hours in (1, -1):
            jump(monkeypatch, hours)
            assert client.score(MODEL, rows).ok
            began = time.monotonic()
            relay.order("dark")
            assert client.score(MODEL, rows, deadline_ms=100).status == "FALLBACK"
            assert time.monotonic() - began < 1
            monkeypatch.undo()
            time.sleep(0.25)
            assert client.score(MODEL, rows, deadline_ms=100).status == "DEADLINE"  # too old to be held
            relay.order("refuse")
            relay.order("clear")
            until = time.monotonic() + 5
            while not client.score(MODEL, rows).ok and time.monotonic() < until:
                time.sleep(0.01)


def test_hold_never_gives_a_model_that_was_pinned_before(triton: Any, rows: np.ndarray, make_manifest: Any) -> None:
    with Client(triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS, fallback=Hold(ttl_ms=60_000)) as client:
        assert client.score(MODEL, rows).ok
        client.repin(make_manifest(family="lstm"))  # same tensors, another bundle
        signal = client.score(MODEL, rows)
        assert (signal.status, signal.score) == ("UNAVAILABLE", None)


def test_local_gives_the_same_artifacts_number(triton: Any, relay: Relay, rows: np.ndarray) -> None:
    with Client(
        relay.address, manifest=triton.folder, deadline_ms=SECONDS_MS, fallback=Local(triton.repository)
    ) as client:
        served = client.score(MODEL, rows)
        relay.order("refuse")
        signal = client.score(MODEL, rows)
        assert (signal.status, signal.fallback, signal.version) == ("FALLBACK", "local", 1)
        assert np.array_equal(signal.probabilities, served.probabilities)
        assert signal.bundle_digest == served.bundle_digest
        assert client.score(MODEL, BAD).status == "REJECTED_INPUT"


def test_local_of_another_artifact_is_refused(triton: Any, make_manifest: Any, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatchError) as caught:
        Client(triton.http, manifest=make_manifest(family="lstm"), fallback=Local(triton.repository))
    assert caught.value.field == "fallback"
    with (
        Client(triton.http, manifest=triton.folder, fallback=Local(triton.folder)) as client,
        pytest.raises(DigestMismatchError),
    ):
        client.repin(make_manifest(family="lstm"))


def test_a_changed_local_artifact_is_refused(triton: Any, tmp_path: Path) -> None:
    copy = tmp_path / MODEL / "1"
    shutil.copytree(triton.folder, copy)
    manifest = load_manifest(copy)
    assert manifest.export is not None
    changed = manifest.export.model_copy(update={"onnx_sha256": "sha256:" + "0" * 64})
    write_manifest(copy, manifest.model_copy(update={"export": changed}))
    with pytest.raises(DigestMismatchError):
        Client(triton.http, manifest=triton.folder, fallback=Local(tmp_path))


@pytest.mark.parametrize("policy", ["hold", "local", "", 7, object(), Hold])
def test_what_is_no_fallback_is_refused(make_manifest: Any, policy: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Client(NOWHERE, manifest=make_manifest(), fallback=policy)
    assert caught.value.field == "fallback"


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), "5"])
def test_a_hold_that_is_no_time_span(ttl: Any) -> None:
    with pytest.raises(UsageError, match="ttl_ms"):
        Hold(ttl_ms=ttl)


def test_a_feed_that_freezes_is_stale_whatever_the_fallback(triton: Any, rows: np.ndarray) -> None:
    newest = time.time_ns()
    with Client(triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS, max_age_ms=500, fallback="flat") as client:
        assert client.score(MODEL, rows, newest_event_ns=newest).ok
        time.sleep(0.6)  # the feed still heartbeats, and its newest event stays what it was
        signal = client.score(MODEL, rows, newest_event_ns=newest)
        assert (signal.status, signal.score, signal.fallback) == ("STALE", None, None)
        assert client.score(MODEL, rows, newest_event_ns=time.time_ns()).ok


@pytest.mark.parametrize("kind", ["flat", "signal", "hold", "local"])
def test_an_event_that_grows_too_old_while_the_call_fails(
    triton: Any, relay: Relay, rows: np.ndarray, kind: str
) -> None:
    """No number of the model's is older than the limit, whoever has it; and the age told is that of the return."""
    policies = {"hold": Hold(ttl_ms=60_000), "local": Local(triton.repository)}
    options = {"manifest": triton.folder, "max_age_ms": 600, "fallback": policies.get(kind, kind)}
    with Client(relay.address, deadline_ms=SECONDS_MS, **options) as client:
        assert client.score(MODEL, rows, newest_event_ns=time.time_ns() - 250_000_000).ok  # what is held grows old too
        relay.order("dark")
        soon = client.score(MODEL, rows, newest_event_ns=time.time_ns() - 10_000_000, deadline_ms=50)
        assert soon.fallback == (None if kind == "signal" else kind)
        event = time.time_ns() - 300_000_000
        late = client.score(MODEL, rows, newest_event_ns=event, deadline_ms=400)
        assert late.event_age_us == pytest.approx((time.time_ns() - event) / 1e3, abs=50_000)
        assert late.event_age_us > 695_000
        expected = {"flat": ("FALLBACK", "flat"), "signal": ("DEADLINE", None)}.get(kind, ("STALE", None))
        assert (late.status, late.fallback) == expected
        assert (late.score is None) == (kind != "flat")
        assert "DeadlineExceededError" in (late.reason or "")
        assert client.statistics()["signals"][late.status] >= 1


class Down:
    """An observer whose sink is down."""

    def decided(self, decision: Any) -> None:
        raise OSError("no space left on device")


def test_an_observer_that_is_down_costs_no_decision(triton: Any, rows: np.ndarray) -> None:
    with Client(triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS, observer=Down()) as client:
        assert client.score(MODEL, rows).ok
        with pytest.raises(RequestError):
            client.score(MODEL, BAD)
        assert client.statistics()["observer_errors"] == 2
