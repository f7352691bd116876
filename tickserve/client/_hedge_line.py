"""Protocols on a line in two halves: a connection that has sent its request waits beside others.

One that loses still owes an answer, which must never be taken for that of a later request: it is closed, or parked
until that answer has come where a close would be a cancel that the server minds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import ref

from tickserve.client._pool import Exchanging, Pool, as_error
from tickserve.client._transport import InferResponse
from tickserve.client._wire import DeadlinePassedError, DisconnectedError, WireError
from tickserve.errors import TransportError

Reply = TypeVar("Reply")


class LinePending(Generic[Reply]):
    """A request sent on a connection of its own, from `begin_on`."""

    __slots__ = ("_authority", "_connection", "_decode", "_message", "_pool", "_ref")

    def __init__(
        self,
        pool: Pool[Any],
        authority: str,
        message: tuple[bytes, bytes],
        decode: Callable[[Reply], InferResponse],
    ) -> None:
        self._pool, self._authority, self._message, self._decode = pool, authority, message, decode
        self._connection: Any = None
        self._ref: Any = None

    def send(self, connection: Exchanging[Reply], by_ns: int) -> None:
        """Send on `connection`, or on a new one where the server had closed it. Raises WireError."""
        self._connection = connection
        # A call that an exception out of a signal's handler ends between two lines takes its count with it.
        self._ref = ref(connection, self._pool.busy.discard)
        self._pool.busy.add(self._ref)
        try:
            self._connection.send(*self._message, by_ns)
        except DisconnectedError:
            self._release().close()
            if not connection.used:
                raise
            self._send_again(by_ns)
        except BaseException:
            self.abandon()
            raise

    def wait(self, until_ns: int) -> bool:
        """Whether there is something to receive before `until_ns`."""
        ready: bool = self._connection.readable(until_ns)
        return ready

    def fileno(self) -> int:
        """The connection's descriptor."""
        descriptor: int = self._connection.fileno()
        return descriptor

    def abandon(self) -> None:
        """Let the connection go: an answer that comes late finds nobody. Nothing, once the call has ended."""
        if self._connection is not None:
            self._pool.let_go(self._release())

    def _release(self) -> Any:
        """The connection, which is this call's no more."""
        connection, self._connection = self._connection, None
        self._pool.busy.discard(self._ref)
        return connection

    def receive(self, deadline_ns: int) -> InferResponse:
        """The answer. Raises RequestError."""
        try:
            reply = self._receive(deadline_ns)
        except WireError as error:
            raise as_error(error, self._authority) from error
        return self._decode(reply)

    def _receive(self, deadline_ns: int) -> Reply:
        connection = self._connection
        try:
            reply: Reply = connection.receive(deadline_ns)
        except DisconnectedError as error:
            self._release().close()
            if not connection.used or error.answered:
                raise
            self._send_again(deadline_ns)
            return self._receive(deadline_ns)
        except BaseException as error:
            if isinstance(error, WireError) and not isinstance(error, DeadlinePassedError):
                self._release().close()
            self.abandon()
            if isinstance(error, DeadlinePassedError) and connection.used and not connection.heard:
                self._pool.drop()  # a dead path is as dead for its neighbours
            raise
        self._pool.keep(self._release())
        return reply

    def _send_again(self, by_ns: int) -> None:
        """The server closed an idle connection just as it was used; its neighbours are as old."""
        self._pool.drop()
        self.send(self._pool.open(by_ns), by_ns)


def begin_on(
    pool: Pool[Any],
    authority: str,
    message: tuple[bytes, bytes],
    decode: Callable[[Reply], InferResponse],
    deadline_ns: int,
    connect_by_ns: int,
) -> LinePending[Reply]:
    """Send `message` on an idle or a new connection of `pool`. Raises RequestError."""
    pending = LinePending(pool, authority, message, decode)
    by = min(deadline_ns, connect_by_ns)
    try:
        pending.send(pool.take(by), by)
    except DeadlinePassedError as error:
        if by == deadline_ns:
            raise as_error(error, authority) from error
        raise TransportError(f"no connection to {authority} in time") from error
    except WireError as error:
        raise as_error(error, authority) from error
    return pending
