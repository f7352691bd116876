"""A peer that speaks what HTTP/2 a test has it speak, frame by frame, over a raw socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from tritonclient.grpc import service_pb2

from tickserve.client import _h2 as h2
from tickserve.client._hpack import literal

Script = Callable[["Peer", socket.socket, int], None]
VALUES = np.array([[0.25, 0.25, 0.5]], np.float32)
HEAD = b"\x88" + literal("content-type", "application/grpc")
GOOD_END = literal("grpc-status", "0") + literal("grpc-message", "")
BEGIN = h2.frame(h2.SETTINGS, 0, 0)


def message() -> bytes:
    answer = service_pb2.ModelInferResponse(model_name="m", model_version="2", id="abc")
    answer.outputs.add(name="p", datatype="FP32", shape=(1, 3))
    answer.raw_output_contents.append(VALUES.tobytes())
    data: bytes = answer.SerializeToString()
    return b"\0" + len(data).to_bytes(4, "big") + data


def answer(stream: int, data: bytes | None = None) -> bytes:
    data = message() if data is None else data
    return (
        h2.frame(h2.HEADERS, h2.END_HEADERS, stream, HEAD)
        + h2.frame(h2.DATA, 0, stream, data)
        + h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream, GOOD_END)
    )


class Peer:
    """Reads requests on each connection, and runs the script once for each, with its stream."""

    def __init__(self, script: Script) -> None:
        self.script, self.connections, self.requests = script, 0, 0
        self.frames: list[tuple[int, int, int, bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._open.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError), sock:
            assert self.read(sock, 24) == h2.PREFACE[:24]
            while True:
                kind, flags, stream, _ = self.frame(sock)
                if kind == h2.DATA and flags & h2.END_STREAM:
                    self.requests += 1
                    self.script(self, sock, stream)

    def keep_window(self, size: int, say: Callable[[int, int, int], bytes]) -> None:
        """Take so many bytes at a time from now on; `say(stream, flags, bytes)` is the reply to each frame of data."""

        def serve(sock: socket.socket) -> None:
            with suppress(OSError), sock:
                self.read(sock, 24)
                sock.sendall(h2.frame(h2.SETTINGS, 0, 0, h2.settings({h2.INITIAL_WINDOW_SIZE: size})))
                while True:
                    kind, flags, stream, payload = self.frame(sock)
                    if kind == h2.DATA:
                        sock.sendall(say(stream, flags, len(payload)))

        self._serve = serve  # type: ignore[method-assign]

    def read(self, sock: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = sock.recv(size - len(data))
            if not chunk:
                raise OSError("the client went away")
            data += chunk
        return data

    def frame(self, sock: socket.socket) -> tuple[int, int, int, bytes]:
        head = self.read(sock, 9)
        payload = self.read(sock, int.from_bytes(head[:3], "big"))
        self.frames.append((head[3], head[4], int.from_bytes(head[5:], "big"), payload))
        return self.frames[-1]

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
