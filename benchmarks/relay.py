"""A TCP relay in front of one server, in a process of its own, that can be told to misbehave: the network at its worst.

    python -m benchmarks.relay --target 127.0.0.1:8000      # prints its own address, then obeys lines on its input

Orders: `clear`; `slow F`, answers take F times as long; `cold N`, the first answer of each connection comes N ms
later; `dark`, bytes are taken and lost and nothing is said, as on a half-open connection; `cut N`, every answer is
reset after N bytes; `refuse`, no connection is accepted and those there are reset.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

CHUNK = 65_536
LONGEST_S = 1.0
RESET = struct.pack("ii", 1, 0)


class _Relay:
    """The relaying end."""

    def __init__(self, target: str, address: str) -> None:
        self._target, self._address = target, address
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.order, self.number = "clear", 0.0

    async def listen(self) -> str:
        if self._server is None:
            path = _path(self._address)
            if path is not None:
                self._server = await asyncio.start_unix_server(self._accept, path)
            else:
                self._server = await asyncio.start_server(self._accept, *_address(self._address))
                host, port = self._server.sockets[0].getsockname()[:2]
                self._address = f"{host}:{port}"
        return self._address

    async def obey(self, line: str) -> None:
        order, _, number = line.partition(" ")
        self.order, self.number = order, float(number or 0)
        if order != "refuse":
            await self.listen()
        elif self._server is not None:
            self._server.close()
            self._server = None
            for writer in list(self._writers):
                _reset(writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await _reach(self._target)
        except OSError:
            _reset(writer)
            return
        self._writers |= {writer, far_writer}
        asked = [0.0]
        pumps = (self._up(reader, far_writer, asked), self._down(far_reader, writer, asked))
        tasks = [asyncio.create_task(pump) for pump in pumps]
        self._tasks.update(tasks)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
            self._tasks.discard(task)
        self._writers -= {writer, far_writer}
        writer.close()
        far_writer.close()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[float]) -> None:
        while data := await reader.read(CHUNK):
            asked[0] = asyncio.get_running_loop().time()
            if self.order != "dark":
                writer.write(data)

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[float]) -> None:
        fresh = True
        while data := await reader.read(CHUNK):
            if self.order == "cold" and fresh:
                await asyncio.sleep(self.number / 1_000)
            fresh = False
            if self.order == "slow" and asked[0]:  # what a server says unasked is not an answer
                taken = asyncio.get_running_loop().time() - asked[0]
                asked[0] = 0.0
                await asyncio.sleep(min(LONGEST_S, taken * (self.number - 1)))
            if self.order == "cut":
                writer.write(data[: int(self.number)])
                await asyncio.sleep(0.001)
                _reset(writer)
                return
            if self.order != "dark":
                writer.write(data)


async def _reach(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    path = _path(target)
    if path is not None:
        return await asyncio.open_unix_connection(path)
    return await asyncio.open_connection(*_address(target))


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def _serve(target: str, address: str) -> None:
    relay = _Relay(target, address)
    print(await relay.listen(), flush=True)
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line.strip())
        loop.call_soon_threadsafe(lines.put_nowait, "end")

    threading.Thread(target=read, daemon=True).start()
    while (line := await lines.get()) != "end":
        await relay.obey(line)
        print("done", flush=True)
    os._exit(0)  # connections that are still open are nobody's any more


class Relay:
    """A relay that this process starts, orders about, and ends. `command` goes in front, to run it elsewhere."""

    def __init__(self, target: str, *, listen: str = "127.0.0.1:0", command: Sequence[str] = ()) -> None:
        started = [*command, sys.executable, "-m", "benchmarks.relay", "--target", target, "--listen", listen]
        self._process: subprocess.Popen[str] = subprocess.Popen(
            started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self._line()

    def order(self, order: str) -> None:
        """Give one order; it is in force when this returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        self._line()

    def close(self) -> None:
        """End it: its input ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(5)
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the relay ended by itself")
        return line


def _path(text: str) -> str | None:
    """The path of `unix:PATH`; None for an address."""
    return text.removeprefix("unix:") if text.startswith("unix:") else None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="host:port of the server, or unix:PATH")
    parser.add_argument("--listen", default="127.0.0.1:0", help="the same to listen on; port 0 takes a free one")
    chosen = parser.parse_args(arguments)
    asyncio.run(_serve(chosen.target, chosen.listen))


if __name__ == "__main__":
    main(sys.argv[1:])
