"""The row and its company: what a row is answered does not depend on the batch it travels in.

A server batches whatever arrives together, so a decision that hangs on the batch's size, on the row's place in it or on
its neighbours is no decision. Letters: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from export.counterexample import Candidate, refusal
from export.edge_rows import extreme_rows, rows_with_nan
from export.onnx_graph import BUNDLE_ID, PROBABILITIES
from export.parity import (
    Difference,
    Rows,
    Served,
    drift,
    first_difference,
    flips,
    in_chunks,
    largest,
)
from tickserve.manifest import GateResult, Manifest, Tolerance

Places = npt.NDArray[np.int64]
PROBE_ROWS = 64
ROUNDS = 2
# Every size up to here; a larger batch is gated at the sizes around each multiple of STEP, where kernels change over.
EVERY_SIZE = 512
STEP = 64
# Families whose rows never meet inside the graph, so that company may not change a single bit. A net's sums are cut
# into blocks by the size of the batch; its numbers stay within the manifest's tolerance, its decisions the same.
BIT_EQUAL = frozenset({("gbdt", "fp32")})


def bound(manifest: Manifest, threads: int) -> Tolerance:
    """How far a row's numbers in company may lie from its numbers alone.

    With several threads ONNX Runtime splits a lone row's trees among them, and adds the parts up in another order.
    """
    if (manifest.family, manifest.precision) in BIT_EQUAL and threads == 1:
        return Tolerance(atol=0.0, rtol=0.0)
    return manifest.tolerance


def moved(alone: Served, in_company: Served, allowed: Tolerance) -> Difference | None:
    """The first row whose numbers, state too, are beyond `allowed` in company, or whose decision is another one."""
    for name in (name for name in alone if name != BUNDLE_ID):
        one, other = (served[name].reshape(len(served[name]), -1) for served in (alone, in_company))
        difference = drift(f"{name} alone", one, other, allowed)
        if difference is not None:
            return difference
    for name, flipped in flips(alone[PROBABILITIES], in_company).items():
        if flipped.any():
            row = int(np.flatnonzero(flipped)[0])
            said, was = (str(served[PROBABILITIES][row].tolist()) for served in (alone, in_company))
            return Difference(row, f"{name} alone", said, was)
    return None


def every_size(max_batch: int) -> list[int]:
    """The batch sizes to score: all up to EVERY_SIZE, then those around each multiple of STEP, and the largest."""
    around = (size + side for size in range(EVERY_SIZE, max_batch + 1, STEP) for side in (-1, 0, 1))
    return sorted(
        {*range(1, min(max_batch, EVERY_SIZE) + 1), *(size for size in around if size <= max_batch), max_batch}
    )


def batch_gate(candidate: Candidate, max_batch: int, allowed: Tolerance) -> GateResult:
    """Real rows in batches of every size: research's numbers, and the same as alone."""
    probes, expected, alone = _probes(candidate)
    sizes = every_size(max_batch)
    worst = _Worst()
    for size in sizes:
        # Another start for each size: a row then meets every place, and other neighbours.
        places = (np.arange(size) + 7 * size) % len(probes)
        batch = probes[places]
        served = candidate.score(batch)
        _check(candidate, f"parity.batch of {size}", batch, served, expected[places], _taken(alone, places), allowed)
        worst.see(expected[places], served, _taken(alone, places))
    measured = {"rows": len(probes), "sizes": _spelled(sizes)} | worst.measured()
    return GateResult(name="parity.batch", passed=True, measured=measured, limits=_limits(candidate, allowed))


def composition_gate(candidate: Candidate, sizes: Sequence[int], allowed: Tolerance) -> GateResult:
    """Real rows shuffled among other real rows, rows with holes and rows at the edges of float32, in full batches."""
    probes, expected, alone = _probes(candidate)
    generator = np.random.default_rng(0)
    neighbours = _neighbours(candidate)
    worst = _Worst()
    for size in (size for size in sizes if size > 1):
        for _ in range(ROUNDS):
            _in_company(candidate, size, (probes, expected, alone), neighbours, generator, allowed, worst)
    measured = {"rows": len(probes), "sizes": ",".join(map(str, sizes)), "rounds": ROUNDS} | worst.measured()
    return GateResult(name="parity.composition", passed=True, measured=measured, limits=_limits(candidate, allowed))


def _probes(candidate: Candidate) -> tuple[Rows, Rows, Served]:
    """Real rows, research's numbers for them, and the graph's for each alone."""
    recorded = candidate.recorded
    chosen = np.random.default_rng(0).permutation(len(recorded.rows))[:PROBE_ROWS]
    rows = recorded.rows[chosen]
    return rows, recorded.probabilities[chosen], in_chunks(candidate.score, rows, 1)


def _neighbours(candidate: Candidate) -> Rows:
    rows, manifest = candidate.recorded.rows, candidate.manifest
    odd = [] if manifest.nan_policy == "reject" else [rows_with_nan(rows)]
    return np.concatenate([rows, *odd, extreme_rows(rows, manifest)])


def _in_company(
    candidate: Candidate,
    size: int,
    probes: tuple[Rows, Rows, Served],
    neighbours: Rows,
    generator: np.random.Generator,
    allowed: Tolerance,
    worst: _Worst,
) -> None:
    """Every probe once, in full batches of which at least half are neighbours."""
    rows, expected, alone = probes
    share = max(1, size // 2)
    for start in range(0, len(rows), share):
        chosen = np.arange(start, min(start + share, len(rows)))
        company = neighbours[generator.integers(len(neighbours), size=size - len(chosen))]
        places = generator.permutation(size)[: len(chosen)]
        batch = np.empty((size, *rows.shape[1:]), np.float32)
        batch[np.setdiff1d(np.arange(size), places)] = company
        batch[places] = rows[chosen]
        served = candidate.score(batch)
        answers, lone = _taken(served, places), _taken(alone, chosen)
        _check(candidate, f"parity.composition of {size}", batch, answers, expected[chosen], lone, allowed, places)
        worst.see(expected[chosen], answers, lone)


def _check(
    candidate: Candidate,
    gate: str,
    batch: Rows,
    served: Served,
    expected: Rows,
    alone: Served,
    allowed: Tolerance,
    places: Places | None = None,
) -> None:
    """Raise GateRefusedError, minimised, when a row differs from research or from itself alone."""
    difference = first_difference(expected, served, candidate.manifest) or moved(alone, served, allowed)
    if difference is not None:
        place = difference.row if places is None else int(places[difference.row])
        raise refusal(candidate, gate, difference, batch, place, expected[difference.row : difference.row + 1])


class _Worst:
    """The largest differences seen over many batches."""

    def __init__(self) -> None:
        self.research = self.alone = 0.0

    def see(self, expected: Rows, served: Served, alone: Served) -> None:
        self.research = max(self.research, largest(expected, served[PROBABILITIES]))
        self.alone = max(self.alone, largest(alone[PROBABILITIES], served[PROBABILITIES]))

    def measured(self) -> dict[str, float | int | str | None]:
        return {"max_abs_probability": self.research, "max_abs_against_alone": self.alone, "decision_flips": 0}


def _taken(served: Served, places: Places) -> Served:
    return {name: array[places] for name, array in served.items()}


def _spelled(sizes: Sequence[int]) -> str:
    every = min(len(sizes), EVERY_SIZE)
    return f"1..{every}" + "".join(f",{size}" for size in sizes[every:])


def _limits(candidate: Candidate, allowed: Tolerance) -> dict[str, float | int | str | None]:
    tolerance = candidate.manifest.tolerance
    return {
        "atol": tolerance.atol,
        "rtol": tolerance.rtol,
        "against_alone_atol": allowed.atol,
        "against_alone_rtol": allowed.rtol,
        "decision_flips": 0,
    }
