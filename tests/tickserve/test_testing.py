"""The mock an engine's developer tests with: scripted, deterministic, and with the real client's whole contract."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.tickserve.exported import patient
from tickserve.errors import (
    DeadlineExceededError,
    InputRejectedError,
    ModelNotFoundError,
    ServerRejectedError,
    TransportError,
    UsageError,
)
from tickserve.manifest import CLASSES, parse_manifest
from tickserve.store import canonical_json
from tickserve.testing import DOWN_ANSWER, FLAT_ANSWER, UP_ANSWER, Answer, make_manifest, mock_client

ROW = np.zeros((1, 3), np.float32)


def test_answers_come_in_the_order_of_the_script_and_then_the_last() -> None:
    client = patient(make_manifest(), [UP_ANSWER, DOWN_ANSWER], then=Answer((0.2, 0.2, 0.6)))
    signals = [client.score("mock-model", ROW) for _ in range(4)]
    assert [signal.decision for signal in signals] == [("up",), ("down",), ("up",), ("up",)]
    assert signals[0].ok
    assert signals[0].version == 1
    np.testing.assert_allclose(signals[0].score, [0.6], rtol=1e-6)
    assert len(client.transport.requests) == 4


def test_an_error_of_the_script_is_raised_as_the_client_raises_it() -> None:
    client = patient(make_manifest(), [TransportError("the link broke"), ServerRejectedError("no")])
    with pytest.raises(TransportError, match="the link broke") as caught:
        client.score("mock-model", ROW, request_id="mine")
    assert (caught.value.model, caught.value.request_id) == ("mock-model", "mine")
    with pytest.raises(ServerRejectedError):
        client.score("mock-model", ROW)
    assert client.score("mock-model", ROW).decision == ("flat",)


def test_a_latency_beyond_the_deadline_is_the_deadline_and_nothing_sleeps() -> None:
    client = patient(make_manifest(), [Answer(latency_ms=30_000), Answer(latency_ms=19_000)])
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        client.score("mock-model", ROW)
    assert client.score("mock-model", ROW).ok
    assert time.monotonic() - started < 10


def test_the_contract_is_the_real_clients() -> None:
    client = mock_client(make_manifest(columns=("spread", "flow")))
    with pytest.raises(InputRejectedError, match="wrong shape"):
        client.score("mock-model", ROW)
    with pytest.raises(InputRejectedError, match="permuted"):
        client.score("mock-model", ROW[:, :2], columns=["flow", "spread"])
    with pytest.raises(ModelNotFoundError):
        client.score("another", ROW)
    client.close()
    assert client.transport.closed
    with pytest.raises(UsageError, match="closed"):
        client.score("mock-model", ROW)


def test_a_mock_may_require_proof_of_the_features() -> None:
    manifest = make_manifest()
    client = patient(manifest, require_features=True)
    with pytest.raises(InputRejectedError, match="feature_digest"):
        client.score("mock-model", ROW)
    assert not client.transport.requests
    assert client.score("mock-model", ROW, feature_digest=manifest.features.digest).ok
    assert client.score("mock-model", ROW, columns=manifest.features.columns).ok


def test_old_events_are_stale_and_fallbacks_are_labelled() -> None:
    client = mock_client(make_manifest(), max_age_ms=1_000)
    assert client.score("mock-model", ROW, newest_event_ns=time.time_ns() - 10**10).status == "STALE"
    assert not client.transport.requests
    client = patient(make_manifest(), [TransportError("gone")], fallback="flat")
    signal = client.score("mock-model", ROW)
    assert (signal.status, signal.fallback) == ("FALLBACK", "flat")


def test_an_entry_may_look_at_the_request() -> None:
    client = patient(make_manifest(), then=lambda request: UP_ANSWER if len(request.tensors) == 1 else FLAT_ANSWER)
    client.score("mock-model", np.array([[1, 2, 3]], np.float32))
    np.testing.assert_array_equal(client.transport.inputs()["features"], [[1, 2, 3]])


def test_rows_of_their_own() -> None:
    client = patient(make_manifest(), [Answer([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])])
    assert client.score("mock-model", np.zeros((2, 3), np.float32)).decision == ("down", "up")


def test_windows_and_states() -> None:
    window, stateful = make_manifest("w", window=4), make_manifest("s", state=(1, 2))
    client = patient([window, stateful], [FLAT_ANSWER, FLAT_ANSWER, Answer(state={"hidden": np.full((1, 1, 2), 9)})])
    assert client.score("w", np.zeros((2, 4, 3), np.float32)).state is None
    first = client.score("s", {"features": ROW, "hidden": np.zeros((1, 1, 2), np.float32)})
    assert first.state is not None
    np.testing.assert_array_equal(first.state["hidden"], np.ones((1, 1, 2)))
    second = client.score("s", {"features": ROW, **first.state})
    assert second.state is not None
    np.testing.assert_array_equal(second.state["hidden"], np.full((1, 1, 2), 9))


def test_a_made_manifest_survives_being_written_and_read() -> None:
    for manifest in (make_manifest(), make_manifest(window=3), make_manifest(state=(2, 5)), make_manifest(stride=4)):
        again = parse_manifest(canonical_json(manifest.stored()))
        assert again.digest() == manifest.digest()
        assert again.classes == CLASSES


def test_warming_takes_nothing_from_the_script() -> None:
    client = mock_client(make_manifest())
    assert [each.error for each in client.warm()] == [None]
    assert not client.transport.requests
    with pytest.raises(UsageError, match="deadline_ms"):
        client.warm(deadline_ms=0)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UsageError, match="transport"):
        mock_client(make_manifest(), transport="http")


def test_nothing_of_tickserve_imports_it(root: Path) -> None:
    folders = ("tickserve", "market", "models", "export", "training", "serving", "loadtest", "monitoring")
    for path in (path for folder in folders for path in (root / folder).rglob("*.py")):
        if path != root / "tickserve" / "testing.py":
            assert "tickserve.testing" not in path.read_text(), path


def test_it_needs_no_extra() -> None:
    heavy = ("numba", "onnxruntime", "grpc", "torch")
    code = f"import sys, tickserve.testing; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
