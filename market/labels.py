"""Fixed-horizon labels: the relative return of the mid price over the next milliseconds or rows, and its class.

Letters: N rows, in time order. A label at row i is made of row i (what an engine knows) and of one later row j of the
same session (what it wants to know); `end_index[i] = j` is when the label becomes known, which is what purging needs.
A span that holds a jump (`market.jumps`: a split is no return) gives no label; `jump_spans` says which.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from market.jumps import jumps, priced
from tickserve.errors import InsufficientDataError, SchemaError, UsageError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Sessions = npt.NDArray[np.int32] | None

NS_PER_MS = 1_000_000
DOWN, FLAT, UP = range(3)
UNKNOWN = -1


def forward_returns_ms(
    ts_ns: IntArray, mid: FloatArray, horizon_ms: int, *, session: Sessions = None
) -> tuple[FloatArray, IntArray]:
    """Return over the next `horizon_ms`: to the first row at or after `ts + horizon`.

    Gives (relative return float64 [N], end index int64 [N]). Where the future is not in the data, lies beyond the end
    of row i's session (`session`: one id per row) or beyond a jump, or a mid is not a positive number, they are NaN and
    -1.
    In sparse data the realised horizon is longer than asked, never shorter. Raises SchemaError when time goes back.
    """
    return _returns_to(mid, span_ends_ms(ts_ns, horizon_ms), session)


def forward_returns_rows(mid: FloatArray, rows: int, *, session: Sessions = None) -> tuple[FloatArray, IntArray]:
    """Return over the next `rows` rows; results and NaN rule as `forward_returns_ms`."""
    return _returns_to(mid, span_ends_rows(len(mid), rows), session)


def span_ends_ms(ts_ns: IntArray, horizon_ms: int) -> IntArray:
    """Row int64 [N] at which each row's label would be known; N where that lies behind the data."""
    _check_horizon(horizon_ms, "horizon_ms")
    check_time_order(ts_ns)
    return np.searchsorted(ts_ns, ts_ns + horizon_ms * NS_PER_MS, side="left").astype(np.int64)


def span_ends_rows(count: int, rows: int) -> IntArray:
    """`span_ends_ms` for a horizon in rows, of `count` rows: N or more where it lies behind the data."""
    _check_horizon(rows, "rows")
    return np.arange(count, dtype=np.int64) + rows


def jump_spans(mid: FloatArray, end: IntArray) -> npt.NDArray[np.bool_]:
    """Spans (bool [N]) from row i to row `end[i]` of the data that hold a jump, and so have no label."""
    so_far = np.cumsum(jumps(mid))
    spans: npt.NDArray[np.bool_] = (end < len(mid)) & (so_far != so_far[np.minimum(end, len(mid) - 1)])
    return spans


def trailing_returns_ms(ts_ns: IntArray, mid: FloatArray, horizon_ms: int, *, session: Sessions = None) -> FloatArray:
    """Return over the last `horizon_ms`, from the last row at or before `ts - horizon`; 0 where there is none.

    After a jump it is 0 until the span has left it behind. Uses only rows <= i: it is what an engine can know, and the
    "last move" baseline predicts with it.
    """
    check_time_order(ts_ns)
    start = np.searchsorted(ts_ns, ts_ns - horizon_ms * NS_PER_MS, side="right").astype(np.int64) - 1
    return _returns_from(mid, start, session)


def trailing_returns_rows(mid: FloatArray, rows: int, *, session: Sessions = None) -> FloatArray:
    """Return over the last `rows` rows; 0 where the session is younger, or after a jump."""
    return _returns_from(mid, np.arange(len(mid), dtype=np.int64) - rows, session)


def flat_threshold(returns_train: FloatArray, quantile: float) -> float:
    """The |return| below which `quantile` of the training moves lie: moves up to it are called flat.

    Raises InsufficientDataError when no return is finite.
    """
    finite = returns_train[np.isfinite(returns_train)]
    if not finite.size:
        raise InsufficientDataError("no training row has a label", field="labels", expected="at least 1", was="0")
    return float(np.quantile(np.abs(finite), quantile))


def to_classes(ret: FloatArray, threshold: float) -> IntArray:
    """Class of each return: 0 down (below -threshold), 1 flat, 2 up (above threshold). Raises SchemaError for NaN."""
    if np.isnan(ret).any():
        raise SchemaError("a return without a label", field="ret", expected="finite returns", was="NaN")
    return np.where(ret > threshold, UP, np.where(ret < -threshold, DOWN, FLAT)).astype(np.int64)


def check_time_order(ts_ns: IntArray) -> None:
    """Raise SchemaError unless `ts_ns` never goes back."""
    back = np.flatnonzero(np.diff(ts_ns) < 0)
    if back.size:
        raise SchemaError(
            "time goes back", field="ts_ns", expected="non-decreasing", was=f"a step back at row {back[0] + 1}"
        )


def _check_horizon(value: int, field: str) -> None:
    if value < 1:
        raise UsageError("the horizon must lie ahead", field=field, expected=">= 1", was=str(value))


def _returns_to(mid: FloatArray, end: IntArray, session: Sessions) -> tuple[FloatArray, IntArray]:
    n = len(mid)
    inside = np.minimum(end, n - 1)
    known = (end < n) & _same_session(session, inside) & priced(mid) & priced(mid)[inside] & ~jump_spans(mid, end)
    ret = np.full(n, np.nan)
    ret[known] = mid[inside[known]] / mid[known] - 1.0
    return ret, np.where(known, end, UNKNOWN)


def _returns_from(mid: FloatArray, start: IntArray, session: Sessions) -> FloatArray:
    inside = np.maximum(start, 0)
    known = (start >= 0) & _same_session(session, inside) & priced(mid) & priced(mid)[inside] & ~jump_spans(mid, inside)
    ret = np.zeros(len(mid))
    ret[known] = mid[known] / mid[inside[known]] - 1.0
    return ret


def _same_session(session: Sessions, other: IntArray) -> npt.NDArray[np.bool_]:
    if session is None:
        return np.ones(len(other), dtype=bool)
    same: npt.NDArray[np.bool_] = session == session[other]
    return same
