"""How long answers take: a running quantile per model (when to hedge) and a running mean per replica (who is slow)."""

from __future__ import annotations

WINDOW = 512
REFRESH = 32
MEAN_WEIGHT = 0.2


class RunningQuantile:
    """A quantile of the last `WINDOW` values, made anew every `REFRESH`: a sort of 512 costs 20 us, under 1 us each.

    Threads may lose each other's values, never corrupt them.
    """

    __slots__ = ("_count", "_quantile", "_values", "value")

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self._values: list[int] = []
        self._count = 0
        self.value: int | None = None  # None until there are `REFRESH` values

    def add(self, value: int) -> None:
        """One more value."""
        values, count = self._values, self._count
        if len(values) < WINDOW:
            values.append(value)
        else:
            values[count % WINDOW] = value
        self._count = count + 1
        if not self._count % REFRESH:
            ordered = sorted(values)
            self.value = ordered[min(len(ordered) - 1, int(self._quantile * len(ordered)))]


class RunningMean:
    """Exponentially weighted mean of one replica's latencies, by model."""

    __slots__ = ("_means",)

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def of(self, model: str) -> float | None:
        """The mean in nanoseconds; None before the first answer."""
        return self._means.get(model)

    def add(self, model: str, value: float) -> None:
        """One more latency in nanoseconds."""
        before = self._means.get(model)
        self._means[model] = value if before is None else before + MEAN_WEIGHT * (value - before)
