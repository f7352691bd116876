"""How long one execution takes, by rows and by requests: measured samples, and numbers between them.

The measurement itself needs a server: `loadtest/service_times.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.errors import UsageError

Samples = Mapping[int, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class ServiceTimes:
    """`samples_us` maps rows of a lone request to measured microseconds an instance was busy with it.

    `per_request_us` is what each further request in a batch adds at equal rows; `overhead_us` is what a caller
    typically waits beside that (network stack, parsing, answer), off the instance, and `path_us` how that varies from
    request to request (none: it does not). `source` says what was measured.
    """

    samples_us: Samples
    per_request_us: float
    overhead_us: float
    source: str
    path_us: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        bad = not self.samples_us or any(not len(s) or not np.all(s > 0) for s in self.samples_us.values())
        if bad or self.per_request_us < 0 or self.overhead_us < 0 or any(not path >= 0 for path in self.path_us):
            raise UsageError("expected positive microseconds for each batch size", field="service times")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The measured numbers of rows, smallest first."""
        return tuple(sorted(self.samples_us))

    def mean_us(self, rows: int, requests: int = 1) -> float:
        """Mean time of an execution; straight lines between the measured sizes and past the largest."""
        sizes = self.sizes
        means = [float(np.mean(self.samples_us[size])) for size in sizes]
        base = float(np.interp(rows, sizes, means))
        if rows > sizes[-1] and len(sizes) > 1:
            slope = (means[-1] - means[-2]) / (sizes[-1] - sizes[-2])
            base += max(0.0, slope) * (rows - sizes[-1])
        return base + self.per_request_us * (requests - 1)

    def spread(self) -> npt.NDArray[np.float64]:
        """Every sample over its size's mean: how an execution varies around `mean_us`. float64 [samples]."""
        return np.concatenate([s / np.mean(s) for s in self.samples_us.values()])

    def paths(self) -> npt.NDArray[np.float64]:
        """What callers waited off the instance, as it was seen. float64 [samples]."""
        return np.array(self.path_us or (self.overhead_us,))

    def to_json(self) -> dict[str, Any]:
        """Mean, p50 and p99 by size; the path's p99 too."""
        return {
            "source": self.source,
            "overhead_us": round(self.overhead_us, 3),
            "overhead_p99_us": round(float(np.percentile(self.paths(), 99)), 1),
            "per_request_us": round(self.per_request_us, 6),
            "rows": {
                str(size): {
                    "calls": len(self.samples_us[size]),
                    "mean_us": round(self.mean_us(size), 3),
                    "p50_us": round(float(np.percentile(self.samples_us[size], 50)), 1),
                    "p99_us": round(float(np.percentile(self.samples_us[size], 99)), 1),
                }
                for size in self.sizes
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ServiceTimes:
        """What `to_json` kept: the means, without their spread. Raises UsageError for anything else."""
        try:
            samples = {int(size): np.array([float(row["mean_us"])]) for size, row in value["rows"].items()}
            return cls(samples, float(value["per_request_us"]), float(value["overhead_us"]), str(value["source"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError("not the service times that derive writes", field="service") from error


def sizes_up_to(max_batch: int) -> list[int]:
    """1, 2, 4, ... and `max_batch` itself."""
    return sorted({*(1 << power for power in range(max_batch.bit_length()) if 1 << power <= max_batch), max_batch})
