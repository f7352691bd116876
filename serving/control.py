"""What a swap asks of a running server: load, unload, which versions are ready, how many requests each answered.

A load over HTTP holds the server's HTTP thread until the model is there, and every connection of that thread with it;
over gRPC it holds nobody up. So loads go over gRPC wherever the server speaks it in plaintext.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tickserve.errors import ComponentError, MissingExtraError, ModelNotFoundError, ServerRejectedError, TransportError

# Triton puts this in front of a restricted protocol's key when it looks for it in gRPC's metadata.
GRPC_HEADER_PREFIX = "triton-grpc-protocol-"
CALL_TIMEOUT_S = 10.0

Credential = tuple[str, str]


class Counts(NamedTuple):
    """What one version has done since it was loaded: `requests` ended well or badly, in `executions` batches."""

    requests: int
    executions: int


class Control:
    """The closed APIs of the server at `http_url` and `grpc_url` ("host:port"; None: loads go over HTTP)."""

    def __init__(self, http_url: str, grpc_url: str | None, credential: Credential | None) -> None:
        self._http_url, self._grpc_url = http_url, grpc_url
        self._headers = {} if credential is None else {credential[0]: credential[1]}

    def load(self, model: str, timeout_s: float, config: Mapping[str, Any] | None = None) -> None:
        """Load what the repository, or `config` (Triton's JSON form) in its place, says of `model`; wait until it is.

        Raises ServerRejectedError with the server's reason, and TransportError.
        """
        parameters = {} if config is None else {"config": json.dumps(config)}
        if self._grpc_url is None:
            self._post(f"/v2/repository/models/{model}/load", {"parameters": parameters}, timeout_s)
        else:
            self._grpc("load_model", model, timeout_s, config=parameters.get("config"))

    def unload(self, model: str, timeout_s: float) -> None:
        """Unload every version of `model`; returns before it is done."""
        if self._grpc_url is None:
            self._post(f"/v2/repository/models/{model}/unload", {}, timeout_s)
        else:
            self._grpc("unload_model", model, timeout_s)

    def ready(self, model: str, version: int) -> bool:
        """Whether this version answers. Raises TransportError."""
        return self._http("GET", f"/v2/models/{model}/versions/{version}/ready", None, CALL_TIMEOUT_S)[0] == 200

    def versions(self, model: str) -> tuple[int, ...]:
        """The versions the server has of `model`, oldest first. Raises ModelNotFoundError and its kin."""
        status, body = self._http("GET", f"/v2/models/{model}", None, CALL_TIMEOUT_S)
        if status in (http.HTTPStatus.BAD_REQUEST, http.HTTPStatus.NOT_FOUND):
            raise ModelNotFoundError("the server does not serve this model", field="model", was=repr(model[:100]))
        return tuple(sorted(int(number) for number in _read(status, body)["versions"]))

    def counts(self, model: str, version: int) -> Counts:
        """What this version has done so far. Raises ServerRejectedError and TransportError."""
        status, body = self._http("GET", f"/v2/models/{model}/versions/{version}/stats", None, CALL_TIMEOUT_S)
        (found,) = _read(status, body)["model_stats"]
        ended = found["inference_stats"]
        requests = sum(int(ended.get(kind, {}).get("count", 0)) for kind in ("success", "fail"))
        return Counts(requests, int(found.get("execution_count", 0)))

    @property
    def headers(self) -> Mapping[str, str]:
        """What opens the closed APIs over HTTP."""
        return self._headers

    def _post(self, path: str, body: object, timeout_s: float) -> None:
        _read(*self._http("POST", path, body, timeout_s))

    def _http(self, method: str, path: str, body: object, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._http_url, timeout=timeout_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), dict(self._headers))
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(f"no answer from the server: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _grpc(self, method: str, model: str, timeout_s: float, **arguments: Any) -> None:
        try:
            import tritonclient.grpc as triton
            from tritonclient.utils import InferenceServerException
        except ImportError as error:
            raise MissingExtraError.of("tritonclient", "triton") from error
        headers = {GRPC_HEADER_PREFIX + name: value for name, value in self._headers.items()}
        # A channel for this call alone: threads of a kept one would not survive a fork of the program.
        client = triton.InferenceServerClient(self._grpc_url)
        try:
            getattr(client, method)(model, headers=headers, client_timeout=timeout_s, **arguments)
        except InferenceServerException as error:
            kind = error.status() or ""
            if "UNAVAILABLE" in kind and "restricted" not in str(error):
                raise TransportError(f"no answer from the server: {_line(error.message())}") from error
            if "DEADLINE" in kind:
                raise ComponentError(
                    f"the server took longer than {timeout_s:g} s", field="swap.load_timeout_s"
                ) from error
            raise ServerRejectedError(_line(error.message())) from error
        finally:
            client.close()


def _line(message: str) -> str:
    """The reason in a server's message, on one line."""
    return " ".join(message.split())[:600]


def _read(status: int, body: bytes) -> Any:
    text = body.decode("utf-8", "replace")
    if status == http.HTTPStatus.OK:
        return json.loads(text) if text else {}
    try:
        text = str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        text = text[:300]
    raise ServerRejectedError(f"HTTP {status}: {_line(text)}")
