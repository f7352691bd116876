"""Smaller children of a net: fp16 and int8 graphs, each measured against its teacher and refused when it is worse.

INT8 here is *weight-only*: the LSTM's matrices are stored as int8 with one scale per output row and dequantized in the
graph. ONNX Runtime's dynamic quantization was tried and left: its activation scale is taken over the whole batch, so a
row's number, and now and then its decision, depends on which other requests it was batched with.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tickserve.config import CompressSettings
from tickserve.errors import ArtifactError
from tickserve.manifest import GateResult, Manifest, TensorSpec
from training.bundles import TrainedBundle, write_bundle
from training.examples import FloatArray, Rows
from training.metrics import Prediction, rank_correlation
from training.reference import rescored

if TYPE_CHECKING:
    from onnx import ModelProto

Precision = Literal["fp16", "int8"]

# A child that decides otherwise than its teacher on more rows than this is another model.
MIN_DECISION_AGREEMENT = 0.97
# Absolute, since a ratio of two small information coefficients means nothing.
MAX_IC_LOSS = 0.01
NO_OPTIMIZATION = 2
MODEL_FILE = "model.onnx"
INT8_LIMIT = 127


@dataclass(frozen=True)
class Teacher:
    """What the children are made from and held against: the net, its bundle, and parity rows with their returns.

    `inputs` is float32 [R, T, F], `expected` the teacher's probabilities [R, 3], `ret` the forward returns [R].
    """

    net: Any
    bundle: TrainedBundle
    tensor: TensorSpec
    inputs: Rows
    expected: Rows
    ret: FloatArray


def children(
    teacher: Teacher, wanted: CompressSettings, out: Path, say: Callable[[str], None]
) -> tuple[list[TrainedBundle], list[dict[str, Any]]]:
    """The bundles of the children that passed, and a report row for every child, passed or not."""
    from export.onnx_graph import net_to_onnx

    precisions: list[Precision] = [name for name in ("fp16", "int8") if getattr(wanted, name)]
    if not precisions:
        return [], []
    graph = net_to_onnx(teacher.net, teacher.tensor)
    bundles, rows = [], []
    for precision in precisions:
        child, row = _child(teacher, SHRINK[precision](graph), precision, out)
        rows.append(row)
        say(f"{row['model']}: {row['verdict']}")
        bundles.extend([child] if child else [])
    return bundles, rows


def to_fp16(graph: ModelProto) -> ModelProto:
    """The LSTM and what follows in float16; float32 in and out, and float32 up to the scaled windows.

    The scaler stays float32: a raw price or size is more than float16 can hold.
    """
    from onnxconverter_common.float16 import convert_float_to_float16

    before: list[str] = []
    for node in graph.graph.node:
        if node.op_type == "LSTM":
            break
        before.append(node.name)
    with warnings.catch_warnings():
        # It reports each weight it rounds; the gate below measures what the rounding does.
        warnings.filterwarnings("ignore", category=UserWarning, module="onnxconverter_common")
        smaller: ModelProto = convert_float_to_float16(copy_of(graph), keep_io_types=True, node_block_list=before)
    return smaller


def to_int8(graph: ModelProto) -> ModelProto:
    """The LSTM's input and recurrent matrices as int8 with a float32 scale per output row (symmetric)."""
    from onnx import helper, numpy_helper

    model = _fold_constants(graph)
    weights = {item.name: item for item in model.graph.initializer}
    added, replaced = [], set()
    for node in model.graph.node:
        for slot in (1, 2) if node.op_type == "LSTM" else ():
            name = node.input[slot]
            quantized, scale = quantize_rows(numpy_helper.to_array(weights[name]))
            parts: dict[str, np.ndarray[Any, Any]] = {
                "int8": quantized,
                "scale": scale,
                "zero": np.zeros(len(scale), np.int8),
            }
            model.graph.initializer.extend(
                numpy_helper.from_array(part, f"{name}.{key}") for key, part in parts.items()
            )
            inputs = [f"{name}.{key}" for key in parts]
            added.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.float"], f"{name}.dequantize", axis=1))
            node.input[slot] = f"{name}.float"
            replaced.add(name)
    if not added:
        raise ArtifactError("nothing to quantize", field="model", expected="an LSTM", was="none")
    _replace(model, added, replaced)
    return model


def quantize_rows(matrix: Rows) -> tuple[np.ndarray[Any, np.dtype[np.int8]], Rows]:
    """An LSTM matrix [1, 4H, K] as int8, and its scale per output row [4H]: `matrix ~ int8 * scale`."""
    scale = np.abs(matrix).max(axis=(0, 2)) / INT8_LIMIT
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    quantized = np.clip(np.rint(matrix / scale[None, :, None]), -INT8_LIMIT, INT8_LIMIT)
    return quantized.astype(np.int8), scale


def _fold_constants(graph: ModelProto) -> ModelProto:
    """Compute what does not depend on the input, so that every weight the LSTM reads is an initializer."""
    import onnx_ir
    from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    everything = 2**30
    model = onnx_ir.serde.deserialize_model(copy_of(graph))
    fold_constants(model, input_size_limit=everything, output_size_limit=everything)
    for step in (LiftConstantsToInitializersPass(lift_all_constants=True), RemoveUnusedNodesPass()):
        step(model)
    return onnx_ir.serde.serialize_model(model)


def _replace(model: ModelProto, added: list[Any], replaced: set[str]) -> None:
    kept = [item for item in model.graph.initializer if item.name not in replaced]
    nodes = [*added, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:], model.graph.value_info[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)


def copy_of(graph: ModelProto) -> ModelProto:
    """A copy that may be changed."""
    from onnx import ModelProto as Model

    copied = Model()
    copied.CopyFrom(graph)
    return copied


SHRINK: dict[Precision, Callable[[ModelProto], ModelProto]] = {"fp16": to_fp16, "int8": to_int8}


def _child(
    teacher: Teacher, graph: ModelProto, precision: Precision, out: Path
) -> tuple[TrainedBundle | None, dict[str, Any]]:
    """Measure one child; write its bundle when it passes, and leave none of that name when it does not."""
    from export.onnx_graph import clean_graph
    from export.runtime import open_session, run

    name = f"{teacher.bundle.manifest.name}-{precision}"
    content = clean_graph(graph).SerializeToString(deterministic=True)
    session = open_session(content, graph_level=NO_OPTIMIZATION)

    def predict(inputs: Rows) -> Rows:
        if not len(inputs):  # ONNX Runtime's LSTM aborts the process over an empty batch
            return np.empty((0, teacher.expected.shape[1]), np.float32)
        return np.asarray(run(session, {teacher.tensor.name: inputs})["probabilities"], np.float32)

    teacher_file = teacher.bundle.path / teacher.bundle.manifest.model_file
    gate = hold(teacher, predict(teacher.inputs), len(content), teacher_file.stat().st_size)
    row = {
        "model": name,
        "family": "lstm",
        "precision": precision,
        "teacher": teacher.bundle.manifest.name,
        "passed": gate.passed,
        **gate.measured,
        "verdict": gate.detail,
    }
    if not gate.passed:
        shutil.rmtree(out / name, ignore_errors=True)
        return None, row
    reference = teacher.bundle.manifest.reference
    path, manifest = write_bundle(
        out,
        name=name,
        model_file=MODEL_FILE,
        save=lambda file: _write(file, content),
        predict=predict,
        tensor=teacher.tensor,
        parity_inputs=teacher.inputs,
        fields=_fields(teacher.bundle.manifest, precision, gate) | rescored(reference, predict(teacher.inputs)),
    )
    return TrainedBundle(path, manifest, row), row


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _fields(parent: Manifest, precision: Precision, gate: GateResult) -> dict[str, Any]:
    return inherited(parent) | {
        "precision": precision,
        "parents": (parent.digest(),),
        "metrics": {"against_teacher": gate.measured} | inherited_gate(parent),
        "gates": (gate,),
    }


def inherited(parent: Manifest) -> dict[str, Any]:
    """What a child's manifest takes over from its teacher's."""
    names = ["family", "horizon", "architecture", "nan_policy", "features", "tolerance", "provenance"]
    return {name: getattr(parent, name) for name in [*names, *(["stream"] if parent.stream else [])]}


def inherited_gate(parent: Manifest) -> dict[str, Any]:
    """The answer of the validation gate for a child: its teacher's, whose decisions it was held to."""
    return {"gate": parent.metrics["gate"] | {"of": parent.name}} if "gate" in parent.metrics else {}


def hold(teacher: Teacher, answered: Rows, size: int, teacher_size: int) -> GateResult:
    """The child's probabilities [R, 3] against its teacher's, as a gate: decisions and information coefficient.

    No rows, or the same one over and over, prove nothing: refused.
    """
    said, wanted = Prediction.of(answered), Prediction.of(teacher.expected)
    agreement = float((said.classes == wanted.classes).mean()) if len(answered) else 0.0
    ic, teacher_ic = rank_correlation(said.score, teacher.ret), rank_correlation(wanted.score, teacher.ret)
    lost = (teacher_ic or 0.0) - (ic or 0.0)
    reasons = []
    if not len(answered):
        reasons.append("there are no rows to judge it on")
    elif np.array_equal(teacher.inputs, np.broadcast_to(teacher.inputs[:1], teacher.inputs.shape), equal_nan=True):
        reasons.append("the rows to judge it on are all the same")
    if not np.isfinite(answered).all():
        reasons.append("its probabilities are not finite")
    if agreement < MIN_DECISION_AGREEMENT:
        reasons.append(f"it decides as its teacher on {agreement:.1%} of rows, {MIN_DECISION_AGREEMENT:.0%} needed")
    if lost > MAX_IC_LOSS:
        reasons.append(f"its information coefficient is {lost:.3f} lower, {MAX_IC_LOSS} allowed")
    passed = f"decides as its teacher on {agreement:.1%} of rows, {teacher_size / size:.1f} times smaller"
    return GateResult(
        name="child",
        passed=not reasons,
        measured={
            "rows": len(answered),
            "max_abs_diff": float(np.abs(answered - teacher.expected).max()) if not reasons else None,
            "decision_agreement": agreement,
            "ic": ic,
            "teacher_ic": teacher_ic,
            "size_bytes": size,
            "teacher_size_bytes": teacher_size,
        },
        limits={"decision_agreement": MIN_DECISION_AGREEMENT, "ic_loss": MAX_IC_LOSS},
        detail=passed if not reasons else f"refused: {'; '.join(reasons)}",
    )
