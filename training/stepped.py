"""The stepped child of a net: the same weights, fed one row at a time, with a state that its caller carries.

Research's number is the torch module stepping through each session of the table from zeros. The child is judged on the
teacher's own test rows, with the state that stepping had there: it remembers more than the teacher's window, so it
is another forecaster and is measured as one. Letters: N table rows, W wanted rows, F features, L layers, H units.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from models.lstm import LstmClassifier
from models.stepped import CELL, HIDDEN, OUT, SteppedLstm, tensors
from tickserve.config import Config
from tickserve.errors import ArtifactError
from tickserve.manifest import GOLDEN_NAME, GateResult, Manifest, StateContract, TensorSpec
from training.bundles import OUTPUTS, PARITY_NAME, Arrays, TrainedBundle, golden_inputs, scores, store_bundle
from training.examples import Examples, IntArray, Rows
from training.metrics import Prediction, evaluate
from training.nets import reproducible
from training.quantize import MAX_IC_LOSS, inherited, inherited_gate
from training.reference import rescored

SUFFIX = "-step"
FEATURES, PROBABILITIES = "features", "probabilities"
MODEL_FILE = "model.safetensors"
# How often the state is taken away where restarts are measured: about what the longest features look back.
RESTART_MS = 300_000


def stepped_child(
    net: LstmClassifier,
    teacher: TrainedBundle,
    examples: Examples,
    parity: IntArray,
    eligible: Callable[[IntArray], IntArray],
    config: Config,
    out: Path,
) -> tuple[TrainedBundle | None, dict[str, Any]]:
    """The child's bundle (None when it was refused), and its report row.

    `parity` are the rows whose inputs and numbers the bundle carries; `eligible` gives the rows the teacher answers.
    """
    stepped, fold = SteppedLstm(net).eval(), examples.published
    judged = eligible(fold.rows.test)
    wanted = np.unique(np.concatenate([_first_of_session(examples, parity), parity]))
    with reproducible(config.seed, config.lstm.threads), torch.inference_mode():
        said, states = walk(stepped, examples.features, examples.session, wanted, through=int(judged[-1]))
        restarts = _restarts(stepped, examples, judged)
        answer = _answer(stepped)
        arrays = _recorded(examples.features[wanted], states, answer, keep_first=config.export.parity_rows)
    gate, measured = _judge(said[judged], judged, teacher.manifest, examples, config)
    restarted = _restarted_metrics(*restarts, judged, examples, config)
    name = teacher.manifest.name + SUFFIX
    row: dict[str, Any] = {"model": name, "family": "lstm", "precision": "fp32", "teacher": teacher.manifest.name}
    row |= {"passed": gate.passed, **gate.measured, "verdict": gate.detail}
    row["restarted"] = restarted
    if not gate.passed:
        shutil.rmtree(out / name, ignore_errors=True)
        return None, row
    weights = {key: tensor.contiguous() for key, tensor in net.state_dict().items()}
    path, manifest = store_bundle(
        out,
        name=name,
        model_file=MODEL_FILE,
        save=lambda file: save_file(weights, file),
        arrays=arrays,
        fields=_fields(stepped, teacher.manifest, gate, {"stepped": measured, "restarted": restarted})
        | rescored(teacher.manifest.reference, said[judged]),
    )
    return TrainedBundle(path, manifest, row), row


def walk(
    net: SteppedLstm, features: Rows, session: np.ndarray[Any, Any], wanted: IntArray, through: int
) -> tuple[Rows, Arrays]:
    """Step through every session from zeros, up to row `through`.

    Returns probabilities [through + 1, 3], and of each of the `wanted` rows (ascending) the state [W, L, H] it was met
    with. Stepping a stretch at once gives what stepping row by row gives, to float32's last digits.
    """
    said = np.empty((through + 1, 3), np.float32)
    kept: dict[str, list[Rows]] = {HIDDEN: [], CELL: []}
    state, met = net.initial(), set(wanted.tolist())
    for start, stop, opens in _stretches(session, wanted, through + 1):
        state = net.initial() if opens else state
        if start in met:
            for name, tensor in zip(kept, state, strict=True):
                kept[name].append(tensor[0].numpy().copy())
        answers, state = net.through(torch.from_numpy(np.ascontiguousarray(features[start:stop])), state)
        said[start:stop] = answers.numpy()
    return said, {name: np.stack(parts) for name, parts in kept.items()}


def _stretches(session: np.ndarray[Any, Any], wanted: IntArray, rows: int) -> Iterator[tuple[int, int, bool]]:
    """Where to stop on the way: (start, stop, whether a session opens at start), in order."""
    opens = {0, *(np.flatnonzero(session[1:rows] != session[: rows - 1]) + 1).tolist()}
    starts = sorted(opens | {row for row in wanted.tolist() if row < rows})
    for start, stop in zip(starts, [*starts[1:], rows], strict=True):
        yield start, stop, start in opens


def _restarts(net: SteppedLstm, examples: Examples, judged: IntArray) -> tuple[Rows, int]:
    """Probabilities [W, 3] of the `judged` rows where the state is zeros again every so many rows, and how many."""
    labelled = np.flatnonzero(examples.end >= 0)
    rows_per_ms = float(np.median(examples.end[labelled] - labelled)) / examples.horizon_median_ms
    every = max(1, round(RESTART_MS * rows_per_ms))
    first, last = int(judged[0]) // every * every, int(judged[-1])
    rows = np.arange(first, last + 1)
    pieces = examples.session[rows].astype(np.int64) * len(examples.session) + rows // every
    said, _ = walk(net, examples.features[rows], pieces, np.zeros(1, np.int64), through=last - first)
    return said[judged - first], every


def _restarted_metrics(said: Rows, every: int, judged: IntArray, examples: Examples, config: Config) -> dict[str, Any]:
    """What an engine that loses its state about every five minutes gets of the model; no gate."""
    measured = evaluate(Prediction.of(said), judged, examples, examples.published.threshold, config.costs.fee_bps)
    return {"ic": measured["ic"], "every_rows": every}


def _first_of_session(examples: Examples, rows: IntArray) -> IntArray:
    """The first row of the session of the first of `rows`: what a stream begins with is recorded too."""
    first = int(np.flatnonzero(examples.session == examples.session[rows[0]])[0])
    return np.array([first], np.int64)


Answer = Callable[[Arrays], Arrays]


def _answer(net: SteppedLstm) -> Answer:
    """One step for each row of the inputs: what the module answers, by the names of the graph's outputs."""

    def run(inputs: Arrays) -> Arrays:
        given = [torch.from_numpy(inputs[name]) for name in (FEATURES, HIDDEN, CELL)]
        probabilities, hidden, cell = (tensor.numpy().copy() for tensor in net(*given))
        return {PROBABILITIES: probabilities, HIDDEN + OUT: hidden, CELL + OUT: cell}

    return run


def _recorded(features: Rows, states: Arrays, answer: Answer, keep_first: int) -> dict[str, Arrays]:
    """golden.npz and parity.npz: real rows, the states they were met with, and what one step makes of both."""
    inputs = {FEATURES: features[:keep_first]} | {name: state[:keep_first] for name, state in states.items()}
    at = np.linspace(0, len(inputs[FEATURES]) - 1, len(golden_inputs(inputs[FEATURES]))).astype(np.int64)
    golden = {FEATURES: golden_inputs(inputs[FEATURES])} | {name: states[name][at] for name in states}
    expected = answer(golden)
    return {
        GOLDEN_NAME: golden | expected | {"score": scores(expected[PROBABILITIES])},
        PARITY_NAME: inputs | answer(inputs),
    }


def _judge(
    said: Rows, rows: IntArray, teacher: Manifest, examples: Examples, config: Config
) -> tuple[GateResult, dict[str, Any]]:
    """The child on the teacher's test rows: finite, and its information coefficient not far below the teacher's."""
    fold = examples.published
    measured = evaluate(Prediction.of(said), rows, examples, fold.threshold, config.costs.fee_bps)
    ic, teacher_ic = measured["ic"], teacher.metrics["folds"][-1]["metrics"]["ic"]
    reasons = []
    if not np.isfinite(said).all():
        reasons.append("its probabilities are not finite")
    if (teacher_ic or 0.0) - (ic or 0.0) > MAX_IC_LOSS:
        reasons.append(f"its information coefficient is {ic:+.3f}, its teacher's {teacher_ic:+.3f}")
    shown = "none" if ic is None or math.isnan(ic) else f"{ic:+.3f}"
    passed = f"one row and its state instead of a window: IC {shown}, its teacher's {teacher_ic or 0:+.3f}"
    gate = GateResult(
        name="stepped",
        passed=not reasons,
        measured={"rows": len(rows), "ic": ic, "teacher_ic": teacher_ic},
        limits={"ic_loss": MAX_IC_LOSS},
        detail=passed if not reasons else f"refused: {'; '.join(reasons)}",
    )
    return gate, measured


def _fields(net: SteppedLstm, parent: Manifest, gate: GateResult, measured: dict[str, Any]) -> dict[str, Any]:
    if parent.stream is None:
        raise ArtifactError("a stateful model needs to know when a session ends", field="stream")
    state = StateContract.model_validate(
        {
            "tensors": tensors(net),
            "initial": "zeros",
            "session_gap_ns": parent.stream.spec["session_gap_ns"],
            "sequence_gap": "reset",
            "stride": parent.stream.stride,
        }
    )
    inputs = [TensorSpec(name=FEATURES, dtype="FP32", shape=(net.net.features,))]
    inputs += [TensorSpec(name=each.input, dtype="FP32", shape=each.shape) for each in state.tensors]
    outputs = [TensorSpec(name=each.output, dtype="FP32", shape=each.shape) for each in state.tensors]
    return inherited(parent) | {
        "state": state,
        "inputs": tuple(inputs),
        "outputs": (*OUTPUTS, *outputs),
        "parents": (parent.digest(),),
        "metrics": measured | {"against_teacher": gate.measured} | inherited_gate(parent),
        "gates": (gate,),
    }
