"""Connections of an event loop: bare protocols, kept alive, one exchange at a time each, with no framework between.

What HTTP and gRPC share. A connection whose call was given up is closed, for it still owes an answer; or it is parked
until that answer has come, where a close would be a cancel that the server minds (_parked.py).
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic_ns
from typing import Generic, TypeVar, cast

from tickserve.client import _parked
from tickserve.client._meanwhile import work_meanwhile
from tickserve.client._pool import SPARE, as_error
from tickserve.client._socket import (
    DeadlinePassedError,
    DisconnectedError,
    RefusedError,
    UnreachableError,
    WireError,
    set_options,
)
from tickserve.client._tls import UntrustedError, refused
from tickserve.client._transport import InferRequest, InferResponse
from tickserve.client._url import Endpoint
from tickserve.errors import TransportError, UsageError

MAX_IDLE = 64
_ERRNO = re.compile(r"\[Errno (\d+)\]")

R = TypeVar("R")


class AsyncLine(asyncio.Protocol, Generic[R]):
    """One connection. `answer` is the future of the exchange that is under way."""

    __slots__ = ("_loop", "_timer", "_transport", "answer", "freed", "heard", "open", "reusable", "used")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[R] | None = None
        self.open = False
        self.used = False  # whether an exchange has gone well on it
        self.heard = False  # whether anything of the answer has come in the exchange that goes on
        self.reusable = True  # whether another exchange may follow
        self.freed: Callable[[AsyncLine[R]], None] | None = None  # told once nothing is owed any more

    @property
    def owed(self) -> bool:
        """Whether an answer is still to come that the connection must stay open for."""
        return False

    def send(self, head: bytes, payload: bytes) -> None:
        """Send a request; what comes of it goes to `finish`."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast("asyncio.Transport", transport)
        self.open = True

    def eof_received(self) -> None:
        """The server will say no more."""
        self.open = False  # at once: whoever is freed by it must not be taken for an idle one
        self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.open = False
        if isinstance(exc, ssl.SSLError):  # in TLS 1.3 a server says only now that it wants a certificate
            self.finish(None, refused(exc))
        self._lost()

    def ask(self, head: bytes, payload: bytes, deadline_ns: int) -> asyncio.Future[R]:
        """Send; the future has the answer, or WireError by `deadline_ns`."""
        self.heard = False
        self.answer = answer = self._loop.create_future()
        delay = (deadline_ns - monotonic_ns()) / 1e9
        self._timer = self._loop.call_later(max(0.0, delay), self._expire)
        self.send(head, payload)
        self._loop.call_soon(work_meanwhile)  # once all who can send have sent
        return answer

    @property
    def closing(self) -> bool:
        """Whether nothing that is written goes out any more."""
        return self._transport is None or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send `data`, now or as soon as the socket takes it."""
        assert self._transport is not None  # noqa: S101 - only an open connection is asked
        self._transport.write(data)

    def close(self) -> None:
        """Close at once; whoever waits is told."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()
        self._lost()

    def fail(self, error: WireError) -> None:
        """What came cannot be: whoever waits is told, and the connection closed."""
        self.finish(None, error)
        self.close()

    def finish(self, reply: R | None, error: WireError | None) -> None:
        """End the exchange for whoever waits for it; nothing where nobody does."""
        timer, answer = self._timer, self.answer
        if timer is not None:
            timer.cancel()
            self._timer = None
        if answer is None or answer.done():
            return
        if reply is None:
            assert error is not None  # noqa: S101 - one of the two
            answer.set_exception(error)
        else:
            self.used = True
            answer.set_result(reply)

    def free(self) -> None:
        """Nothing is owed any more."""
        freed, self.freed = self.freed, None
        if freed is not None:
            freed(self)

    def _expire(self) -> None:
        self.finish(None, DeadlinePassedError("waiting for the answer"))

    def _lost(self) -> None:
        self.finish(None, DisconnectedError("the connection broke", answered=self.heard))
        self.free()


class AsyncLineTransport(Generic[R]):
    """One server over connections of one kind, for one event loop at a time."""

    def __init__(self, endpoint: Endpoint, kind: Callable[[asyncio.AbstractEventLoop], AsyncLine[R]]) -> None:
        self._endpoint, self._kind, self.address = endpoint, kind, endpoint.authority
        self._tls = None if endpoint.tls is None else endpoint.tls.context(endpoint.transport)
        self._idle: deque[AsyncLine[R]] = deque()
        self._parked: dict[AsyncLine[R], asyncio.TimerHandle] = {}  # oldest first, each with what closes it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def message(self, request: InferRequest) -> tuple[bytes, bytes]:
        """The request's bytes, in two parts."""
        raise NotImplementedError

    def response(self, reply: R, request_id: str) -> InferResponse:
        """What a reply says. Raises RequestError."""
        raise NotImplementedError

    def close(self) -> None:
        """Close idle connections; those in use are closed when their call ends."""
        self._closed = True
        self.drop()
        for line in list(self._parked):
            with suppress(RuntimeError):
                line.close()
        self._parked.clear()

    def drop(self) -> None:
        """Close idle connections."""
        while self._idle:
            with suppress(RuntimeError):  # their loop may be closed
                self._idle.pop().close()

    async def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError."""
        pending = await self.begin(request, deadline_ns, deadline_ns)
        return await pending.receive()

    async def begin(self, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> AsyncLinePending[R]:
        """Send; a connection that does not stand by `connect_by_ns` is a TransportError. Raises RequestError."""
        message = self.message(request)
        by = min(deadline_ns, connect_by_ns)
        try:
            line = self._take() or await self.connect(by)
        except DeadlinePassedError as error:
            if by == deadline_ns:
                raise as_error(error, self.address) from error
            raise TransportError(f"no connection to {self.address} in time") from error
        except WireError as error:
            raise as_error(error, self.address) from error
        return AsyncLinePending(self, line, message, request.request_id, deadline_ns)

    async def spare(self, deadline_ns: int) -> None:
        """Have a connection left for whoever calls beside the next call. Raises RequestError."""
        self._settle_here()
        try:
            while sum(line.open for line in self._idle) < SPARE and not self._closed:
                self.settle(await self.connect(deadline_ns))
        except WireError as error:
            raise as_error(error, self.address) from error

    async def connect(self, by_ns: int) -> AsyncLine[R]:
        """A new connection. Raises WireError."""
        loop = asyncio.get_running_loop()
        host, port, name = self._endpoint.host, self._endpoint.port, None
        if self._tls is not None and self._endpoint.tls is not None:
            name = self._endpoint.tls.server_name or host
        try:
            async with asyncio.timeout(max(0.0, (by_ns - monotonic_ns()) / 1e9)):
                transport, line = await loop.create_connection(
                    lambda: self._kind(loop), host, port, ssl=self._tls, server_hostname=name
                )
                set_options(cast("socket.socket", transport.get_extra_info("socket")))  # which may be gone again
        except TimeoutError as error:
            raise DeadlinePassedError("connecting") from error
        except ssl.SSLError as error:
            raise refused(error) from error
        except (OSError, UnicodeError) as error:
            raise _unreachable(error, secure=self._tls is not None) from error
        return line

    def settle(self, line: AsyncLine[R]) -> None:
        """Take a connection back that owes nothing, or close it when it cannot be used again."""
        line.answer = None
        if line.reusable and line.open and not self._closed:
            self._idle.append(line)
            if len(self._idle) > MAX_IDLE:
                self._idle.popleft().close()
        else:
            line.close()

    def let_go(self, line: AsyncLine[R]) -> None:
        """Part with a connection whose call was given up: open until it is answered where a close would be a cancel."""
        if not (line.owed and line.open) or self._closed:
            line.close()
            return
        try:
            self._parked[line] = asyncio.get_running_loop().call_later(_parked.PARK_NS / 1e9, line.close)
        except RuntimeError:  # its loop has ended, and nobody would hear the answer
            with suppress(RuntimeError):
                line.close()
            return
        line.freed = self._unpark
        if len(self._parked) > _parked.MAX_PARKED:
            next(iter(self._parked)).close()

    def _unpark(self, line: AsyncLine[R]) -> None:
        timer = self._parked.pop(line, None)
        if timer is not None:
            timer.cancel()
            self.settle(line)

    def _settle_here(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # another asyncio.run: the old loop's connections went with it
            if self._loop is not None and self._loop.is_running():
                raise UsageError("used in two event loops at once", hint="a client for each")
            self._idle.clear()
            self._parked.clear()
            self._loop = loop

    def _take(self) -> AsyncLine[R] | None:
        self._settle_here()
        while self._idle:
            line = self._idle.pop()
            if line.open:
                return line
        return None


def _unreachable(error: OSError | UnicodeError, *, secure: bool) -> WireError:
    """Why there is no connection, in the words of the synchronous one."""
    if secure and isinstance(error, ConnectionResetError):
        return UntrustedError("closed in the TLS handshake: does the other side speak TLS?")
    if isinstance(error, socket.gaierror):
        return UnreachableError("the host name has no address")
    # Of several addresses asyncio tells all in one text, without a number of its own.
    numbers = [getattr(error, "errno", None), *map(int, _ERRNO.findall(str(error)))]
    number = next((number for number in numbers if number), 0)
    kind = RefusedError if number == errno.ECONNREFUSED else UnreachableError
    return kind(errno.errorcode.get(number) or getattr(error, "strerror", None) or type(error).__name__)


class AsyncLinePending(Generic[R]):
    """A request that was sent on a connection of its own. `done` is its future."""

    __slots__ = ("_deadline_ns", "_line", "_message", "_request_id", "_transport", "done")

    def __init__(
        self,
        transport: AsyncLineTransport[R],
        line: AsyncLine[R],
        message: tuple[bytes, bytes],
        request_id: str,
        deadline_ns: int,
    ) -> None:
        self._transport, self._message = transport, message
        self._request_id, self._deadline_ns = request_id, deadline_ns
        self._line: AsyncLine[R] | None = line  # None once the call has ended: it is another's then
        self.done = line.ask(*message, deadline_ns)

    def abandon(self) -> None:
        """Let the connection go: an answer that comes late finds nobody. Nothing, once the call has ended."""
        line, self._line = self._line, None
        if line is None:
            return
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()  # looked at: asyncio would complain of one that nobody took
        self._transport.let_go(line)

    async def receive(self) -> InferResponse:
        """The answer. Raises RequestError; a cancelled wait lets the connection go."""
        transport, line = self._transport, self._line
        assert line is not None  # noqa: S101 - an answer is received once
        try:
            reply = await self.done
        except DisconnectedError as error:
            line.close()
            if not line.used or error.answered:
                raise as_error(error, transport.address) from error
            return await self._receive_again()
        except DeadlinePassedError as error:
            if line.used and not line.heard:
                transport.drop()  # a dead path is as dead for its neighbours
            self.abandon()
            raise as_error(error, transport.address) from error
        except WireError as error:
            line.close()
            raise as_error(error, transport.address) from error
        except BaseException:
            self.abandon()
            raise
        self._line = None
        transport.settle(line)
        return transport.response(reply, self._request_id)

    async def _receive_again(self) -> InferResponse:
        """The server closed an idle connection just as it was used; its neighbours are as old."""
        transport = self._transport
        transport.drop()
        try:
            self._line = line = await transport.connect(self._deadline_ns)
        except WireError as error:
            raise as_error(error, transport.address) from error
        self.done = line.ask(*self._message, self._deadline_ns)
        return await self.receive()
