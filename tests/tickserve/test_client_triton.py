"""The client against the real Triton, over both transports: right numbers, and every refusal a server can give."""

from __future__ import annotations

import os
import signal as signals
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tickserve.client import Client, InferRequest, Tensor
from tickserve.client._http import HttpTransport
from tickserve.client._url import parse_endpoint
from tickserve.errors import (
    DeadlineExceededError,
    ModelNotFoundError,
    ProtocolError,
    ServerRejectedError,
    TransportError,
    UsageError,
)
from tickserve.manifest import GOLDEN_NAME, load_manifest

MODEL = "hand-l1-gbdt"
TRANSPORTS = ("http", "grpc")
SECONDS_MS = 5_000  # where a test is not about time


def url_of(triton: Any, transport: str) -> str:
    return str(triton.urls[TRANSPORTS.index(transport)])


@pytest.fixture(params=TRANSPORTS)
def client(request: pytest.FixtureRequest, triton: Any) -> Iterator[Client]:
    with Client(url_of(triton, request.param), manifest=triton.folder, deadline_ms=SECONDS_MS) as opened:
        yield opened


def test_the_number_is_researchs_with_its_proof(client: Client, triton: Any) -> None:
    manifest = load_manifest(triton.folder)
    with np.load(triton.folder / GOLDEN_NAME, allow_pickle=False) as golden:
        rows, expected, score = golden["features"], golden["probabilities"], golden["score"]
    assert np.isnan(rows).any()
    for batch in range(1, 9):
        signal = client.score(MODEL, rows[:batch], newest_event_ns=time.time_ns(), columns=manifest.features.columns)
        assert signal.ok
        assert np.allclose(signal.probabilities, expected[:batch], rtol=1e-5, atol=1e-6)
        assert np.allclose(signal.score, score[:batch, 0], rtol=1e-5, atol=1e-6)
        assert signal.decision == tuple(manifest.classes[k] for k in expected[:batch].argmax(axis=1))
        assert (signal.model, signal.version) == (MODEL, 1)
        assert (signal.bundle_digest, signal.bundle_id) == (manifest.digest(), manifest.bundle_id())
        assert signal.feature_digest == manifest.features.digest
        assert list(signal.stage_us) == ["check", "send_wait", "decode", "total"]
        assert sum(list(signal.stage_us.values())[:3]) <= signal.stage_us["total"]
        assert signal.event_age_us is not None
        assert 0 < signal.event_age_us < 1e3 * SECONDS_MS
        assert signal.flags == ()


def test_both_transports_give_the_same_bits(triton: Any, rows: np.ndarray) -> None:
    answers = []
    for url in triton.urls:
        with Client(url, manifest=triton.repository, deadline_ms=SECONDS_MS) as client:
            answers.append(client.score(MODEL, {"features": rows}).probabilities)
    assert answers[0] is not None
    assert np.array_equal(answers[0], answers[1])


def test_layouts_in_memory_do_not_change_the_number(client: Client, rows: np.ndarray) -> None:
    plain = client.score(MODEL, rows).probabilities
    frozen = rows.copy()
    frozen.setflags(write=False)
    for array in (np.asfortranarray(rows), np.repeat(rows, 2, axis=0)[::2], frozen):
        assert np.array_equal(client.score(MODEL, array).probabilities, plain)


def test_a_value_out_of_range_is_answered_and_flagged(client: Client, rows: np.ndarray) -> None:
    rows[1, 2] = 40.0
    signal = client.score(MODEL, rows, newest_event_ns=time.time_ns() + 10**10)
    assert signal.ok
    assert signal.flags == ("out_of_range:flow", "event_in_future")


def test_request_ids_come_back(client: Client, rows: np.ndarray) -> None:
    for identity in ("a", "x" * 256, 'quote " back \\ slash', "größe ✓", "{}[]:,"):
        assert client.score(MODEL, rows, request_id=identity).request_id == identity
    assert client.score(MODEL, rows).request_id != client.score(MODEL, rows).request_id


def test_unknown_versions_and_models(client: Client, triton: Any, rows: np.ndarray, make_manifest: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="version 99") as caught:
        client.score(MODEL, rows, version=99, request_id="r1")
    assert (caught.value.model, caught.value.request_id) == (MODEL, "r1")
    with (
        Client(triton.http, manifest=make_manifest(name="nobody"), deadline_ms=SECONDS_MS) as other,
        pytest.raises(ModelNotFoundError),
    ):
        other.score("nobody", rows)
    assert client.score(MODEL, rows).ok


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_another_bundle_than_the_pinned_one_gives_no_number(
    triton: Any, transport: str, rows: np.ndarray, make_manifest: Any
) -> None:
    pinned = make_manifest(family="lstm")  # same tensors, another bundle
    with (
        Client(url_of(triton, transport), manifest=pinned, deadline_ms=SECONDS_MS) as client,
        pytest.raises(ProtocolError, match="another model than the pinned one") as caught,
    ):
        client.score(MODEL, rows)
    assert caught.value.expected == str(pinned.bundle_id())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_outputs_that_differ_from_the_manifest(triton: Any, transport: str, rows: np.ndarray) -> None:
    served = load_manifest(triton.folder)
    extra = served.outputs[0].model_copy(update={"name": "more"})
    pinned = served.model_copy(update={"outputs": (*served.outputs, extra), "export": None})
    with (
        Client(url_of(triton, transport), manifest=pinned, deadline_ms=SECONDS_MS) as client,
        pytest.raises(ProtocolError, match="wrong output"),
    ):
        client.score(MODEL, rows)


def raw(triton: Any, shape: tuple[int, ...], size: int, *, name: str = "features", dtype: str = "FP32") -> Any:
    """A request our own checks would stop, to see the server refuse it and stay up."""
    transport = HttpTransport(parse_endpoint(triton.http, None))
    try:
        tensors = (Tensor(name, dtype, shape, bytes(size)),)
        return transport.infer(InferRequest(MODEL, None, "raw", 10**6, tensors), time.monotonic_ns() + 5 * 10**9)
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((1, 4), 12, {}),
        ((1, 4), 20, {}),
        ((1, 4), 0, {}),
        ((-1, 4), 16, {}),
        ((1, -4), 16, {}),
        ((1, 5), 20, {}),
        ((4,), 16, {}),
        ((9, 4), 144, {}),
        ((2**40, 4), 16, {}),
        ((1, 4), 16, {"name": "other"}),
        ((1, 4), 32, {"dtype": "FP64"}),
        ((1, 4), 16, {"dtype": "NONE"}),
    ],
)
def test_the_server_refuses_what_reaches_it_and_goes_on(
    triton: Any, client: Client, rows: np.ndarray, shape: tuple[int, ...], size: int, options: dict[str, str]
) -> None:
    with pytest.raises(ServerRejectedError):
        raw(triton, shape, size, **options)
    assert client.score(MODEL, rows).ok


def test_a_closed_port_is_a_transport_error(client: Client, triton: Any, rows: np.ndarray) -> None:
    client.close()
    with pytest.raises(UsageError, match="closed"):
        client.score(MODEL, rows)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_wrong_port_of_a_live_server(triton: Any, transport: str, rows: np.ndarray) -> None:
    swapped = f"grpc://{triton.http}" if transport == "grpc" else triton.grpc
    with Client(swapped, manifest=triton.folder, deadline_ms=2_000) as client:
        with pytest.raises((TransportError, ProtocolError, DeadlineExceededError, ServerRejectedError)) as caught:
            client.score(MODEL, rows)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stopped_server_costs_the_deadline_and_no_more(triton: Any, transport: str, rows: np.ndarray) -> None:
    with Client(url_of(triton, transport), manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
        assert client.score(MODEL, rows).ok
        os.kill(triton.pid, signals.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                client.score(MODEL, rows, deadline_ms=100)
            taken = time.monotonic() - began
        finally:
            os.kill(triton.pid, signals.SIGCONT)
        assert 0.09 < taken < 0.2  # deadline + 10 % on an idle machine; these share theirs
        assert client.score(MODEL, rows).ok


class Tunnel:
    """A proxy whose connections go dark on demand: their bytes are taken and lost. New ones work."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._dark, self._sockets = (host, int(port)), threading.Event(), list[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def go_dark(self) -> None:
        self._dark.set()
        self._dark = threading.Event()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, far = self._listener.accept()[0], socket.create_connection(self._target)
                self._sockets += (near, far)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(*pair, self._dark), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, dark: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if not dark.is_set():
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_dead_path_is_left_after_one_deadline(triton: Any, transport: str, rows: np.ndarray) -> None:
    tunnel = Tunnel(triton.http if transport == "http" else triton.grpc)
    try:
        with Client(tunnel.address, manifest=triton.folder, transport=transport, deadline_ms=SECONDS_MS) as client:
            with ThreadPoolExecutor(8) as threads:
                assert all(threads.map(lambda _: client.score(MODEL, rows).ok, range(80)))
            tunnel.go_dark()
            failures = 0
            while failures < 20:
                try:
                    assert client.score(MODEL, rows, deadline_ms=250).ok
                    break
                except (DeadlineExceededError, TransportError):
                    failures += 1
            assert failures == 1
            assert client.score(MODEL, rows).ok
    finally:
        tunnel.close()


def test_a_microsecond(client: Client, rows: np.ndarray) -> None:
    assert client.score(MODEL, rows).ok
    with pytest.raises(DeadlineExceededError):
        client.score(MODEL, rows, deadline_ms=0.001)
    assert client.score(MODEL, rows).ok


def test_sixty_four_threads_get_their_own_answers(client: Client) -> None:
    inputs = np.random.default_rng(7).uniform(-4, 4, (64, 4)).astype(np.float32)
    alone = [client.score(MODEL, row[np.newaxis]).probabilities for row in inputs]

    def score(index: int) -> bool:
        return all(
            np.allclose(client.score(MODEL, inputs[index : index + 1]).probabilities, alone[index], atol=1e-6)
            for _ in range(10)
        )

    with ThreadPoolExecutor(64) as threads:
        assert all(threads.map(score, range(64)))


FORK = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from tickserve.client import Client

url, folder = sys.argv[1:3]
rows = np.zeros((1, 4), np.float32)
client = Client(url, manifest=Path(folder), deadline_ms=5_000)
first = client.score("hand-l1-gbdt", rows)
child = os.fork()
if not child:
    code = 1
    try:
        if client._transport._transport._pool._idle:
            os._exit(5)  # the parent's connections must be gone before any thread of ours can take one
        with ThreadPoolExecutor(8) as threads:
            ids = set(threads.map(lambda _: client.score("hand-l1-gbdt", rows).request_id, range(50)))
        code = 0 if len(ids) == 50 and not any(i.startswith(first.request_id[:8]) for i in ids) else 2
    finally:
        os._exit(code)
assert all(client.score("hand-l1-gbdt", rows).ok for _ in range(50))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
client.close()
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_forked_child_reconnects_and_its_parent_goes_on(triton: Any, transport: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, url_of(triton, transport), str(triton.folder)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "0", done.stderr


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_descriptor_is_left_behind(triton: Any, rows: np.ndarray) -> None:
    before = descriptors()
    for _ in range(5):
        with Client(triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
            client.score(MODEL, rows)
            with pytest.raises(ModelNotFoundError):
                client.score(MODEL, rows, version=99)
            with pytest.raises(DeadlineExceededError):
                client.score(MODEL, rows, deadline_ms=0.05)
    looks = []
    for _ in range(5):  # the supervisors of the servers open connections for a moment
        looks.append(descriptors())
        time.sleep(0.01)
    assert min(looks) <= before


def test_importing_the_client_loads_nothing_heavy() -> None:
    heavy = ("torch", "xgboost", "polars", "ray", "pandas", "grpc", "tritonclient", "numba", "onnxruntime", "google")
    code = (
        "import sys, tickserve, tickserve.client, tickserve.signal; "
        "tickserve.client.Client('127.0.0.1:1').close(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_no_lone_request_waits_for_the_batcher_to_wake_by_itself(triton: Any, rows: np.ndarray) -> None:
    """Triton 24.10 with a default_queue_policy leaves requests lying for its 500 ms idle wait (server issue 8870)."""
    with Client(triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
        slowest = max(client.score(MODEL, rows).stage_us["total"] for _ in range(2_000))
    assert slowest < 400_000
