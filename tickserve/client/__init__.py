"""The scoring client: `Client(url, manifest=...).score(model, features)` gives a `Signal` or a typed error in time.

Importing this loads numpy and pydantic, nothing heavier; gRPC is loaded when a client first asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tickserve.client._client import Client
from tickserve.client._credential import local_credential
from tickserve.client._fallback import FallbackPolicy, Hold, Local
from tickserve.client._manifests import load_manifests, newest_versions
from tickserve.client._observer import Decision, Observer, Observers
from tickserve.client._resilience import Resilience
from tickserve.client._risk import RiskActions
from tickserve.client._tls import Tls
from tickserve.client._transport import InferRequest, InferResponse, Tensor, Transport
from tickserve.client._warm import Warmed

if TYPE_CHECKING:
    from tickserve.client._async import AsyncClient

__all__ = [
    "AsyncClient",
    "Client",
    "Decision",
    "FallbackPolicy",
    "Hold",
    "InferRequest",
    "InferResponse",
    "Local",
    "Observer",
    "Observers",
    "Resilience",
    "RiskActions",
    "Tensor",
    "Tls",
    "Transport",
    "Warmed",
    "load_manifests",
    "local_credential",
    "newest_versions",
]


def __getattr__(name: str) -> Any:
    """Import `AsyncClient` when it is first asked for: asyncio takes longer to load than all else here."""
    if name == "AsyncClient":
        from tickserve.client._async import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
