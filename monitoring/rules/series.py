"""The names of the recorded series and the PromQL that rules and dashboards share.

A name ends with its window, so another window is another name: `tickserve:stale:ratio_rate5m`. Sums keep `namespace`,
which plain Prometheus does not have and then does not show.
"""

from __future__ import annotations

from dataclasses import dataclass

from monitoring.rules.rule import duration
from tickserve.config import MonitoringSettings

CALLS = "tickserve_client_calls_total"
MISSES = "tickserve_client_deadline_misses_total"
FALLBACKS = "tickserve_client_fallbacks_total"
OK, FAILED = "nv_inference_request_success", "nv_inference_request_failure"
PENDING = "nv_inference_pending_request_count"
CLIENT = "namespace, model"
SERVER = "namespace, job, model"
QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
ERRORS = "tickserve_client_errors_total"
# Errors by type, whatever then stood in for the answer: a missed deadline has alerts of its own, and so has bad input.
REJECTED, LATE = "InputRejectedError", "DeadlineExceededError"


@dataclass(frozen=True)
class Series:
    """Names under the settings in force."""

    settings: MonitoringSettings

    @property
    def window(self) -> str:
        """The window of ratios and quantiles."""
        return duration(self.settings.window_s)

    @property
    def queue_window(self) -> str:
        """The window of queue times."""
        return duration(self.settings.queue_window_s)

    def served(self, metric: str, *more: str) -> str:
        """A metric of our own servers; another team's Triton reports the same names."""
        return f"{metric}{{{', '.join((self.jobs, *more))}}}"

    @property
    def jobs(self) -> str:
        """The matcher of the servers' jobs."""
        return f'job=~"{self.settings.server_jobs}"'

    @property
    def windows(self) -> tuple[float, ...]:
        """Every window of deadline misses, in seconds, shortest first."""
        found = {self.settings.window_s, *self.settings.burn_short_s, *self.settings.burn_long_s}
        return tuple(sorted(found))

    def misses(self, seconds: float) -> str:
        """Share of calls that missed their deadline."""
        return f"tickserve:deadline_miss:ratio_rate{duration(seconds)}"

    def share(self, of: str) -> str:
        """Share of calls: `stale`, `fallback`, `client_error`, `rejected_input`, `server_error`."""
        return f"tickserve:{of}:ratio_rate{self.window}"

    def rate(self, of: str) -> str:
        """A second: `calls` of clients, `requests` and `rows` of servers."""
        return f"tickserve:{of}:rate{self.window}"

    def quantile(self, of: str, name: str) -> str:
        """`client_call_seconds`, `client_stage_seconds`, `event_age_seconds`; p50, p99 or p999."""
        return f"tickserve:{of}:{name}_{self.window}"

    @property
    def queue_seconds(self) -> str:
        """Mean wait of a request in the queue."""
        return f"tickserve:queue_seconds_per_request:rate{self.queue_window}"

    @property
    def pending(self) -> str:
        """Requests that wait, in all servers together."""
        return "tickserve:pending_requests:sum"

    @property
    def memory(self) -> str:
        """Memory of a server: of its container, or of its process where no container is known."""
        return "tickserve:memory_bytes:max"


def share(part: str, whole: str, by: str, window: str) -> str:
    """`part` of `whole` over the window; 0, not nothing, where a part has not happened yet."""
    total = f"sum by ({by}) (rate({whole}[{window}]))"
    return f"(sum by ({by}) (rate({part}[{window}])) or 0 * {total})\n/ {total}"
