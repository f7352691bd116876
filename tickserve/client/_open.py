"""From an address to its transport: what each scheme of a URL opens."""

from __future__ import annotations

from tickserve.client._http import HttpTransport
from tickserve.client._local import LocalTransport, local_path, trusted_keys
from tickserve.client._transport import Transport
from tickserve.client._url import TransportName, parse_endpoint
from tickserve.errors import UsageError


def open_transport(url: str, transport: TransportName | None) -> Transport:
    """The transport of `url`. Raises UsageError naming `url` or `transport`."""
    folder = local_path(url)
    if folder is not None:
        if transport is not None:
            raise UsageError("local:// takes none", field="transport", expected="None", was=repr(transport)[:40])
        return LocalTransport(folder, trusted_keys())
    endpoint = parse_endpoint(url, transport)
    if endpoint.transport == "grpc":
        from tickserve.client._grpc import GrpcTransport  # gRPC is loaded only where it is used

        return GrpcTransport(endpoint)
    return HttpTransport(endpoint)
