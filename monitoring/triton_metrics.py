"""What Triton says about itself: its Prometheus text read into counts per model and version.

The counters start with the server, and golden pairs and warm-ups at load count too: compare two scrapes to count what
happened in between. A signal is one row scored, so a request of B rows counts B signals.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from tickserve.errors import ComponentError, ProtocolError, UsageError

TIMEOUT_S = 10.0
MAX_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class ModelCounts:
    """Counters of one version of one model since the server started; durations are sums in microseconds."""

    model: str
    version: str
    requests_ok: int = 0
    requests_failed: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    executions: int = 0
    request_us: int = 0
    queue_us: int = 0
    compute_input_us: int = 0
    compute_infer_us: int = 0
    compute_output_us: int = 0


COUNTERS = {
    "nv_inference_request_success": "requests_ok",
    "nv_inference_count": "rows",
    "nv_inference_exec_count": "executions",
    "nv_inference_request_duration_us": "request_us",
    "nv_inference_queue_duration_us": "queue_us",
    "nv_inference_compute_input_duration_us": "compute_input_us",
    "nv_inference_compute_infer_duration_us": "compute_infer_us",
    "nv_inference_compute_output_duration_us": "compute_output_us",
}
FAILURES = "nv_inference_request_failure"


def scrape(metrics_url: str) -> dict[tuple[str, str], ModelCounts]:
    """Counts by (model, version) from `metrics_url`, e.g. "http://127.0.0.1:8002/metrics".

    Raises UsageError for another kind of address, ComponentError when nobody answers there, and ProtocolError when the
    answer is not Prometheus text.
    """
    return parse(_fetch(metrics_url))


def signals_counted(metrics_url: str) -> dict[str, int]:
    """Rows scored per model over all its versions, as Triton counted them. Raises as `scrape`."""
    totals: dict[str, int] = {}
    for counts in scrape(metrics_url).values():
        totals[counts.model] = totals.get(counts.model, 0) + counts.rows
    return totals


def parse(text: str) -> dict[tuple[str, str], ModelCounts]:
    """Counts by (model, version) in Prometheus text. Raises ProtocolError."""
    values: dict[tuple[str, str], dict[str, int]] = {}
    failures: dict[tuple[str, str], dict[str, int]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.labels.get("model", ""), sample.labels.get("version", ""))
                # The parser takes `_total` off some names and leaves it on others.
                name = sample.name.removesuffix("_total")
                # On a GPU a model has two series of each counter, one of them with a gpu_uuid: their sum is the count.
                if name == FAILURES:
                    _add(failures.setdefault(key, {}), sample.labels.get("reason", "OTHER"), sample.value)
                elif name in COUNTERS:
                    _add(values.setdefault(key, {}), COUNTERS[name], sample.value)
    except (ValueError, OverflowError, KeyError, IndexError) as error:
        raise ProtocolError(f"not Prometheus text: {str(error)[:100]}", field="metrics") from error
    make: Callable[..., ModelCounts] = ModelCounts
    return {
        key: make(
            *key,
            **values.get(key, {}),
            failures=failures.get(key, {}),
            requests_failed=sum(failures.get(key, {}).values()),
        )
        for key in sorted({*values, *failures})
    }


def _add(counts: dict[str, int], name: str, value: float) -> None:
    counts[name] = counts.get(name, 0) + int(value)


def _fetch(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise UsageError("wrong address", field="metrics url", expected="http://host:port/metrics", was=repr(url[:100]))
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310 - the scheme is checked above
            body: bytes = answer.read(MAX_BYTES)
    except (urllib.error.URLError, OSError, http.client.HTTPException, ValueError) as error:
        raise ComponentError(
            f"no metrics at {url[:100]}: {getattr(error, 'reason', error)}",
            field="metrics url",
            hint="is the server running, and is this its metrics port?",
        ) from error
    return body.decode("utf-8", "replace")
