"""The gRPC transport against a scripted server of gRPC's own: which error each status becomes, and what close does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tickserve.client import InferRequest, Tensor
from tickserve.client._grpc import GrpcTransport, _template, encode
from tickserve.client._url import parse_endpoint
from tickserve.errors import (
    DeadlineExceededError,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    RequestError,
    ServerRejectedError,
    TransportError,
    UsageError,
)

Script = Callable[[Any, grpc.ServicerContext], Any]
VALUES = np.array([[0.25, 0.25, 0.5]], np.float32)


@pytest.fixture
def server() -> Iterator[Callable[[Script], GrpcTransport]]:
    opened: list[Any] = []

    def start(script: Script) -> GrpcTransport:
        with_threads = grpc.server(ThreadPoolExecutor(4))
        method = grpc.unary_unary_rpc_method_handler(
            script,
            request_deserializer=service_pb2.ModelInferRequest.FromString,
            response_serializer=service_pb2.ModelInferResponse.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})
        with_threads.add_generic_rpc_handlers((service,))
        port = with_threads.add_insecure_port("127.0.0.1:0")
        with_threads.start()
        transport = GrpcTransport(parse_endpoint(f"grpc://127.0.0.1:{port}", None))
        opened.append((transport, with_threads))
        return transport

    yield start
    for transport, running in opened:
        transport.close()
        running.stop(0).wait(5)


def request(timeout_us: int = 1_000) -> InferRequest:
    return InferRequest("m", None, "abc", timeout_us, (Tensor("x", "FP32", (1, 4), bytes(16)),))


def ask(transport: GrpcTransport, ms: float = 5_000) -> Any:
    return transport.infer(request(), time.monotonic_ns() + int(ms * 1e6))


def reply(shape: tuple[int, ...] = (1, 3), version: str = "2", identity: str = "abc") -> Any:
    answer = service_pb2.ModelInferResponse(model_name="m", model_version=version, id=identity)
    answer.outputs.add(name="p", datatype="FP32", shape=shape)
    answer.raw_output_contents.append(VALUES.tobytes())
    return answer


def abort(code: grpc.StatusCode, details: str) -> Script:
    return lambda _, context: context.abort(code, details)


CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (CODE.NOT_FOUND, "Request for unknown model: 'm' version 9 is not found", ModelNotFoundError),
        (CODE.INVALID_ARGUMENT, "Request for unknown model: 'm' has no available versions", ModelNotFoundError),
        (CODE.INVALID_ARGUMENT, "unexpected shape for input 'x'", ServerRejectedError),
        (CODE.UNAVAILABLE, "Request for unknown model: 'm' version 1 is not at ready state", OverloadedError),
        (CODE.UNAVAILABLE, "Server is stopping, scheduler for model has stopped accepting", OverloadedError),
        (CODE.UNAVAILABLE, "Exceeds maximum queue size", OverloadedError),
        (CODE.UNAVAILABLE, "Request timeout expired", DeadlineExceededError),
        (CODE.UNAVAILABLE, "Socket closed", TransportError),
        (CODE.UNAVAILABLE, "GOAWAY received", TransportError),
        (CODE.UNAVAILABLE, "keepalive watchdog timeout", TransportError),
        (CODE.INTERNAL, "in ensemble: mapping failed", ServerRejectedError),
    ],
)
def test_the_status_decides_before_the_text(server: Any, code: Any, details: str, kind: type) -> None:
    with pytest.raises(RequestError) as caught:
        ask(server(abort(code, details)))
    assert type(caught.value) is kind


def test_nobody_there_is_a_transport_error() -> None:
    transport = GrpcTransport(parse_endpoint("grpc://127.0.0.1:1", None))
    with pytest.raises(TransportError):
        ask(transport)
    transport.close()


def test_the_answer_as_the_server_gave_it(server: Any) -> None:
    response = ask(server(lambda _, context: reply()))
    assert (response.model, response.version, response.request_id) == ("m", 2, "abc")
    assert np.array_equal(response.outputs["p"], VALUES)
    assert ask(server(lambda _, context: reply(identity=""))).request_id == ""


@pytest.mark.parametrize(
    "answer",
    [reply((0, 2**62)), reply((1,) * 100), reply((-1, -3)), reply((3, 3)), reply(version="1_0"), reply(version="-1")],
    ids=["huge", "hundred dimensions", "negative", "size", "underscore", "minus"],
)
def test_answers_whose_description_does_not_fit(server: Any, answer: Any) -> None:
    with pytest.raises(ProtocolError):
        ask(server(lambda _, context: answer))


@pytest.mark.parametrize(("ms", "most"), [(100, 0.098), (5, 0.004)])
def test_grpcs_timer_is_set_earlier_since_it_fires_late(server: Any, ms: float, most: float) -> None:
    transport = server(lambda _, context: reply())
    line, given = transport._line, []
    call = line.call

    def note(message: bytes, timeout: float) -> Any:
        given.append(timeout)
        return call(message, timeout=5)

    line.call = note
    ask(transport, ms=ms)
    assert 0 < given[0] <= most


def test_close_during_a_call_says_closed(server: Any) -> None:
    reached, go = threading.Event(), threading.Event()

    def wait(_: Any, context: grpc.ServicerContext) -> Any:
        reached.set()
        go.wait(5)
        return reply()

    transport = server(wait)
    threading.Thread(target=lambda: (reached.wait(5), transport.close()), daemon=True).start()
    try:
        with pytest.raises(UsageError, match="the client is closed"):
            ask(transport)
        with pytest.raises(UsageError, match="the client is closed"):
            ask(transport)
    finally:
        go.set()


def test_the_message_is_what_protobuf_would_write_and_its_template_serves_every_timeout() -> None:
    _template.cache_clear()
    for timeout_us in (1, 127, 128, 10**6, 3_600_000_000):
        message = service_pb2.ModelInferRequest.FromString(encode(request(timeout_us)))
        assert {key: value.int64_param for key, value in message.parameters.items()} == {"timeout": timeout_us}
        assert (message.model_name, message.id, list(message.raw_input_contents)) == ("m", "abc", [bytes(16)])
        assert [(part.name, part.datatype, list(part.shape)) for part in message.inputs] == [("x", "FP32", [1, 4])]
    assert _template.cache_info().currsize == 1


def test_calls_that_are_still_on_a_replaced_channel_get_their_answers(server: Any) -> None:
    def slow(message: Any, context: grpc.ServicerContext) -> Any:
        time.sleep(0.6)
        return reply()

    transport = server(slow)
    first = transport._line
    first.opened_ns -= 2 * 10**9
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(ask(transport)))
    caller.start()
    time.sleep(0.05)
    for _ in range(2):
        with pytest.raises(DeadlineExceededError):
            ask(transport, ms=100)
    assert transport._line is not first
    assert first.users == 1
    caller.join(5)
    assert len(answers) == 1
    assert first.users == 0
    with pytest.raises(ValueError, match="closed"):
        first.call(b"")
