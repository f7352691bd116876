"""Whether a version may be served here: its bytes are what was published, and they give research's numbers.

Both of our `onnxruntime` backends ask it, once per load. The Python one imports it; the native one runs it as a process
and serves exactly what it is handed: the settings to honour, and the bytes that were checked. Letters: G golden rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

if __name__ == "__main__":
    # Started with -I, so that nothing of the caller's is imported: the package lies beside this file, in the folder
    # that the server was given. The server's sockets are not ours to keep open.
    sys.path.insert(0, str(Path(__file__).parent))
    os.closerange(3, 1 << 16)

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from tickserve.errors import ArtifactError, TickserveError
from tickserve.golden import compare, read_golden
from tickserve.manifest import GOLDEN_NAME, MANIFEST_NAME, TensorSpec, Tolerance
from tickserve.model_config import MODEL_FILE, SESSION_ENTRIES, BackendOptions, read_options

PROVIDERS = {"CPU": "CPUExecutionProvider", "GPU": "CUDAExecutionProvider"}
# Fields that config.pbtxt leaves out and Triton fills in by itself, for a backend in Python and for a library.
FILLED_IN = {
    "platform": ("onnxruntime_onnx",),
    "runtime": ("model.py", "libtriton_onnxruntime.so"),
}
# ONNX Runtime's name of a tensor type, and ours.
ONNX_TYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}
DIGEST_NAME = "manifest.sha256"
# What the native backend has room for (serving/backends/native/version.h).
MOST_TENSORS, MOST_RANK, NAME_BYTES = 32, 8, 256

Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class Served:
    """A version that was checked: what to honour, the bytes that were checked, and a session over them."""

    options: BackendOptions
    graph: bytes
    session: ort.InferenceSession

    def run(self, inputs: Sequence[npt.NDArray[Any]]) -> Arrays:
        """Score inputs in the configuration's order; returns outputs in the configuration's order."""
        feed = {tensor.name: array for tensor, array in zip(self.options.inputs, inputs, strict=True)}
        answer: Arrays = self.session.run([tensor.name for tensor in self.options.outputs], feed)
        return answer


def check_version(config: Mapping[str, Any], folder: Path, kind: str) -> Served:
    """Check the version in `folder`, which `config` (Triton's JSON form) configures, for instances of `kind`.

    Raises ArtifactError and GateRefusedError.
    """
    options = read_options({name: value for name, value in config.items() if value not in FILLED_IN.get(name, ())})
    manifest = _verified_manifest(folder, options.manifests.get(int(folder.name)) or _digest_beside(folder))
    graph = _verified_graph(folder, manifest)
    served = Served(options, graph, _session(graph, options, kind))
    _check_signature(served.session, options)
    _check_golden(served, folder, manifest)
    return served


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _digest_beside(folder: Path) -> str | None:
    """The digest that the embedded server's view (serving/view.py) keeps with the version, not in config.pbtxt."""
    path = folder / DIGEST_NAME
    return (path.read_text("utf-8") or None) if path.is_file() else None


def _expect(condition: bool, field: str, expected: object, was: object) -> None:
    if not condition:
        raise ArtifactError("refused", field=field, expected=str(expected), was=str(was))


def _verified_manifest(folder: Path, digest: str | None) -> dict[str, Any]:
    """The version's manifest, when it is the bytes that were published."""
    _expect(digest is not None, f"parameters.manifest.{folder.name}", "the digest of manifest.json", "missing")
    for name in (MANIFEST_NAME, MODEL_FILE, GOLDEN_NAME):
        _expect((folder / name).is_file(), name, "a file in the version's folder", "missing")
    data = (folder / MANIFEST_NAME).read_bytes()
    _expect(_digest(data) == digest, MANIFEST_NAME, digest, _digest(data))
    manifest: dict[str, Any] = json.loads(data)
    return manifest


def _verified_graph(folder: Path, manifest: Mapping[str, Any]) -> bytes:
    """The graph, when it and the golden pairs are the bytes the manifest names."""
    record = manifest.get("export") or {}
    graph = (folder / MODEL_FILE).read_bytes()
    for name, data, key in (
        (MODEL_FILE, graph, "onnx_sha256"),
        (GOLDEN_NAME, (folder / GOLDEN_NAME).read_bytes(), "golden_sha256"),
    ):
        _expect(_digest(data) == record.get(key), name, record.get(key), _digest(data))
    return graph


def _session(graph: bytes, options: BackendOptions, kind: str) -> ort.InferenceSession:
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
    for key, value in SESSION_ENTRIES.items():
        settings.add_session_config_entry(key, value)
    settings.log_severity_level = 3
    session = ort.InferenceSession(graph, settings, providers=[provider])
    _expect(session.get_providers()[0] == provider, "execution provider", provider, session.get_providers())
    return session


def _check_signature(session: ort.InferenceSession, options: BackendOptions) -> None:
    """The graph takes and gives exactly the configured tensors, each with a batch dimension in front.

    None under both names: ONNX Runtime does not write an output that is an input into the buffer it is given.
    """
    twice = {tensor.name for tensor in options.inputs} & {tensor.name for tensor in options.outputs}
    _expect(not twice, "output of config.pbtxt", "names of their own", sorted(twice))
    for side, nodes, tensors in (
        ("input", session.get_inputs(), options.inputs),
        ("output", session.get_outputs(), options.outputs),
    ):
        graph = {node.name: (ONNX_TYPES.get(node.type, node.type), tuple(node.shape[1:])) for node in nodes}
        declared = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
        _expect(graph == declared, f"{side} of config.pbtxt", f"the graph's {graph}", declared)


def _check_golden(served: Served, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Score the golden inputs; every value must lie within the manifest's tolerance of research's."""
    options = served.options
    arrays = read_golden(folder / GOLDEN_NAME, options.inputs, options.outputs)
    tolerance, bundle_id = Tolerance(**manifest["tolerance"]), manifest["export"]["bundle_id"]
    names = [tensor.name for tensor in options.outputs]
    for start in range(0, len(arrays[options.inputs[0].name]), options.max_batch):
        part = {
            name: np.ascontiguousarray(values[start : start + options.max_batch]) for name, values in arrays.items()
        }
        answer = dict(zip(names, served.run([part[tensor.name] for tensor in options.inputs]), strict=True))
        compare(part, answer, options.outputs, tolerance=tolerance, bundle_id=bundle_id)


def handed_over(served: Served) -> bytes:
    """What the native backend reads (serving/backends/native/version.c): lines, an empty one, the graph's bytes."""
    options = served.options
    for tensors in (options.inputs, options.outputs):
        _expect(len(tensors) <= MOST_TENSORS, "tensors", f"at most {MOST_TENSORS} on a side", len(tensors))
    level = int(getattr(ort.GraphOptimizationLevel, options.graph_optimization))
    settings = f"threads {options.intra_op_threads} {options.inter_op_threads} level {level} batch {options.max_batch}"
    sizes = f"inputs {len(options.inputs)} outputs {len(options.outputs)} graph {len(served.graph)}"
    lines = [
        f"served-version 1 {settings} {sizes}",
        *(_line("input", tensor) for tensor in options.inputs),
        *(_line("output", tensor) for tensor in options.outputs),
    ]
    return "\n".join(lines).encode() + b"\n\n" + served.graph


def _line(side: str, tensor: TensorSpec) -> str:
    plain = tensor.name.isprintable() and " " not in tensor.name and len(tensor.name.encode()) < NAME_BYTES
    _expect(plain, f"{side} name", f"text without spaces, under {NAME_BYTES} bytes", tensor.name[:100])
    _expect(len(tensor.shape) < MOST_RANK, f"{side} {tensor.name}", f"fewer than {MOST_RANK} dimensions", tensor.shape)
    return " ".join([side, tensor.name, tensor.dtype, *map(str, tensor.shape)])


def main(arguments: Sequence[str], config: BinaryIO, answer: BinaryIO) -> int:
    """What the native backend starts: `location version`, the configuration in, `handed_over` or a reason out."""
    location, version = arguments
    try:
        served = check_version(json.load(config), Path(location) / version, "CPU")
        answer.write(handed_over(served))
    except TickserveError as error:
        answer.write(f"version {version}: {error}".encode())
        return 1
    except Exception as error:  # ONNX Runtime raises a type of its own per cause, all from Exception
        reason = (str(error).splitlines() or [""])[0][:300]
        answer.write(f"version {version}: {type(error).__name__}: {reason}".encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer, sys.stdout.buffer))
