"""The action file as a client obeys it: labelled, shrunk, flat, and what becomes of a file that cannot be trusted."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tickserve.conftest import Triton
from tests.waiting import wait_until
from tickserve import Client
from tickserve.client import AsyncClient, Hold, RiskActions
from tickserve.client._risk import RiskWatch
from tickserve.errors import ArtifactError, InputRejectedError, TransportError, UsageError
from tickserve.journal import DecisionRecord, Journal, read_journal
from tickserve.risk import ActionFile, ModelAction, read_actions, write_actions
from tickserve.signal import Signal
from tickserve.testing import UP_ANSWER, MockClient, make_manifest, mock_client

MODEL = "mock-model"
ROW = np.zeros((1, 3), np.float32)
LOOK_MS = 5.0
Ask = Callable[..., None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "actions.json"


@pytest.fixture
def ask(path: Path) -> Ask:
    """Writes what is asked of the model; `age_s` old."""

    def write(action: str, age_s: float = 0.0, model: str = MODEL, **fields: Any) -> None:
        asked = ModelAction.model_validate({"action": action, "reason": "PSI of spread 0.9"} | fields)
        write_actions(path, time.time_ns() - int(age_s * 1e9), {model: asked})

    return write


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., MockClient]]:
    made: list[MockClient] = []

    def make(script: Any = (), *, max_age_s: float = 60.0, on_unknown: Any = "keep", **options: Any) -> MockClient:
        actions = RiskActions(path, max_age_s=max_age_s, on_unknown=on_unknown, look_ms=LOOK_MS)
        made.append(
            mock_client(make_manifest(), script, then=UP_ANSWER, risk_actions=actions, deadline_ms=20_000, **options)
        )
        return made[-1]

    yield make
    for client in made:
        client.close()


def until(client: MockClient, holds: Callable[[Signal], bool]) -> Signal:
    """The first signal that is as it must be, soon."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        signal = client.score(MODEL, ROW)
        if holds(signal):
            return signal
        time.sleep(LOOK_MS / 1e3)
    pytest.fail(f"never so: {signal}")


def test_none_changes_nothing(ask: Ask, opened: Any) -> None:
    ask("none")
    signal = opened().score(MODEL, ROW)
    assert (signal.ok, signal.flags, signal.size_factor) == (True, (), 1.0)


def test_label_is_a_flag_and_the_numbers_are_the_models(ask: Ask, opened: Any) -> None:
    ask("label")
    signal = opened().score(MODEL, ROW)
    assert (signal.ok, signal.flags, signal.size_factor, signal.decision) == (True, ("drift",), 1.0, ("up",))


def test_shrink_is_a_factor_and_the_numbers_are_the_models(ask: Ask, opened: Any) -> None:
    ask("shrink", factor=0.25)
    client = opened()
    signal = client.score(MODEL, ROW)
    assert (signal.ok, signal.flags, signal.size_factor) == (True, ("drift", "size_factor:0.25"), 0.25)
    assert signal.score is not None
    assert signal.score[0] == pytest.approx(0.6)
    assert signal.to_json()["size_factor"] == 0.25
    assert len(client.transport.requests) == 1


def test_flat_sends_nothing_and_says_why(ask: Ask, opened: Any) -> None:
    ask("flat")
    client = opened()
    signal = client.score(MODEL, np.zeros((2, 3), np.float32))
    assert (signal.status, signal.fallback, signal.size_factor) == ("FALLBACK", "flat", 0.0)
    assert (signal.decision, signal.flags) == (("flat", "flat"), ("drift",))
    assert signal.reason == "drift: PSI of spread 0.9"
    assert not signal.ok
    assert client.transport.requests == []
    with pytest.raises(InputRejectedError):  # nonsense is still refused
        client.score(MODEL, ROW.astype(np.float64))


def test_a_stale_event_is_stale_first(ask: Ask, opened: Any) -> None:
    ask("flat")
    client = opened(max_age_ms=1_000)
    assert client.score(MODEL, ROW, newest_event_ns=time.time_ns() - 10**10).status == "STALE"
    assert client.score(MODEL, ROW, newest_event_ns=time.time_ns()).fallback == "flat"


def test_it_follows_the_file_and_tells_each_change_once(
    ask: Ask, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tickserve.client")
    ask("none")
    client = opened()
    assert client.score(MODEL, ROW).flags == ()
    ask("shrink", factor=0.5)
    until(client, lambda signal: signal.size_factor == 0.5)
    ask("shrink", factor=0.5, reason="another time")
    ask("flat")
    until(client, lambda signal: signal.fallback == "flat")
    ask("none")
    assert until(client, lambda signal: signal.ok).flags == ()

    def changes() -> list[str]:
        return [line for line in caplog.messages if "drift action" in line]

    wait_until(lambda: len(changes()) >= 3)
    time.sleep(0.05)  # for one that is told again
    assert [line.split("drift action ")[1].split(":")[0] for line in changes()] == [
        "none -> shrink", "shrink -> flat", "flat -> none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),  # torn
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"format": "another/1", "written_ns": 1, "models": {}}'),
        lambda path: path.write_bytes(b"\0" * 2_000_000),
        lambda path: path.write_text(path.read_text().replace('"factor":0.5', '"factor":7.0')),
    ],
)
def test_what_cannot_be_read_keeps_the_last_action_and_says_so(spoil: Any, path: Path, ask: Ask, opened: Any) -> None:
    ask("shrink", factor=0.5)
    client = opened()
    assert client.score(MODEL, ROW).flags == ("drift", "size_factor:0.5")
    spoil(path)
    signal = until(client, lambda signal: "drift_unknown" in signal.flags)
    assert (signal.ok, signal.size_factor) == (True, 0.5)
    assert signal.flags == ("drift", "size_factor:0.5", "drift_unknown")
    ask("none")
    assert until(client, lambda signal: signal.flags == ()).size_factor == 1.0


def test_an_old_file_is_unknown_and_its_action_holds(ask: Ask, opened: Any) -> None:
    ask("shrink", factor=0.5, age_s=120)
    assert opened().score(MODEL, ROW).flags == ("drift", "size_factor:0.5", "drift_unknown")


def test_it_grows_old_by_itself(ask: Ask, opened: Any) -> None:
    ask("none")
    client = opened(max_age_s=0.3)
    assert client.score(MODEL, ROW).flags == ()
    signal = until(client, lambda signal: signal.flags == ("drift_unknown",))
    assert (signal.ok, signal.size_factor) == (True, 1.0)


def test_it_grows_old_even_when_the_look_hangs(ask: Ask, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ask("none")
    client = opened(max_age_s=0.2)
    monkeypatch.setattr(RiskWatch, "look", lambda self: time.sleep(5))
    started = time.monotonic()
    until(client, lambda signal: signal.flags == ("drift_unknown",))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("age_s", [-3_600, 30])
def test_from_the_future_or_older_than_what_is_known(age_s: float, ask: Ask, opened: Any) -> None:
    ask("flat")
    client = opened()
    assert client.score(MODEL, ROW).fallback == "flat"
    ask("none", age_s=age_s)
    signal = until(client, lambda signal: "drift_unknown" in signal.flags)
    assert signal.fallback == "flat"
    ask("none")
    assert until(client, lambda signal: signal.ok).flags == ()


def test_nothing_known_is_flagged_or_flat(path: Path, ask: Ask, opened: Any) -> None:
    signal = opened().score(MODEL, ROW)
    assert (signal.ok, signal.flags) == (True, ("drift_unknown",))
    careful = opened(on_unknown="flat")
    signal = careful.score(MODEL, ROW)
    assert (signal.fallback, signal.flags) == ("flat", ("drift_unknown",))
    assert signal.reason == "drift: unknown: nothing is known of this model"
    ask("none", model="another")  # fresh, and silent about this one
    time.sleep(0.05)
    assert careful.score(MODEL, ROW).fallback == "flat"
    ask("none", measured=False, reason="too few rows: 3 of 1000")
    signal = until(careful, lambda signal: "too few" in (signal.reason or ""))
    assert signal.fallback == "flat"
    ask("none")
    assert until(careful, lambda signal: signal.ok).flags == ()


def test_an_exporter_that_has_not_measured_yet_lifts_nothing(ask: Ask, opened: Any) -> None:
    ask("flat")
    client = opened()
    client.score(MODEL, ROW)
    ask("none", measured=False, reason="too few rows")
    signal = until(client, lambda signal: "drift_unknown" in signal.flags)
    assert signal.fallback == "flat"


def test_fallbacks_are_shrunk_too_and_what_is_held_is_asked_anew(ask: Ask, opened: Any) -> None:
    ask("shrink", factor=0.5)
    client = opened([UP_ANSWER, TransportError("gone"), TransportError("gone")], fallback=Hold(ttl_ms=60_000))
    client.score(MODEL, ROW)
    held = client.score(MODEL, ROW)
    assert (held.fallback, held.size_factor, held.flags) == ("hold", 0.5, ("drift", "size_factor:0.5"))
    ask("none")
    watch = client._core._risk
    assert wait_until(lambda: watch.of(MODEL, time.monotonic_ns()) is None)
    held = client.score(MODEL, ROW)
    assert (held.fallback, held.size_factor, held.flags) == ("hold", 1.0, ())


def test_the_journal_keeps_it_in_the_flags(ask: Ask, opened: Any, tmp_path: Path) -> None:
    ask("shrink", factor=0.5)
    with Journal(tmp_path / "journal") as journal:
        client = opened(observer=journal)
        client.score(MODEL, ROW)
        ask("flat")
        until(client, lambda signal: signal.fallback == "flat")
    records = [each for each in read_journal(tmp_path / "journal") if isinstance(each, DecisionRecord)]
    assert records[0].flags == ("drift", "size_factor:0.5")
    assert (records[-1].status, records[-1].fallback, records[-1].flags) == ("FALLBACK", "flat", ("drift",))
    assert records[-1].tensors[0].shape == (1, 3)  # so that drift can be measured on, and the action lifted


def test_over_asyncio_in_process_and_on_a_server(
    path: Path, ask: Ask, triton: Triton, published: Path, rows: np.ndarray
) -> None:
    ask("shrink", factor=0.5, model="hand-l1-gbdt")
    for url, manifest in ((triton.http, triton.repository), (f"local://{published}", None)):
        with Client(url, manifest=manifest, risk_actions=path, deadline_ms=5_000) as client:
            signal = client.score("hand-l1-gbdt", rows)
            assert (signal.ok, signal.size_factor) == (True, 0.5)

    async def score() -> Signal:
        options: dict[str, Any] = {"manifest": triton.repository, "risk_actions": path, "deadline_ms": 5_000}
        async with AsyncClient(triton.http, **options) as client:
            return await client.score("hand-l1-gbdt", rows)

    assert asyncio.run(score()).size_factor == 0.5
    ask("flat", model="hand-l1-gbdt")
    signal = asyncio.run(score())
    assert (signal.fallback, signal.attempts) == ("flat", 0)


FORK = """
import os, sys, time
import numpy as np
from pathlib import Path
from tickserve.client import RiskActions
from tickserve.risk import ModelAction, write_actions
from tickserve.testing import make_manifest, mock_client

path = Path(sys.argv[1])
write_actions(path, time.time_ns(), {"mock-model": ModelAction()})
client = mock_client(make_manifest(), risk_actions=RiskActions(path, look_ms=5))
row = np.zeros((1, 3), np.float32)
client.score("mock-model", row)
pid = os.fork()
if pid == 0:
    write_actions(path, time.time_ns(), {"mock-model": ModelAction(action="flat")})
    for _ in range(400):
        if client.score("mock-model", row).fallback == "flat":
            os._exit(0)
        time.sleep(0.01)
    os._exit(1)
print(os.waitpid(pid, 0)[1])
"""


def test_a_forked_child_looks_for_itself(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr


def test_a_client_that_nobody_closed_keeps_no_thread(ask: Ask, path: Path) -> None:
    ask("none")
    client = mock_client(make_manifest(), risk_actions=RiskActions(path, look_ms=LOOK_MS))
    client.score(MODEL, ROW)
    watch = client._core._risk
    assert watch is not None
    thread = watch._thread
    assert thread is not None
    del client, watch
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("/no/such/folder/actions.json", "risk_actions: no such folder"),
        (3, "risk_actions: not an action file"),
        (("x", {"max_age_s": 0}), "max_age_s: not a time"),
        (("x", {"max_age_s": True}), "max_age_s: not a time"),
        (("x", {"on_unknown": "guess"}), "on_unknown: unknown"),
    ],
)
def test_wrong_arguments(given: Any, says: str, tmp_path: Path) -> None:
    def use() -> None:
        actions = RiskActions(tmp_path / given[0], **given[1]) if isinstance(given, tuple) else given
        mock_client(make_manifest(), risk_actions=actions)

    with pytest.raises(UsageError, match=says):
        use()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_bytes_are_taken_for_an_action_file(data: Any, tmp_path: Path) -> None:
    whole = json.dumps(ActionFile(written_ns=5, models={MODEL: ModelAction(action="flat")}).model_dump()).encode()
    cut = data.draw(st.integers(0, len(whole) - 1))
    spoilt = data.draw(st.one_of(st.just(whole[:cut]), st.binary(max_size=200), st.just(whole + whole[cut:] + b"}")))
    (tmp_path / "a.json").write_bytes(spoilt)
    with pytest.raises(ArtifactError, match=r"a\.json: not an action file"):
        read_actions(tmp_path / "a.json")


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    models = {f"m-{number}": ModelAction(reason="r" * 400) for number in range(3_000)}
    write_actions(tmp_path / "a.json", 5, models)
    with pytest.raises(ArtifactError, match="at most 1048576 bytes"):
        read_actions(tmp_path / "a.json")


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "actions.json"
    write_actions(path, 5, {MODEL: ModelAction(action="shrink", factor=0.5, reason="r", since_ns=4, version="3")})
    told = read_actions(path)
    assert told.models[MODEL] == ModelAction(action="shrink", factor=0.5, reason="r", since_ns=4, version="3")
    assert [each.name for each in tmp_path.iterdir()] == ["actions.json"]
    assert path.stat().st_size < 1_000


def test_an_unmeasured_none_lifts_nothing_but_of_another_bundle_or_by_a_person(ask: Ask, path: Path) -> None:
    ask("flat", bundle_digest="one")
    watch = RiskWatch(RiskActions(path))
    for fields in ({"bundle_digest": "one"}, {}):
        ask("none", measured=False, **fields)
        watch.look()
        told = watch.of(MODEL, time.monotonic_ns())
        assert told is not None
        assert told.action == "flat"
    ask("none", measured=False, bundle_digest="one", cleared_ns=5)  # the exporter's file after `monitor clear`'s
    watch.look()
    told = watch.of(MODEL, time.monotonic_ns())
    assert told == ("none", 1.0, ("drift_unknown",), "PSI of spread 0.9")
    ask("flat", bundle_digest="one", cleared_ns=5)
    watch.look()
    ask("none", measured=False, bundle_digest="two", cleared_ns=5)
    watch.look()
    told = watch.of(MODEL, time.monotonic_ns())
    assert told is not None
    assert told.action == "none"
    watch.close()
