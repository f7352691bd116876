"""The open-loop driver against a real server of bytes: latency counts from the intended time of sending."""

from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from export.batching.arrivals import of_times, with_bulk
from loadtest.open_loop import Feed, drive
from tickserve.errors import ComponentError

ROWS = np.ones((4, 8), np.float32)
STALL_S = 0.3


@contextmanager
def answering(stall_s: float = 0.0, status: str = "200 OK", body: bytes = b"{}") -> Iterator[tuple[str, list[bytes]]]:
    """An HTTP server on loopback; the first request of all waits `stall_s`, and everything behind it, in one lock."""
    seen: list[bytes] = []
    lock = threading.Lock()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                head = [line]
                while head[-1] not in (b"\r\n", b""):
                    head.append(self.rfile.readline())
                length = next(int(h.split(b":")[1]) for h in head if h.lower().startswith(b"content-length"))
                content = self.rfile.read(length)
                with lock:
                    if not seen:
                        time.sleep(stall_s)
                    seen.append(content)
                try:
                    self.wfile.write(
                        b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)
                    )
                except OSError:
                    return

        def finish(self) -> None:
            with suppress(OSError):
                super().finish()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            """A connection that the driver gave up is no news."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


def feed(authority: str, deadline_ms: float = 5_000, *, lanes: bool = False) -> Feed:
    return Feed(authority, "m", {"features": ROWS}, deadline_ms, lanes)


def test_a_stall_is_seen_by_everyone_who_was_due_meanwhile() -> None:
    arrivals = of_times(np.arange(0, 200_000_000, 10_000_000))
    with answering(STALL_S) as (authority, seen):
        result = drive(feed(authority), arrivals)
    assert result.outcome == ["answered"] * len(arrivals)
    assert len(seen) == len(arrivals)
    # A closed loop would have sent one request during the stall; here each waits for what is left of it.
    due_s = arrivals.times_ns / 1e9
    assert (result.latency_us / 1e6 >= STALL_S - due_s - 0.01).all()
    shown = result.to_json()
    assert shown["single"]["p50_us"] > 100_000
    assert shown["outcomes"] == {"answered": len(arrivals)}


def test_who_gets_no_answer_in_time_is_counted_and_holds_nobody_up() -> None:
    arrivals = of_times(np.arange(0, 100_000_000, 10_000_000))
    with answering(3.0) as (authority, _):
        began = time.monotonic()
        result = drive(feed(authority, 100), arrivals)
        assert time.monotonic() - began < 2.5
    assert set(result.outcome) == {"no answer by the deadline"}
    assert result.to_json()["single"] == {"requests": 10, "p50_us": None, "p99_us": None}


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (b'{"error":"Exceeds maximum queue size"}', "refused: queue full"),
        (b'{"error":"Request timeout expired"}', "refused: waited too long"),
        (b"", "HTTP 503"),
    ],
)
def test_refusals_are_told_apart(body: bytes, outcome: str) -> None:
    with answering(0, "503 Service Unavailable", body) as (authority, _):
        assert set(drive(feed(authority), of_times(np.array([0, 1000]))).outcome) == {outcome}


def test_bulk_requests_carry_their_rows_and_their_lane() -> None:
    arrivals = with_bulk(of_times(np.array([0, 10_000_000])), rows=6, per_second=1)
    with answering() as (authority, seen):
        drive(feed(authority, lanes=True), arrivals)
    bulk = [content for content in seen if b'"priority": 2' in content]
    assert len(seen) == 3
    assert len(bulk) == 1
    assert b'"shape": [6, 8]' in bulk[0]
    assert bulk[0].endswith(np.ones(48, "<f4").tobytes())


def test_no_server_is_said() -> None:
    with pytest.raises(ComponentError):
        drive(feed("127.0.0.1:9"), of_times(np.array([0, 1])))
