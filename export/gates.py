"""Every parity gate in turn: one graph, held against research on real rows and on rows made to find it wrong.

parity.recorded      what training recorded
parity.nan           rows with holes (not where the manifest says NaN is refused)
parity.extreme       values at the edges of float32 and far outside the training range
parity.thresholds    trees: on each split and one float32 step to each side
parity.missing       trees: the value missing at each split that NaN can reach
parity.batch         every batch size
parity.composition   other neighbours, other places
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from export import composition
from export.counterexample import Candidate, refusal
from export.edge_rows import extreme_rows, rows_with_nan
from export.parity import CHUNK_ROWS, Recorded, Rows, Scorer, first_difference, hold, in_chunks, largest
from export.research import Research
from export.split_rows import rows_on_splits
from tickserve.manifest import GateResult, Manifest

CROSS_CHECK_ROWS = 20_000


def served_batches(preferred: Sequence[int], max_batch: int) -> list[int]:
    """The batch sizes a server is likely to make: 1, 2, 3, every preferred one and the largest."""
    return sorted({size for size in (1, 2, 3, *preferred, max_batch) if size <= max_batch})


def run_gates(
    score: Scorer,
    recorded: Recorded,
    research: Research,
    manifest: Manifest,
    batches: Sequence[int],
    *,
    threads: int = 1,
) -> tuple[GateResult, ...]:
    """Every parity gate; `batches` are the likely batch sizes, the last of them the largest that will be served.

    Raises GateRefusedError with the first row that differs, and in `counterexample` the smallest case that shows it.
    """
    allowed = composition.bound(manifest, threads)
    candidate = Candidate(
        score, research.predict, recorded, manifest, lambda alone, met: composition.moved(alone, met, allowed)
    )
    gates = [_held(candidate, "parity.recorded", recorded.rows, recorded.probabilities)]
    if manifest.nan_policy != "reject":
        gates.append(_made(candidate, "parity.nan", rows_with_nan(recorded.rows)))
    gates.append(_made(candidate, "parity.extreme", extreme_rows(recorded.rows, manifest)))
    if research.splits is not None:
        gates.extend(_split_gates(candidate, research))
    gates.append(composition.batch_gate(candidate, max(batches), allowed))
    gates.append(composition.composition_gate(candidate, batches, allowed))
    return tuple(gates)


def _made(candidate: Candidate, gate: str, rows: Rows) -> GateResult:
    return _held(candidate, gate, rows, candidate.predict(rows))


def _held(candidate: Candidate, gate: str, rows: Rows, expected: Rows) -> GateResult:
    """`parity.hold`, with the smallest case where it refuses."""
    served = in_chunks(candidate.score, rows, CHUNK_ROWS)
    difference = first_difference(expected, served, candidate.manifest)
    if difference is not None:
        row = difference.row
        start = row - row % CHUNK_ROWS
        batch = rows[start : start + CHUNK_ROWS]
        raise refusal(candidate, gate, difference, batch, row - start, expected[row : row + 1])
    return hold(gate, rows, expected, served, candidate.manifest)


def _split_gates(candidate: Candidate, research: Research) -> list[GateResult]:
    """A forest at each of its splits, and what another engine for the same trees says there."""
    made = rows_on_splits(candidate.recorded.rows, research.splits or (), research.trees)
    gates = []
    if len(made.on_value):
        gates.append(_counted(_made(candidate, "parity.thresholds", made.on_value), made.covered))
    if len(made.missing) and candidate.manifest.nan_policy != "reject":
        gates.append(_counted(_made(candidate, "parity.missing", made.missing), made.covered))
    return gates


def cross_check(research: Research, recorded: Recorded) -> dict[str, Any] | None:
    """Research against a second engine for the same trees, on real rows and on the splits; None for a net.

    For the report and no gate: where the two differ, it is not yet said which of them is wrong.
    """
    if research.second is None or research.splits is None:
        return None
    made = rows_on_splits(recorded.rows, research.splits, research.trees)
    rows = np.concatenate([recorded.rows, made.on_value, made.missing])[:CROSS_CHECK_ROWS]
    said, again = research.predict(rows), research.second()(rows)
    return {
        "engine": "treelite",
        "rows": len(rows),
        "max_abs_probability": largest(said, again),
        "decision_flips": int((np.argmax(said, axis=1) != np.argmax(again, axis=1)).sum()),
    }


def _counted(gate: GateResult, covered: dict[str, int]) -> GateResult:
    measured: dict[str, Any] = gate.measured | covered
    return gate.model_copy(update={"measured": measured})
