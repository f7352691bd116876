"""Triton's `onnxruntime` backend for a machine without NVIDIA's C++ one: the same config.pbtxt, honoured or refused.

Triton starts one stub process per model instance and loads this file in it (the Python-based backend rule). At load
the model file, its manifest and the golden pairs beside it are checked, and the golden pairs are scored, so a model
that does not give research's numbers never becomes ready. The requests Triton batched together are scored in one run.
Letters: R requests of one batch, B rows of all of them together.
"""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

if int(np.__version__.split(".")[0]) >= 2:
    # With numpy 2 the stub hands over wrong inputs and empty outputs without a word.
    raise ImportError(f"numpy: expected < 2 in the environment of the embedded Triton, was {np.__version__}")

import onnxruntime as ort
import triton_python_backend_utils as pb_utils

from tickserve.golden import compare, read_golden
from tickserve.manifest import Tolerance
from tickserve.model_config import MODEL_FILE, BackendOptions, read_options

PROVIDERS = {"CPU": "CPUExecutionProvider", "GPU": "CUDAExecutionProvider"}
# Fields that config.pbtxt leaves out and Triton fills in for a backend of this name written in Python.
FILLED_IN = {"platform": "onnxruntime_onnx", "runtime": "model.py"}
# ONNX Runtime's name of a tensor type, and ours.
ONNX_TYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}


class TritonPythonModel:
    """One instance of a served model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load, check and score the golden pairs; an exception leaves the model unready, with its message logged."""
        config = json.loads(args["model_config"])
        options = read_options({name: value for name, value in config.items() if value != FILLED_IN.get(name)})
        version = args["model_version"]
        folder = Path(args["model_repository"]) / version
        manifest = _verified_manifest(folder, options.manifests.get(int(version)) or _digest_beside(folder))
        self._session = _session(folder / MODEL_FILE, options, args["model_instance_kind"])
        _check_signature(self._session, options)
        self.inputs = [tensor.name for tensor in options.inputs]
        self.outputs = [tensor.name for tensor in options.outputs]
        _check_golden(self, folder / "golden.npz", manifest, options)
        # What is loaded stays: a garbage collection need not walk over it in the middle of a request.
        gc.collect()
        gc.freeze()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, in order; a request that cannot be scored gets an error of its own."""
        arrays = [[tensor.as_numpy() for tensor in _ordered(request, self.inputs)] for request in requests]
        try:
            if len(requests) == 1:
                return [self._response(self.run(arrays[0]))]
            outputs = self.run([np.concatenate(parts) for parts in zip(*arrays, strict=True)])
        except Exception:
            # One bad request must not take its batch with it: score each alone.
            return [self._alone(parts) for parts in arrays]
        responses, start = [], 0
        for parts in arrays:
            stop = start + len(parts[0])
            responses.append(self._response([values[start:stop] for values in outputs]))
            start = stop
        return responses

    def finalize(self) -> None:
        """Free the session."""
        del self._session

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Score inputs in the configuration's order; returns outputs in the configuration's order."""
        result: list[np.ndarray] = self._session.run(self.outputs, dict(zip(self.inputs, inputs, strict=True)))
        return result

    def _response(self, outputs: list[np.ndarray]) -> Any:
        return pb_utils.InferenceResponse(list(map(pb_utils.Tensor, self.outputs, outputs)))

    def _alone(self, parts: list[np.ndarray]) -> Any:
        try:
            return self._response(self.run(parts))
        except Exception as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"cannot score this request: {reason}"))


def _ordered(request: Any, names: list[str]) -> list[Any]:
    """The request's tensors in the configuration's order. Triton has checked that each is there once."""
    tensors = request.inputs()
    if len(names) == 1:
        return [tensors[0]]
    by_name = {tensor.name(): tensor for tensor in tensors}
    return [by_name[name] for name in names]


def _digest(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_beside(folder: Path) -> str | None:
    """The digest that the embedded server's view (serving/view.py) keeps with the version, not in config.pbtxt."""
    path = folder / "manifest.sha256"
    return (path.read_text("utf-8") or None) if path.is_file() else None


def _expect(condition: bool, field: str, expected: object, was: object) -> None:
    if not condition:
        raise pb_utils.TritonModelException(f"{field}: expected {expected}, was {was}")


def _verified_manifest(folder: Path, digest: str | None) -> dict[str, Any]:
    """The version's manifest, when it and the files it names are the bytes that were published."""
    _expect(digest is not None, f"parameters.manifest.{folder.name}", "the digest of manifest.json", "missing")
    for name in ("manifest.json", MODEL_FILE, "golden.npz"):
        _expect((folder / name).is_file(), name, "a file in the version's folder", "missing")
    _expect(_digest(folder / "manifest.json") == digest, "manifest.json", digest, _digest(folder / "manifest.json"))
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    record = manifest.get("export") or {}
    for name, key in ((MODEL_FILE, "onnx_sha256"), ("golden.npz", "golden_sha256")):
        _expect(_digest(folder / name) == record.get(key), name, record.get(key), _digest(folder / name))
    return manifest


def _session(path: Path, options: BackendOptions, kind: str) -> ort.InferenceSession:
    provider = PROVIDERS.get(kind)
    # A CPU instance ignores TensorRT, as NVIDIA's backend does; on a GPU it is that backend's to run.
    _expect(kind == "CPU" or not options.tensorrt, "optimization.execution_accelerators", "NVIDIA's backend", "ours")
    # On a GPU host KIND_AUTO means the GPU; a silent fall back to the CPU would break the latency it was chosen for.
    _expect(provider in ort.get_available_providers(), f"instance kind {kind}", provider, ort.get_available_providers())
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.intra_op_threads
    settings.inter_op_num_threads = options.inter_op_threads
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, options.graph_optimization)
    # Waiting threads that spin would take the core from Triton's own.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3
    session = ort.InferenceSession(path.read_bytes(), settings, providers=[provider])
    _expect(session.get_providers()[0] == provider, "execution provider", provider, session.get_providers())
    return session


def _check_signature(session: ort.InferenceSession, options: BackendOptions) -> None:
    """The graph takes and gives exactly the configured tensors, each with a batch dimension in front."""
    for side, nodes, tensors in (
        ("input", session.get_inputs(), options.inputs),
        ("output", session.get_outputs(), options.outputs),
    ):
        graph = {node.name: (ONNX_TYPES.get(node.type, node.type), tuple(node.shape[1:])) for node in nodes}
        declared = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
        _expect(graph == declared, f"{side} of config.pbtxt", f"the graph's {graph}", declared)


def _check_golden(model: TritonPythonModel, path: Path, manifest: dict[str, Any], options: BackendOptions) -> None:
    """Score the golden inputs; every value must lie within the manifest's tolerance of research's."""
    arrays = read_golden(path, options.inputs, options.outputs)
    tolerance, bundle_id = Tolerance(**manifest["tolerance"]), manifest["export"]["bundle_id"]
    for start in range(0, len(arrays[model.inputs[0]]), options.max_batch):
        part = {
            name: np.ascontiguousarray(values[start : start + options.max_batch]) for name, values in arrays.items()
        }
        answer = dict(zip(model.outputs, model.run([part[name] for name in model.inputs]), strict=True))
        compare(part, answer, options.outputs, tolerance=tolerance, bundle_id=bundle_id)
