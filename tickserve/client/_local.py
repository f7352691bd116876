"""Scoring in the engine's own process: a published version of a repository folder, by ONNX Runtime, without a server.

What is loaded is held to the same as what a server loads: the manifest's digests, its signature where trusted keys are
configured, and the golden pairs. Letters: B rows.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tickserve.client._manifests import Pinned, pin
from tickserve.client._transport import DTYPES, Array, InferRequest, InferResponse, Packed, Places, Tensor, named
from tickserve.errors import (
    ArtifactError,
    DigestMismatchError,
    MissingExtraError,
    ModelNotFoundError,
    ServerRejectedError,
    UsageError,
)
from tickserve.golden import compare, read_golden
from tickserve.manifest import GOLDEN_NAME, MANIFEST_NAME, Manifest, TensorSpec, load_manifest, verify_file
from tickserve.model_config import GRAPH_LEVELS, MODEL_FILE, SESSION_ENTRIES
from tickserve.signing import TrustedKeys, read_trusted_keys, verify_signature

SCHEME = "local"
TRUSTED_KEYS_ENV = "TICKSERVE_REPOSITORY__TRUSTED_KEYS_FILE"
# Up to this many rows a call's fixed cost shows, and buffers bound once are cheaper than arrays handed over each time.
BOUND_ROWS = 8
ALIGNMENT = 16
ONLY_ERRORS = 3
ONNX_TYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}


def local_path(url: object) -> Path | None:
    """The folder a `local://folder` URL names (`local:///folder` from the root); None for another scheme.

    Raises UsageError when there is no such folder.
    """
    if not isinstance(url, str) or not url.lower().startswith(f"{SCHEME}://"):
        return None
    folder = Path(url[len(SCHEME) + 3 :])
    if not url[len(SCHEME) + 3 :] or "\0" in url or not folder.is_dir():
        raise UsageError("no such folder", field="url", expected="local://<repository folder>", was=repr(url)[:100])
    return folder


def trusted_keys() -> TrustedKeys | None:
    """The keys of the file that the environment names as `repository.trusted_keys_file`; None without it."""
    name = os.environ.get(TRUSTED_KEYS_ENV)
    return read_trusted_keys(Path(name)) if name else None


class LocalTransport:
    """The models of a repository folder, or one version folder, each in the version in force.

    Every model in force is verified and loaded here, so that no first call pays for it; a version that a call names is
    loaded by that call. Safe for threads. A run cannot be interrupted: an answer after the deadline is refused when
    it is there.

    Raises UsageError, MissingExtraError, and ArtifactError, SignatureError or GateRefusedError for what cannot be
    trusted.
    """

    def __init__(self, folder: Path, trusted: TrustedKeys | None = None) -> None:
        self._folder, self._trusted = folder, trusted
        self._lock = threading.Lock()
        self._models: dict[tuple[str, int | None], LocalModel] = {}
        self._closed = False
        for name, pinned in pin(folder).items():
            model = LocalModel(self._version_folder(name, pinned), trusted)
            self._models[name, None] = self._models[name, model.version] = model

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """Score in this thread. Raises ModelNotFoundError, ServerRejectedError."""
        name, version, identity, _, tensors, _ = request
        model = self._models.get((name, version)) or self._load(request)
        return named(InferResponse, (name, model.version, identity, model.run(tensors), None, 1, False))

    def close(self) -> None:
        """Free the models; idempotent."""
        self._closed = True
        self._models = {}

    def _version_folder(self, name: str, pinned: Pinned) -> Path:
        single = (self._folder / MANIFEST_NAME).is_file()
        return self._folder if single else self._folder / name / str(pinned.version)

    def _load(self, request: InferRequest) -> LocalModel:
        """Another version than the one in force, once."""
        if self._closed:
            raise UsageError("the client is closed", hint="open another one")
        key = (request.model, request.version)
        folder = self._folder / request.model / str(request.version)
        with self._lock:
            if key not in self._models:
                if (self._folder / MANIFEST_NAME).is_file() or not (folder / MANIFEST_NAME).is_file():
                    raise ModelNotFoundError(
                        "the repository has no such version", field="version", was=f"{key[0]} {key[1]}"
                    )
                self._models[key] = LocalModel(folder, self._trusted)
            return self._models[key]


class LocalModel:
    """One published version, verified and loaded. Safe for threads.

    Raises ArtifactError (DigestMismatchError, SignatureError) for bytes that are not what was published, and
    GateRefusedError when it does not give research's numbers for its golden pairs.
    """

    def __init__(self, folder: Path, trusted: TrustedKeys | None = None) -> None:
        if not folder.name.isdigit():
            folder = folder.resolve()
        self.manifest = _verified(folder, trusted)
        self.version = int(folder.name) if folder.name.isdigit() else 1
        gated = self.manifest.export.judged_with() if self.manifest.export else None
        # As the server is configured: another level of optimisation, or other threads, may give another last digit.
        options = (gated.threads, gated.graph_level) if gated else ()
        self._session = open_session((folder / MODEL_FILE).read_bytes(), *options)
        _check_signature(self._session, self.manifest)
        self._inputs, self._outputs = self.manifest.inputs, self.manifest.outputs
        self._names = [spec.name for spec in self._outputs]
        self._given = [spec.name for spec in self._inputs]
        # One for all threads: the client knows an answer of a shape it has seen by it.
        self._layouts = [_layout(self._outputs, rows) for rows in range(BOUND_ROWS + 1)]
        self._free: tuple[list[_Bound], ...] = tuple([] for _ in range(BOUND_ROWS + 1))
        self._check_golden(folder)

    def run(self, tensors: Sequence[Tensor]) -> Mapping[str, Array]:
        """Every output [B, ...] by name, in arrays of its own. Raises ServerRejectedError."""
        if len(tensors) > 1 and [tensor.name for tensor in tensors] != self._given:
            by_name = {tensor.name: tensor for tensor in tensors}
            tensors = [by_name[spec.name] for spec in self._inputs]
        rows = tensors[0].shape[0]
        try:
            if rows > BOUND_ROWS:
                return self._run_arrays(tensors)
            free = self._free[rows]
            try:
                bound = free.pop()  # each is one thread's at a time
            except IndexError:
                bound = _Bound(self._session, self._inputs, self._layouts[rows], rows)
            answer = bound.run(tensors)
            free.append(bound)
            return answer
        except Exception as error:  # ONNX Runtime raises a type of its own per cause, all from Exception
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ServerRejectedError(f"ONNX Runtime cannot score this: {reason}") from error

    def answer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every output of one run, by name, from inputs by name [B, ...]. Raises ServerRejectedError."""
        tensors = [
            Tensor(spec.name, spec.dtype, inputs[spec.name].shape, inputs[spec.name].tobytes()) for spec in self._inputs
        ]
        return dict(self.run(tensors))

    def _run_arrays(self, tensors: Sequence[Tensor]) -> dict[str, Array]:
        feed = {
            tensor.name: np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tensor.shape) for tensor in tensors
        }
        answer = dict(zip(self._names, self._session.run(self._names, feed), strict=True))
        for array in answer.values():
            array.setflags(write=False)
        return answer

    def _check_golden(self, folder: Path) -> None:
        manifest = self.manifest
        pairs = read_golden(folder / GOLDEN_NAME, self._inputs, self._outputs)
        limit = manifest.export.max_batch if manifest.export else 1
        rows = len(pairs[self._inputs[0].name])
        for start in range(0, rows, limit):
            part = {name: array[start : start + limit] for name, array in pairs.items()}
            compare(
                part, self.answer(part), self._outputs, tolerance=manifest.tolerance, bundle_id=manifest.bundle_id()
            )


class _Layout(NamedTuple):
    """Where each output lies in one buffer, each aligned, and the size of it."""

    places: Places
    size: int


class _Bound:
    """Buffers for a fixed number of rows, bound to a session once: a call copies in, runs, and copies out."""

    __slots__ = ("_arrays", "_inputs", "_out", "_places", "_run")

    def __init__(self, session: Any, inputs: Sequence[TensorSpec], layout: _Layout, rows: int) -> None:
        binding = session.io_binding()
        self._run = _runner(session, binding)
        self._arrays = [np.empty((rows, *spec.shape), DTYPES[spec.dtype]) for spec in inputs]
        self._inputs = [(array.shape, array.data.cast("B")) for array in self._arrays]
        for spec, array in zip(inputs, self._arrays, strict=True):
            binding.bind_input(spec.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # All outputs lie in one buffer, so that one copy takes them out.
        self._places, self._out = layout.places, np.empty(layout.size, np.uint8)
        for name, (dtype, shape, offset) in self._places.items():
            binding.bind_output(name, "cpu", 0, dtype.type, shape, self._out.ctypes.data + offset)

    def run(self, tensors: Sequence[Tensor]) -> Packed:
        """Raises ValueError for another shape."""
        for (name, _, given, data), (shape, view) in zip(tensors, self._inputs, strict=True):
            if given != shape:
                raise ValueError(f"{name}: expected {list(shape)}, was {list(given)}")
            view[:] = data
        self._run()
        return Packed(self._places, self._out.tobytes(), 0)


def _layout(outputs: Sequence[TensorSpec], rows: int) -> _Layout:
    places, end = Places(), 0
    for spec in outputs:
        dtype, shape = DTYPES[spec.dtype], (rows, *spec.shape)
        places[spec.name] = (dtype, shape, end)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return _Layout(places, end)


def _runner(session: Any, binding: Any) -> Callable[[], object]:
    """Runs `session` on what is bound.

    The public way checks for a GPU's captured graphs on each run, and makes the same options anew: a fifth of what the
    run of a small forest takes.
    """
    bare = getattr(getattr(session, "_sess", None), "run_with_iobinding", None)
    bound = getattr(binding, "_iobinding", None)
    if bare is None or bound is None:  # another version of ONNX Runtime than we know
        return partial(session.run_with_iobinding, binding)
    import onnxruntime as ort

    return partial(bare, bound, ort.RunOptions())


def open_session(graph: bytes, threads: int = 1, graph_level: int = 0) -> Any:
    """An ONNX Runtime session on the CPU; `graph_level` is Triton's (0 optimises all, 2 nothing).

    Raises MissingExtraError, and ArtifactError for what does not load.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError.of("onnxruntime", "inprocess") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    level = GRAPH_LEVELS.get(graph_level)
    if level is None:
        raise ArtifactError("an unknown level of optimisation", field="export.gated.graph_level", was=str(graph_level))
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = ONLY_ERRORS
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a type of its own per cause, all from Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ArtifactError(f"ONNX Runtime does not load this graph: {reason}", field=MODEL_FILE) from error


def _verified(folder: Path, trusted: TrustedKeys | None) -> Manifest:
    """The manifest of a version whose files are the bytes that were published."""
    if trusted is not None:
        verify_signature(folder, trusted)
    manifest = load_manifest(folder)
    record = manifest.export
    if record is None:
        raise ArtifactError("expected a published version, was a bundle", field="export")
    if record.bundle_digest != manifest.digest() or record.bundle_id != manifest.bundle_id():
        raise DigestMismatchError(
            "wrong digest", field="export.bundle_digest", expected=manifest.digest(), was=record.bundle_digest[:100]
        )
    verify_file(folder, MODEL_FILE, record.onnx_sha256)
    verify_file(folder, GOLDEN_NAME, record.golden_sha256)
    return manifest


def _check_signature(session: Any, manifest: Manifest) -> None:
    """The graph takes and gives exactly the manifest's tensors, each with the batch in front."""
    for side, nodes, specs in (
        ("input", session.get_inputs(), manifest.inputs),
        ("output", session.get_outputs(), manifest.outputs),
    ):
        graph = {node.name: (ONNX_TYPES.get(node.type, node.type), tuple(node.shape[1:])) for node in nodes}
        declared = {spec.name: (spec.dtype, spec.shape) for spec in specs}
        if graph != declared:
            raise ArtifactError(
                f"the graph's {side}s are not the manifest's", field=side, expected=str(declared), was=str(graph)[:300]
            )
