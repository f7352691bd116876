"""The gRPC transport against a scripted server of gRPC's own: which error each status becomes, and what close does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tickserve.client import InferRequest, Tensor
from tickserve.client._grpc import GrpcTransport
from tickserve.client._url import parse_endpoint
from tickserve.errors import (
    DeadlineExceededError,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    RequestError,
    ServerRejectedError,
    TransportError,
)

Script = Callable[[Any, grpc.ServicerContext], Any]
VALUES = np.array([[0.25, 0.25, 0.5]], np.float32)


@pytest.fixture
def server() -> Iterator[Callable[..., GrpcTransport]]:
    opened: list[Any] = []

    def start(script: Script | None, options: Sequence[tuple[str, Any]] = ()) -> GrpcTransport:
        with_threads = grpc.server(ThreadPoolExecutor(4), options=options)
        method = grpc.unary_unary_rpc_method_handler(
            script,
            request_deserializer=service_pb2.ModelInferRequest.FromString,
            response_serializer=service_pb2.ModelInferResponse.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})
        if script is not None:
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


def request(timeout_us: int = 5_000_000) -> InferRequest:
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


def test_close_lets_a_call_end_and_keeps_no_connection(server: Any) -> None:
    reached, go = threading.Event(), threading.Event()

    def wait(_: Any, context: grpc.ServicerContext) -> Any:
        reached.set()
        go.wait(5)
        return reply()

    transport, answers = server(wait), list[Any]()
    caller = threading.Thread(target=lambda: answers.append(ask(transport)))
    caller.start()
    assert reached.wait(5)
    transport.close()
    go.set()
    caller.join(5)
    assert [answer.model for answer in answers] == ["m"]
    assert not transport._pool._idle


def test_the_deadline_is_kept_to_the_millisecond_and_the_server_has_a_later_one(server: Any) -> None:
    remaining: list[float] = []

    def wait(_: Any, context: grpc.ServicerContext) -> Any:
        remaining.append(context.time_remaining())
        time.sleep(0.3)
        return reply()

    transport = server(wait)
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        transport.infer(request(timeout_us=100_000), time.monotonic_ns() + 100 * 10**6)
    assert 0.1 <= time.monotonic() - began < 0.2
    assert 10 < remaining[0] <= 61


@pytest.mark.parametrize("megabytes", [0.01, 1, 9])
def test_large_requests_and_answers_pass_the_windows_of_both_sides(server: Any, megabytes: float) -> None:
    values = np.random.default_rng(7).standard_normal((1, int(megabytes * 2**18))).astype(np.float32)

    def echo(message: Any, context: grpc.ServicerContext) -> Any:
        answer = service_pb2.ModelInferResponse(model_name="m", model_version="2", id=message.id)
        answer.outputs.add(name="p", datatype="FP32", shape=values.shape)
        answer.raw_output_contents.append(message.raw_input_contents[0])
        return answer

    transport = server(echo, [("grpc.max_receive_message_length", -1)])
    tensors = (Tensor("x", "FP32", values.shape, values.tobytes()),)
    for _ in range(12 if megabytes == 9 else 3):
        response = transport.infer(
            InferRequest("m", None, "abc", 20_000_000, tensors), time.monotonic_ns() + 20 * 10**9
        )
        assert np.array_equal(response.outputs["p"], values)
        assert not response.outputs["p"].flags.writeable
    assert len(transport._pool._idle) == 1


def test_more_than_a_server_takes_is_refused_with_its_reason(server: Any) -> None:
    transport = server(lambda _, context: reply())  # at most 4 MiB
    tensors = (Tensor("x", "FP32", (1, 2**21), bytes(2**23)),)
    with pytest.raises(ServerRejectedError, match="RESOURCE_EXHAUSTED"):
        transport.infer(InferRequest("m", None, "abc", 20_000_000, tensors), time.monotonic_ns() + 5 * 10**9)
    assert ask(transport).model == "m"


def test_a_server_that_starts_anew_is_found_again(server: Any) -> None:
    """The idle connection is closed by the server; the next call replaces it and succeeds."""
    transport = server(lambda _, context: reply(), [("grpc.max_connection_age_ms", 200)])
    for _ in range(8):
        assert ask(transport).model == "m"
        time.sleep(0.1)


def test_details_come_back_as_they_were_said(server: Any) -> None:
    with pytest.raises(ServerRejectedError, match="größe 100% ✓"):
        ask(server(abort(CODE.INVALID_ARGUMENT, "größe 100% ✓")))


def test_a_method_nobody_serves(server: Any) -> None:
    transport = server(None)
    with pytest.raises(ServerRejectedError, match="UNIMPLEMENTED"):
        ask(transport)
