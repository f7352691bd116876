"""A kept-alive TCP connection under any of the protocols: non-blocking, one absolute deadline for whatever is done.

The socket never blocks: it sends, waits for what is left until the deadline, and receives; that holds against a peer
that drips. A lone call first looks for its answer again and again, giving way to whoever else wants the processor: to
be woken from sleep costs more than all of the client's own work. It does so for at most `SPIN_NS`, and a connection
whose answers take longer does without, but for a try now and then. Before that it does what an observer put off.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Any

from tickserve.client._meanwhile import work_meanwhile

RECEIVE_BYTES = 16 * 1024
JOIN_BYTES = 64 * 1024
FD_SETSIZE = 1024
NS_PER_MS = 1_000_000
SPIN_NS = 400_000
LEAST_RESTS, MOST_RESTS = 8, 512  # calls without looking after one that looked in vain, doubled each time
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 1), ("TCP_USER_TIMEOUT", 13_000))

Address = tuple[Any, ...]  # (host, port), and two numbers more for IPv6


class WireError(Exception):
    """The connection cannot be used any more."""


class DeadlinePassedError(WireError):
    """The deadline passed while connecting, sending or waiting."""


class UnreachableError(WireError):
    """The connection could not be made."""


class RefusedError(UnreachableError):
    """Nobody listens at the address: its machine answers, and runs no server there."""


class DisconnectedError(WireError):
    """The peer went away; `answered` says whether a byte of its answer had arrived."""

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


class MalformedError(WireError):
    """What arrived is not the protocol that was asked for."""


class SecureExpectedError(MalformedError):
    """The other side speaks TLS: it answered plaintext with an alert."""


def set_options(sock: socket.socket) -> None:
    """Send at once, and notice a peer that vanished: probed after 10 s of silence, given up 3 s later."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE:
        if hasattr(socket, name):  # they differ between systems
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _connect(family: int, address: Address, deadline_ns: int) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:  # no descriptor left
        raise UnreachableError(error.strerror or type(error).__name__) from error
    try:
        set_options(sock)
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            _wait(sock, poll, deadline_ns, write=True)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            kind = RefusedError if code == errno.ECONNREFUSED else UnreachableError
            raise kind(errno.errorcode.get(code, str(code)))
    except (OSError, UnicodeError) as error:
        sock.close()
        raise UnreachableError(getattr(error, "strerror", None) or type(error).__name__) from error
    except BaseException:
        sock.close()
        raise
    return sock


def connect(addresses: Sequence[tuple[int, Address]], deadline_ns: int) -> socket.socket:
    """A connection to the first of `addresses` that accepts, before `deadline_ns`. Raises WireError."""
    problem: WireError = UnreachableError("the host name has no address")
    for family, address in addresses:
        try:
            return _connect(family, address, deadline_ns)
        except UnreachableError as error:
            problem = error
    raise problem


class Line:
    """A connected socket with its deadline-bound sends and receives; protocols build on it.

    `busy` holds every line of one client that is in use; whoever uses a line puts it in.
    """

    __slots__ = ("__weakref__", "_arrived", "_busy", "_in_vain", "_poll", "_rest", "_sock", "heard", "reusable", "used")

    def __init__(self, sock: socket.socket, busy: set[Line]) -> None:
        self._sock, self._busy = sock, busy
        self._rest, self._in_vain = 0, LEAST_RESTS
        self.used = False  # whether an exchange has gone well on it
        self.heard = False  # whether a byte has come in the exchange that goes on
        self.reusable = True  # whether another exchange may follow
        # TLS knows of bytes that no poll of the socket shows.
        self._poll: Any = getattr(sock, "poll", select.poll)()
        self._poll.register(self._sock, select.POLLIN)
        # And not all of what a poll shows is for the protocol on top of it.
        self._arrived: Callable[[], bool] | None = getattr(sock, "arrived", None)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._sock.close()

    @property
    def owed(self) -> bool:
        """Whether an answer is still to come that the line must stay open for."""
        return False

    def settled(self) -> bool:
        """Whether nothing is owed any more; reads what has come and waits for nothing. Then `reusable` holds."""
        self.reusable = False
        return True

    def fileno(self) -> int:
        """The socket's descriptor; -1 once closed."""
        return self._sock.fileno()

    def readable(self, until_ns: int) -> bool:
        """Whether there is something to receive (an end counts) before `until_ns`; 0 does not wait."""
        while True:
            if until_ns == 0:
                if not self._poll.poll(0):
                    return False
            elif not self._spin(until_ns):
                try:
                    _wait(self._sock, self._poll, until_ns, write=False)
                except DeadlinePassedError:
                    return False
            if self._arrived is None or self._arrived():
                return True

    def put(self, data: bytes, deadline_ns: int) -> None:
        """Send all of `data`. Raises WireError."""
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise DisconnectedError("while sending", answered=False) from error
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:], deadline_ns)

    def _send_rest(self, rest: memoryview, deadline_ns: int) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while rest:
            _wait(self._sock, poll, deadline_ns, write=True)
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise DisconnectedError("while sending", answered=False) from error

    def more(self, deadline_ns: int, most: int = RECEIVE_BYTES) -> bytes:
        """What has come, at most so many bytes, as soon as there is something. Raises WireError."""
        while True:
            if not self._spin(deadline_ns):
                _wait(self._sock, self._poll, deadline_ns, write=False)
            try:
                data = self._sock.recv(most)
            except BlockingIOError:  # woken without data
                continue
            except OSError as error:
                raise DisconnectedError("while waiting for the answer", answered=self.heard) from error
            if not data:
                raise DisconnectedError("the server closed the connection", answered=self.heard)
            self.heard = True
            return data

    def fill(self, buffer: memoryview, deadline_ns: int) -> None:
        """All of `buffer`. Raises WireError."""
        while buffer:
            try:
                count = self._sock.recv_into(buffer)
            except BlockingIOError:
                _wait(self._sock, self._poll, deadline_ns, write=False)
                continue
            except OSError as error:
                raise DisconnectedError("while waiting for the answer", answered=True) from error
            if not count:
                raise DisconnectedError("the server closed the connection", answered=True)
            buffer = buffer[count:]

    def surplus(self) -> bool:
        """Whether more has come than was asked for; it is lost."""
        try:
            return bool(self._sock.recv(1))
        except OSError:  # nothing there, or a peer that is going: the next exchange tells
            return False

    def _spin(self, deadline_ns: int) -> bool:
        """Whether something has come while this looked for it without sleeping."""
        poll, busy = self._poll.poll, self._busy
        here = bool(poll(0))
        if not (here or self.heard or len(busy) > 1) and deadline_ns - monotonic_ns() > NS_PER_MS:
            work_meanwhile()
            here = bool(poll(0))
        if self._rest:
            self._rest -= 1
            return here
        until = min(monotonic_ns() + SPIN_NS, deadline_ns)
        while not here:
            if len(busy) > 1:  # another thread's call is under way: it has more use for the interpreter
                return False
            _give_way()
            if monotonic_ns() >= until:  # a slow answer, or others want the processor: who sleeps gets it back sooner
                self._rest = self._in_vain = min(2 * self._in_vain, MOST_RESTS)
                return False
            here = bool(poll(0))
        self._in_vain = LEAST_RESTS
        return True


def _wait(sock: socket.socket, poll: select.poll, deadline_ns: int, *, write: bool) -> None:
    """Return when `sock` is ready (or broken: the next call tells). Raises DeadlinePassedError."""
    remaining = deadline_ns - monotonic_ns()
    if remaining >= NS_PER_MS:
        if poll.poll(remaining // NS_PER_MS):
            return
        remaining = deadline_ns - monotonic_ns()
    if remaining <= 0:
        raise DeadlinePassedError("sending" if write else "waiting for the answer")
    # poll counts whole milliseconds; select counts microseconds, but only for low descriptors.
    if sock.fileno() >= FD_SETSIZE:
        ready = bool(poll.poll(1))
    else:
        watched = [sock]
        ready = any(select.select([] if write else watched, watched if write else [], [], remaining / 1e9))
    if not ready:
        raise DeadlinePassedError("sending" if write else "waiting for the answer")


_give_way = getattr(os, "sched_yield", lambda: None)
