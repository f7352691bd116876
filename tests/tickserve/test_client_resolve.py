"""Looking names up: never more than one thread, never again without need, and numeric hosts without any."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tickserve.client import _resolve
from tickserve.client._resolve import Resolver
from tickserve.client._wire import DeadlinePassedError, UnreachableError

RESOLVE = socket.getaddrinfo


class Names:
    """A resolver of the system that is as slow, or as lost, as the test says; it counts what it is asked."""

    def __init__(self) -> None:
        self.go, self.asked, self.known = threading.Event(), 0, True
        self.go.set()

    def __call__(self, host: str, port: int, *others: Any, **named: Any) -> list[Any]:
        if others:  # a server that other tests share is being watched meanwhile
            return RESOLVE(host, port, *others, **named)
        self.asked += 1
        self.go.wait(10)
        if not self.known:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    system = Names()
    monkeypatch.setattr(socket, "getaddrinfo", system)
    yield system
    system.go.set()
    for thread in lookups():
        thread.join(5)


def lookups() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "tickserve-resolve"}


def within(ms: float) -> int:
    return time.monotonic_ns() + int(ms * 1e6)


def test_a_name_is_looked_up_once(names: Names) -> None:
    resolver = Resolver("host.example", 80)
    for _ in range(3):
        assert resolver.addresses(within(1_000)) == [(socket.AF_INET, ("127.0.0.1", 80))]
    assert names.asked == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%lo"])
def test_numeric_hosts_need_no_lookup(names: Names, host: str) -> None:
    resolver = Resolver(host, 80)
    resolver.refresh()
    assert resolver.addresses(0)[0][1] == (host, 80)
    assert names.asked == 0


def test_calls_share_one_lookup_however_slow_it_is(names: Names) -> None:
    names.go.clear()
    before = lookups()
    resolver = Resolver("host.example", 80)
    for _ in range(50):
        with pytest.raises(DeadlinePassedError):
            resolver.addresses(within(1))
    assert names.asked == 1
    assert len(lookups() - before) == 1
    names.go.set()
    assert resolver.addresses(within(1_000))


def test_a_name_without_an_address_is_asked_again(names: Names) -> None:
    names.known = False
    resolver = Resolver("host.example", 80)
    with pytest.raises(UnreachableError, match="no address"):
        resolver.addresses(within(1_000))
    names.known = True
    assert resolver.addresses(within(1_000))


def test_a_refresh_goes_on_beside_the_old_addresses(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver("host.example", 80)
    resolver.addresses(within(1_000))
    resolver.refresh()
    assert names.asked == 1  # less than a second ago
    monkeypatch.setattr(_resolve, "REFRESH_NS", 0)
    names.go.clear()
    for _ in range(5):
        resolver.refresh()
        assert resolver.addresses(0)
    names.go.set()
    for thread in lookups():
        thread.join(10)
    assert names.asked == 2


def test_no_thread_left_is_typed(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(UnreachableError, match="no thread"):
        Resolver("host.example", 80).addresses(within(1_000))


def test_a_forked_child_does_not_wait_for_its_parents_lookup(names: Names) -> None:
    names.go.clear()
    resolver = Resolver("host.example", 80)
    with pytest.raises(DeadlinePassedError):
        resolver.addresses(within(1))
    with resolver._lock:  # as if another thread of the parent were inside
        child = os.fork()
        if not child:
            code = 1
            signal.alarm(5)  # rather than wait for ever where this fails
            try:
                names.go.set()
                code = 0 if resolver.addresses(within(2_000)) else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
