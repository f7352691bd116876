"""gRPC over asyncio: one stream of HTTP/2 after another on connections of their own, as the synchronous transport does.

A call that nobody waits for any more is not cancelled: its connection stays open until the answer has come. Some Triton
versions die of a cancel that meets an answer (server issues 7368 and 8034), and with them every call of every client.
"""

from __future__ import annotations

import asyncio

from tickserve.client._async_line import AsyncLine, AsyncLineTransport
from tickserve.client._grpc import decode, encode
from tickserve.client._h2 import Answer, Conversation
from tickserve.client._socket import WireError
from tickserve.client._transport import InferRequest, InferResponse
from tickserve.client._url import Endpoint


class GrpcLine(AsyncLine[Answer]):
    """A connection that speaks HTTP/2, one stream at a time; pings are answered whenever they come."""

    __slots__ = ("_talk",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._talk = Conversation()

    @property
    def owed(self) -> bool:
        """Whether a request was begun whose answer has not ended."""
        return not self._talk.ended

    def send(self, head: bytes, payload: bytes) -> None:
        """Send a request: its header block, its data as the server's windows take them."""
        self.write(self._talk.request(head, payload))
        self._send_parts()

    def data_received(self, data: bytes) -> None:
        """Frames, or parts of them."""
        talk = self._talk
        owed, wanted = not talk.ended, self.answer is not None and not self.answer.done()
        talk.feed(data)
        try:
            while talk.whole():
                talk.step()
                if not wanted:
                    talk.forget()
        except WireError as error:
            self.fail(error)
            return
        self._say()
        if not talk.ended:
            self.heard = talk.heard
            self._send_parts()
        elif owed:
            answer = talk.answer()
            self._say()
            self.used, self.reusable = True, not talk.left
            self.finish(answer, None)
            self.free()
        elif talk.left and self.answer is None:  # a goodbye to an idle connection
            self.close()
        elif talk.left:
            self.reusable = False

    def _send_parts(self) -> None:
        talk = self._talk
        while not self.closing and (part := talk.part()) is not None:
            self.write(part)

    def _say(self) -> None:
        """Send what the conversation wants sent."""
        talk = self._talk
        if talk.out:
            self.write(talk.out)
            talk.out = b""


class AsyncGrpcTransport(AsyncLineTransport[Answer]):
    """One server over gRPC, for one event loop at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint, GrpcLine)

    def message(self, request: InferRequest) -> tuple[bytes, bytes]:
        """The request as (header block, data)."""
        return encode(request, self.address)

    def response(self, reply: Answer, request_id: str) -> InferResponse:
        """The response an answer carries. Raises the server's error, or ProtocolError."""
        return decode(reply)
