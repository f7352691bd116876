"""From the one number a regression or a ranking gives to the three probabilities that are served: proportional odds.

    p_down = s(low - slope r)    p_up = s(slope r - high)    p_flat = 1 - p_down - p_up       s(t) = 1 / (1 + e^-t)

With `slope` above 0 and `low` below `high` every probability is one, and p_up - p_down rises with the margin r.
McCullagh, Regression Models for Ordinal Data, Journal of the Royal Statistical Society B 42 (1980). It is computed in
float64 and rounded once, here and in the served graph (`export/link_graph.py`): both then give the same float32.
Letters: B rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.errors import ArtifactError

Rows = npt.NDArray[np.float32]
FIELD = "architecture.link"


@dataclass(frozen=True, slots=True)
class OrdinalLink:
    """`slope` > 0 and the cut points `low` < `high`, each a float32 value. Raises ArtifactError for others."""

    slope: float
    low: float
    high: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, float) or not math.isfinite(value) or float(np.float32(value)) != value:
                raise _refused("finite float32 values", f"{name} {value!r}")
        if self.slope <= 0 or self.low >= self.high:
            raise _refused("slope above 0 and low below high", str(asdict(self)))

    @classmethod
    def of(cls, slope: float, low: float, high: float) -> OrdinalLink:
        """The nearest link in float32; cut points that meet there are one step apart."""
        cut = np.float32(low)
        above = max(np.float32(high), np.nextafter(cut, np.float32(np.inf)))
        return cls(float(np.float32(slope)), float(cut), float(above))

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> OrdinalLink | None:
        """The link of a manifest's `architecture`; None where it has none. Raises ArtifactError."""
        declared = architecture.get("link")
        if declared is None:
            return None
        names = {field.name for field in fields(cls)}
        if not isinstance(declared, Mapping) or set(declared) != names:
            raise _refused(", ".join(sorted(names)), str(declared)[:80])
        return cls(**declared)

    def to_json(self) -> dict[str, float]:
        """What `from_architecture` reads."""
        return asdict(self)

    def probabilities(self, margin: Rows) -> Rows:
        """Probabilities float32 [B, 3] of margins float32 [B]."""
        steps = margin.astype(np.float64)[:, np.newaxis] * np.array([-self.slope, self.slope])
        down, up = logistic(steps + np.array([self.low, -self.high])).T
        flat = np.maximum(1.0 - down - up, 0.0)
        stacked: Rows = np.stack([down, flat, up], axis=1).astype(np.float32)
        return stacked


def logistic(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 / (1 + e^-t) without overflow, in the form ONNX Runtime computes it for float64."""
    positive = 1.0 / (1.0 + np.exp(-np.abs(values)))
    return np.where(values >= 0, positive, 1.0 - positive)


def _refused(expected: str, was: str) -> ArtifactError:
    return ArtifactError("not an ordinal link", field=FIELD, expected=expected, was=was)
