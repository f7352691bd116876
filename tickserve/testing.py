"""For engine developers: a client without a server, whose answers are scripted and always the same.

`mock_client` is the real client, with its whole contract, over a transport that answers from a script; so what an
engine meets in a test is what it meets in production: typed errors, flags, statuses, fallbacks. Nothing sleeps: a
scripted latency is held against the call's deadline instead. Nothing of Tickserve imports this. Letters: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.client._client import Client
from tickserve.client._core import Core
from tickserve.client._transport import DTYPES, Array, InferRequest, InferResponse
from tickserve.client._warm import Warmed, deadline_of
from tickserve.errors import DeadlineExceededError, ModelNotFoundError, RequestError, UsageError
from tickserve.features.spec import FeatureSpec
from tickserve.manifest import (
    CLASSES,
    OUTPUTS,
    FeatureContract,
    Horizon,
    Manifest,
    Provenance,
    StateContract,
    StateTensor,
    StreamContract,
    TensorSpec,
    Tolerance,
)
from tickserve.store import sha256_bytes

DOWN, FLAT, UP = range(3)
VERSION = 1
MARGIN = 1e9


@dataclass(frozen=True)
class Answer:
    """One scripted answer: `probabilities` (down, flat, up) for every row, or [B, 3]; it took `latency_ms`.

    `state` is a stateful model's next state by input name, [B, ...]; by default the state that came in plus one.
    `version` is the version that says it answered.
    """

    probabilities: Any = (0.25, 0.5, 0.25)
    latency_ms: float = 0.0
    state: Mapping[str, npt.NDArray[np.float32]] | None = None
    version: int = VERSION


UP_ANSWER, DOWN_ANSWER, FLAT_ANSWER = Answer((0.1, 0.2, 0.7)), Answer((0.7, 0.2, 0.1)), Answer((0.1, 0.8, 0.1))

Entry = Answer | RequestError | Callable[[InferRequest], Answer]


def make_manifest(
    name: str = "mock-model",
    *,
    columns: Iterable[str] = ("a", "b", "c"),
    window: int | None = None,
    state: tuple[int, ...] | None = None,
    spec: FeatureSpec | None = None,
    stride: int = 1,
    **fields: Any,
) -> Manifest:
    """A consistent manifest of a model that does not exist.

    - `columns`: of the features; `spec` gives them, with what `tickserve.stream.Stream` needs, instead.
    - `window`: the model takes so many rows at a time; `state`: it takes one and a `hidden` state of this shape.
    - `fields`: any field of `Manifest`, as it is.
    """
    names = spec.columns if spec else tuple(columns)
    contract = FeatureContract(
        spec=spec.name if spec else "mock",
        digest=spec.digest if spec else sha256_bytes(",".join(names).encode()),
        columns=names,
        minimum=(-MARGIN,) * len(names),
        maximum=(MARGIN,) * len(names),
    )
    shape = (len(names),) if window is None else (window, len(names))
    made: dict[str, Any] = {
        "name": name,
        "family": "gbdt" if window is None and state is None else "lstm",
        "horizon": Horizon(unit="ms", value=1_000, threshold=0.0),
        "model_file": "model.ubj",
        "architecture": {"stride": stride},
        "inputs": (TensorSpec(name="features" if window is None else "window", dtype="FP32", shape=shape),),
        "outputs": OUTPUTS,
        "nan_policy": "native",
        "features": contract,
        "tolerance": Tolerance(atol=1e-6, rtol=1e-5),
        "files": {"model.ubj": sha256_bytes(name.encode())},
        "provenance": Provenance(created="2000-01-01T00:00:00+00:00", seed=0, simulated=True),
    }
    if spec is not None:
        jump = 1.5 if spec.kind == "bars" else None
        made["stream"] = StreamContract(spec=spec.to_json(), stride=stride, jump_factor=jump)
    if state is not None:
        made |= _stateful(made, state, spec.session_gap_ns if spec else 3_600 * 10**9, stride)
    return Manifest(**(made | fields))


def _stateful(made: Mapping[str, Any], shape: tuple[int, ...], gap_ns: int, stride: int) -> dict[str, Any]:
    tensor = StateTensor(input="hidden", output="hidden_out", shape=shape)
    return {
        "state": StateContract(tensors=(tensor,), session_gap_ns=gap_ns, stride=stride),
        "inputs": (*made["inputs"], TensorSpec(name="hidden", dtype="FP32", shape=shape)),
        "outputs": (*made["outputs"], TensorSpec(name="hidden_out", dtype="FP32", shape=shape)),
    }


class MockTransport:
    """Answers from `script`, one entry a request; when it is through, with `then`.

    An entry is an `Answer`, an error to raise, or a function of the request. `requests` keeps what was asked.
    """

    def __init__(self, manifests: Iterable[Manifest], script: Iterable[Entry] = (), then: Entry = FLAT_ANSWER) -> None:
        self._manifests = {manifest.name: manifest for manifest in manifests}
        self._script: Iterator[Entry] = iter(script)
        self._then = then
        self.requests: list[InferRequest] = []
        self.closed = False

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """The next entry's answer. Raises the entry's error, and DeadlineExceededError for a latency beyond it."""
        self.requests.append(request)
        manifest = self._manifests.get(request.model)
        if manifest is None:
            raise ModelNotFoundError("the mock does not serve this model", field="model", was=request.model)
        entry = next(self._script, self._then)
        if isinstance(entry, RequestError):
            raise entry
        answer = entry if isinstance(entry, Answer) else entry(request)
        if answer.latency_ms * 1e3 > request.timeout_us:
            raise DeadlineExceededError("no answer inside the deadline (scripted)")
        return InferResponse(request.model, answer.version, request.request_id, _outputs(answer, request, manifest))

    def inputs(self, request: int = -1) -> dict[str, Array]:
        """The arrays [B, ...] of a request, by tensor name; the last one's by default."""
        return _arrays(self.requests[request])

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def _arrays(request: InferRequest) -> dict[str, Array]:
    return {
        tensor.name: np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tensor.shape)
        for tensor in request.tensors
    }


def _outputs(answer: Answer, request: InferRequest, manifest: Manifest) -> dict[str, Array]:
    given = _arrays(request)
    rows = len(given[manifest.inputs[0].name])
    probabilities = np.array(np.broadcast_to(np.asarray(answer.probabilities, np.float32), (rows, len(CLASSES))))
    outputs: dict[str, Array] = {
        "probabilities": probabilities,
        "score": probabilities[:, [UP]] - probabilities[:, [DOWN]],
        "bundle_id": np.full((rows, 1), manifest.bundle_id(), np.int64),
    }
    for tensor in manifest.state.tensors if manifest.state else ():
        said = None if answer.state is None else answer.state[tensor.input]
        outputs[tensor.output] = given[tensor.input] + np.float32(1) if said is None else np.asarray(said, np.float32)
    return outputs


class MockClient(Client):
    """A `Client` over a `MockTransport`, which is its attribute `transport`."""

    def __init__(self, transport: MockTransport, manifests: Mapping[str, Manifest], /, **options: Any) -> None:
        known: dict[str, Any] = {
            "deadline_ms": 100,
            "max_age_ms": None,
            "fallback": None,
            "observer": None,
            "risk_actions": None,
            "require_features": False,
        }
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UsageError("unknown option of a mock client", field=unknown[0], expected=", ".join(known))
        self.transport = transport
        self._transport: Any = transport
        self._core = Core(dict(manifests), **(known | options))
        self._infer = transport.infer

    def warm(self, model: str | None = None, *, deadline_ms: float = 1_000) -> tuple[Warmed, ...]:
        """As if all were reached at once; the script is left to the calls that decide."""
        deadline_of(deadline_ms)
        return tuple(Warmed("mock", name, 0.0, None) for name in self._core.to_rehearse(model))


def mock_client(
    manifest: Manifest | Iterable[Manifest], script: Iterable[Entry] = (), *, then: Entry = FLAT_ANSWER, **options: Any
) -> MockClient:
    """A client that answers from `script` and then with `then`, pinned to `manifest` or several.

    `options` are `Client`'s `deadline_ms`, `max_age_ms`, `fallback`, `observer`, `risk_actions` and `require_features`.
    Raises UsageError.
    """
    manifests = (manifest,) if isinstance(manifest, Manifest) else tuple(manifest)
    transport = MockTransport(manifests, script, then)
    return MockClient(transport, {each.name: each for each in manifests}, **options)
