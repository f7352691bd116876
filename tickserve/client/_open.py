"""From an address to its transport: what each scheme of a URL opens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tickserve.client._arguments import shown
from tickserve.client._http import HttpTransport
from tickserve.client._local import LocalTransport, local_path, trusted_keys
from tickserve.client._replicas import Guarded, Replicas
from tickserve.client._resilience import Resilience
from tickserve.client._transport import Transport
from tickserve.client._url import TransportName, parse_endpoint
from tickserve.errors import UsageError

MAX_REPLICAS = 64


def addresses(url: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses in `url`: one, several with commas between, or a sequence. Raises UsageError."""
    if isinstance(url, str):
        return tuple(part.strip() for part in url.split(",")) if "," in url and "://" not in url else (url,)
    found: tuple[Any, ...] = tuple(url) if isinstance(url, Iterable) else (url,)  # no text is refused as what it is
    if not 1 <= len(found) <= MAX_REPLICAS:
        raise UsageError("wrong number of addresses", field="url", expected=f"1 to {MAX_REPLICAS}", was=str(len(found)))
    return found


def open_servers(
    urls: Sequence[str], transport: TransportName | None, resilience: Resilience | None
) -> tuple[Transport, str | None]:
    """The transport over all of `urls`, and the name of a lone server. Raises UsageError."""
    if resilience is not None and not isinstance(resilience, Resilience):
        raise UsageError("wrong type", field="resilience", expected="a Resilience", was=shown(resilience))
    if len(urls) == 1 and local_path(urls[0]) is not None:
        if resilience is not None:
            raise UsageError("local:// takes none", field="resilience", expected="None", was="a Resilience")
        return open_transport(urls[0], transport), None
    names = [parse_endpoint(url, transport).authority for url in urls]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError("an address is given twice", field="url", was=twice)
    opened = [open_transport(url, transport) for url in urls]
    settings = Resilience() if resilience is None else resilience
    if len(opened) == 1:
        return Guarded(names[0], opened[0], settings), names[0]
    return Replicas(list(zip(names, opened, strict=True)), settings), None


def open_transport(url: str, transport: TransportName | None) -> Transport:
    """The transport of `url`. Raises UsageError naming `url` or `transport`."""
    folder = local_path(url)
    if folder is not None:
        if transport is not None:
            raise UsageError("local:// takes none", field="transport", expected="None", was=repr(transport)[:40])
        return LocalTransport(folder, trusted_keys())
    endpoint = parse_endpoint(url, transport)
    if endpoint.transport == "grpc":
        from tickserve.client._hedge_grpc import GrpcReplica  # gRPC is loaded only where it is used

        return GrpcReplica(endpoint)
    return HttpTransport(endpoint)
