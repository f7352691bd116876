"""TLS under any of the protocols: whom to trust, what to show, and a socket that encrypts what a line sends.

The handshake is part of connecting and keeps the call's deadline. TLS 1.2 and newer; the server's name is always held
against its certificate.
"""

from __future__ import annotations

import os
import select
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

from tickserve.client._socket import UnreachableError, WireError, _wait
from tickserve.errors import UsageError

EARLY_BYTES = 16 * 1024
ALPN = {"http": ["http/1.1"], "grpc": ["h2"]}


class UntrustedError(WireError):
    """TLS failed: a certificate was refused, here or there, or the other side speaks no TLS."""


@dataclass(frozen=True)
class Tls:
    """How to speak TLS to a server, for `Client(url, tls=...)` with `https://` or `grpcs://`.

    - `ca`: PEM file of the authorities to trust; None: those of the system.
    - `cert`, `key`: PEM files of this client's certificate chain and its key, for a server that asks for them.
    - `server_name`: the name the certificate has to be for, where it is not the host of the address.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise UsageError("cert and key go together", field="tls", expected="both or neither", was="one of them")

    def context(self, transport: str) -> ssl.SSLContext:
        """The context for `transport`. Raises UsageError naming the file that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(ALPN[transport])
        if self.ca is None:
            context.load_default_certs()
        else:
            self._load("ca", lambda: context.load_verify_locations(os.fspath(self.ca or "")))
        if self.cert is not None:
            # A key with a password would have it asked for on the terminal, in the middle of a session.
            self._load("cert", lambda: context.load_cert_chain(self.cert or "", self.key, password=lambda: b""))
        return context

    def _load(self, field: str, load: Callable[[], object]) -> None:
        try:
            load()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "no PEM file"
            raise UsageError(
                f"cannot be used: {reason}",
                field=f"tls.{field}",
                expected="a PEM file" if field == "ca" else "a PEM certificate and its key, without a password",
            ) from error


class SecureSocket:
    """A TLS connection with the methods that a line uses of a socket; blocking is told as a socket tells it."""

    __slots__ = ("_early", "_problem", "_sock")

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._early = b""  # what `arrived` took for the next `recv`, and what it met
        self._problem: Exception | None = None

    def send(self, data: bytes | memoryview) -> int:
        """How much of `data` went out. Raises BlockingIOError, OSError and UntrustedError."""
        try:
            return self._sock.send(data)
        except ssl.SSLEOFError as error:
            # Why it closed may be there to be read: in TLS 1.3 a server says only now that it wants a certificate.
            with suppress(BlockingIOError):
                self.recv(1)
            raise ConnectionResetError from error
        except ssl.SSLError as error:
            raise _told(error) from error

    def recv(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end. Raises as `send`."""
        if self._problem is not None:
            raise self._problem
        if self._early:
            data, self._early = self._early[:size], self._early[size:]
            return data
        try:
            return self._sock.recv(size)
        except ssl.SSLError as error:
            raise _told(error) from error

    def arrived(self) -> bool:
        """Whether `recv` has something to tell: session tickets, which follow every handshake, are nothing."""
        if self._early or self._problem is not None:
            return True
        try:
            self._early = self.recv(EARLY_BYTES)
        except BlockingIOError:
            return False
        except (OSError, WireError) as error:
            self._problem = error
        return True

    def recv_into(self, buffer: memoryview) -> int:
        """How much was received into `buffer`. Raises as `send`."""
        if self._early or self._problem is not None:
            data = self.recv(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        try:
            return self._sock.recv_into(buffer)
        except ssl.SSLError as error:
            raise _told(error) from error

    def pending(self) -> bool:
        """Whether bytes were decrypted and not yet taken."""
        return bool(self._early) or self._problem is not None or self._sock.pending() > 0

    def fileno(self) -> int:
        """The descriptor; -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close, without a farewell: the peer may be gone."""
        self._sock.close()

    def poll(self) -> SecurePoll:
        """What waits for this socket to have something."""
        return SecurePoll(self)


class SecurePoll:
    """`select.poll` over one connection, which also knows of what was decrypted and not yet taken."""

    __slots__ = ("_poll", "_sock")

    def __init__(self, sock: SecureSocket) -> None:
        self._sock, self._poll = sock, select.poll()

    def register(self, sock: Any, events: int) -> None:
        """Wait for `events` of `sock`."""
        self._poll.register(sock, events)

    def poll(self, timeout_ms: float) -> Any:
        """Something true as soon as there is something to receive."""
        return self._sock.pending() or self._poll.poll(timeout_ms)


def secured(sock: socket, context: ssl.SSLContext, name: str, deadline_ns: int) -> Any:
    """`sock`, connected, with TLS on it before `deadline_ns`. Raises WireError; `sock` is then closed."""
    try:
        wrapped = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
    except (OSError, ValueError) as error:
        sock.close()
        raise UnreachableError("closed before the TLS handshake") from error
    try:
        _shake(wrapped, deadline_ns)
    except BaseException:
        wrapped.close()
        raise
    return SecureSocket(wrapped)


def _shake(sock: ssl.SSLSocket, deadline_ns: int) -> None:
    while True:
        poll = select.poll()
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            poll.register(sock, select.POLLIN)
            _wait(sock, poll, deadline_ns, write=False)
        except ssl.SSLWantWriteError:
            poll.register(sock, select.POLLOUT)
            _wait(sock, poll, deadline_ns, write=True)
        except ssl.SSLError as error:
            raise refused(error) from error
        except OSError as error:
            raise UnreachableError("closed in the TLS handshake") from error
        else:
            return


def _told(error: ssl.SSLError) -> Exception:
    if isinstance(error, ssl.SSLWantReadError | ssl.SSLWantWriteError):
        return BlockingIOError()
    return ConnectionResetError() if isinstance(error, ssl.SSLEOFError) else refused(error)


def refused(error: ssl.SSLError) -> UntrustedError:
    """What went wrong with TLS, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return UntrustedError(f"the server's certificate is not trusted: {error.verify_message}")
    reason = error.reason or ""
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "PACKET_LENGTH_TOO_LONG"):
        return UntrustedError("the other side speaks no TLS")
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return UntrustedError("the server asks for a certificate of this client")
    if "ALERT" in reason:
        return UntrustedError(f"the server refused this client: {reason.lower().replace('_', ' ')}")
    return UntrustedError(f"TLS failed: {reason.lower().replace('_', ' ') or 'no reason given'}")
