"""From an address to its transport: what each scheme of a URL opens."""

from __future__ import annotations

from tickserve.client._http import HttpTransport
from tickserve.client._transport import Transport
from tickserve.client._url import TransportName, parse_endpoint


def open_transport(url: str, transport: TransportName | None) -> Transport:
    """The transport of `url`. Raises UsageError naming `url` or `transport`."""
    endpoint = parse_endpoint(url, transport)
    if endpoint.transport == "grpc":
        from tickserve.client._grpc import GrpcTransport  # gRPC is loaded only where it is used

        return GrpcTransport(endpoint)
    return HttpTransport(endpoint)
