"""Latencies in microseconds, every one of them: exact percentiles, and a histogram with buckets 2.3 % wide.

`Recorder` listens to Locust's `request` event, whose times are float milliseconds and keep the microseconds.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from typing import Any

BUCKETS_PER_DECADE = 100
# Per row; beyond it requests still count in the histogram, and the percentiles come from there.
MAX_SAMPLES = 4_000_000
PERCENTILES = {"p50_us": 0.50, "p90_us": 0.90, "p99_us": 0.99, "p99_9_us": 0.999}


def bucket_of(latency_us: float) -> int:
    """The bucket of a latency; bucket b holds 10^(b/100) <= latency_us < 10^((b+1)/100)."""
    return math.floor(math.log10(max(latency_us, 1.0)) * BUCKETS_PER_DECADE)


def bucket_floor_us(bucket: int) -> float:
    """The smallest latency of a bucket."""
    return float(10 ** (bucket / BUCKETS_PER_DECADE))


class Row:
    """What was measured for one model over one transport."""

    def __init__(self) -> None:
        self.samples = array("d")
        self.buckets: Counter[int] = Counter()
        self.answered = self.unmeasured = 0
        self.total_us = self.max_us = 0.0
        self.failures: Counter[str] = Counter()
        self.gave_up = 0

    def add(self, latency_us: float) -> None:
        """Count one answered request of the measured window."""
        self.answered += 1
        self.total_us += latency_us
        self.max_us = max(self.max_us, latency_us)
        self.buckets[bucket_of(latency_us)] += 1
        if len(self.samples) < MAX_SAMPLES:
            self.samples.append(latency_us)

    def quantile_us(self, q: float, ordered: list[float] | None = None) -> float:
        """The smallest latency that a share `q` of the requests does not exceed (nearest rank); NaN without any."""
        if not self.answered:
            return math.nan
        if self.answered == len(self.samples):
            ordered = sorted(self.samples) if ordered is None else ordered
            return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
        rank, seen = math.ceil(q * self.answered), 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= rank:
                return min(self.max_us, bucket_floor_us(bucket + 1))
        return self.max_us

    def to_json(self) -> dict[str, Any]:
        """Counts, percentiles (None without an answer), and the histogram as [smallest latency in us, count]."""
        ordered = sorted(self.samples)
        quantiles = {name: round(self.quantile_us(q, ordered), 1) for name, q in PERCENTILES.items()}
        return {
            "requests": self.answered + self.unmeasured + self.failures.total(),
            "measured": self.answered,
            "failures": self.failures.total(),
            "errors": dict(self.failures.most_common(10)),
            "gave_up": self.gave_up,
            **(quantiles if self.answered else dict.fromkeys(PERCENTILES)),
            "mean_us": round(self.total_us / self.answered, 1) if self.answered else None,
            "max_us": round(self.max_us, 1) if self.answered else None,
            "percentiles_from": "every request" if self.answered == len(self.samples) else "histogram",
            "histogram": [[round(bucket_floor_us(b), 2), self.buckets[b]] for b in sorted(self.buckets)],
        }


class Recorder:
    """Rows by (transport, model)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}

    def row(self, transport: str, model: str) -> Row:
        """The row, made when it is first asked for."""
        return self.rows.setdefault((transport, model), Row())

    def on_request(
        self,
        request_type: str,
        name: str,
        response_time: float,
        exception: BaseException | None = None,
        context: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        """Locust's `request` event; `context["measured"]` is False in the warm-up of a phase."""
        row = self.row(request_type, name)
        if exception is not None:
            row.failures[f"{type(exception).__name__}: {exception}"[:200]] += 1
        elif context is None or context.get("measured", True):
            row.add(response_time * 1_000)
        else:
            row.unmeasured += 1
