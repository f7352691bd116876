"""The three loopback ports of the embedded server: the given ones when nobody listens there, else free ones."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from tickserve.config import ServeSettings
from tickserve.errors import PortInUseError, UsageError

LOOPBACK = "127.0.0.1"
PORT_FIELDS = ("http_port", "grpc_port", "metrics_port")


class Ports(NamedTuple):
    """Ports of 127.0.0.1."""

    http: int
    grpc: int
    metrics: int


@contextmanager
def reserved(settings: ServeSettings) -> Iterator[Ports]:
    """Hold the three ports for as long as the block runs, so that free ones differ and nobody else takes them.

    Raises PortInUseError naming the port and its option, and UsageError when two options name one port.
    """
    wanted = {field: int(getattr(settings, field)) for field in PORT_FIELDS}
    _check_distinct(wanted)
    with ExitStack() as stack:
        # The given ones first: a free port must not be one that another option asks for.
        held: dict[str, int] = {}
        for field, port in sorted(wanted.items(), key=lambda item: item[1] == 0):
            held[field] = _hold(stack, field, port)
        yield Ports(*(held[field] for field in PORT_FIELDS))


def _check_distinct(wanted: dict[str, int]) -> None:
    seen: dict[int, str] = {}
    for field, port in wanted.items():
        if port and port in seen:
            raise UsageError(
                "two options name one port",
                field=f"serve.{field} ({_option(field)})",
                expected=f"another port than serve.{seen[port]}",
                was=str(port),
            )
        seen[port] = field


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _hold(stack: ExitStack, field: str, port: int) -> int:
    """Take `port`, or a free one for 0. A given one is held without listening: who calls it meanwhile is refused."""
    try:
        if port:
            with _bound(port) as probe:
                probe.listen(1)
        held = stack.enter_context(_bound(port))
        if not port:
            held.listen(1)  # or another server's choice of a free one could be the same
    except OSError as error:
        raise _refused(field, port, error) from error
    return int(held.getsockname()[1])


def _bound(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # With this option only a listener is in the way, as it is for Triton; connections that linger are not.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((LOOPBACK, port))
    except OSError:
        sock.close()
        raise
    return sock


def _refused(field: str, port: int, error: OSError) -> Exception:
    name = f"serve.{field} ({_option(field)})"
    if error.errno == errno.EADDRINUSE:
        hint = f"stop what listens there, or choose another with {_option(field)}; 0 takes a free one"
        return PortInUseError(f"port {port} is taken", field=name, hint=hint)
    return UsageError(f"cannot listen on port {port}: {error.strerror}", field=name, hint="choose a port above 1023")
