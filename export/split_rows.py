"""Rows that stand on the splits of a forest: on each threshold, one float32 step to each side, with the value missing.

A row says something about a split only when it gets there, so the features on the way down are set to what the way asks
for, and the rest of the row is real. Letters: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.parity import Rows

# Rows times trees: some seconds of scoring. A forest beyond it has each of its thresholds visited at one split, and as
# many more splits as fit.
MAX_TREE_VISITS = 400_000_000
ROWS_PER_SPLIT = 4
MINUS, PLUS = np.float32(-np.inf), np.float32(np.inf)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a way down a tree asks of a feature: a value in [low, high), or none where `missing` may pass."""

    low: np.float32 = MINUS
    high: np.float32 = PLUS
    missing: bool = True

    def holds(self, value: np.float32) -> bool:
        """Whether this value, NaN for a missing one, goes that way."""
        return self.missing if np.isnan(value) else bool(self.low <= value < self.high)

    def narrowed(self, threshold: np.float32, left: bool, missing: bool) -> Bounds:
        """After one more split: to the left is below the threshold, and `missing` says whether NaN goes that way."""
        low, high = (self.low, min(self.high, threshold)) if left else (max(self.low, threshold), self.high)
        return Bounds(low, high, self.missing and missing)

    def value(self) -> np.float32 | None:
        """Some value that goes that way; None when there is none."""
        if self.low < self.high:
            return self.low if self.low > MINUS else np.nextafter(self.high, MINUS)
        return np.float32(np.nan) if self.missing else None


ANY = Bounds()


@dataclass(frozen=True, slots=True)
class Split:
    """One inner node of a forest, and what each feature has to be for a row to get there."""

    feature: int
    threshold: np.float32
    way: tuple[tuple[int, Bounds], ...]

    def own(self) -> Bounds:
        """What the way down asks of the feature that is split here."""
        return dict(self.way).get(self.feature, ANY)

    def crossed(self) -> bool:
        """Whether a row on the threshold gets there, and the one just below it: the two must then part."""
        own = self.own()
        return own.holds(self.threshold) and own.holds(np.nextafter(self.threshold, MINUS))


def read_splits(trees: Sequence[dict[str, Any]]) -> list[Split]:
    """Every split of XGBoost's trees (its JSON), those near the root first."""
    splits = [found for tree in trees for found in _walk(tree)]
    return [split for _, split in sorted(splits, key=lambda pair: pair[0])]


def _walk(tree: dict[str, Any]) -> Iterator[tuple[int, Split]]:
    left, right = tree["left_children"], tree["right_children"]
    stack: list[tuple[int, int, dict[int, Bounds]]] = [(0, 0, {})]
    while stack:
        node, depth, way = stack.pop()
        if left[node] == -1:
            continue
        feature, threshold = int(tree["split_indices"][node]), np.float32(tree["split_conditions"][node])
        yield depth, Split(feature, threshold, tuple(way.items()))
        missing_left = bool(tree["default_left"][node])
        bounds = way.get(feature, ANY)
        for child, goes_left in ((left[node], True), (right[node], False)):
            narrowed = bounds.narrowed(threshold, goes_left, missing_left is goes_left)
            stack.append((child, depth + 1, way | {feature: narrowed}))


@dataclass(frozen=True)
class SplitRows:
    """`on_value` [3n, F]: below, on and above a threshold; `missing` [m, F]: NaN there; and how much that covers.

    `covered`: distinct `thresholds`, all `splits`, `splits_visited`, of these `splits_crossed` (`Split.crossed`) and
    `splits_missing` (NaN gets there), and `splits_unreachable` (no row of any kind gets there).
    """

    on_value: Rows
    missing: Rows
    covered: dict[str, int]


def rows_on_splits(rows: Rows, splits: Sequence[Split], trees: int, seed: int = 0) -> SplitRows:
    """Real rows [N, F] moved onto the splits: every threshold at one split at least, every split while it is cheap."""
    chosen = _within_budget(splits, MAX_TREE_VISITS // max(1, trees * ROWS_PER_SPLIT))
    bases = np.random.default_rng(seed).integers(len(rows), size=len(chosen))
    on_value: list[Rows] = []
    missing: list[Rows] = []
    crossed = unreachable = 0
    for split, base in zip(chosen, bases, strict=True):
        row = _on_its_way(rows[base], split)
        if row is None:
            unreachable += 1
            continue
        values = (np.nextafter(split.threshold, MINUS), split.threshold, np.nextafter(split.threshold, PLUS))
        crossed += split.crossed()
        on_value.extend(_with(row, split.feature, value) for value in values)
        if split.own().missing:
            missing.append(_with(row, split.feature, np.float32(np.nan)))
    covered = {
        "thresholds": len({(split.feature, float(split.threshold)) for split in splits}),
        "splits": len(splits),
        "splits_visited": len(chosen) - unreachable,
        "splits_crossed": crossed,
        "splits_missing": len(missing),
        "splits_unreachable": unreachable,
    }
    none = np.empty((0, rows.shape[1]), np.float32)
    return SplitRows(np.stack(on_value) if on_value else none, np.stack(missing) if missing else none, covered)


def _within_budget(splits: Sequence[Split], most: int) -> list[Split]:
    """One split of each threshold, one that rows cross where there is one; then others; feature by feature."""
    first: dict[tuple[int, float], Split] = {}
    others = []
    for split in sorted(splits, key=lambda split: not split.crossed()):
        key = (split.feature, float(split.threshold))
        if key in first:
            others.append(split)
        else:
            first[key] = split
    chosen = [*first.values(), *others[: max(0, most - len(first))]]
    return sorted(chosen, key=lambda split: (split.feature, split.threshold))


def _on_its_way(base: Rows, split: Split) -> Rows | None:
    """The real row `base`, changed where it would leave the way to the split; None when no row gets there."""
    row = base.copy()
    for feature, bounds in split.way:
        if feature != split.feature and not bounds.holds(row[feature]):
            value = bounds.value()
            if value is None:
                return None
            row[feature] = value
    own = split.own()
    return row if own.missing or own.value() is not None else None


def _with(row: Rows, feature: int, value: np.float32) -> Rows:
    changed = row.copy()
    changed[feature] = value
    return changed
