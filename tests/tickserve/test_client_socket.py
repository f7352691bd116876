"""A line's waiting: it looks for its answer for a little while, gives up in time, and not beside other calls."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tickserve.client import _socket
from tickserve.client._socket import LEAST_RESTS, MOST_RESTS, DeadlinePassedError, DisconnectedError, Line

SECOND = 10**9


@pytest.fixture
def pair() -> Iterator[tuple[Line, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    line = Line(near, set())
    yield line, far
    line.close()
    far.close()


def soon() -> int:
    return time.monotonic_ns() + 2 * SECOND


def test_what_is_there_is_received_at_once(pair: tuple[Line, socket.socket]) -> None:
    line, far = pair
    far.sendall(b"answer")
    assert line.more(soon()) == b"answer"
    assert line.heard
    assert line._rest == 0


def test_after_looking_in_vain_it_sleeps_for_a_while_and_then_looks_again(
    pair: tuple[Line, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, _ = pair
    began = time.monotonic_ns()
    assert not line._spin(began + SECOND)
    assert time.monotonic_ns() - began < SECOND // 2  # its own limit, not the deadline's
    rests = line._rest
    assert rests == 2 * LEAST_RESTS
    looks: list[int] = []
    monkeypatch.setattr(_socket, "_give_way", lambda: looks.append(1))
    for _ in range(rests):
        assert not line._spin(soon())
    assert not looks
    assert not line._spin(soon())
    assert looks


def test_one_that_sleeps_takes_what_is_there_already(pair: tuple[Line, socket.socket]) -> None:
    line, far = pair
    line._rest = 2
    far.sendall(b"x")
    assert line._spin(soon())
    assert line._rest == 1


def test_who_looks_in_vain_again_and_again_looks_ever_less(pair: tuple[Line, socket.socket]) -> None:
    line, far = pair
    rests = []
    for _ in range(12):
        line._rest = 0
        assert not line._spin(soon())
        rests.append(line._rest)
    assert rests[:3] == [2 * LEAST_RESTS, 4 * LEAST_RESTS, 8 * LEAST_RESTS]
    assert max(rests) == MOST_RESTS
    far.sendall(b"x")
    line._rest = 0
    assert line._spin(soon())
    line.more(soon())
    assert not line._spin(soon())
    assert line._rest == 2 * LEAST_RESTS


def test_it_does_not_look_past_the_deadline(pair: tuple[Line, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    line, _ = pair
    monkeypatch.setattr(_socket, "SPIN_NS", 10 * SECOND)
    began = time.monotonic_ns()
    with pytest.raises(DeadlinePassedError):
        line.more(began + SECOND // 20)
    assert SECOND // 20 <= time.monotonic_ns() - began < SECOND


def test_it_gives_way_to_whoever_takes_the_processor(
    pair: tuple[Line, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, _ = pair
    calls: list[int] = []

    def taken() -> None:
        calls.append(1)
        time.sleep(0.02)

    monkeypatch.setattr(_socket, "_give_way", taken)
    assert not line._spin(soon())
    assert len(calls) == 1


def test_beside_another_call_it_sleeps(pair: tuple[Line, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    line, _ = pair
    line._busy.update((line, Line(socket.socket(), line._busy)))
    monkeypatch.setattr(_socket, "_give_way", lambda: pytest.fail("it looked again"))
    assert not line._spin(soon())
    assert line._rest == 0  # the others may be gone by the next call
    for other in line._busy - {line}:
        other.close()


def test_a_peer_that_is_gone_says_whether_it_had_answered(pair: tuple[Line, socket.socket]) -> None:
    line, far = pair
    far.sendall(b"half")
    assert line.more(soon()) == b"half"
    far.close()
    with pytest.raises(DisconnectedError) as caught:
        line.more(soon())
    assert caught.value.answered


def test_all_of_a_large_buffer_is_filled_and_a_surplus_noticed(pair: tuple[Line, socket.socket]) -> None:
    line, far = pair
    buffer = bytearray(1000)
    far.sendall(bytes(range(250)) * 4)
    line.fill(memoryview(buffer), soon())
    assert bytes(buffer) == bytes(range(250)) * 4
    assert not line.surplus()
    far.sendall(b"more")
    assert line.surplus()
