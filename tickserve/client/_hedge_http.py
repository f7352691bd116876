"""HTTP in two halves: a connection that has sent its request waits beside others, and is closed when it loses.

A lost connection still owes an answer, which must never be taken for that of a later request.
"""

from __future__ import annotations

from tickserve.client._http import HttpTransport, as_error, decode, encode
from tickserve.client._transport import InferRequest, InferResponse
from tickserve.client._wire import Connection, DeadlinePassedError, DisconnectedError, WireError
from tickserve.errors import TransportError


class HttpReplica(HttpTransport):
    """One server of several, over HTTP. Safe for threads and after a fork."""

    def begin(self, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> HttpPending:
        """Send on an idle or a new connection. Raises RequestError."""
        head, payload = encode(request, self._authority)
        by = min(deadline_ns, connect_by_ns)
        try:
            connection = self._pool.take(by)
            connection = self._send(connection, head, payload, by)
        except DeadlinePassedError as error:
            if by == deadline_ns:
                raise as_error(error, self._authority) from error
            raise TransportError(f"no connection to {self._authority} in time") from error
        except WireError as error:
            raise as_error(error, self._authority) from error
        return HttpPending(self, connection, (head, payload), request.request_id)

    def again(self, message: tuple[bytes, bytes], deadline_ns: int) -> Connection:
        """A new connection with `message` sent: the server had closed the idle one. Raises WireError."""
        self._pool.drop()
        connection = self._pool.open(deadline_ns)
        return self._send(connection, *message, deadline_ns)

    def settle(self, connection: Connection, *, keep: bool) -> None:
        """Take a connection back, or close it."""
        if keep:
            self._pool.give(connection)
        else:
            connection.close()

    def silent(self, connection: Connection) -> None:
        """Close what heard nothing until its deadline, and its neighbours, which are on the same path."""
        connection.close()
        if connection.used and not connection.heard:
            self._pool.drop()

    @property
    def address(self) -> str:
        """`host:port`."""
        return self._authority

    def _send(self, connection: Connection, head: bytes, payload: bytes, by_ns: int) -> Connection:
        try:
            connection.send(head, payload, by_ns)
        except DisconnectedError:
            connection.close()
            if not connection.used:
                raise
            return self.again((head, payload), by_ns)
        except BaseException:
            connection.close()
            raise
        return connection


class HttpPending:
    """A request that was sent on a connection of its own."""

    __slots__ = ("_connection", "_message", "_replica", "_request_id")

    def __init__(
        self, replica: HttpReplica, connection: Connection, message: tuple[bytes, bytes], request_id: str
    ) -> None:
        self._replica, self._connection, self._message, self._request_id = replica, connection, message, request_id

    def wait(self, until_ns: int) -> bool:
        """Whether there is something to receive before `until_ns`."""
        return self._connection.readable(until_ns)

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._connection.fileno()

    def abandon(self) -> None:
        """Close the connection: an answer that comes late finds nobody."""
        self._connection.close()

    def receive(self, deadline_ns: int) -> InferResponse:
        """The answer. Raises RequestError."""
        replica = self._replica
        try:
            reply = self._connection.receive(deadline_ns)
        except DisconnectedError as error:
            self._connection.close()
            if not self._connection.used or error.answered:
                raise as_error(error, replica.address) from error
            return self._receive_again(deadline_ns)
        except WireError as error:
            if isinstance(error, DeadlinePassedError):
                replica.silent(self._connection)
            self._connection.close()
            raise as_error(error, replica.address) from error
        except BaseException:
            self._connection.close()
            raise
        replica.settle(self._connection, keep=reply.head.keep_alive)
        return decode(reply, self._request_id)

    def _receive_again(self, deadline_ns: int) -> InferResponse:
        """The server closed an idle connection just as it was used: once more, on a new one."""
        replica = self._replica
        try:
            self._connection = replica.again(self._message, deadline_ns)
        except WireError as error:
            raise as_error(error, replica.address) from error
        return self.receive(deadline_ns)
