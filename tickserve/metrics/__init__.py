"""Metrics of a client, for Prometheus: `Client(url, manifest=..., observer=MetricsExporter())` counts and serves them.

Counting loads nothing; serving takes the extra `monitoring` (prometheus-client). docs/metrics.md names every metric.
"""

from tickserve.metrics._exporter import MetricsExporter
from tickserve.metrics._server import Endpoint
from tickserve.metrics._tally import Histogram, log_buckets

__all__ = ["Endpoint", "Histogram", "MetricsExporter", "log_buckets"]
