"""The endpoint `/metrics`: what is scraped, over HTTP, from threads of its own.

A scraper that opens a connection and says nothing holds one of a few places for a few seconds, and no call of a client.
Whoever can reach the address reads the metrics: it is this machine's own unless another one is configured.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6, SHUT_RDWR, socket
from typing import Any

from tickserve.errors import ComponentError, PortInUseError, UsageError

SILENCE_S = 5.0
PATHS = ("/", "/metrics")
Render = Callable[[str], tuple[bytes, str]]


class _Handler(BaseHTTPRequestHandler):
    """Answers GET; logs nothing."""

    server: Endpoint
    timeout = SILENCE_S  # a peer that says nothing, or does not read, is given up
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tickserve", ""

    def do_GET(self) -> None:
        """The metrics in the format that is asked for."""
        if self.path.partition("?")[0] not in PATHS:
            self.send_error(404)
            return
        try:
            body, kind = self.server.render(self.headers.get("Accept", ""))
        except Exception:  # whatever it is, the scraper is told, and the process that is watched goes on
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a line for each scrape would be all that a log holds."""


class Endpoint(ThreadingHTTPServer):
    """Serves `render(accept)` at `address:port` (0: a free one) until `close()`. At most `places` peers at a time.

    Raises PortInUseError naming the port and `option`, and UsageError for an address that is none of this machine's.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, address: str, port: int, render: Render, *, option: str, places: int = 8) -> None:
        self.render = render
        self._places = threading.BoundedSemaphore(places)
        self._peers = set[socket]()
        if ":" in address:
            self.address_family = AF_INET6
        try:
            super().__init__((address, port), _Handler)
        except OSError as error:
            raise _refusal(error, address, port, option) from error
        self.port: int = self.server_address[1]
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{self.port}/metrics"
        name = "tickserve-metrics-http"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name=name, daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Bind without asking a name server who this machine is, as the base class does."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """A thread for the peer, or the door where all places are taken."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve the peer and free its place."""
        self._peers.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._peers.discard(request)
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that went away is its own affair."""

    def close(self) -> None:
        """Stop answering, those too who keep their connection, and free the port."""
        self.shutdown()
        self.server_close()
        for peer in list(self._peers):
            with suppress(OSError):
                peer.shutdown(SHUT_RDWR)
        self._thread.join(SILENCE_S)

    def forget(self) -> None:
        """In a forked child: let go of the parent's socket; its thread is not here."""
        with suppress(OSError):
            self.socket.close()


def _refusal(error: OSError, address: str, port: int, option: str) -> ComponentError | UsageError:
    if error.errno == errno.EADDRINUSE:
        hint = f"choose another {option}, or 0 for a free one"
        return PortInUseError(f"port {port} is taken", field=option, hint=hint)
    if error.errno == errno.EACCES:
        return ComponentError(f"port {port} may not be bound by this user", field=option, expected="a port from 1024")
    where = option.replace("port", "address")
    return UsageError("cannot be bound here", field=where, expected="an address of this machine", was=address[:100])
