"""What a parity gate compares: the graph that will be served gives research's numbers and research's decisions, or not.

Numbers: every probability and score lies within the manifest's tolerance. Decisions: the class (argmax), the sign of
the score, and the side of every score level an engine may trade at. A class that flips is refused when research itself
was sure of it: its margin between the best two exceeds the tolerance; below that the two are a tie, which rounding may
break either way, as it may put a score beside the level it stands on. Ties that come out differently are counted, and
too many are refused. How wide a tolerance may be is fixed here. Letters: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from export.onnx_graph import BUNDLE_ID, DOWN, PROBABILITIES, SCORE, UP
from tickserve.errors import GateRefusedError
from tickserve.manifest import TREES, Family, GateResult, Manifest, Tolerance

Rows = npt.NDArray[np.float32]
Served = Mapping[str, npt.NDArray[Any]]
Scorer = Callable[[Rows], Served]

CHUNK_ROWS = 1_024
# Of the rows a gate scores, how many decisions may differ because research itself was undecided. A model that is
# undecided everywhere would otherwise pass with any decision at all. One such row is always allowed.
MAX_TIE_SHARE = 0.01
# Score levels an engine may trade at: a score must not cross one on its way to the engine. Zero is the sign.
LEVELS = np.arange(-19, 20) / 20.0

# The widest tolerance a manifest may ask for: the gate's strictness is not the artefact's to choose.
CEILINGS = {
    # The same float32 leaves, summed in another order.
    ("gbdt", "fp32"): Tolerance(atol=1e-5, rtol=1e-5),
    # A net: float32 sums over steps and units, ordered and fused differently by the two runtimes. Research's numbers of
    # a child are the child's own: the rounding to 16 or 8 bits is on both sides, and training holds the child against
    # its teacher.
    **{
        (family, precision): Tolerance(atol=1e-5, rtol=1e-4)
        for family in sorted(set(get_args(Family)) - TREES)
        for precision in ("fp32", "fp16", "int8")
    },
}

# A child whose activations are rounded to eight bits too. Float32 sums that differ in the last digit may round to
# neighbouring integers now and then, and one step of one activation moves a probability by some thousandths.
ROUNDED_ACTIVATIONS = Tolerance(atol=1e-2, rtol=0.0)


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
    widest = ROUNDED_ACTIVATIONS if _rounds_activations(manifest) else CEILINGS[kind]
    for field in ("atol", "rtol"):
        ceiling, asked = getattr(widest, field), getattr(manifest.tolerance, field)
        if asked > ceiling:
            raise GateRefusedError(
                f"wider than a gate for {' '.join(kind)} allows",
                field=f"tolerance.{field}",
                expected=f"at most {ceiling:g}",
                was=f"{asked:g}",
            )


def _rounds_activations(manifest: Manifest) -> bool:
    return manifest.precision == "int8" and manifest.architecture.get("rounded") == "activations"


def check_rounding(manifest: Manifest, operators: Iterable[str]) -> None:
    """Raise GateRefusedError when the manifest claims rounded activations of a graph (its operators) that has none."""
    if _rounds_activations(manifest) and "QuantizeLinear" not in set(operators):
        raise GateRefusedError(
            "claims rounded activations, and with them a wider tolerance, of a graph without any",
            field="architecture.rounded",
            expected="QuantizeLinear in the graph",
            was="none",
        )


def score_of(probabilities: Rows) -> Rows:
    """p_up - p_down, float32 [N, 1]: what research calls the score."""
    score: Rows = probabilities[:, UP : UP + 1] - probabilities[:, DOWN : DOWN + 1]
    return score


@dataclass(frozen=True)
class Difference:
    """The first row that differs: its place, in which field, what research says there and what the graph says."""

    row: int
    field: str
    expected: str
    was: str


def first_difference(expected: Rows, served: Served, manifest: Manifest) -> Difference | None:
    """Where what was served differs from research's probabilities `expected` [N, 3]; None when it does not."""
    missing = [name for name in (PROBABILITIES, SCORE, BUNDLE_ID) if name not in served]
    if missing:
        return Difference(0, missing[0], "an output of this name", "none")
    probabilities, score, expected_score = served[PROBABILITIES], served[SCORE], score_of(expected)
    return (
        _malformed(len(expected), served, manifest)
        or drift(PROBABILITIES, expected, probabilities, manifest.tolerance)
        or drift(SCORE, expected_score, score, manifest.tolerance)
        or _class_flip(expected, probabilities, manifest)
        or _sign_flip(expected_score, score, manifest.tolerance)
    )


def hold(gate: str, rows: Rows, expected: Rows, served: Served, manifest: Manifest) -> GateResult:
    """Compare what was served for `rows` [N, ...] with research's probabilities `expected` [N, 3].

    Raises GateRefusedError with the first row that differs; gives what was measured otherwise.
    """
    difference = first_difference(expected, served, manifest)
    if difference is not None:
        raise refused(gate, difference)
    ties = _ties(expected, served)
    allowed = max(1, int(MAX_TIE_SHARE * len(rows)))
    if max(ties.values()) > allowed:
        raise GateRefusedError(
            f"gate {gate} refused: too many decisions differ where research is undecided",
            field="ties_broken_differently",
            expected=f"at most {allowed} of {len(rows)} rows",
            was=str(max(ties.values())),
            hint="nothing was published",
        )
    return GateResult(
        name=gate,
        passed=True,
        measured={
            "rows": len(rows),
            "max_abs_probability": largest(expected, served[PROBABILITIES]),
            "max_abs_score": largest(score_of(expected), served[SCORE]),
            "decision_flips": 0,
            "ties_broken_differently": sum(ties.values()),
        },
        limits={
            "atol": manifest.tolerance.atol,
            "rtol": manifest.tolerance.rtol,
            "decision_flips": 0,
            "ties_broken_differently": allowed,
        },
    )


def refused(
    gate: str, difference: Difference, smallest: str = "", case: dict[str, Any] | None = None
) -> GateRefusedError:
    """The error of a gate: the first row that differs, and the smallest case that shows it where there is one."""
    return GateRefusedError(
        f"gate {gate} refused: row {difference.row}",
        field=difference.field,
        expected=difference.expected,
        was=difference.was,
        hint="nothing was published" + (f"; smallest case: {smallest}" if smallest else ""),
        counterexample=case,
    )


def largest(expected: Rows, was: npt.NDArray[Any]) -> float:
    """The largest absolute difference."""
    return float(np.abs(was.astype(np.float64) - expected).max(initial=0.0))


def in_chunks(score: Scorer, rows: Rows, size: int = CHUNK_ROWS) -> Served:
    """Score `rows` in batches of `size` (the last may be smaller)."""
    parts = [score(chunk) for chunk in _chunks(rows, size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _chunks(rows: Rows, size: int) -> Iterator[Rows]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _allowed(values: Rows, tolerance: Tolerance) -> npt.NDArray[np.float64]:
    allowed: npt.NDArray[np.float64] = tolerance.atol + tolerance.rtol * np.abs(values.astype(np.float64))
    return allowed


def _malformed(rows: int, served: Served, manifest: Manifest) -> Difference | None:
    wanted = {PROBABILITIES: ((rows, 3), np.float32), SCORE: ((rows, 1), np.float32), BUNDLE_ID: ((rows, 1), np.int64)}
    for name, (shape, dtype) in wanted.items():
        array = served[name]
        if array.shape != shape or array.dtype != dtype:
            return Difference(0, name, f"{np.dtype(dtype)} {shape}", f"{array.dtype} {array.shape}")
    wrong = np.flatnonzero(served[BUNDLE_ID][:, 0] != manifest.bundle_id())
    if wrong.size:
        was = str(int(served[BUNDLE_ID][wrong[0], 0]))
        return Difference(int(wrong[0]), BUNDLE_ID, str(manifest.bundle_id()), was)
    return None


def drift(field: str, expected: Rows, was: npt.NDArray[Any], tolerance: Tolerance) -> Difference | None:
    """The first row of `was` [N, ...] beyond the tolerance around `expected`."""
    difference = np.abs(was.astype(np.float64) - expected)
    # Written so that a NaN on either side is a difference.
    wrong = np.flatnonzero(~(difference <= _allowed(expected, tolerance)).all(axis=1))
    if not wrong.size:
        return None
    row = int(wrong[0])
    return Difference(row, field, str(expected[row].tolist()), str(was[row].tolist()))


def _class_flip(expected: Rows, was: npt.NDArray[Any], manifest: Manifest) -> Difference | None:
    flipped = np.argmax(expected, axis=1) != np.argmax(was, axis=1)
    ordered = np.sort(expected.astype(np.float64), axis=1)
    sure = ordered[:, -1] - ordered[:, -2] > _allowed(expected, manifest.tolerance).max(axis=1)
    wrong = np.flatnonzero(flipped & sure)
    if not wrong.size:
        return None
    row, names = int(wrong[0]), manifest.classes
    said, served = names[int(np.argmax(expected[row]))], names[int(np.argmax(was[row]))]
    return Difference(row, "decision", f"{said} {expected[row].tolist()}", f"{served} {was[row].tolist()}")


def _sign_flip(expected: Rows, was: npt.NDArray[Any], tolerance: Tolerance) -> Difference | None:
    flipped = np.sign(expected[:, 0]) != np.sign(was[:, 0])
    sure = np.abs(expected[:, 0]) > _allowed(expected, tolerance)[:, 0]
    wrong = np.flatnonzero(flipped & sure)
    if not wrong.size:
        return None
    row = int(wrong[0])
    return Difference(row, "sign of score", str(float(expected[row, 0])), str(float(was[row, 0])))


def _ties(expected: Rows, served: Served) -> dict[str, int]:
    """Decisions that differ although no number does: what rounding alone decided, by kind."""
    return {name: int(flipped.sum()) for name, flipped in flips(expected, served).items()}


def flips(expected: Rows, served: Served) -> dict[str, npt.NDArray[np.bool_]]:
    """Per row [N]: another class, another sign of the score, another side of a level an engine may trade at."""
    score, was = score_of(expected)[:, 0], served[SCORE][:, 0]
    return {
        "class": np.argmax(expected, axis=1) != np.argmax(served[PROBABILITIES], axis=1),
        "sign": np.sign(score) != np.sign(was),
        # Float64 levels: a float32 score is then on one side or the other, never rounded onto a level.
        "level": np.searchsorted(LEVELS, score.astype(np.float64)) != np.searchsorted(LEVELS, was.astype(np.float64)),
    }
