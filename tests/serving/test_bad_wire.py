"""Bad requests on the wire: each gets an error or a closed connection, and the next good request is right.

Numbers in the ids are the rows of the project's list of bad inputs.
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import random
import socket
import struct
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from serving.arguments import BODY_LIMIT_BYTES
from serving.control import GRPC_HEADER_PREFIX
from serving.embedded import EmbeddedTriton
from serving.golden import check_golden
from serving.process import SHARED_MEMORY
from tests.serving.conftest import FEATURES, STUBS, Running, publish_tiny

GOOD_ROW = [0.1] * FEATURES
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(autouse=True)
def server_is_right_afterwards(running: Running) -> Iterator[None]:
    pid = running.server.pid
    yield
    assert running.server.running
    assert running.server.pid == pid
    for tiny in (running.tiny, running.other):
        check_golden(running.server.http_url, tiny.name, 1, tiny.path)


def post(running: Running, body: bytes, path: str = "/v2/models/tiny/infer", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(running.server.http_url, timeout=10)
    try:
        connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    finally:
        connection.close()


def tensor(data: object, shape: list[int] | None = None, dtype: str = "FP32", name: str = "features") -> dict:
    return {"name": name, "shape": shape or [1, FEATURES], "datatype": dtype, "data": data}


def body(*tensors: dict, **more: object) -> bytes:
    return json.dumps({"inputs": tensors, **more}).encode()


EXTRA = {"name": "extra", "shape": [1, 1], "datatype": "FP32", "data": [1]}
REFUSED = {
    "1 missing tensor": (body(), "features"),
    "1 no inputs at all": (b"{}", "inputs"),
    "1 another name": (body(tensor(GOOD_ROW, name="window")), "window"),
    "2 extra tensor": (body(tensor(GOOD_ROW), EXTRA), "extra"),
    "2 the same tensor twice": (body(tensor(GOOD_ROW), tensor(GOOD_ROW)), "already exists"),
    "3 INT64": (body(tensor([1] * FEATURES, dtype="INT64")), "FP32"),
    "3 FP64": (body(tensor(GOOD_ROW, dtype="FP64")), "FP32"),
    "3 BYTES": (body(tensor(["a"] * FEATURES, dtype="BYTES")), "FP32"),
    "3 unknown type": (body(tensor(GOOD_ROW, dtype="FP99")), "datatype"),
    "4 rank 1": (body(tensor(GOOD_ROW, [FEATURES])), "shape"),
    "4 rank 3": (body(tensor(GOOD_ROW, [1, FEATURES, 1])), "shape"),
    "5 one feature too few": (body(tensor(GOOD_ROW[:-1], [1, FEATURES - 1])), "shape"),
    "5 one feature too many": (body(tensor([*GOOD_ROW, 1], [1, FEATURES + 1])), "shape"),
    "7 batch 0": (body(tensor([], [0, FEATURES])), "features"),
    "8 batch over the maximum": (body(tensor(GOOD_ROW * 65, [65, FEATURES])), "batch-size must be <= 64"),
    "9 negative dimension": (body(tensor(GOOD_ROW, [-1, FEATURES])), "shape"),
    "9 a dimension that overflows": (body(tensor(GOOD_ROW, [2**62, FEATURES])), "features"),
    "11 data not matching shape": (body(tensor(GOOD_ROW[:-1])), "data"),
    "34 unclosed nesting": (b"[" * 100_000, "JSON"),
    "not JSON": (b"hello", "JSON"),
    "not UTF-8": (body(tensor(GOOD_ROW)).replace(b"features", b"\xff\xfe"), "input"),
    "unknown output": (body(tensor(GOOD_ROW), outputs=[{"name": "nope"}]), "nope"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(running: Running, case: str) -> None:
    sent, named = REFUSED[case]
    status, text = post(running, sent)
    assert status in (400, 500)
    assert named in json.loads(text)["error"]


def test_json_nested_100k_deep(running: Running) -> None:
    """Row 34. Without a larger stack this build dies here (see serving/process.py)."""
    nested = b"[" * 100_000 + b"1" + b"]" * 100_000
    status, _ = post(running, body(tensor("DATA")).replace(b'"DATA"', nested))
    assert status in (400, 500)


@pytest.mark.parametrize(
    ("sent", "declared"),
    [(31, 32), (31, 31), (33, 33), (33, 32), (0, 0), (0, 32), (64, 32), (32, -1), (32, 2**63)],
)
def test_bytes_not_matching_shape(running: Running, sent: int, declared: int) -> None:
    """Row 11, in the binary protocol."""
    head = {"name": "features", "shape": [1, FEATURES], "datatype": "FP32"}
    head["parameters"] = {"binary_data_size": declared}
    text = json.dumps({"inputs": [head]}).encode()
    status, answer = post(running, text + bytes(sent), Inference_Header_Content_Length=str(len(text)))
    assert status in (400, 500)
    assert "features" in answer or "binary_data_size" in answer or "additional input data" in answer


@pytest.mark.parametrize("length", ["-1", "0", "5", "abc", "99999999999", str(2**64 - 1), str(2**200)])
def test_absurd_header_length(running: Running, length: str) -> None:
    """Row 36."""
    status, answer = post(running, body(tensor(GOOD_ROW)), Inference_Header_Content_Length=length)
    assert status in (400, 500)
    assert json.loads(answer)["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/nobody/infer",
        "/v2/models/tiny/versions/9/infer",
        "/v2/models/tiny/versions/0/infer",
        "/v2/models/tiny/versions/-1/infer",
        "/v2/models/tiny/versions/abc/infer",
        "/v2/models/tiny/versions/99999999999999999999/infer",
        "/v2/models/../x/infer",
        "/v2/models/..%2f..%2fetc/infer",
        "/v2/models//infer",
        "/v2/models/a%00b/infer",
        "/v2/models/%ff%fe/infer",
    ],
)
def test_unknown_models_versions_and_names(running: Running, path: str) -> None:
    """Rows 21 to 23."""
    status, _ = post(running, body(tensor(GOOD_ROW)), path)
    assert status in (400, 404)


def test_name_of_10_kb(running: Running) -> None:
    """Row 23: longer than this server's request line may be, so it hangs up."""
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        post(running, body(tensor(GOOD_ROW)), "/v2/models/" + "a" * 10_000 + "/infer")


@pytest.mark.parametrize("identifier", ["a\r\nX-Evil: 1", "\x00\x01\x1b[31m", "é" * 1000, "x" * 10_000])
def test_request_id_with_control_characters(running: Running, identifier: str) -> None:
    """Row 24: echoed inside JSON or refused, never as a header."""
    connection = http.client.HTTPConnection(running.server.http_url, timeout=10)
    connection.request("POST", "/v2/models/tiny/infer", body(tensor(GOOD_ROW), id=identifier))
    response = connection.getresponse()
    headers = dict(response.getheaders())
    text = response.read()
    connection.close()
    assert response.status in (200, 400)
    assert "X-Evil" not in headers
    assert json.loads(text)


def grpc_infer(running: Running, message: bytes) -> grpc.StatusCode:
    """Send raw bytes as a ModelInfer request."""
    with grpc.insecure_channel(running.server.grpc_url) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        try:
            call(message, timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def grpc_message(raw: bytes, shape: tuple[int, ...] = (1, FEATURES), dtype: str = "FP32", model: str = "tiny") -> bytes:
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="features", datatype=dtype, shape=shape)
    request.raw_input_contents.append(raw)
    return bytes(request.SerializeToString())


def test_truncated_protobuf(running: Running) -> None:
    """Row 32, cut at every length; and whole, to show that the message itself is good."""
    whole = grpc_message(np.array(GOOD_ROW, np.float32).tobytes())
    assert grpc_infer(running, whole) == grpc.StatusCode.OK
    for length in range(0, len(whole), 5):
        assert grpc_infer(running, whole[:length]) != grpc.StatusCode.OK, length


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (grpc_message(bytes(31)), "INVALID_ARGUMENT"),
        (grpc_message(bytes(32), shape=(FEATURES,)), "INVALID_ARGUMENT"),
        (grpc_message(bytes(0), shape=(0, FEATURES)), "INVALID_ARGUMENT"),
        (grpc_message(bytes(32), shape=(-1, FEATURES)), "INVALID_ARGUMENT"),
        (grpc_message(bytes(65 * 32), shape=(65, FEATURES)), "INVALID_ARGUMENT"),
        (grpc_message(bytes(64), dtype="INT64"), "INVALID_ARGUMENT"),
        (grpc_message(bytes(32), model="nobody"), "NOT_FOUND"),
        (grpc_message(bytes(32), model="../x"), "NOT_FOUND"),
        (grpc_message(bytes(32), model=""), "NOT_FOUND"),
    ],
    ids=["11 bytes", "4 rank", "7 batch 0", "9 negative", "8 over", "3 dtype", "21 unknown", "23 path", "23 empty"],
)
def test_refused_over_grpc(running: Running, message: bytes, code: str) -> None:
    assert grpc_infer(running, message).name == code


def test_a_small_gzip_bomb(running: Running) -> None:
    """Row 38: 8 MiB out of a few kilobytes. This build has no limit to what it unpacks: it stays on loopback."""
    packed = gzip.compress(b" " * BODY_LIMIT_BYTES + body(tensor(GOOD_ROW)))
    assert len(packed) < 20_000
    status, _ = post(running, packed, Content_Encoding="gzip")
    assert status in (http.HTTPStatus.OK, http.HTTPStatus.BAD_REQUEST)


def test_one_byte_over_the_body_limit_of_production(running: Running) -> None:
    """Row 39: production refuses it unread; this build does not know the option, reads it, and finds it wrong."""
    status, reason = post(running, body(tensor(GOOD_ROW)).ljust(BODY_LIMIT_BYTES + 1, b"x"))
    assert status >= http.HTTPStatus.BAD_REQUEST
    assert "error" in reason


FOREIGN_KEYS = {
    "reserved: a stub's own": lambda: f"/{next(SHARED_MEMORY.glob(f'tickserve-{os.getpid()}-*')).name}",
    "reserved: Triton's prefix": lambda: "/triton_python_backend_shm_region_1",
    "foreign": lambda: "/another-program",
    "path": lambda: "/../../etc/passwd",
    "empty": lambda: "",
}


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose models are scored by processes, which share memory with it."""
    folder = tmp_path_factory.mktemp("stubbed")
    tiny = publish_tiny(folder, "tiny", 1)
    with EmbeddedTriton(folder, STUBS) as server:
        yield Running(server, tiny, tiny)


@pytest.mark.parametrize("kind", FOREIGN_KEYS)
def test_shared_memory_of_others_is_refused(stubbed: Running, kind: str) -> None:
    """Row 43: whatever the key, nobody registers a region without the credential, over either protocol."""
    running, key = stubbed, FOREIGN_KEYS[kind]()
    region = json.dumps({"key": key, "offset": 0, "byte_size": 64}).encode()
    status, reason = post(running, region, "/v2/systemsharedmemory/region/mine/register")
    assert (status, "restricted" in reason) == (http.HTTPStatus.FORBIDDEN, True)
    with grpcclient.InferenceServerClient(running.server.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="restricted"):
            client.register_system_shared_memory("mine", key, 64)
        headers = {GRPC_HEADER_PREFIX + name: value for name, value in [running.server.credential]}
        assert not client.get_system_shared_memory_status(headers=headers).regions


@pytest.mark.parametrize("key", ["/no-such-region", "/../../etc/passwd", "../etc/passwd", ""])
def test_a_region_that_is_none_is_refused_to_whoever_asks(running: Running, key: str) -> None:
    """Row 43, with the credential: what is not there is not made, and a key is never a path."""
    region = json.dumps({"key": key, "offset": 0, "byte_size": 64}).encode()
    name, value = running.server.credential
    status, reason = post(running, region, "/v2/systemsharedmemory/region/none/register", **{name: value})
    assert status >= http.HTTPStatus.BAD_REQUEST
    assert "Unable to open shared memory region" in reason


@pytest.mark.parametrize("port", ["http_url", "grpc_url", "metrics_url"])
def test_random_bytes_on_every_port(running: Running, port: str) -> None:
    """Row 33: noise, half a request, and lengths no request has."""
    noise = random.Random(33)
    number = int(getattr(running.server, port).removeprefix("http://").split(":")[1].split("/")[0])
    request = b"POST /v2/models/tiny/infer HTTP/1.1\r\n"
    blobs = [noise.randbytes(4096) for _ in range(5)]
    blobs += [bytes(100), request, request + b"Content-Length: 99999999999999999999\r\n\r\nx"]
    blobs += [request + b"Content-Length: -5\r\n\r\nx", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + noise.randbytes(200)]
    for blob in blobs:
        with socket.create_connection(("127.0.0.1", number), timeout=10) as connection:
            connection.sendall(blob)
            # Reset instead of a polite end: a client that crashed.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
