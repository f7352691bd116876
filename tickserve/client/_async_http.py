"""Triton's binary HTTP protocol over asyncio: bare protocols on kept-alive connections, no framework between.

The bytes out and in are made and read by the functions of the synchronous transport. One connection carries one
exchange at a time; one that is cancelled or late is closed, for it still owes an answer.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from contextlib import suppress
from time import monotonic_ns
from typing import cast

from tickserve.client._http import decode, encode
from tickserve.client._pool import as_error
from tickserve.client._socket import set_options
from tickserve.client._tls import refused
from tickserve.client._transport import InferRequest, InferResponse
from tickserve.client._url import Endpoint
from tickserve.client._wire import (
    DeadlinePassedError,
    DisconnectedError,
    MalformedError,
    Reply,
    UnreachableError,
    WireError,
    whole_reply,
)
from tickserve.errors import TransportError

MAX_IDLE = 64


class Exchange(asyncio.Protocol):
    """One connection. `answer` is the future of the exchange that is under way."""

    __slots__ = ("_data", "_loop", "_timer", "_transport", "answer", "open", "used")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._data = b""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[Reply] | None = None
        self.open, self.used = False, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast("asyncio.Transport", transport)
        self.open = True

    def data_received(self, data: bytes) -> None:
        """A part of an answer, or all of it."""
        answer = self.answer
        if answer is None or answer.done():
            self.close()  # nobody asked: what follows on this connection belongs to nothing
            return
        if self._data:
            data = self._data + data
        try:
            reply = whole_reply(data)
        except MalformedError as error:
            self._finish(None, error)
            self.close()
            return
        if reply is None:
            self._data = data
        else:
            self._finish(reply, None)

    def eof_received(self) -> None:
        """The server will say no more."""
        self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.open = False
        if isinstance(exc, ssl.SSLError):  # in TLS 1.3 a server says only now that it wants a certificate
            self._finish(None, refused(exc))
        self._lost()

    def ask(self, message: bytes, deadline_ns: int) -> asyncio.Future[Reply]:
        """Send; the future has the answer, or WireError by `deadline_ns`."""
        assert self._transport is not None  # noqa: S101 - only an open connection is asked
        self._data = b""
        self.answer = answer = self._loop.create_future()
        delay = (deadline_ns - monotonic_ns()) / 1e9
        self._timer = self._loop.call_later(max(0.0, delay), self._expire)
        self._transport.write(message)
        return answer

    def close(self) -> None:
        """Close at once; whoever waits is told."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()
        self._lost()

    def _expire(self) -> None:
        self._finish(None, DeadlinePassedError("waiting for the answer"))
        self.close()

    def _lost(self) -> None:
        self._finish(None, DisconnectedError("the connection broke", answered=bool(self._data)))

    def _finish(self, reply: Reply | None, error: WireError | None) -> None:
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


class AsyncHttpTransport:
    """One server over HTTP, for one event loop at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self._authority = endpoint, endpoint.authority
        self._tls = None if endpoint.tls is None else endpoint.tls.context(endpoint.transport)
        self._idle: deque[Exchange] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def close(self) -> None:
        """Close idle connections; those in use are closed when their call ends."""
        self._closed = True
        self.drop()

    def drop(self) -> None:
        """Close idle connections."""
        while self._idle:
            with suppress(RuntimeError):  # their loop may be closed
                self._idle.pop().close()

    async def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError."""
        pending = await self.begin(request, deadline_ns, deadline_ns)
        return await pending.receive()

    async def begin(self, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> AsyncPending:
        """Send; a connection that does not stand by `connect_by_ns` is a TransportError. Raises RequestError."""
        head, payload = encode(request, self._authority)
        by = min(deadline_ns, connect_by_ns)
        try:
            exchange = self._take() or await self.connect(by)
        except DeadlinePassedError as error:
            if by == deadline_ns:
                raise as_error(error, self._authority) from error
            raise TransportError(f"no connection to {self._authority} in time") from error
        except WireError as error:
            raise as_error(error, self._authority) from error
        message = head + payload
        return AsyncPending(
            self, exchange, exchange.ask(message, deadline_ns), message, request.request_id, deadline_ns
        )

    async def connect(self, by_ns: int) -> Exchange:
        """A new connection. Raises WireError."""
        loop = asyncio.get_running_loop()
        host, port, name = self._endpoint.host, self._endpoint.port, None
        if self._tls is not None and self._endpoint.tls is not None:
            name = self._endpoint.tls.server_name or host
        try:
            async with asyncio.timeout(max(0.0, (by_ns - monotonic_ns()) / 1e9)):
                transport, exchange = await loop.create_connection(
                    lambda: Exchange(loop), host, port, ssl=self._tls, server_hostname=name
                )
        except TimeoutError as error:
            raise DeadlinePassedError("connecting") from error
        except ssl.SSLError as error:
            raise refused(error) from error
        except (OSError, UnicodeError) as error:
            raise UnreachableError(getattr(error, "strerror", None) or type(error).__name__) from error
        set_options(cast("socket.socket", transport.get_extra_info("socket")))
        return exchange

    def settle(self, exchange: Exchange, *, keep: bool) -> None:
        """Take a connection back, or close it."""
        exchange.answer = None
        if keep and exchange.open and not self._closed:
            self._idle.append(exchange)
            if len(self._idle) > MAX_IDLE:
                self._idle.popleft().close()
        else:
            exchange.close()

    @property
    def address(self) -> str:
        """`host:port`."""
        return self._authority

    def _take(self) -> Exchange | None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # another asyncio.run: the old loop's connections went with it
            self._idle.clear()
            self._loop = loop
        while self._idle:
            exchange = self._idle.pop()
            if exchange.open:
                return exchange
        return None


class AsyncPending:
    """A request that was sent on a connection of its own. `done` is its future."""

    __slots__ = ("_deadline_ns", "_exchange", "_message", "_request_id", "_transport", "done")

    def __init__(
        self,
        transport: AsyncHttpTransport,
        exchange: Exchange,
        done: asyncio.Future[Reply],
        message: bytes,
        request_id: str,
        deadline_ns: int,
    ) -> None:
        self._transport, self._exchange, self.done, self._message = transport, exchange, done, message
        self._request_id, self._deadline_ns = request_id, deadline_ns

    def abandon(self) -> None:
        """Close the connection: an answer that comes late finds nobody. A future nobody waits for is not an error."""
        self.done.cancel()
        self._exchange.close()

    async def receive(self) -> InferResponse:
        """The answer. Raises RequestError; a cancelled wait closes the connection."""
        transport = self._transport
        try:
            reply = await self.done
        except DisconnectedError as error:
            if not self._exchange.used or error.answered:
                self._exchange.close()
                raise as_error(error, transport.address) from error
            return await self._receive_again()
        except WireError as error:
            if isinstance(error, DeadlinePassedError) and self._exchange.used:
                transport.drop()  # a dead path is as dead for its neighbours
            self._exchange.close()
            raise as_error(error, transport.address) from error
        except BaseException:
            self._exchange.close()
            raise
        transport.settle(self._exchange, keep=reply.head.keep_alive)
        return decode(reply, self._request_id)

    async def _receive_again(self) -> InferResponse:
        """The server closed an idle connection just as it was used; its neighbours are as old."""
        transport = self._transport
        transport.drop()
        try:
            self._exchange = await transport.connect(self._deadline_ns)
        except WireError as error:
            raise as_error(error, transport.address) from error
        self.done = self._exchange.ask(self._message, self._deadline_ns)
        return await self.receive()
