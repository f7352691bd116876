"""The search as a picture: each trial's information coefficient over the p99 of a lone row, the Pareto front joined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 320, 56, 12, 40
TICKS = 4


def draw_pareto(result: Mapping[str, Any]) -> Markup:
    """Inline SVG of a study's `result.json`; trials that were given up or cut off have no place in it."""
    rows = [row for row in result["trials"] if row["ic"] is not None and row["p99_us"] is not None]
    if not rows:
        return Markup("")
    x, y = (
        _scale([row["p99_us"] for row in rows], LEFT, WIDTH - 12),
        _scale([row["ic"] for row in rows], HEIGHT - BOTTOM, TOP),
    )
    front = sorted((row for row in rows if row["trial"] in result["pareto_front"]), key=lambda row: row["p99_us"])
    line = " ".join(f"{x(row['p99_us']):.1f},{y(row['ic']):.1f}" for row in front)
    dots = Markup("").join(_dot(row, x, y, result) for row in rows)
    return Markup(
        '<svg viewBox="0 0 {width} {height}" role="img" aria-label="Information coefficient over latency">{axes}'
        '<polyline class="front" points="{line}"/>{dots}</svg>'
    ).format(width=WIDTH, height=HEIGHT, axes=_axes(rows, x, y), line=line, dots=dots)


def _scale(values: Sequence[float], start: float, end: float) -> Any:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or max(abs(high) * 0.1, 1e-6)
    low, high = low - margin, high + margin
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _dot(row: Mapping[str, Any], x: Any, y: Any, result: Mapping[str, Any]) -> Markup:
    kind = (
        "chosen" if row["trial"] == result["chosen"] else "best" if row["trial"] in result["pareto_front"] else "other"
    )
    return Markup(
        '<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"><title>trial {trial}: IC {ic:+.4f}, '
        "p99 {p99:,.0f} us, {size:,.0f} bytes</title></circle>"
    ).format(
        kind=kind, x=x(row["p99_us"]), y=y(row["ic"]), r=7 if kind == "chosen" else 5, trial=row["trial"], ic=row["ic"],
        p99=row["p99_us"], size=row["size_bytes"],
    )  # fmt: skip


def _axes(rows: Sequence[Mapping[str, Any]], x: Any, y: Any) -> Markup:
    latency = [row["p99_us"] for row in rows]
    quality = [row["ic"] for row in rows]
    parts = [
        Markup('<text x="{x:.1f}" y="{y}" text-anchor="middle">{label:,.0f}</text>').format(
            x=x(value), y=HEIGHT - BOTTOM + 18, label=value
        )
        for value in _ticks(latency)
    ]
    parts += [
        Markup('<text x="{x}" y="{y:.1f}" text-anchor="end">{label:+.3f}</text>').format(
            x=LEFT - 6, y=y(value) + 4, label=value
        )
        for value in _ticks(quality)
    ]
    parts.append(
        Markup(
            '<path class="grid" d="M{x} {top}V{y}H{end}"/>'
            '<text x="{end}" y="{low}" text-anchor="end">p99 of a lone row, us</text>'
        ).format(x=LEFT, top=TOP, y=HEIGHT - BOTTOM, end=WIDTH - 12, low=HEIGHT - 6)
    )
    return Markup("").join(parts)


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [low] if math.isclose(low, high) else [low + (high - low) * step / TICKS for step in range(TICKS + 1)]
