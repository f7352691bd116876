"""The reference distribution: how a model's features and score lay in training, in bins that drift is measured by.

Training writes it into the manifest (`reference`). Bins are cut at the training rows' deciles: bin i holds the values
above edge i-1 up to edge i, and what is missing (NaN) has a share of its own. Where one value has nine rows of ten, it
has a bin, and the rest is cut at its quarters. Letters: F features, K bins, N rows.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from tickserve.runtimes import Stored

BINS = 10
ROUNDING = 1e-6
Counts = npt.NDArray[np.int64]


class Distribution(Stored):
    """One column's K shares of all rows, between K-1 rising `edges`, and the share that is `missing`; together 1."""

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    missing: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> Distribution:
        if len(self.shares) != len(self.edges) + 1:
            raise ValueError(f"shares: expected {len(self.edges) + 1}, one more than edges, was {len(self.shares)}")
        if any(low >= high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("edges: expected rising values")
        total = sum(self.shares) + self.missing
        if min(self.shares) < 0 or abs(total - 1) > 1e-3:
            raise ValueError(f"shares: expected from 0, together 1 with missing, was {total:g}")
        return self

    @classmethod
    def of(cls, values: npt.NDArray[np.float32], bins: int = BINS) -> Distribution:
        """The distribution of `values` [N], N from 1. Values that tie share a bin: there may be fewer than `bins`."""
        known = values[np.isfinite(values)]
        edges = _edges(known, bins)
        counts, missing = counted(values, edges)
        shares = tuple(round(float(count) / len(values), 6) for count in counts)
        return cls(edges=tuple(map(float, edges)), shares=shares, missing=round(missing / len(values), 6))

    def counts_of(self, values: npt.NDArray[np.float32]) -> Counts:
        """How many of `values` [N] lie in each bin, and how many are missing: int64 [K + 1]."""
        counts, missing = counted(values, np.array(self.edges, np.float32))
        return np.append(counts, missing)


class Reference(Stored):
    """Of each feature over `rows` training rows, and of the model's score over `score_rows` rows it never saw.

    `score` is None where no score could be had.
    """

    rows: int = Field(ge=1)
    columns: tuple[Distribution, ...]
    score_rows: int = Field(0, ge=0)
    score: Distribution | None = None


def reference_of(
    features: npt.NDArray[np.float32], score: npt.NDArray[np.float32] | None = None, bins: int = BINS
) -> Reference:
    """The reference of `features` [N, F] and, where given, of out-of-sample scores [M]."""
    columns = tuple(Distribution.of(features[:, index], bins) for index in range(features.shape[1]))
    if score is None or not len(score):
        return Reference(rows=len(features), columns=columns)
    return Reference(rows=len(features), columns=columns, score_rows=len(score), score=Distribution.of(score, bins))


def counted(values: npt.NDArray[np.float32], edges: npt.NDArray[np.float32]) -> tuple[Counts, int]:
    """How many of `values` lie in each bin of `edges`: int64 [K], and how many are missing."""
    unknown = np.isnan(values)
    places = np.searchsorted(edges, values[~unknown], side="left")
    return np.bincount(places, minlength=len(edges) + 1).astype(np.int64), int(unknown.sum())


def _edges(known: npt.NDArray[np.float32], bins: int) -> npt.NDArray[np.float32]:
    """The inner quantiles of `known`, once each. A value that (nearly) all have lies between two edges of its own."""
    if not len(known):
        return np.empty(0, np.float32)
    at = np.quantile(known.astype(np.float64), np.arange(1, bins) / bins, method="inverted_cdf")
    edges = np.unique(at.astype(np.float32))
    lowest, highest = known.min(), known.max()
    if lowest == highest:
        return np.array([np.nextafter(lowest, np.float32(-np.inf)), lowest], np.float32)
    if len(edges) == 1:
        edges = _around(edges[0], known)
    return edges[edges < highest] if (edges < highest).any() else edges


def _around(value: np.float32, known: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Edges where nine rows of ten have one `value`: around it, and the quarters of the rest, else all in one bin."""
    rest = known[known != value]
    quarters = np.quantile(rest.astype(np.float64), (0.25, 0.5, 0.75), method="inverted_cdf").astype(np.float32)
    below = [np.nextafter(value, np.float32(-np.inf))] if (rest < value).any() else []
    return np.unique(np.array([*quarters, *below, value], np.float32))


def _of_the_features(reference: Reference | None, info: ValidationInfo) -> Reference | None:
    features: Any = info.data.get("features")
    if reference is not None and features is not None and len(reference.columns) != len(features.columns):
        raise ValueError(f"expected {len(features.columns)} columns, as the features, was {len(reference.columns)}")
    return reference


# The manifest's field: a column for each feature.
ManifestReference = Annotated[Reference | None, AfterValidator(_of_the_features)]
