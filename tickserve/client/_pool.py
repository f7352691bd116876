"""The connections of one server: idle ones are used again, newest first, and one that went stale is replaced once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from socket import socket
from typing import Any, Generic, Protocol, TypeVar

from tickserve.client._fork import renew_after_fork
from tickserve.client._parked import Parked
from tickserve.client._resolve import Resolver
from tickserve.client._socket import (
    DeadlinePassedError,
    DisconnectedError,
    Line,
    MalformedError,
    SecureExpectedError,
    UnreachableError,
    WireError,
    connect,
)
from tickserve.client._tls import UntrustedError, secured
from tickserve.client._url import Endpoint
from tickserve.errors import CertificateError, DeadlineExceededError, ProtocolError, RequestError, TransportError

SPARE = 2

R = TypeVar("R", covariant=True)


class Exchanging(Protocol[R]):
    """A line that speaks a protocol."""

    used: bool
    heard: bool
    reusable: bool

    @property
    def owed(self) -> bool:
        """Whether an answer is still to come that the line must stay open for."""
        ...

    def exchange(self, head: bytes, payload: bytes, deadline_ns: int) -> R:
        """Send a request, receive its response. Raises WireError; the connection must then be closed."""
        ...

    def close(self) -> None:
        """Close the socket; idempotent."""
        ...


C = TypeVar("C", bound=Exchanging[Any])


class Pool(Generic[C]):
    """Connections of one kind to one server; a deque's pop and append are atomic, so no lock is taken."""

    def __init__(self, endpoint: Endpoint, kind: Callable[[socket, set[Line]], C], max_idle: int = 64) -> None:
        self._resolver, self._kind, self._max_idle = Resolver(endpoint.host, endpoint.port), kind, max_idle
        self._tls = None if endpoint.tls is None else endpoint.tls.context(endpoint.transport)
        self._name = (endpoint.tls and endpoint.tls.server_name) or endpoint.host
        self._idle: deque[C] = deque()
        self.parked = Parked()
        self.busy: set[Any] = set()
        self.closed = False
        renew_after_fork(self)

    def exchange(self, head: bytes, payload: bytes, deadline_ns: int) -> Any:
        """One exchange on an idle or a new connection. Raises WireError."""
        connection = self.take(deadline_ns)
        busy = self.busy
        try:
            busy.add(connection)
            reply = connection.exchange(head, payload, deadline_ns)
        except DisconnectedError as error:
            connection.close()
            if not connection.used or error.answered:
                raise
            # The server closed an idle connection just as it was used again; its neighbours are as old.
            self.drop()
            return self._again(head, payload, deadline_ns)
        except DeadlinePassedError:
            self.let_go(connection)
            if connection.used and not connection.heard:
                self.drop()  # a dead path is as dead for its neighbours: one deadline is spent on it, not all
            raise
        except WireError:
            connection.close()
            raise
        except BaseException:
            self.let_go(connection)
            raise
        finally:
            busy.discard(connection)
        self.keep(connection)
        return reply

    def _again(self, head: bytes, payload: bytes, deadline_ns: int) -> Any:
        """Send once more on a new connection: scoring changes nothing on the server, so twice is as good as once."""
        connection = self.open(deadline_ns)
        try:
            reply = connection.exchange(head, payload, deadline_ns)
        except WireError as error:
            if isinstance(error, DeadlinePassedError):
                self.let_go(connection)
            else:
                connection.close()
            raise
        except BaseException:
            self.let_go(connection)
            raise
        self.keep(connection)
        return reply

    def let_go(self, connection: C) -> None:
        """Part with a connection whose call was given up: open until it is answered where a close would be a cancel."""
        if connection.owed and not self.closed:
            self.parked.add(connection)
        else:
            connection.close()

    def spare(self, deadline_ns: int) -> None:
        """Have two connections idle: one for whoever asks now, one for who asks meanwhile. Raises WireError."""
        while len(self._idle) < SPARE and not self.closed:
            self.give(self.open(deadline_ns))

    def keep(self, connection: C) -> None:
        """Take a connection back after an exchange, or close it when it cannot be used again."""
        if connection.reusable:
            self.give(connection)
        else:
            connection.close()

    def take(self, deadline_ns: int) -> C:
        """An idle connection, or a new one. Raises WireError."""
        if self.parked:
            self._look()
        try:
            return self._idle.pop()
        except IndexError:
            return self.open(deadline_ns)

    def open(self, deadline_ns: int) -> C:
        """A new connection. Raises WireError."""
        try:
            sock = connect(self._resolver.addresses(deadline_ns), deadline_ns)
            if self._tls is not None:
                sock = secured(sock, self._tls, self._name, deadline_ns)
            return self._kind(sock, self.busy)
        except (UnreachableError, DeadlinePassedError):
            self._resolver.refresh()
            raise

    def give(self, connection: C) -> None:
        """Keep `connection` for another call; closed when the pool is, or full."""
        self._idle.append(connection)
        if self.closed:
            self.end()
        elif len(self._idle) > self._max_idle:
            with suppress(IndexError):
                self._idle.popleft().close()

    def _look(self) -> None:
        """Take back what was answered in the meantime."""
        for connection in self.parked.look():
            self.give(connection)

    def end(self) -> None:
        """Close what no call uses."""
        self.drop()
        self.parked.end()

    def drop(self) -> None:
        """Close what is idle."""
        with suppress(IndexError):  # another thread may empty it first
            while True:
                self._idle.pop().close()

    def after_fork(self) -> None:
        """The connections are the parent's; closing them here does not end them there."""
        self.end()
        self.busy.clear()


def as_error(error: WireError, authority: str) -> RequestError:
    """The typed error of what went wrong on a connection."""
    if isinstance(error, DeadlinePassedError):
        return DeadlineExceededError(f"no answer inside the deadline, while {error}")
    if isinstance(error, UntrustedError):
        return CertificateError(f"no TLS with {authority}: {error}")
    if isinstance(error, SecureExpectedError):
        return TransportError(f"{authority} speaks TLS", hint="https:// or grpcs://")
    if isinstance(error, MalformedError):
        return ProtocolError(f"the answer is not the protocol's: {error}")
    if isinstance(error, UnreachableError):
        return TransportError(f"cannot connect to {authority}: {error}", hint="is the server up, and is this its port?")
    cut = isinstance(error, DisconnectedError) and error.answered
    if cut:
        return TransportError(f"the connection to {authority} broke inside the answer")
    hint = "is the server up, and does this port speak the protocol?"
    return TransportError(f"the connection to {authority} broke before the answer", hint=hint)
