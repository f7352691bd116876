"""The scoring client: `Client(url, manifest=...).score(model, features)` gives a `Signal` or a typed error in time.

Importing this loads numpy and pydantic, nothing heavier; gRPC is loaded when a client first asks for it.
"""

from tickserve.client._async import AsyncClient
from tickserve.client._client import Client
from tickserve.client._fallback import FallbackPolicy, Hold, Local
from tickserve.client._manifests import load_manifests, newest_versions
from tickserve.client._observer import Decision, Observer
from tickserve.client._resilience import Resilience
from tickserve.client._tls import Tls
from tickserve.client._transport import InferRequest, InferResponse, Tensor, Transport

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
    "Resilience",
    "Tensor",
    "Tls",
    "Transport",
    "load_manifests",
    "newest_versions",
]
