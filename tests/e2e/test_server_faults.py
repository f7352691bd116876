"""Bad input through the client to the real server, over every transport: typed, counted once, the next call is right.

Numbers are the rows of the project's list of bad inputs.
"""

from __future__ import annotations

import math
import os
import signal as signals
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from benchmarks.relay import Relay
from serving.embedded import EmbeddedTriton
from tests.serving.conftest import ANY_PORTS, FEATURES, Tiny, publish_tiny
from tickserve.client import Client, Decision
from tickserve.errors import InputRejectedError, ModelNotFoundError, ProtocolError, RequestError, ServerRejectedError

TRANSPORTS = ("http", "grpc", "shm")
SECONDS_MS = 5_000
ROWS = np.random.default_rng(28).normal(size=(6, FEATURES)).astype(np.float32)
DIGEST = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Served:
    """A server and its one model."""

    server: EmbeddedTriton
    tiny: Tiny

    def address(self, transport: str) -> str:
        return f"grpc://{self.server.grpc_url}" if transport == "grpc" else self.server.http_url

    def client(self, transport: str, **options: Any) -> Client:
        if transport == "shm":
            options = {"transport": "shm", "credential": self.server.credential} | options
        settings = {"manifest": self.tiny.path, "deadline_ms": SECONDS_MS} | options
        return Client(self.address(transport), **settings)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("faults")
    tiny = publish_tiny(folder / "models", "tiny", 1)
    with EmbeddedTriton(folder / "models", ANY_PORTS, log=folder / "triton.log") as server:
        yield Served(server, tiny)


@pytest.fixture(params=TRANSPORTS)
def client(request: pytest.FixtureRequest, served: Served) -> Iterator[Client]:
    with served.client(request.param) as opened:
        yield opened


def right(client: Client, served: Served, rows: np.ndarray = ROWS) -> None:
    signal = client.score("tiny", rows)
    assert signal.ok
    np.testing.assert_allclose(signal.probabilities, served.tiny.research(np.array(rows)), atol=1e-5)  # type: ignore[arg-type]


LAYOUTS: dict[str, Callable[[], np.ndarray]] = {
    "fortran": lambda: np.asfortranarray(ROWS),
    "strided": lambda: np.repeat(ROWS, 2, axis=1)[:, ::2],
    "every other row": lambda: np.repeat(ROWS, 2, axis=0)[::2],
    "reversed": lambda: ROWS[::-1, ::-1],
    "broadcast": lambda: np.broadcast_to(ROWS[:1], (5, FEATURES)),
    "read-only": lambda: np.frombuffer(ROWS.tobytes(), np.float32).reshape(ROWS.shape),
    "unaligned": lambda: np.frombuffer(b"x" + ROWS.tobytes(), np.uint8)[1:].view(np.float32).reshape(ROWS.shape),
    "a field of records": lambda: np.array([(1, row) for row in ROWS], [("a", "u1"), ("b", "f4", FEATURES)])["b"],
    "subclass": lambda: ROWS.view(type("Sub", (np.ndarray,), {})),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_scored_as_it_reads(client: Client, served: Served, layout: str) -> None:
    """Row 28."""
    right(client, served, LAYOUTS[layout]())


NAN = math.nan
BAD: dict[str, tuple[dict[str, Any], type[RequestError]]] = {
    "1 missing": ({"inputs": {}}, InputRejectedError),
    "2 extra": ({"inputs": {"features": ROWS, "more": ROWS}}, InputRejectedError),
    "3 float64": ({"inputs": ROWS.astype(np.float64)}, InputRejectedError),
    "4 rank": ({"inputs": ROWS[0]}, InputRejectedError),
    "5 too few": ({"inputs": ROWS[:, :-1]}, InputRejectedError),
    "5 too many": ({"inputs": np.hstack([ROWS, ROWS])}, InputRejectedError),
    "6 permuted": ({"columns": [f"f{i}" for i in (1, 0, *range(2, FEATURES))]}, InputRejectedError),
    "6 another spec": ({"feature_digest": DIGEST}, InputRejectedError),
    "7 batch 0": ({"inputs": ROWS[:0]}, InputRejectedError),
    "8 batch over": ({"inputs": np.repeat(ROWS, 11, axis=0)}, InputRejectedError),
    "13 infinity": ({"inputs": np.full((1, FEATURES), np.inf, np.float32)}, InputRejectedError),
    "18 no time": ({"newest_event_ns": -1}, InputRejectedError),
    "21 unknown model": ({"model": "nobody"}, ModelNotFoundError),
    "22 unknown version": ({"version": 9}, ModelNotFoundError),
    "22 no version": ({"version": 0}, InputRejectedError),
    "23 path": ({"model": "../tiny"}, InputRejectedError),
    "23 NUL": ({"model": "tiny\0"}, InputRejectedError),
    "23 10 kB": ({"model": "t" * 10_000}, InputRejectedError),
    "24 control characters": ({"request_id": "a\r\nX: y"}, InputRejectedError),
    "27 deadline 0": ({"deadline_ms": 0}, InputRejectedError),
    "27 deadline NaN": ({"deadline_ms": NAN}, InputRejectedError),
    "28 big-endian": ({"inputs": ROWS.astype(">f4")}, InputRejectedError),
    "28 objects": ({"inputs": ROWS.astype(object)}, InputRejectedError),
    "a number that is none": ({"inputs": np.full((1, FEATURES), 3e38, np.float32)}, ProtocolError),
}
REACH_THE_SERVER = {"22 unknown version", "a number that is none"}


class Heard:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def decided(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_refusal_is_typed_counted_once_and_forgotten(served: Served, transport: str) -> None:
    """One failure of its type in the statistics and one decision for the journal each; the next call is right."""
    heard, expected = Heard(), Counter[str]()
    folder = str(served.tiny.path.parents[1])
    with served.client(transport, observer=heard) as client:
        for number, (options, error) in enumerate(BAD.values(), 1):
            with pytest.raises(error) as caught:
                client.score(**{"model": "tiny", "inputs": ROWS, **options})
            expected[type(caught.value).__name__] += 1
            said = str(caught.value)
            assert len(said) < 500
            assert not [secret for secret in (folder, served.server.credential[1], "site-packages") if secret in said]
            assert "\n" not in said
            right(client, served)
            assert client.statistics()["failures"] == expected
            assert client.statistics()["signals"] == {"OK": number}
            assert [d.error is None for d in heard.decisions[-2:]] == [False, True]
        assert len(heard.decisions) == 2 * len(BAD)
        (replica,) = client.statistics()["replicas"].values()
        assert replica["requests"] == len(BAD) + len(REACH_THE_SERVER), "what is refused is never sent"
        assert (replica["breaker"], replica["in_flight"]) == ("closed", 0)
    assert served.server.healthy


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_answer_that_comes_when_its_event_is_too_old_is_stale(served: Served, transport: str) -> None:
    """Row 17: fresh when it was sent, too old when the server, held for a while, answered."""
    with served.client(transport, max_age_ms=1_000) as client:
        assert client.score("tiny", ROWS, newest_event_ns=time.time_ns()).ok
        os.kill(served.server.pid, signals.SIGSTOP)
        waking = threading.Timer(1.6, os.kill, (served.server.pid, signals.SIGCONT))
        waking.start()
        try:
            signal = client.score("tiny", ROWS, newest_event_ns=time.time_ns())
        finally:
            waking.join()
        assert (signal.status, signal.score, signal.probabilities, signal.decision) == ("STALE", None, None, None)
        assert signal.event_age_us is not None
        assert signal.event_age_us > 1_000_000
        assert client.score("tiny", ROWS, newest_event_ns=time.time_ns()).ok


def test_a_value_far_outside_is_answered_and_flagged_on_every_transport(client: Client, served: Served) -> None:
    """Row 15."""
    rows = ROWS.copy()
    rows[2, 5] = 1_000.0
    signal = client.score("tiny", rows)
    assert (signal.status, signal.flags) == ("OK", ("out_of_range:f5",))
    np.testing.assert_allclose(signal.probabilities, served.tiny.research(rows), atol=1e-5)  # type: ignore[arg-type]


def test_nan_is_scored_as_the_manifest_declares(client: Client, served: Served) -> None:
    """Row 12: `native` reaches the model, which knows what to make of it; a manifest that says `reject` is held to."""
    rows = ROWS.copy()
    rows[1, :3] = np.nan
    right(client, served, rows)
    strict = served.tiny.manifest.model_copy(update={"nan_policy": "reject", "export": None})
    with (
        Client(served.server.http_url, manifest=strict) as other,
        pytest.raises(InputRejectedError, match="row 1, column 'f0'"),
    ):
        other.score("tiny", rows)


def loopback_of_ipv6() -> None:
    """Skips where this machine has no IPv6, and fails where CI must have it."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError as error:
        reason = f"no IPv6 loopback here: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.mark.parametrize("transport", ["http", "grpc"])
@pytest.mark.parametrize("form", ["[::1]:{0}", "{1}://[::1]:{0}", "{1}://[0:0::1]:{0}/", "{1}://localhost6:{0}"])
def test_ipv6_addresses(served: Served, transport: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 29: the server listens on IPv4 alone, so a relay stands on ::1 in front of it."""
    loopback_of_ipv6()
    real = socket.getaddrinfo

    def named(host: str, *rest: Any, **options: Any) -> Any:  # not every machine's hosts file has it
        return real("::1" if host == "localhost6" else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", named)
    target = served.server.grpc_url if transport == "grpc" else served.server.http_url
    with Relay(target, listen="::1:0") as relay:
        url = form.format(relay.address.rpartition(":")[2], transport)
        with Client(url, manifest=served.tiny.path, transport=transport, deadline_ms=SECONDS_MS) as client:  # type: ignore[arg-type]
            right(client, served)
            assert client.score("tiny", ROWS).replica in (url.partition("://")[2].rstrip("/") or url, url)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("form", ["{0}", "{1}://{0}", "{2}://{0}/", "{1}://localhost:{3}"])
def test_addresses_that_mean_the_same(served: Served, scheme: str, form: str) -> None:
    """Row 29: with a scheme in any case, with a slash, by name."""
    target = served.server.grpc_url if scheme == "grpc" else served.server.http_url
    url = form.format(target, scheme, scheme.upper(), target.rpartition(":")[2])
    with Client(url, manifest=served.tiny.path, transport=scheme, deadline_ms=SECONDS_MS) as client:  # type: ignore[arg-type]
        right(client, served)


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_many_more_bytes_than_a_request_has(served: Served, transport: str) -> None:
    """Row 39, past the client's own checks: 16 MiB where 32 bytes belong are refused, and the next call is right."""
    from tickserve.client._open import open_transport
    from tickserve.client._transport import InferRequest, Tensor

    wire = open_transport(served.address(transport), None)
    tensors = (Tensor("features", "FP32", (1, FEATURES), bytes(2**24)),)
    try:
        with pytest.raises(ServerRejectedError):
            wire.infer(InferRequest("tiny", None, "big", 10**7, tensors), time.monotonic_ns() + 10 * 10**9)
    finally:
        wire.close()
    with served.client(transport) as client:
        right(client, served)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_burst_of_nan_moves_nobody_elses_number(served: Served, transport: str) -> None:
    """Fault 34: rows of nothing but NaN, refused by one client and scored for another, beside good rows."""
    nothing = np.full((8, FEATURES), NAN, np.float32)
    wrong: list[Any] = []
    good: list[Any] = []
    strict = served.tiny.manifest.model_copy(update={"nan_policy": "reject", "export": None})
    burst_over = threading.Event()

    def ask() -> None:
        with served.client(transport) as client:
            while not burst_over.is_set():
                answer = client.score("tiny", ROWS).probabilities
                (good if np.allclose(answer, served.tiny.research(ROWS), atol=1e-5) else wrong).append(answer)

    callers = [threading.Thread(target=ask) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        with served.client(transport, manifest=strict, fallback="flat") as refusing, served.client(transport) as native:
            for _ in range(500):
                refused = refusing.score("tiny", nothing)
                assert (refused.status, refused.score, refused.probabilities) == ("REJECTED_INPUT", None, None)
                right(native, served, nothing)
            assert refusing.statistics()["signals"] == {"REJECTED_INPUT": 500}
            assert native.statistics()["failures"] == {}
    finally:
        burst_over.set()
        for caller in callers:
            caller.join()
    assert (wrong, len(good) > 10) == ([], True)
