"""The population stability index: how far a sample lies from the reference it is binned by.

PSI = sum over bins of (a - e) * ln(a / e), of the sample's share a and the reference's share e; what is missing (NaN)
is a bin of its own (N. Siddiqi, Credit Risk Scorecards, 2006, where 0.1 is called a minor shift and 0.25 a major one).
Letters: K bins.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tickserve.reference import Distribution

Counts = npt.NDArray[np.int64]


def psi(reference: Distribution, counts: Counts, reference_rows: int) -> float:
    """The index of `counts` [K + 1] (the missing last) against `reference`, of `reference_rows` rows.

    A bin that is empty on one side counts as half a row there: the index stays finite, and small where rows are few.
    Bins that are empty on both sides add nothing. Raises ValueError without a row.
    """
    rows = int(counts.sum())
    if rows < 1:
        raise ValueError("counts: expected a row or more, was none")
    expected = np.array([*reference.shares, reference.missing])
    used = (expected > 0) | (counts > 0)
    share = np.where(counts > 0, counts, 0.5)[used] / rows
    expected = np.where(expected > 0, expected, 0.5 / reference_rows)[used]
    share, expected = share / share.sum(), expected / expected.sum()
    return float(np.sum((share - expected) * np.log(share / expected)))
