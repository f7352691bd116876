"""Where a server is: `host:port`, `http://`, `grpc://` or with TLS `https://`, `grpcs://`; `[...]` around IPv6."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal, NamedTuple

from tickserve.client._arguments import shown
from tickserve.client._tls import Tls
from tickserve.errors import UsageError

TransportName = Literal["http", "grpc", "shm"]

_AUTHORITY = re.compile(r"(?P<host>\[[A-Za-z0-9:.%_-]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?/?")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
MAX_NAME = 253
_EXPECTED = "host:port, or http, https, grpc or grpcs://host:port"


class Endpoint(NamedTuple):
    """A parsed address; `host` is without brackets. `tls` None: in plaintext."""

    transport: TransportName
    host: str
    port: int
    tls: Tls | None = None

    @property
    def authority(self) -> str:
        """`host:port` as it is written in a URL and in a Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(url: str, transport: str | None, tls: Tls | None = None) -> Endpoint:
    """The address `url` names; `transport` None follows its scheme.

    Raises UsageError naming `url`, `transport` or `tls`, which goes with https:// and grpcs:// alone.
    """
    if transport not in (None, "http", "grpc", "shm"):
        raise UsageError(
            "unknown transport", field="transport", expected="'http', 'grpc' or 'shm'", was=shown(transport)
        )
    if transport == "shm":
        return _shared(url, tls)
    if not isinstance(url, str):
        raise UsageError("not text", field="url", expected=_EXPECTED, was=type(url).__name__)
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = transport or "http", url
    scheme = scheme.lower()
    secure = scheme in ("https", "grpcs")
    if tls is not None and not isinstance(tls, Tls):
        raise UsageError("wrong type", field="tls", expected="a Tls", was=type(tls).__name__)
    if tls is not None and not secure:
        raise UsageError("goes with TLS alone", field="tls", expected="https:// or grpcs://", was=shown(url, 80))
    endpoint = _parse(url, scheme.removesuffix("s") if secure else scheme, rest, transport)
    return endpoint._replace(tls=tls or Tls()) if secure else endpoint


def _shared(url: str, tls: Tls | None) -> Endpoint:
    """Memory is shared with a server on this machine, which is told of it over plain HTTP."""
    endpoint = parse_endpoint(url, "http", tls)
    if endpoint.tls is not None:
        raise UsageError("shared memory takes plain HTTP", field="transport", expected="http://", was=shown(url, 80))
    return endpoint._replace(transport="shm")


def _is_host(text: str) -> bool:
    """Whether `text` is an address or a name the resolver takes: labels of 1 to 63, the last not a number."""
    try:
        if text.startswith("["):
            ipaddress.IPv6Address(text[1:-1])
            return True
        labels = text.removesuffix(".").split(".")
        if labels[-1].isdigit():
            ipaddress.IPv4Address(text)
            return True
    except ValueError:
        return False
    return len(text) <= MAX_NAME and all(_LABEL.fullmatch(label) for label in labels)


def _parse(url: str, scheme: str, rest: str, transport: str | None) -> Endpoint:
    if scheme not in ("http", "grpc"):
        raise UsageError("unknown scheme", field="url", expected=_EXPECTED, was=shown(url, 80))
    if transport is not None and transport != scheme:
        raise UsageError("contradicts the URL's scheme", field="transport", expected=repr(scheme), was=shown(transport))
    match = _AUTHORITY.fullmatch(rest)
    if match is None or not _is_host(match["host"]):
        raise UsageError("not a server address", field="url", expected=_EXPECTED, was=shown(url, 80))
    if match["port"] is None:
        raise UsageError(
            "no port", field="url", expected=_EXPECTED, was=shown(url, 80), hint="Triton's own: 8000, 8001"
        )
    port = int(match["port"])
    if not 1 <= port <= 65_535:
        raise UsageError("no such port", field="url", expected="a port from 1 to 65535", was=match["port"])
    return Endpoint("grpc" if scheme == "grpc" else "http", match["host"].strip("[]"), port)
