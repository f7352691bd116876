"""What a client that follows asks before it goes over, whom it asks, and that no call waits for the answer."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.tickserve.conftest import MakeManifest
from tests.tickserve.test_client_follow import model_of, seed_of
from tests.waiting import wait_until
from tickserve.client import AsyncClient, Client
from tickserve.client import _follow as follow
from tickserve.client import _ready as ready
from tickserve.client._follow import Follower
from tickserve.client._proto import decode_ready
from tickserve.client._ready import NOT_LOADED, Readiness
from tickserve.client._url import parse_endpoint
from tickserve.current import write_current
from tickserve.errors import ProtocolError, RequestError
from tickserve.manifest import write_manifest

ROWS = np.zeros((1, 4), np.float32)
SLOW_S = 1.0
HELD = "the old one stays pinned until it is loaded"


class Asked:
    """Servers that answer what a test says, as late as it says."""

    def __init__(self, problem: str | None = None) -> None:
        self.problem, self.questions = problem, list[tuple[str, int]]()
        self.go = threading.Event()
        self.go.set()

    def missing(self, model: str, version: int) -> str | None:
        self.questions.append((model, version))
        assert self.go.wait(30)
        if self.problem == "raise":
            raise ZeroDivisionError
        return self.problem


class Following:
    """A follower that begins with version 1 pinned, and what it pinned since."""

    def __init__(self, repository: Path, servers: Asked, *, every_ms: float = 1e-3, patience_s: float = 0.0) -> None:
        self.model, self.folder, self.taken = model_of(repository), repository / model_of(repository), list[int]()
        self.pinned = 1
        self.follower = Follower(
            repository,
            self._repin,
            [self.model],
            every_ms,
            servers=servers,
            pinned=lambda _: self.pinned,
            patience_s=patience_s,
        )
        self.follower.look()

    def _repin(self, folders: dict[str, Path]) -> None:
        self.pinned = int(folders[self.model].name)
        self.taken.append(self.pinned)

    def look_until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not true():
            assert time.monotonic() < end
            self.follower.look()
            time.sleep(0.001)


def held(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines about versions that are waited for: lines of other tests' breakers may still come."""
    return [text for record in caplog.records if HELD in (text := record.getMessage())]


def test_nobody_is_asked_for_what_is_pinned(repository: Path) -> None:
    servers = Asked()
    following = Following(repository, servers)
    assert (following.taken, servers.questions) == ([1], [])


def test_the_pin_holds_until_the_servers_are_ready_and_that_is_said_once(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    servers = Asked(f"somewhere {NOT_LOADED}")
    following = Following(repository, servers)
    write_current(following.folder, 2)
    following.look_until(lambda: len(servers.questions) > 3 and bool(held(caplog)))
    assert following.pinned == 1
    assert held(caplog) == [f"model {following.model!r}: version 2 is in force, but somewhere {NOT_LOADED}; {HELD}"]
    servers.problem = None
    following.look_until(lambda: following.pinned == 2)
    assert following.taken == [1, 2]
    asked = len(servers.questions)
    following.follower.look()
    assert (len(servers.questions), len(held(caplog))) == (asked, 1)


def test_no_look_of_a_stream_of_calls_waits(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that come one after another go on with what they have, however long the servers take."""
    monkeypatch.setattr(follow, "PAUSE_NS", 900_000_000)  # a busy machine makes pauses of its own
    servers = Asked()
    following = Following(repository, servers, every_ms=1_000, patience_s=30)
    write_current(following.folder, 2)
    servers.go.clear()
    slowest, end = 0.0, time.monotonic() + 1.5
    while time.monotonic() < end:
        began = time.monotonic()
        following.follower.look()
        slowest = max(slowest, time.monotonic() - began)
    assert servers.questions == [(following.model, 2)]
    assert slowest < SLOW_S
    assert following.pinned == 1
    servers.go.set()
    following.look_until(lambda: following.pinned == 2)


def test_the_first_look_after_the_answer_goes_over(repository: Path) -> None:
    """It does not wait for its time: the old version may be drained as soon as nobody asks for it."""
    servers = Asked()
    following = Following(repository, servers, every_ms=1_000)
    write_current(following.folder, 2)
    time.sleep(1.0)
    servers.go.clear()
    following.follower.look()
    noticed = time.monotonic()
    servers.go.set()
    following.look_until(lambda: following.pinned == 2)
    assert time.monotonic() - noticed < 0.9


def test_a_look_after_a_pause_waits_within_its_bound(repository: Path) -> None:
    servers = Asked()
    following = Following(repository, servers, patience_s=10)
    write_current(following.folder, 2)
    time.sleep(0.05)
    following.follower.look()
    assert following.pinned == 2
    hasty = Following(repository, servers, patience_s=0.05)
    hasty.look_until(lambda: hasty.pinned == 2)
    servers.go.clear()
    write_current(following.folder, 1)
    time.sleep(0.05)
    began = time.monotonic()
    hasty.follower.look()
    assert 0.05 <= time.monotonic() - began < 0.05 + SLOW_S
    assert hasty.pinned == 2
    servers.go.set()
    hasty.look_until(lambda: hasty.pinned == 1)


def test_who_looks_aside_does_not_wait_and_the_next_call_after_a_pause_does(repository: Path) -> None:
    asked = Asked()
    following = Following(repository, asked, every_ms=SLOW_S * 1e3, patience_s=30)
    following.follower._next_ns = 0
    asked.go.clear()
    write_current(repository / following.model, 2)
    following.follower.look_aside()
    assert wait_until(lambda: bool(asked.questions))
    assert (following.taken, len(asked.questions)) == ([1], 1)
    following.follower._called_ns -= 10**9
    threading.Timer(0.05, asked.go.set).start()
    following.follower.look()
    assert (following.taken, len(asked.questions)) == ([1, 2], 1)


def test_several_models_share_the_wait(tmp_path: Path, make_manifest: MakeManifest) -> None:
    names = [f"model{number}" for number in range(5)]
    for name in names:
        for version in (1, 2):
            write_manifest(tmp_path / name / str(version), make_manifest(name=name))
        write_current(tmp_path / name, 2)
    servers = Asked()
    servers.go.clear()
    began = time.monotonic()
    Follower(tmp_path, lambda _: None, names, 50, servers=servers, pinned=lambda _: 1, patience_s=SLOW_S).look()
    assert SLOW_S <= time.monotonic() - began < 2 * SLOW_S
    servers.go.set()


def test_whatever_goes_wrong_with_the_question_is_no_yes_and_reaches_no_call(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    servers = Asked("raise")
    following = Following(repository, servers)
    write_current(following.folder, 2)
    following.look_until(lambda: len(servers.questions) > 2 and bool(held(caplog)))
    assert following.pinned == 1
    (line,) = held(caplog)
    assert "could not be asked (ZeroDivisionError)" in line


def test_a_machine_without_threads_goes_over_later(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = Asked()
    following = Following(repository, servers)
    write_current(following.folder, 2)

    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        following.follower.look()
        following.follower.look()
    assert following.pinned == 1
    following.look_until(lambda: following.pinned == 2)


def test_what_was_put_back_while_it_was_asked_for_is_not_taken(repository: Path) -> None:
    servers = Asked()
    following = Following(repository, servers)
    servers.go.clear()
    write_current(following.folder, 2)
    following.follower.look()
    write_current(following.folder, 1)
    servers.go.set()
    following.look_until(lambda: len(following.taken) > 1)
    assert following.taken == [1, 1]


def test_a_version_exchanged_while_it_was_asked_for_is_not_taken(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    servers = Asked()
    following = Following(repository, servers)
    servers.go.clear()
    write_current(following.folder, 2)
    following.follower.look()
    (following.folder / "2" / "manifest.json").write_text("{}")
    servers.go.set()
    following.look_until(lambda: "is not the one put in force" in caplog.text)
    assert following.taken == [1]


def test_a_child_forked_while_its_parent_asks_asks_itself(repository: Path) -> None:
    servers = Asked()
    following = Following(repository, servers)
    servers.go.clear()
    write_current(following.folder, 2)
    following.follower.look()
    pid = os.fork()
    if pid == 0:
        servers.go = threading.Event()
        servers.go.set()
        following.look_until(lambda: following.pinned == 2)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    servers.go.set()
    following.look_until(lambda: following.pinned == 2)


# Who is asked, and what each one's silence means.


@contextmanager
def replying(reply: bytes | None) -> Iterator[str]:
    """A server that answers every connection with these bytes; None: it takes the question and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as open_lines:
        host, port = listening.getsockname()

        def serve() -> None:
            while True:
                try:
                    line, _ = listening.accept()
                except OSError:
                    return
                if reply is None:
                    open_lines.enter_context(line)
                    continue
                with line:
                    line.recv(65_536)
                    line.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"{host}:{port}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def http(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()


YES, NO, SILENT, AWAY = http("200 OK"), http("400 Bad Request"), None, b"away"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed soon."""
    monkeypatch.setattr(ready, "ASK_NS", 100_000_000)


@pytest.mark.parametrize(
    ("replies", "states", "problem"),
    [
        ([YES], ["closed"], None),
        ([NO], ["closed"], f"0 {NOT_LOADED}"),
        ([http("404 Not Found")], ["closed"], f"0 {NOT_LOADED}"),
        ([http("403 Forbidden")], ["closed"], "0 does not say: HTTP 403"),
        ([b"nonsense"], ["closed"], "0 does not say: expected an HTTP/1.1 status line"),
        ([SILENT], ["closed"], "0 does not say: waiting for the answer"),
        ([YES, YES], ["closed", "closed"], None),
        ([YES, NO], ["closed", "closed"], f"1 {NOT_LOADED}"),
        # One that is down holds nobody up: its breaker says so, or its machine does.
        ([YES, SILENT], ["closed", "open"], None),
        ([YES, NO], ["closed", "half_open"], None),
        ([YES, AWAY], ["closed", "closed"], None),
        ([YES, SILENT], ["closed", "closed"], "1 does not say: waiting for the answer"),
        # Nobody is believed to be up.
        ([NO], ["open"], f"0 {NOT_LOADED}"),
        ([SILENT, YES], ["open", "open"], "0 does not say: waiting for the answer"),
        ([AWAY, NO], ["closed", "open"], f"1 {NOT_LOADED}"),
        ([YES], ["open"], None),
        ([AWAY], ["closed"], None),
        ([AWAY, AWAY], ["open", "closed"], None),
    ],
)
def test_every_server_that_is_up_has_to_be_ready(
    replies: list[bytes | None], states: list[str], problem: str | None, quick: None
) -> None:
    with ExitStack() as stack:
        urls = ["127.0.0.1:1" if reply == AWAY else stack.enter_context(replying(reply)) for reply in replies]
        if urls.count("127.0.0.1:1") > 1:
            urls[-1] = "127.0.0.1:2"
        breakers = dict(zip(urls, states, strict=True))
        found = Readiness([parse_endpoint(url, None) for url in urls], lambda: breakers).missing("some model", 3)
    if problem is None:
        assert found is None
    else:
        place, _, rest = problem.partition(" ")
        assert (found or "").startswith(f"{urls[int(place)]} {rest}")


@pytest.mark.parametrize("url", ["http://{}", "grpc://{}"])
def test_clients_ask_their_own_servers(url: str, repository: Path, quick: None) -> None:
    """Neither client goes over to what a server that is up does not say it has."""
    model = model_of(repository)
    with replying(b"nonsense") as address:
        write_current(repository / model, 1)
        with Client(url.format(address), manifest=repository, follow_ms=1e-3) as client:

            async def ask() -> int | None:
                async with AsyncClient(url.format(address), manifest=repository, follow_ms=1e-3) as other:
                    write_current(repository / model, 2)
                    for _ in range(20):
                        with pytest.raises(RequestError):
                            await other.score(model, ROWS)
                    return seed_of(other)

            assert asyncio.run(ask()) == 1
            for _ in range(20):
                with pytest.raises(RequestError):
                    client.score(model, ROWS)
            assert seed_of(client) == 1


@pytest.mark.parametrize(
    ("message", "is_ready"), [(b"", False), (b"\x08\x00", False), (b"\x08\x01", True), (b"\x12\x01x\x08\x01", True)]
)
def test_what_model_ready_says(message: bytes, is_ready: bool) -> None:
    assert decode_ready(b"\0\0\0\0\0" + message, 5) is is_ready


@pytest.mark.parametrize("message", [b"\x08", b"\x0a\x01\x01", b"\x0f"])
def test_what_model_ready_cannot_say(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_ready(message)
