"""Triton's binary HTTP protocol over asyncio; the bytes are made and read by the synchronous transport's functions."""

from __future__ import annotations

import asyncio

from tickserve.client._async_line import AsyncLine, AsyncLineTransport
from tickserve.client._http import decode, encode
from tickserve.client._transport import InferRequest, InferResponse
from tickserve.client._url import Endpoint
from tickserve.client._wire import MalformedError, Reply, whole_reply


class HttpLine(AsyncLine[Reply]):
    """A connection that speaks HTTP/1.1."""

    __slots__ = ("_data",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._data = b""

    def send(self, head: bytes, payload: bytes) -> None:
        """Send a request."""
        self._data = b""
        self.write(head + payload)

    def data_received(self, data: bytes) -> None:
        """A part of an answer, or all of it."""
        answer = self.answer
        if answer is None or answer.done():
            self.close()  # nobody asked: what follows on this connection belongs to nothing
            return
        self.heard = True
        if self._data:
            data = self._data + data
        try:
            reply = whole_reply(data)
        except MalformedError as error:
            self.fail(error)
            return
        if reply is None:
            self._data = data
        else:
            self.reusable = reply.head.keep_alive
            self.finish(reply, None)


class AsyncHttpTransport(AsyncLineTransport[Reply]):
    """One server over HTTP, for one event loop at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint, HttpLine)

    def message(self, request: InferRequest) -> tuple[bytes, bytes]:
        """The request as (head with the JSON part, tensors' bytes)."""
        return encode(request, self.address)

    def response(self, reply: Reply, request_id: str) -> InferResponse:
        """The response a reply carries. Raises the server's error, or ProtocolError."""
        return decode(reply, request_id)
