"""More bad requests to the real server: negative and overflowing shapes, calls that are given up, what an error tells.

Numbers are the rows of the project's list of bad inputs; tests/serving/test_bad_wire.py has the others.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2

from monitoring.triton_metrics import ModelCounts, scrape
from serving.embedded import EmbeddedTriton
from serving.golden import check_golden
from tests.serving.conftest import ANY_PORTS, FEATURES, Tiny, edit_config, pending, publish_tiny
from tests.serving.test_bad_wire import REFUSED
from tests.waiting import settled, wait_until
from tickserve.client import Client

METHOD = "/inference.GRPCInferenceService/ModelInfer"
# What is cancelled in a queue is cancelled long before the wait ends, also where the machine stands still for a moment.
WAIT_S = 5.0
ROW = np.full((1, FEATURES), 0.25, np.float32)


@dataclass(frozen=True)
class Wired:
    """A server with a model that answers at once and one, `patient`, whose queue waits `WAIT_S` for company."""

    server: EmbeddedTriton
    models: tuple[Tiny, Tiny]

    def post(self, body: bytes, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.server.http_url, timeout=10)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("POST", "/v2/models/tiny/infer", body, named)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def infer(self, request: service_pb2.ModelInferRequest) -> tuple[str, str]:
        with grpc.insecure_channel(self.server.grpc_url) as channel:
            try:
                answer = channel.unary_unary(METHOD)(request.SerializeToString(), timeout=10)
            except grpc.RpcError as error:
                return error.code().name, error.details()
        return "OK", service_pb2.ModelInferResponse.FromString(answer).id


@pytest.fixture(scope="module")
def wired(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wired]:
    folder = tmp_path_factory.mktemp("wired")
    models = tuple(publish_tiny(folder / "models", name, seed) for seed, name in enumerate(("tiny", "patient"), 1))

    def wait_for_company(config: object) -> None:
        batching = config.dynamic_batching  # type: ignore[attr-defined]
        batching.preferred_batch_size[:] = [64]
        batching.max_queue_delay_microseconds = int(WAIT_S * 1e6)

    edit_config(folder / "models" / "patient", wait_for_company)
    with EmbeddedTriton(folder / "models", ANY_PORTS, log=folder / "triton.log") as server:
        yield Wired(server, models)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def server_is_right_afterwards(wired: Wired) -> Iterator[None]:
    pid = wired.server.pid
    yield
    assert wired.server.healthy
    assert wired.server.pid == pid
    check_golden(wired.server.http_url, "tiny", 1, wired.models[0].path)


def head(shape: tuple[int, ...], size: int | None, rows: np.ndarray = ROW) -> bytes:
    """A request's JSON: with `size`, of tensors that follow in binary."""
    one: dict[str, object] = {"name": "features", "shape": list(shape), "datatype": "FP32"}
    if size is None:
        one["data"] = rows.ravel().tolist()
    else:
        one["parameters"] = {"binary_data_size": size}
    return json.dumps({"inputs": [one]}).encode()


def message(
    shape: tuple[int, ...], size: int = 32, names: tuple[str, ...] = ("features",), **more: str
) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(**{"model_name": "tiny", **more})
    for name in names:
        request.inputs.add(name=name, datatype="FP32", shape=shape)
        request.raw_input_contents.append(bytes(size))
    return request


NEGATIVE = [(-1, FEATURES), (-1, -FEATURES), (1, -FEATURES), (-2, FEATURES), (-(2**63), FEATURES), (-(2**61), FEATURES)]
# Sizes whose product with the row is what 32 bytes hold, once 64 bits are full: the server's own check lets them pass.
OVERFLOWING = [(2**61, FEATURES), (2**62, FEATURES), (2**33, FEATURES)]


@pytest.mark.parametrize("shape", [*NEGATIVE, *OVERFLOWING], ids=str)
@pytest.mark.parametrize("size", [0, 32])
def test_negative_and_overflowing_dimensions(wired: Wired, shape: tuple[int, ...], size: int) -> None:
    """Row 9, in the binary protocol and over gRPC, with and without the bytes of one row."""
    text = head(shape, size)
    status, answer = wired.post(text + bytes(size), Inference_Header_Content_Length=str(len(text)))
    assert status in (400, 500)
    assert json.loads(answer)["error"]
    code, detail = wired.infer(message(shape, size))
    assert code in ("INVALID_ARGUMENT", "INTERNAL")
    assert detail


@pytest.mark.parametrize("shape", NEGATIVE, ids=str)
def test_negative_dimensions_in_json(wired: Wired, shape: tuple[int, ...]) -> None:
    """Row 9. Only negative ones: a shape that claims too much kills this build (the test at the end of this file)."""
    status, answer = wired.post(head(shape, None))
    assert status in (400, 500)
    assert "shape" in json.loads(answer)["error"]


def test_neighbours_of_an_impossible_shape_get_their_own_answers(wired: Wired) -> None:
    """Row 9: what passes the server's own check is batched with good rows; they are right all the while."""
    tiny, done, wrong, right = wired.models[0], threading.Event(), [], []
    rows = np.random.default_rng(9).normal(size=(4, 1, FEATURES)).astype(np.float32)

    def ask(row: np.ndarray) -> None:
        truth = tiny.research(row)
        with Client(wired.server.http_url, manifest=tiny.path, deadline_ms=5_000) as client:
            while not done.is_set():
                answer = client.score("tiny", row).probabilities
                (right if np.allclose(answer, truth, atol=1e-5) else wrong).append(answer)

    callers = [threading.Thread(target=ask, args=(row,)) for row in rows]
    for caller in callers:
        caller.start()
    try:
        for _ in range(20):
            for shape in (*NEGATIVE, *OVERFLOWING):
                assert wired.infer(message(shape))[0] != "OK"
    finally:
        done.set()
        for caller in callers:
            caller.join()
    assert len(right) > 20
    assert wrong == []


@pytest.mark.parametrize("names", [(), ("features", "extra"), ("features", "features"), ("other",)], ids=str)
def test_missing_and_extra_tensors_over_grpc(wired: Wired, names: tuple[str, ...]) -> None:
    """Rows 1 and 2."""
    code, detail = wired.infer(message((1, FEATURES), names=names))
    assert code == "INVALID_ARGUMENT"
    assert "input" in detail


@pytest.mark.parametrize("identifier", ["a\r\nX-Evil: 1", "\x00\x01\x1b[31m", "é" * 1000, "x" * 10_000], ids=ascii)
def test_request_ids_over_grpc(wired: Wired, identifier: str) -> None:
    """Row 24: it comes back inside the message, up to a NUL, or not at all."""
    code, echoed = wired.infer(message((1, FEATURES), id=identifier))
    assert code == "OK"
    assert echoed in (identifier, "")


@pytest.mark.parametrize("value", [np.inf, -np.inf, 3e38])
def test_infinite_and_enormous_values_on_the_wire(wired: Wired, value: float) -> None:
    """Row 13: Triton scores them, to no number; our client refuses infinities, and a number that is none."""
    text = head((1, FEATURES), 32)
    row = np.full((1, FEATURES), value, np.float32)
    status, answer = wired.post(text + row.tobytes(), Inference_Header_Content_Length=str(len(text)))
    assert (status, "NaN" in answer) == (http.HTTPStatus.OK, True)


def test_no_error_shows_a_path_or_the_secret(wired: Wired) -> None:
    """Whatever is refused: not where the repository, the server or Python is, nor what opens the closed APIs."""
    said = [wired.post(sent)[1] for sent, _ in REFUSED.values()]
    said += [wired.infer(message(shape))[1] for shape in (*NEGATIVE, *OVERFLOWING, (1,), (65, FEATURES))]
    said += [wired.infer(message((1, FEATURES), model_name=name))[1] for name in ("nobody", "../tiny", "/etc/passwd")]
    folder = wired.models[0].path
    secrets = [wired.server.credential[1], str(folder), str(folder.parents[1]), str(Path.home()), "site-packages"]
    assert len([text for text in said if text]) > 30
    for text in said:
        assert not [secret for secret in secrets if secret in text], text


def held(wired: Wired) -> int:
    """The server's open descriptors, connections among them."""
    return psutil.Process(wired.server.pid).num_fds()


def settles(measure: Callable[[], int], limit: int, within_s: float = 20) -> int:
    """What `measure` gives once it is at most `limit`, or in the end."""
    until = time.monotonic() + within_s
    while (now := measure()) > limit and time.monotonic() < until:
        time.sleep(0.05)
    return now


def stopped(wired: Wired, then: Callable[[], object]) -> None:
    """Do `then` while the server is held, so that what it sent waits in front of it."""
    os.kill(wired.server.pid, signal.SIGSTOP)
    try:
        then()
    finally:
        os.kill(wired.server.pid, signal.SIGCONT)


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_connection_closed_before_processing(wired: Wired, reset: bool) -> None:
    """Row 47, over HTTP: forty whole requests whose senders are gone before the server reads them."""
    text = head((1, FEATURES), None)
    request = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)
    address = ("127.0.0.1", int(wired.server.http_url.rpartition(":")[2]))
    before = held(wired)

    def hang_up() -> None:
        for _ in range(40):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(request)
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    stopped(wired, hang_up)
    assert settles(lambda: held(wired), before) <= before


def cancel_all(wired: Wired, queued: float) -> list[grpc.StatusCode]:
    """Send forty to `patient` and cancel them once `queued` requests are in its queue; the codes the caller sees."""
    request = message((1, FEATURES), model_name="patient")
    with grpc.insecure_channel(wired.server.grpc_url) as channel:
        grpc.channel_ready_future(channel).result(10)
        call = channel.unary_unary(METHOD)
        waiting = [call.future(request.SerializeToString(), timeout=20) for _ in range(40)]
        assert wait_until(lambda: pending(wired.server, "patient") >= queued, WAIT_S)
        for one in waiting:
            one.cancel()
        return [one.code() for one in waiting]


def test_calls_cancelled_before_processing_over_grpc(wired: Wired) -> None:
    """Row 47: cancelled before the server reads them."""
    before = held(wired)
    with grpc.insecure_channel(wired.server.grpc_url) as channel:
        call = channel.unary_unary(METHOD)
        call(message((1, FEATURES)).SerializeToString(), timeout=10)

        def cancel() -> None:
            waiting = [call.future(message((1, FEATURES)).SerializeToString(), timeout=20) for _ in range(40)]
            for one in waiting:
                one.cancel()
            assert {one.code() for one in waiting} == {grpc.StatusCode.CANCELLED}

        stopped(wired, cancel)
        assert call(message((1, FEATURES)).SerializeToString(), timeout=10)
    assert settles(lambda: held(wired), before) <= before


def counted(wired: Wired, model: str) -> ModelCounts:
    return scrape(wired.server.metrics_url)[model, "1"]


def test_calls_cancelled_in_the_queue_are_not_scored_and_are_counted(wired: Wired) -> None:
    """Row 47: the model waits for company, so all are still in its queue; Triton counts each under CANCELED."""
    before = settled(lambda: counted(wired, "patient"))
    assert set(cancel_all(wired, pending(wired.server, "patient") + 40)) == {grpc.StatusCode.CANCELLED}
    all_told = before.failures["CANCELED"] + 40
    after = settled(lambda: counted(wired, "patient"), lambda now: now.failures["CANCELED"] >= all_told, within_s=10)
    assert after.failures["CANCELED"] == all_told
    assert after.rows == before.rows
    check_golden(wired.server.http_url, "patient", 1, wired.models[1].path)


def test_what_triton_counts_of_a_refusal(wired: Wired) -> None:
    """Nothing before the queue, and what the backend refuses as a failure: watch the clients' counters too."""
    before = settled(lambda: counted(wired, "tiny"))
    for shape in ((1, FEATURES + 1), (FEATURES,), (65, FEATURES), (-1, FEATURES)):
        assert wired.infer(message(shape))[0] == "INVALID_ARGUMENT"
    assert settled(lambda: counted(wired, "tiny")) == before
    assert wired.infer(message(OVERFLOWING[0]))[0] == "INVALID_ARGUMENT"
    after = settled(lambda: counted(wired, "tiny"), lambda now: now != before)
    assert (after.requests_ok, after.requests_failed) == (before.requests_ok, before.requests_failed + 1)


def test_a_call_that_was_not_cancelled_among_those_that_were(wired: Wired) -> None:
    """Row 47: the one that stays in the queue with them gets its own answer."""
    patient = wired.models[1]
    cancelling = threading.Thread(target=cancel_all, args=(wired, pending(wired.server, "patient") + 41))
    with Client(f"grpc://{wired.server.grpc_url}", manifest=patient.path, deadline_ms=10_000) as client:
        cancelling.start()
        answers = [client.score("patient", ROW).probabilities for _ in range(3)]
        cancelling.join()
    for answer in answers:
        np.testing.assert_allclose(answer, patient.research(ROW), atol=1e-5)


def test_a_shape_that_claims_too_much_in_json_ends_this_build_and_is_told(repository: Path) -> None:
    """A known limit (docs/architecture.md): it makes room for what JSON claims before it counts what came."""
    server = EmbeddedTriton(repository, ANY_PORTS)
    server.start()
    try:
        connection = http.client.HTTPConnection(server.http_url, timeout=20)
        connection.request("POST", "/v2/models/tiny/infer", head((2**63 - 1, FEATURES), None))
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            connection.getresponse()
        connection.close()
        until = time.monotonic() + 20
        while server.problem is None and time.monotonic() < until:
            time.sleep(0.05)
        assert server.problem == "the server ended by itself (signal 6)"
    finally:
        server.stop()
    assert server.log is not None
    server.log.unlink()
