"""Where a server is: `host:port`, `http://host:port`, `grpc://host:port`, with `[...]` around an IPv6 address."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from tickserve.errors import UsageError

TransportName = Literal["http", "grpc"]

_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?/?")
_EXPECTED = "host:port, http://host:port or grpc://host:port"


class Endpoint(NamedTuple):
    """A parsed address; `host` is without brackets."""

    transport: TransportName
    host: str
    port: int

    @property
    def authority(self) -> str:
        """`host:port` as it is written in a URL and in a Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(url: str, transport: str | None) -> Endpoint:
    """The address `url` names; `transport` None follows its scheme. Raises UsageError naming `url` or `transport`."""
    if transport not in (None, "http", "grpc"):
        raise UsageError("unknown transport", field="transport", expected="'http' or 'grpc'", was=repr(transport)[:60])
    if not isinstance(url, str):
        raise UsageError("not text", field="url", expected=_EXPECTED, was=type(url).__name__)
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = transport or "http", url
    return _parse(url, scheme.lower(), rest, transport)


def _parse(url: str, scheme: str, rest: str, transport: str | None) -> Endpoint:
    if scheme in ("https", "grpcs"):
        raise UsageError(
            "TLS is not supported yet",
            field="url",
            expected="http:// or grpc://",
            was=f"{scheme}://",
            hint="reach the server over loopback or a private network",
        )
    if scheme not in ("http", "grpc"):
        raise UsageError("unknown scheme", field="url", expected=_EXPECTED, was=repr(url)[:80])
    if transport is not None and transport != scheme:
        raise UsageError("contradicts the URL's scheme", field="transport", expected=repr(scheme), was=repr(transport))
    match = _AUTHORITY.fullmatch(rest)
    if match is None:
        raise UsageError("not a server address", field="url", expected=_EXPECTED, was=repr(url)[:80])
    if match["port"] is None:
        raise UsageError(
            "no port", field="url", expected=_EXPECTED, was=repr(url)[:80], hint="Triton's own: 8000, 8001"
        )
    port = int(match["port"])
    if not 1 <= port <= 65_535:
        raise UsageError("no such port", field="url", expected="a port from 1 to 65535", was=match["port"])
    return Endpoint("grpc" if scheme == "grpc" else "http", match["host"].strip("[]"), port)
