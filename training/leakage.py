"""Two guards against an answer that reached the features: columns that know the future, scores too good to be true.

What is refused. A column whose correlation, of values or of ranks and of either sign, exceeds the bound with the label
(the return over the horizon), its class, or the return to the next row, over half or over twice the horizon: a scale, a
sign, a logarithm and noise of half the answer's size do not hide it. A column that knows the future price: not by its
plain correlation, since a clock or a spread in ticks moves with the price level and is no leak, but by what it knows of
it beyond the present price (a partial rank correlation). And a model whose out-of-sample information coefficient
exceeds `MAX_IC`: an answer that several columns share, or that one hides behind a shape which trees undo.

What is not caught. An answer too diluted to stand out from honest columns (noise of its own size in a book; one that
knows only some of the rows), about an instant far from these horizons, or spread so that the model stays below
`MAX_IC`; anything in the labels or the folds; and recordings with fewer than `MIN_EFFECTIVE_ROWS` independent rows.
Whether a feature *reads* the future is what `tickserve.features.lookahead` shows, by perturbing it; these guards look
at numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tickserve.errors import GateRefusedError
from training.examples import Examples, FloatArray, IntArray, evenly
from training.metrics import effective_rows, rank_correlation, standard_ranks

# The bound of a column, by what the horizon is counted in: "ms" for books, "rows" for bars. Where the tick is wide, the
# imbalance at the touch of a book decides most next moves by itself, so an honest column can know a lot; past 0.75
# it would explain more of the variance than it leaves open. Nothing that a bar shows comes near such foresight.
MAX_COLUMN = {"ms": 0.75, "rows": 0.5}
# Over a short recording the price may have a trend, and every clock knows a part of it; the future price knows all.
MAX_PRICE = 0.9
# Noise of half the answer's size leaves a correlation of 0.89: past 0.8 a model has hardly anything left to get wrong.
MAX_IC = 0.8
# Below this many independent rows a correlation is no evidence.
MIN_EFFECTIVE_ROWS = 50
PROBE_ROWS = 20_000
MIN_FINITE_ROWS = 50
LABEL, PRICE = "the return over the horizon", "the future price"


def refuse_leaks(examples: Examples, columns: tuple[str, ...]) -> None:
    """Raise GateRefusedError naming the first feature column that ranks the future of the training rows.

    The training rows of the published fold are looked at (they include those of every earlier fold).
    """
    train = examples.published.rows.train
    if effective_rows(train, examples.end[train]) < MIN_EFFECTIVE_ROWS:
        return
    rows = evenly(train, PROBE_ROWS)
    answers, mid = futures(examples, rows), examples.mid[rows]
    for index, column in enumerate(columns):
        for answer, found in known(examples.features[rows, index].astype(np.float64), answers, mid).items():
            bound = MAX_PRICE if answer == PRICE else MAX_COLUMN[examples.horizon_unit]
            if found > bound:
                raise GateRefusedError(
                    "the answer leaks into a feature",
                    field=column,
                    expected=f"a correlation with {answer} of at most {bound}",
                    was=f"{found:.3f}",
                    hint="this column knows the future: look at how it is computed",
                )


def refuse_too_good(pooled: Mapping[str, Any], family: str) -> None:
    """Raise GateRefusedError for pooled out-of-sample metrics that no honest model reaches."""
    ic = pooled["ic"] or 0.0
    if pooled["n_eff"] >= MIN_EFFECTIVE_ROWS and abs(ic) > MAX_IC:
        raise GateRefusedError(
            "out of sample, the model is too good to be true",
            field=family,
            expected=f"|IC| of at most {MAX_IC}",
            was=f"{ic:.3f}",
            hint="several features together know the future: look at how they are computed",
        )


def futures(examples: Examples, rows: IntArray) -> dict[str, FloatArray]:
    """What no column may rank, for `rows` [n], by name; NaN where it is not known."""
    span = examples.end[rows] - rows
    return {
        LABEL: examples.ret[rows],
        "its class": examples.classes(rows, examples.published.threshold).astype(np.float64),
        "the return to the next row": _return(examples, rows, np.ones_like(span)),
        "the return over half the horizon": _return(examples, rows, (span + 1) // 2),
        "the return over twice the horizon": _return(examples, rows, 2 * span),
        PRICE: examples.mid[examples.end[rows]],
    }


def _return(examples: Examples, rows: IntArray, ahead: IntArray) -> FloatArray:
    """Relative return from each row to the row `ahead` of it; NaN where that is not in the same session."""
    later = np.minimum(rows + ahead, len(examples.mid) - 1)
    known = (rows + ahead == later) & (examples.session[later] == examples.session[rows])
    return np.where(known, examples.mid[later] / examples.mid[rows] - 1.0, np.nan)


def known(values: FloatArray, answers: Mapping[str, FloatArray], mid: FloatArray) -> dict[str, float]:
    """How much a column [n] knows of each answer: 0 to 1; answers with hardly a finite row to judge by are left out."""
    found = {}
    for name, answer in answers.items():
        both = np.isfinite(values) & np.isfinite(answer)
        if both.sum() < MIN_FINITE_ROWS or min(np.ptp(values[both]), np.ptp(answer[both])) == 0:
            continue
        if name == PRICE:
            found[name] = abs(partial_rank_correlation(values[both], answer[both], mid[both]))
        else:
            linear = float(np.corrcoef(values[both], answer[both])[0, 1])
            found[name] = max(abs(linear), abs(rank_correlation(values[both], answer[both]) or 0.0))
    return found


def partial_rank_correlation(left: FloatArray, right: FloatArray, given: FloatArray) -> float:
    """Spearman's correlation of two varying sides [n] without what both owe to `given`; 0 where nothing is left."""
    one, two = standard_ranks(left), standard_ranks(right)
    base = standard_ranks(given) if np.ptp(given) else np.zeros(len(given))
    one, two = (side - base * float((side * base).mean()) for side in (one, two))
    scale = math.sqrt(float((one**2).mean()) * float((two**2).mean()))
    return float((one * two).mean()) / scale if scale > 1e-12 else 0.0
