"""Rows no recorded day holds, made of real ones: with holes, and with values at the edges of float32.

Letters: N rows, T steps of a window, F features; rows are [N, F] or [N, T, F].
"""

from __future__ import annotations

import numpy as np

from export.parity import Rows
from tickserve.manifest import Manifest

NAN_ROWS = 256
NAN_SHARE = 0.1
LARGEST = np.finfo(np.float32).max
SMALLEST = np.nextafter(np.float32(0), np.float32(1))
EDGES = (0.0, -0.0, 1.0, -1.0, SMALLEST, -SMALLEST, 1e6, -1e6, 1e30, -1e30, LARGEST, -LARGEST)


def rows_with_nan(rows: Rows, seed: int = 0) -> Rows:
    """Real rows with holes: one value in ten; each feature as a whole; each step of a window as a whole; everything."""
    generator = np.random.default_rng(seed)
    holed = rows[:NAN_ROWS].copy()
    holed[generator.random(holed.shape) < NAN_SHARE] = np.nan
    width = rows.shape[-1]
    by_feature = np.repeat(rows[:1], width, axis=0)
    by_feature[np.arange(width), ..., np.arange(width)] = np.nan
    parts = [holed, by_feature]
    if rows.ndim == 3:
        steps = rows.shape[1]
        by_step = np.repeat(rows[:1], steps, axis=0)
        by_step[np.arange(steps), np.arange(steps)] = np.nan
        parts.append(by_step)
    return np.concatenate([*parts, np.full_like(rows[:1], np.nan)])


def extreme_rows(rows: Rows, manifest: Manifest) -> Rows:
    """Each edge of float32 in every feature and in one at a time, and the training range, ten times as wide too.

    A net imputes what is infinite as it does NaN, so infinities are among its edges; trees never see one, since the
    client refuses it. State that a row carries behind its features stays as it is.
    """
    edges = np.array([*EDGES, np.inf, -np.inf] if manifest.nan_policy == "impute_mean" else EDGES, np.float32)
    features = len(manifest.features.columns)
    whole, by_range = (np.repeat(rows[:1], count, axis=0) for count in (len(edges), 4))
    whole[..., :features] = edges.reshape(-1, *(1,) * (rows.ndim - 1))
    by_feature = np.repeat(rows[:1], len(edges) * features, axis=0)
    columns = np.tile(np.arange(features), len(edges))
    by_feature[np.arange(len(columns)), ..., columns] = np.repeat(edges, features).reshape(-1, *(1,) * (rows.ndim - 2))
    low, high = (np.array(side, np.float64) for side in (manifest.features.minimum, manifest.features.maximum))
    ranges = np.stack([low, high, low - 10 * (high - low), high + 10 * (high - low)])
    ranges = np.clip(ranges, -float(LARGEST), float(LARGEST)).astype(np.float32)
    by_range[..., :features] = ranges.reshape(4, *(1,) * (rows.ndim - 2), features)
    return np.concatenate([whole, by_feature, by_range])
