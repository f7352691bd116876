"""gRPC in two halves: a future, and a pipe that becomes readable when it is done, where several are waited for."""

from __future__ import annotations

import os
from contextlib import suppress
from time import monotonic_ns
from typing import Any

from tickserve.client._grpc import LATE_S, GrpcTransport, decode, encode
from tickserve.client._transport import InferRequest, InferResponse
from tickserve.errors import DeadlineExceededError, RequestError, UsageError


class GrpcReplica(GrpcTransport):
    """One server of several, over gRPC. Safe for threads; a forked child must open a client of its own."""

    def begin(self, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> GrpcPending:
        """Send; the channel connects in the background. Raises RequestError, and UsageError once closed."""
        self._check_process()
        remaining_s = (deadline_ns - monotonic_ns()) / 1e9
        remaining_s -= min(LATE_S, remaining_s / 5)
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline passed before the request was sent")
        line = self._enter()
        try:
            call: Any = line.call
            future = call.future(encode(request), timeout=remaining_s)
        except ValueError as error:  # "Cannot invoke RPC on closed channel!"
            self._leave(line, silent=False)
            raise self._cut("the channel was closed during the call") from error
        return GrpcPending(self, line, future)

    def typed(self, error: Any) -> RequestError | UsageError:
        """The typed error of an RpcError."""
        return self._typed(error)

    def left(self, line: Any, error: Any | None) -> None:
        """A call on `line` is over."""
        status = self._grpc.StatusCode
        self._leave(line, silent=error is not None and error.code() is status.DEADLINE_EXCEEDED)

    @property
    def library(self) -> Any:
        """The grpc module."""
        return self._grpc


class GrpcPending:
    """A call that is under way on a channel."""

    __slots__ = ("_future", "_line", "_over", "_pipe", "_replica")

    def __init__(self, replica: GrpcReplica, line: Any, future: Any) -> None:
        self._replica, self._line, self._future = replica, line, future
        self._pipe: tuple[int, int] | None = None
        self._over = False

    def wait(self, until_ns: int) -> bool:
        """Whether the call is done before `until_ns`."""
        try:
            self._future.exception(timeout=max(0.0, (until_ns - monotonic_ns()) / 1e9))
        except self._replica.library.FutureTimeoutError:
            return False
        except self._replica.library.FutureCancelledError:
            return True
        return True

    def fileno(self) -> int:
        """The end of a pipe that is closed on the other side when the call is done."""
        if self._pipe is None:
            near, far = os.pipe()
            self._pipe = (near, far)
            self._future.add_done_callback(lambda _: os.close(far))
        return self._pipe[0]

    def abandon(self) -> None:
        """Cancel the call, here and on the server."""
        self._future.cancel()
        self._end(None)

    def receive(self, deadline_ns: int) -> InferResponse:
        """The answer. Raises RequestError."""
        error = None
        try:
            answer = self._future.result()  # the call carries its own deadline
        except self._replica.library.RpcError as problem:
            error = problem
            raise self._replica.typed(problem) from problem
        finally:
            self._end(error)
        return decode(answer)

    def _end(self, error: Any | None) -> None:
        if self._over:
            return
        self._over = True
        if self._pipe is not None:
            with suppress(OSError):
                os.close(self._pipe[0])
        self._replica.left(self._line, error)
