"""The parity gates: the graph that will be served gives research's numbers and research's decisions, or is refused.

Numbers: every probability and score lies within the manifest's tolerance. Decisions: the class (argmax) and the sign of
the score never flip. A flip counts when research itself was sure of it: its margin between the best two classes (or its
|score|) exceeds the tolerance; below that the two are a tie, which rounding may break either way. Ties that come out
differently are counted, and too many are refused. How wide a tolerance may be is fixed here. Letters: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.onnx_graph import BUNDLE_ID, DOWN, PROBABILITIES, SCORE, UP
from export.research import Research, Rows
from tickserve.errors import GateRefusedError
from tickserve.manifest import GateResult, Manifest, Tolerance

Served = Mapping[str, npt.NDArray[Any]]
Scorer = Callable[[Rows], Served]

PROBE_ROWS = 64
NAN_ROWS = 256
NAN_SHARE = 0.1
MAX_THRESHOLDS = 200
CHUNK_ROWS = 1_024
# Of the rows a gate scores, how many decisions may differ because research itself was undecided. A model that is
# undecided everywhere would otherwise pass with any decision at all. One such row is always allowed.
MAX_TIE_SHARE = 0.01

# The widest tolerance a manifest may ask for: the gate's strictness is not the artefact's to choose.
CEILINGS = {
    # The same float32 leaves, summed in another order.
    ("gbdt", "fp32"): Tolerance(atol=1e-5, rtol=1e-5),
    # Float32 sums over steps and units, ordered and fused differently by the two runtimes.
    ("lstm", "fp32"): Tolerance(atol=1e-5, rtol=1e-4),
    # Research's numbers of a child are the child's own: the rounding to 16 or 8 bits is on both sides, and training
    # holds the child against its teacher. What is left is float32 arithmetic as above.
    ("lstm", "fp16"): Tolerance(atol=1e-5, rtol=1e-4),
    ("lstm", "int8"): Tolerance(atol=1e-5, rtol=1e-4),
}


@dataclass(frozen=True)
class Recorded:
    """Real rows [N, ...] and research's probabilities [N, 3] for them, as training recorded both."""

    rows: Rows
    probabilities: Rows

    def head(self, count: int) -> Recorded:
        """The first `count` rows."""
        return Recorded(self.rows[:count], self.probabilities[:count])


def check_tolerance(manifest: Manifest) -> None:
    """Raise GateRefusedError when the manifest asks for a wider tolerance than its family and precision need."""
    kind = (manifest.family, manifest.precision)
    if kind not in CEILINGS:
        known = ", ".join(map(" ".join, CEILINGS))
        raise GateRefusedError("no gate for this kind", field="precision", expected=known, was=" ".join(kind))
    for field in ("atol", "rtol"):
        ceiling, asked = getattr(CEILINGS[kind], field), getattr(manifest.tolerance, field)
        if asked > ceiling:
            raise GateRefusedError(
                f"wider than a gate for {' '.join(kind)} allows",
                field=f"tolerance.{field}",
                expected=f"at most {ceiling:g}",
                was=f"{asked:g}",
            )


def score_of(probabilities: Rows) -> Rows:
    """p_up - p_down, float32 [N, 1]: what research calls the score."""
    score: Rows = probabilities[:, UP : UP + 1] - probabilities[:, DOWN : DOWN + 1]
    return score


def run_gates(
    score: Scorer, recorded: Recorded, research: Research, manifest: Manifest, batches: Sequence[int]
) -> tuple[GateResult, ...]:
    """Every parity gate in turn; `batches` are the batch sizes that will be served.

    Raises GateRefusedError with the first counterexample: gate, row, what research says and what the graph says.
    """
    gates = [_recorded_gate(score, recorded, manifest)]
    if manifest.nan_policy != "reject":
        gates.append(_nan_gate(score, recorded, research, manifest))
    if research.splits is not None:
        gates.append(_threshold_gate(score, recorded, research, manifest))
    gates.append(_batch_gate(score, recorded, manifest, batches))
    return tuple(gates)


def served_batches(preferred: Sequence[int], max_batch: int) -> list[int]:
    """The batch sizes worth testing: 1, 2, 3, every preferred one and the largest."""
    return sorted({size for size in (1, 2, 3, *preferred, max_batch) if size <= max_batch})


def hold(gate: str, rows: Rows, expected: Rows, served: Served, manifest: Manifest) -> GateResult:
    """Compare what was served for `rows` [N, ...] with research's probabilities `expected` [N, 3].

    Raises GateRefusedError with the first row that differs; gives what was measured otherwise.
    """
    _check_shapes(gate, len(rows), served, manifest)
    probabilities, score = served[PROBABILITIES], served[SCORE]
    expected_score = score_of(expected)
    _refuse_drift(gate, PROBABILITIES, expected, probabilities, manifest.tolerance)
    _refuse_drift(gate, SCORE, expected_score, score, manifest.tolerance)
    class_ties = _refuse_class_flips(gate, expected, probabilities, manifest)
    sign_ties = _refuse_sign_flips(gate, expected_score, score, manifest.tolerance)
    allowed = max(1, int(MAX_TIE_SHARE * len(rows)))
    if max(class_ties, sign_ties) > allowed:
        raise GateRefusedError(
            f"gate {gate} refused: too many decisions differ where research is undecided",
            field="ties_broken_differently",
            expected=f"at most {allowed} of {len(rows)} rows",
            was=str(max(class_ties, sign_ties)),
            hint="nothing was published",
        )
    return GateResult(
        name=gate,
        passed=True,
        measured={
            "rows": len(rows),
            "max_abs_probability": _largest(expected, probabilities),
            "max_abs_score": _largest(expected_score, score),
            "decision_flips": 0,
            "ties_broken_differently": class_ties + sign_ties,
        },
        limits={
            "atol": manifest.tolerance.atol,
            "rtol": manifest.tolerance.rtol,
            "decision_flips": 0,
            "ties_broken_differently": allowed,
        },
    )


def _largest(expected: Rows, was: npt.NDArray[Any]) -> float:
    return float(np.abs(was.astype(np.float64) - expected).max(initial=0.0))


def _allowed(values: Rows, tolerance: Tolerance) -> npt.NDArray[np.float64]:
    allowed: npt.NDArray[np.float64] = tolerance.atol + tolerance.rtol * np.abs(values.astype(np.float64))
    return allowed


def _refuse(gate: str, row: int, field: str, expected: object, was: object) -> GateRefusedError:
    return GateRefusedError(
        f"gate {gate} refused: row {row}",
        field=field,
        expected=str(expected),
        was=str(was),
        hint="nothing was published",
    )


def _check_shapes(gate: str, rows: int, served: Served, manifest: Manifest) -> None:
    wanted = {PROBABILITIES: ((rows, 3), np.float32), SCORE: ((rows, 1), np.float32), BUNDLE_ID: ((rows, 1), np.int64)}
    for name, (shape, dtype) in wanted.items():
        array = served.get(name)
        if array is None or array.shape != shape or array.dtype != dtype:
            was = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise _refuse(gate, 0, name, f"{np.dtype(dtype)} {shape}", was)
    wrong = np.flatnonzero(served[BUNDLE_ID][:, 0] != manifest.bundle_id())
    if wrong.size:
        raise _refuse(gate, int(wrong[0]), BUNDLE_ID, manifest.bundle_id(), int(served[BUNDLE_ID][wrong[0], 0]))


def _refuse_drift(gate: str, field: str, expected: Rows, was: npt.NDArray[Any], tolerance: Tolerance) -> None:
    difference = np.abs(was.astype(np.float64) - expected)
    # Written so that a NaN on either side is a difference.
    wrong = np.flatnonzero(~(difference <= _allowed(expected, tolerance)).all(axis=1))
    if wrong.size:
        raise _refuse(gate, int(wrong[0]), field, expected[wrong[0]].tolist(), was[wrong[0]].tolist())


def _refuse_class_flips(gate: str, expected: Rows, was: npt.NDArray[Any], manifest: Manifest) -> int:
    """The number of ties broken differently."""
    flipped = np.argmax(expected, axis=1) != np.argmax(was, axis=1)
    ordered = np.sort(expected.astype(np.float64), axis=1)
    sure = ordered[:, -1] - ordered[:, -2] > _allowed(expected, manifest.tolerance).max(axis=1)
    wrong = np.flatnonzero(flipped & sure)
    if wrong.size:
        row = wrong[0]
        names = manifest.classes
        said, served = names[int(np.argmax(expected[row]))], names[int(np.argmax(was[row]))]
        raise _refuse(gate, int(row), "decision", f"{said} {expected[row].tolist()}", f"{served} {was[row].tolist()}")
    return int(flipped.sum())


def _refuse_sign_flips(gate: str, expected: Rows, was: npt.NDArray[Any], tolerance: Tolerance) -> int:
    """The number of scores so near zero that their sign is rounding, and came out differently."""
    flipped = np.sign(expected[:, 0]) != np.sign(was[:, 0])
    sure = np.abs(expected[:, 0]) > _allowed(expected, tolerance)[:, 0]
    wrong = np.flatnonzero(flipped & sure)
    if wrong.size:
        raise _refuse(gate, int(wrong[0]), "sign of score", float(expected[wrong[0], 0]), float(was[wrong[0], 0]))
    return int(flipped.sum())


def _in_chunks(score: Scorer, rows: Rows, size: int) -> Served:
    parts = [score(chunk) for chunk in _chunks(rows, size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _chunks(rows: Rows, size: int) -> Iterator[Rows]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _recorded_gate(score: Scorer, recorded: Recorded, manifest: Manifest) -> GateResult:
    """Every real row that training recorded, against the numbers it recorded."""
    served = _in_chunks(score, recorded.rows, CHUNK_ROWS)
    return hold("parity.recorded", recorded.rows, recorded.probabilities, served, manifest)


def rows_with_nan(rows: Rows, seed: int = 0) -> Rows:
    """Real rows with holes: one in ten values missing, then each feature missing as a whole, then everything."""
    generator = np.random.default_rng(seed)
    holed = rows[:NAN_ROWS].copy()
    holed[generator.random(holed.shape) < NAN_SHARE] = np.nan
    features = rows.shape[-1]
    by_feature = np.repeat(rows[:1], features, axis=0)
    by_feature[np.arange(features), ..., np.arange(features)] = np.nan
    return np.concatenate([holed, by_feature, np.full_like(rows[:1], np.nan)])


def _nan_gate(score: Scorer, recorded: Recorded, research: Research, manifest: Manifest) -> GateResult:
    rows = rows_with_nan(recorded.rows)
    return hold("parity.nan", rows, research.predict(rows), _in_chunks(score, rows, CHUNK_ROWS), manifest)


def rows_on_thresholds(rows: Rows, splits: tuple[npt.NDArray[np.int64], Rows], seed: int = 0) -> Rows:
    """Real rows moved onto a split, and one float32 step below and above it: three rows for each sampled split."""
    features, thresholds = splits
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(len(features))[:MAX_THRESHOLDS])
    moved = np.repeat(rows[generator.integers(len(rows), size=len(chosen))], 3, axis=0)
    at = thresholds[chosen]
    infinite = np.float32(np.inf)
    values = np.stack([np.nextafter(at, -infinite), at, np.nextafter(at, infinite)], axis=1).astype(np.float32)
    moved[np.arange(len(moved)), np.repeat(features[chosen], 3)] = values.ravel()
    return moved


def _threshold_gate(score: Scorer, recorded: Recorded, research: Research, manifest: Manifest) -> GateResult:
    assert research.splits is not None  # noqa: S101 - run_gates asks first
    rows = rows_on_thresholds(recorded.rows, research.splits)
    return hold("parity.thresholds", rows, research.predict(rows), _in_chunks(score, rows, CHUNK_ROWS), manifest)


def _batch_gate(score: Scorer, recorded: Recorded, manifest: Manifest, batches: Sequence[int]) -> GateResult:
    """A row's number does not depend on the batch it travels in: its size, its order, or its neighbours."""
    generator = np.random.default_rng(0)
    chosen = generator.permutation(len(recorded.rows))[:PROBE_ROWS]
    probes, expected = recorded.rows[chosen], recorded.probabilities[chosen]
    alone = _in_chunks(score, probes, 1)
    neighbours = recorded.rows if manifest.nan_policy == "reject" else rows_with_nan(recorded.rows)
    measured: dict[str, float | int | str | None] = {"rows": len(probes), "sizes": ",".join(map(str, batches))}
    largest = moved = 0.0
    for size in batches:
        served = _in_company(score, probes, neighbours, size, generator)
        held = hold(f"parity.batch of {size}", probes, expected, served, manifest)
        _refuse_drift(
            f"parity.batch of {size}", "alone", alone[PROBABILITIES], served[PROBABILITIES], manifest.tolerance
        )
        largest = max(largest, float(held.measured["max_abs_probability"] or 0.0))
        moved = max(moved, _largest(alone[PROBABILITIES], served[PROBABILITIES]))
    measured |= {"max_abs_probability": largest, "max_abs_against_alone": moved}
    limits = {"atol": manifest.tolerance.atol, "rtol": manifest.tolerance.rtol}
    return GateResult(name="parity.batch", passed=True, measured=measured, limits=dict(limits))


def _in_company(score: Scorer, probes: Rows, neighbours: Rows, size: int, generator: np.random.Generator) -> Served:
    """Score the probes in full batches of `size`, shuffled among real neighbours, and put them back in order."""
    missing = -len(probes) % size
    company = neighbours[generator.integers(len(neighbours), size=missing)]
    rows = np.concatenate([probes, company])
    order = generator.permutation(len(rows))
    served = _in_chunks(score, np.ascontiguousarray(rows[order]), size)
    back = np.argsort(order)[: len(probes)]
    return {name: array[back] for name, array in served.items()}
