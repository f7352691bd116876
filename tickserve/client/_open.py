"""From an address to its transport: what each scheme of a URL opens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tickserve.client._arguments import shown
from tickserve.client._credential import Credential
from tickserve.client._grpc import GrpcTransport
from tickserve.client._http import HttpTransport
from tickserve.client._local import LocalTransport, local_path, trusted_keys
from tickserve.client._ready import Readiness
from tickserve.client._replicas import Guarded, Replicas
from tickserve.client._resilience import Resilience
from tickserve.client._shm import ShmTransport
from tickserve.client._tls import Tls
from tickserve.client._transport import Transport
from tickserve.client._url import Endpoint, TransportName, parse_endpoint
from tickserve.errors import UsageError

MAX_REPLICAS = 64


def addresses(url: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses in `url`: one, several with commas between, or a sequence. Raises UsageError."""
    found: tuple[Any, ...]
    if isinstance(url, str):
        found = (url,) if url.lower().startswith("local://") else tuple(part.strip() for part in url.split(","))
    else:
        found = tuple(url) if isinstance(url, Iterable) else (url,)  # what is no text is refused as what it is
    if not 1 <= len(found) <= MAX_REPLICAS:
        raise UsageError("wrong number of addresses", field="url", expected=f"1 to {MAX_REPLICAS}", was=str(len(found)))
    return found


def open_local(
    urls: Sequence[str], transport: TransportName | None, resilience: Resilience | None, tls: Tls | None = None
) -> LocalTransport | None:
    """The models of a lone `local://folder`; None for servers. Raises UsageError."""
    folder = local_path(urls[0]) if len(urls) == 1 else None
    if folder is None:
        return None
    for field, value in (("transport", transport), ("resilience", resilience), ("tls", tls)):
        if value is not None:
            raise UsageError("local:// takes none", field=field, expected="None", was=repr(value)[:40])
    return LocalTransport(folder, trusted_keys())


def check_servers(
    urls: Sequence[str], transport: TransportName | None, resilience: Resilience | None, tls: Tls | None = None
) -> list[Endpoint]:
    """The servers at `urls`: distinct, and all spoken to alike. Raises UsageError."""
    if resilience is not None and not isinstance(resilience, Resilience):
        raise UsageError("wrong type", field="resilience", expected="a Resilience", was=shown(resilience))
    endpoints = [parse_endpoint(url, transport, tls) for url in urls]
    names = [endpoint.authority for endpoint in endpoints]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError("an address is given twice", field="url", was=twice)
    kinds = {endpoint.transport for endpoint in endpoints}
    if len(kinds) > 1:
        raise UsageError("several transports", field="url", expected="one for all", was=" and ".join(sorted(kinds)))
    return endpoints


def open_servers(
    urls: Sequence[str],
    transport: TransportName | None,
    resilience: Resilience | None,
    tls: Tls | None = None,
    credential: Credential | None = None,
) -> tuple[Transport, str | None]:
    """The transport over all of `urls`, and the name of a lone server. Raises UsageError."""
    if credential is not None and transport != "shm":
        raise UsageError("goes with shared memory alone", field="credential", expected="transport='shm'", was="given")
    local = open_local(urls, transport, resilience, tls)
    if local is not None:
        return local, None
    endpoints = check_servers(urls, transport, resilience, tls)
    servers = [(endpoint.authority, _connected(endpoint, credential)) for endpoint in endpoints]
    settings = Resilience() if resilience is None else resilience
    if len(servers) == 1:
        return Guarded(*servers[0], settings), servers[0][0]
    return Replicas(servers, settings), None


def readiness(
    urls: Sequence[str], transport: TransportName | None, tls: Tls | None, carrier: object
) -> Readiness | None:
    """Who can be asked which versions the servers behind `carrier` have; None for models of this process."""
    statistics = getattr(carrier, "statistics", None)
    if statistics is None:
        return None

    def breakers() -> dict[str, str]:
        return {name: told["breaker"] for name, told in statistics()["replicas"].items()}

    return Readiness(check_servers(urls, transport, None, tls), breakers)


def open_transport(url: str, transport: TransportName | None) -> Transport:
    """The bare transport of one `url`, without a breaker. Raises UsageError naming `url` or `transport`."""
    return open_local((url,), transport, None) or _connected(parse_endpoint(url, transport))


def _connected(endpoint: Endpoint, credential: Credential | None = None) -> Transport:
    if endpoint.transport == "shm":
        return ShmTransport(endpoint, credential)
    return GrpcTransport(endpoint) if endpoint.transport == "grpc" else HttpTransport(endpoint)
