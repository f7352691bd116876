"""The latency plot: one line per model and transport, latency over percentile, so that the tail is not hidden.

The SVG has a transparent ground and takes its ink from the page (`currentColor`), light or dark; its bytes depend on
the results alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Replaced by `currentColor` in the SVG: matplotlib has no word for it.
INK = "#123456"
COLORS = {"http": "#3b82f6", "grpc": "#f59e0b"}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
TICKS = (0.5, 0.9, 0.99, 0.999, 0.9999)
STYLE = """<style>
svg.latency { color: #1c2024; font-family: system-ui, sans-serif; max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { svg.latency { color: #d8dce1; } }
</style>"""


def draw_latency(rows: Sequence[dict[str, Any]], users: int) -> bytes:
    """The plot as SVG bytes, of the rows of `loadtest.json` (those without an answer are left out)."""
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "tickserve-latency", "font.size": 9, "font.family": "sans-serif",
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.7, 4.3), layout="constrained")
        FigureCanvasSVG(figure)
        _draw(figure.add_subplot(), [row for row in rows if row["measured"]], users)
        if any(row["measured"] for row in rows):
            figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue().decode()).encode()


def _draw(axes: Any, rows: Sequence[dict[str, Any]], users: int) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    for row in rows:
        counts = np.array([count for _, count in row["histogram"]])
        share = (np.cumsum(counts) - counts / 2) / counts.sum()
        axes.plot(
            -np.log10(1 - share), [low_us for low_us, _ in row["histogram"]],
            color=COLORS[row["transport"]], linestyle=DASHES[models.index(row["model"]) % len(DASHES)], linewidth=1.6,
            label=f"{row['model']} · {row['transport']}",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks([-np.log10(1 - tick) for tick in TICKS], [f"{100 * tick:g} %" for tick in TICKS])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g} ms" if value >= 1e3 else f"{value:g} µs")
    axes.yaxis.set_minor_formatter(lambda _value, _: "")
    axes.set_xlabel(f"share of requests answered within, {users} users")
    axes.grid(visible=True, which="major", color=INK, alpha=0.15, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _inline(svg: str) -> str:
    """The SVG without XML and document type declarations, with the page's ink, and named."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    tag_end = svg.index(">") + 1
    tag = re.sub(r' (width|height)="[^"]*"', "", svg[: tag_end - 1])
    return f'{tag} class="latency" role="img" aria-label="Latency by percentile">\n{STYLE}{svg[tag_end:]}'
