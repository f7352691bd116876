"""From a host to addresses: numeric hosts at once, names by the system's resolver, which knows no deadline.

A name is looked up in a thread, by one thread at a time however many calls wait for it, and kept for the client's life.
When a connection cannot be made it is looked up again, while the calls go on with the addresses there are.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from time import monotonic_ns

from tickserve.client._fork import renew_after_fork
from tickserve.client._socket import Address, DeadlinePassedError, UnreachableError

REFRESH_NS = 1_000_000_000


def _numeric(host: str, port: int) -> list[tuple[int, Address]]:
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return []
    return [(family, (host, port))]


class Resolver:
    """The addresses of one server as (family, address) pairs. Safe for threads and after a fork."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._known = _numeric(host, port)
        self._is_name = not self._known
        self._started_ns = 0
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """The parent's lookup does not go on here, and its lock may be held for ever."""
        self._lock = threading.Lock()
        self._pending: threading.Event | None = None

    def addresses(self, deadline_ns: int) -> list[tuple[int, Address]]:
        """The addresses, before `deadline_ns`. Raises DeadlinePassedError and UnreachableError."""
        if self._known:
            return self._known
        if not self._look_up().wait(max(0.0, (deadline_ns - monotonic_ns()) / 1e9)):
            raise DeadlinePassedError("looking up the host")
        if not self._known:
            raise UnreachableError("the host name has no address")
        return self._known

    def refresh(self) -> None:
        """Look the name up again in the background, at most once a second."""
        if self._is_name and monotonic_ns() - self._started_ns > REFRESH_NS:
            self._look_up()

    def _look_up(self) -> threading.Event:
        with self._lock:
            if self._pending is not None and not self._pending.is_set():
                return self._pending
            done = threading.Event()
            try:
                threading.Thread(target=self._ask, args=(done,), name="tickserve-resolve", daemon=True).start()
            except RuntimeError as error:  # the machine has no thread left
                raise UnreachableError("no thread to look up the host") from error
            self._pending, self._started_ns = done, monotonic_ns()
            return done

    def _ask(self, done: threading.Event) -> None:
        try:
            rows = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            if rows:
                self._known = [(int(row[0]), row[4]) for row in rows]
        except (OSError, UnicodeError):  # whoever waits finds no address and says so
            return
        finally:
            done.set()
