"""The calibration plot: how often the price went up, over how likely the model said it was, as inline SVG.

A point per bin, its area growing with the bin's rows; the diagonal is a model whose probabilities are true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

SIDE, MARGIN = 240, 34
TICKS = (0.0, 0.5, 1.0)


def draw_calibration(bins: Sequence[dict[str, Any]], label: str) -> Markup:
    """`bins` hold `rows`, `predicted` and `observed` (shares from 0 to 1); those without rows are left out.

    The axes end at the smallest of 25, 50 or 100 % that holds every point.
    """
    points = [(bin_["predicted"], bin_["observed"], bin_["rows"]) for bin_ in bins if bin_["rows"]]
    highest = max((max(x, y) for x, y, _ in points), default=1.0)
    top = next(limit for limit in (0.25, 0.5, 1.0) if highest <= limit or limit == 1.0)
    most = max((rows for *_, rows in points), default=1)
    line = " ".join(f"{_x(x / top):.1f},{_y(y / top):.1f}" for x, y, _ in sorted(points))
    dots = Markup("").join(_dot(x / top, y / top, x, y, rows, most) for x, y, rows in points)
    return Markup(
        '<svg class="calibration" viewBox="0 0 {width} {height}" role="img" aria-label="Calibration of {label}">'
        '{axes}<path class="diagonal" d="M{x0} {y0}L{x1} {y1}"/>'
        '<polyline class="curve" points="{line}"/>{dots}</svg>'
    ).format(
        width=SIDE + MARGIN + 12, height=SIDE + MARGIN + 12, label=label, axes=_axes(top), line=line, dots=dots,
        x0=_x(0), y0=_y(0), x1=_x(1), y1=_y(1),
    )  # fmt: skip


def _x(share: float) -> float:
    return MARGIN + SIDE * min(max(share, 0.0), 1.0)


def _y(share: float) -> float:
    return 8 + SIDE * (1 - min(max(share, 0.0), 1.0))


def _dot(x: float, y: float, predicted: float, observed: float, rows: int, most: int) -> Markup:
    return Markup(
        '<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"><title>{said:.1%} said, {seen:.1%} seen, {rows:,} '
        "rows</title></circle>"
    ).format(x=_x(x), y=_y(y), r=2.5 + 6 * math.sqrt(rows / most), said=predicted, seen=observed, rows=rows)


def _axes(top: float) -> Markup:
    parts = [
        Markup('<path class="grid" d="M{x} {y0}V{y1}M{x0} {y}H{x1}"/>').format(
            x=_x(tick), y0=_y(0), y1=_y(1), x0=_x(0), x1=_x(1), y=_y(tick)
        )
        + Markup('<text x="{x}" y="{y}" text-anchor="{anchor}">{label}</text>').format(
            x=_x(tick), y=_y(0) + 15, label=f"{100 * tick * top:g} %", anchor="end" if tick == 1 else "middle"
        )
        + Markup('<text x="{x}" y="{y}" text-anchor="end">{label}</text>').format(
            x=_x(0) - 5, y=_y(tick) + 4, label=f"{100 * tick * top:g}" if tick else ""
        )
        for tick in TICKS
    ]
    return Markup("").join(parts)
