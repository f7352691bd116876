"""Eight-bit children of a net: weights alone, or weights and activations, after training (PTQ) or with it (QAT).

`weights` stores matrices as int8 and the file is a quarter; ONNX Runtime dequantizes them in every call, which costs a
small net a fifth of its time. `static` rounds activations too, with ranges calibrated on real training inputs of the
fold, by ONNX Runtime's quantizer. `qat` lets the net learn with modelopt's fake quantizers in it before that. Nothing
is scaled by the batch at hand: a row's number does not depend on its company (`training/quantize.py`).
Letters: n rows.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from export.onnx_graph import clean_graph, net_to_onnx
from export.runtime import open_session, run
from models.net import Net
from models.registry import NETS
from tickserve.errors import ArtifactError, InsufficientDataError
from tickserve.manifest import TensorSpec, Tolerance
from training.compress import qdq
from training.compress.extras import library
from training.compress.lesson import Course, Lesson, Say
from training.compress.recipe import QuantizeStep
from training.examples import IntArray, LabelledFold, Rows, evenly
from training.job import Fit, Watch
from training.nets import NetJob, reproducible
from training.quantize import copy_of, to_int8

MODEL_FILE = "model.onnx"
CHUNK_ROWS = 1_024
CALIBRATION_BATCH = 64
MIN_CALIBRATION_ROWS = 32
NO_OPTIMIZATION = 2


@dataclass(frozen=True)
class GraphModel:
    """A quantized net: its graph, a session over it with every optimisation off, and what its manifest declares."""

    content: bytes
    session: Any
    architecture: dict[str, Any]

    @classmethod
    def of(cls, graph: ModelProto, architecture: dict[str, Any]) -> GraphModel:
        """From a graph. Raises ArtifactError when ONNX Runtime does not load it."""
        content = clean_graph(graph).SerializeToString(deterministic=True)
        return cls(content, open_session(content, graph_level=NO_OPTIMIZATION), architecture)


class GraphJob:
    """The job of a net whose model of each fold is a graph: the net's inputs, answered by ONNX Runtime."""

    model_file = MODEL_FILE

    def __init__(self, job: NetJob, tolerance: Tolerance) -> None:
        self._job, self.tolerance = job, tolerance
        self.family, self.nan_policy = job.family, job.nan_policy
        self.watch: Watch | None = None

    @property
    def tensor(self) -> TensorSpec:
        """The net's."""
        return self._job.tensor

    def eligible(self, rows: IntArray) -> IntArray:
        """As the net."""
        return self._job.eligible(rows)

    def fit(self, fold: LabelledFold) -> Fit:
        """A graph is made from a net, never fitted."""
        raise NotImplementedError

    def inputs(self, rows: IntArray) -> Rows:
        """As the net."""
        return self._job.inputs(rows)

    def predict(self, fit: Fit, rows: IntArray) -> Rows:
        """Probabilities [n, 3] of table `rows`."""
        parts = [self.score(fit, self.inputs(rows[at : at + CHUNK_ROWS])) for at in range(0, len(rows), CHUNK_ROWS)]
        return np.concatenate(parts) if parts else np.zeros((0, 3), np.float32)

    def score(self, fit: Fit, inputs: Rows) -> Rows:
        """Probabilities [n, 3] of model inputs."""
        if not len(inputs):  # ONNX Runtime's LSTM aborts the process over an empty batch
            return np.zeros((0, 3), np.float32)
        return np.asarray(run(fit.model.session, {self.tensor.name: inputs})["probabilities"], np.float32)

    def save(self, fit: Fit, path: Path) -> None:
        """Write `.onnx`."""
        path.write_bytes(fit.model.content)

    def architecture(self, fit: Fit) -> dict[str, Any]:
        """The net's, and how it was quantized."""
        declared: dict[str, Any] = fit.model.architecture
        return declared

    def importance(self, fit: Fit, columns: tuple[str, ...]) -> list[dict[str, Any]]:
        """A net does not say."""
        return []


def quantize(step: QuantizeStep, job: NetJob, parent: Fit, lesson: Lesson, say: Say) -> Fit:
    """The quantized net of one fold.

    Raises ArtifactError where nothing was quantized, InsufficientDataError where there is nothing to calibrate by,
    MissingExtraError for `qat` without modelopt.
    """
    started = time.perf_counter()
    net: Net = parent.model
    calibration = calibration_rows(job, lesson.fold, step) if step.method != "weights" else np.empty(0, np.int64)
    if step.method == "qat":
        net = trained_for_int8(step, job, net, lesson, calibration)
    graph = net_to_onnx(net, job.tensor)
    if step.method == "weights":
        small = to_int8(graph) if job.family == "lstm" else qdq.int8_weights(graph)
    else:
        small = static(step, qdq.split_biases(graph), job.inputs(calibration), job.tensor.name)
    found = qdq.count(small)
    rounded = "none" if step.method == "weights" else "activations"
    model = GraphModel.of(small, job.architecture(parent) | {"quantized": step.method, "rounded": rounded})
    say(
        f"quantize fold {lesson.fold.number}: {found['QuantizeLinear']} QuantizeLinear and "
        f"{found['DequantizeLinear']} DequantizeLinear, {len(model.content):,} bytes, "
        f"{time.perf_counter() - started:.1f} s"
    )
    return Fit(model, parent.best, parent.rows)


def calibration_rows(job: NetJob, fold: LabelledFold, step: QuantizeStep) -> IntArray:
    """The training rows [n] that ranges are taken from, evenly spaced.

    Raises InsufficientDataError for fewer than MIN_CALIBRATION_ROWS that differ: ranges of no rows, or of one row over
    and over, round everything else away.
    """
    rows = evenly(job.eligible(fold.rows.train), step.calibration_rows)
    different = len({row.tobytes() for row in job.inputs(rows)})
    if different < MIN_CALIBRATION_ROWS:
        raise InsufficientDataError(
            "too few different rows to calibrate by",
            field="calibration_rows",
            expected=f"at least {MIN_CALIBRATION_ROWS} that differ",
            was=str(different),
            hint="a feed that stood still says nothing of the ranges",
        )
    return rows


def static(step: QuantizeStep, graph: ModelProto, inputs: Rows, name: str) -> ModelProto:
    """A graph without biases in its products as QDQ, its ranges those of `inputs` [n, ...].

    Raises ArtifactError when the quantizer set fewer quantizers than there are products.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    method = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}[step.calibration]
    products = sum(qdq.count(graph)[name] for name in qdq.QUANTIZED_OPS)
    with tempfile.TemporaryDirectory(prefix="tickserve-quantize-") as folder, _quiet():
        target = Path(folder) / MODEL_FILE
        quantize_static(
            copy_of(graph),  # it moves the weights of what it is given into a file
            target,
            _Inputs(name, inputs),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(qdq.QUANTIZED_OPS),
            per_channel=True,
            reduce_range=step.weight_bits == 7,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        small = onnx.load(target)
    set_ = qdq.count(small)["QuantizeLinear"]
    if set_ < products or not products:
        raise ArtifactError("quantizers are missing", field="model", expected=f"at least {products}", was=str(set_))
    return small


class _Inputs:
    """Calibration inputs in batches, as ONNX Runtime's quantizer asks for them."""

    def __init__(self, name: str, rows: Rows) -> None:
        self._parts = iter([{name: rows[at : at + CALIBRATION_BATCH]} for at in range(0, len(rows), CALIBRATION_BATCH)])

    def get_next(self) -> dict[str, Rows] | None:
        """The next batch; None after the last."""
        return next(self._parts, None)


def trained_for_int8(step: QuantizeStep, job: NetJob, net: Net, lesson: Lesson, calibration: IntArray) -> Net:
    """A copy of `net` that learned with fake quantizers at its layers: of inputs, and of weights by output channel.

    Raises MissingExtraError without modelopt, ArtifactError when it set no quantizer.
    """
    quantization: Any = library("modelopt.torch.quantization")
    taught = copy.deepcopy(net)
    inputs = torch.from_numpy(job.inputs(calibration))
    with reproducible(job.seed, job.settings.threads), contextlib.redirect_stdout(io.StringIO()):
        quantization.quantize(taught, quantization.INT8_DEFAULT_CFG, forward_loop=lambda module: module(inputs))
    if not any(name.endswith("input_quantizer._amax") for name in taught.state_dict()):
        raise ArtifactError(
            "no quantizer was set", field="model", expected="a dense layer or a convolution", was=net.kind
        )
    Course(taught, job, lesson, step, job.trainer).learn(from_start=False)
    plain = NETS[net.kind].from_architecture(net.architecture())
    weights = taught.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs advice about shape inference, which the exporter has done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
