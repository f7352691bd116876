"""Whether the servers of a client have a version loaded, asked before the client goes over to it.

The question is the Open Inference Protocol's own: `GET /v2/models/<model>/versions/<n>/ready`, over gRPC `ModelReady`.
It goes over a connection of its own, so no call's connection waits behind it, and whoever asks is not a call
(_follow.py): the answer may take its time, up to `ASK_NS` from a server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns
from typing import Any, Protocol
from urllib.parse import quote

from tickserve.client._grpc import PREFIX, header_block
from tickserve.client._h2_line import Stream
from tickserve.client._pool import Pool
from tickserve.client._proto import decode_ready, encode_ready
from tickserve.client._socket import RefusedError, WireError
from tickserve.client._url import Endpoint
from tickserve.client._wire import Connection
from tickserve.errors import ProtocolError

ASK_NS = 250_000_000
METHOD = "/inference.GRPCInferenceService/ModelReady"
NOT_LOADED = "does not have it loaded"
# What Triton says of a version that it does not have: 400, over gRPC OK with `ready` unset; others say NOT_FOUND.
_HTTP_ABSENT = (400, 404)
_GRPC_ABSENT = ("3", "5")


class Servers(Protocol):
    """Who can be asked whether a version is loaded."""

    def missing(self, model: str, version: int) -> str | None:
        """Who does not have it, in words; None when it can be asked for."""
        ...


class Readiness:
    """The servers of one client; `breakers` gives the state of each one's breaker by its name."""

    def __init__(self, endpoints: Sequence[Endpoint], breakers: Callable[[], Mapping[str, str]]) -> None:
        self._servers, self._breakers = [_Server(endpoint) for endpoint in endpoints], breakers

    def missing(self, model: str, version: int) -> str | None:
        """Which server that is up does not have the version, or does not say, in words; None: it can be asked for.

        Up are those whose breaker is closed; where none of them is there, the others are asked as well, since a lone
        server that comes back may have been away and not started anew. One that refuses the connection runs no server:
        it has no say, for what is started there loads the version in force.
        """
        states = self._breakers()
        closed = [server for server in self._servers if states.get(server.name) == "closed"]
        for group in (closed, [server for server in self._servers if server not in closed]):
            answered = False
            for server in group:
                try:
                    problem = server.problem(model, version, monotonic_ns() + ASK_NS)
                except RefusedError:
                    continue
                except (WireError, ProtocolError) as error:
                    problem = f"does not say: {error}"
                if problem is not None:
                    return f"{server.name} {problem}"
                answered = True
            if answered:
                break
        return None


class _Server:
    """One server; nothing stays open between two questions, which are few."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.name = endpoint.authority
        grpc = endpoint.transport == "grpc"
        self._ask: Callable[[Any, str, int, int], str | None] = self._over_grpc if grpc else self._over_http
        self._lines: Pool[Any] = Pool(endpoint, Stream if grpc else Connection)

    def problem(self, model: str, version: int, deadline_ns: int) -> str | None:
        """Why the version cannot be asked for; None when it is ready. Raises WireError and ProtocolError."""
        line = self._lines.open(deadline_ns)
        try:
            return self._ask(line, model, version, deadline_ns)
        finally:
            line.close()

    def _over_http(self, line: Connection, model: str, version: int, deadline_ns: int) -> str | None:
        path = f"/v2/models/{quote(model, safe='')}/versions/{version}/ready"
        head = f"GET {path} HTTP/1.1\r\nHost: {self.name}\r\n\r\n".encode()
        status = line.exchange(head, b"", deadline_ns).head.status
        if status == 200:
            return None
        return NOT_LOADED if status in _HTTP_ABSENT else f"does not say: HTTP {status}"

    def _over_grpc(self, line: Stream, model: str, version: int, deadline_ns: int) -> str | None:
        message = encode_ready(model, version)
        data = b"\x00%b%b" % (len(message).to_bytes(PREFIX - 1, "big"), message)
        headers, answer = line.exchange(header_block(self.name, METHOD), data, deadline_ns)
        status = headers.get("grpc-status", "none")
        if status == "0":
            return None if decode_ready(answer, PREFIX) else NOT_LOADED
        return NOT_LOADED if status in _GRPC_ABSENT else f"does not say: gRPC status {status[:20]}"
