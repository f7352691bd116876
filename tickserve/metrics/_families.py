"""The tallies as metric families of prometheus_client: what `/metrics` says. Names and labels: docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tickserve.metrics._tally import Histogram, ModelTally

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PREFIX = "tickserve_client_"


def families(models: Mapping[str, ModelTally], lost: int) -> Iterator[Metric]:
    """Every family, one after the other. A model without a value of a counter has no sample of it."""
    from prometheus_client.core import GaugeMetricFamily

    yield from _counters(models)
    yield _histogram("call_seconds", "A whole call, from its arguments to its signal or its error.", models, "call")
    stages = _family_of_histograms("stage_seconds", "One stage of a call.", ("model", "stage"))
    for name, tally in models.items():
        for stage, histogram in tally.stages.items():
            _add(stages, (name, stage), histogram)
    yield stages
    yield _histogram("event_age_seconds", "Age of the newest market event when a signal was made.", models, "age")
    yield _histogram("score", "p(up) - p(down) of each row that a model answered.", models, "score")
    info = GaugeMetricFamily(
        f"{PREFIX}model_info", "1: this has answered.", labels=("model", "version", "bundle_digest")
    )
    for name, tally in models.items():
        for version, digest in tally.info:
            info.add_metric((name, version, digest), 1.0)
    yield info
    yield _counter("lost", "Observations that the exporter dropped.", (), {(): lost})


def _counters(models: Mapping[str, ModelTally]) -> Iterator[Metric]:
    calls = {(name, *key): count for name, tally in models.items() for key, count in tally.calls.items()}
    yield _counter("calls", "Calls by how they ended.", ("model", "version", "status"), calls)
    for attribute, label, text in (
        ("errors", "error", "Calls that failed, whatever stood in for their answer, by the error's type."),
        ("fallbacks", "fallback", "Signals that something stood in for the model."),
        ("decisions", "decision", "Rows that a model answered, by the most probable class."),
        ("flags", "flag", "Signals that carry this flag, without its column."),
    ):
        found = {
            (name, str(key)): count
            for name, tally in models.items()
            for key, count in getattr(tally, attribute).items()
        }
        yield _counter(attribute, text, ("model", label), found)
    for attribute, text in (
        ("deadline_misses", "Calls without an answer inside their deadline."),
        ("retries", "Replicas asked beyond the first: retries and hedges."),
    ):
        yield _counter(
            attribute, text, ("model",), {(name,): getattr(tally, attribute) for name, tally in models.items()}
        )


def _counter(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, int]) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(name: str, text: str, models: Mapping[str, ModelTally], attribute: str) -> Metric:
    family: Metric = _family_of_histograms(name, text, ("model",))
    for model, tally in models.items():
        _add(family, (model,), getattr(tally, attribute))
    return family


def _family_of_histograms(name: str, text: str, labels: tuple[str, ...]) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    return HistogramMetricFamily(PREFIX + name, text, labels=labels)


def _add(family: Any, labels: tuple[str, ...], histogram: Histogram) -> None:
    if any(histogram.counts):
        # A histogram of values below zero has no sum in OpenMetrics.
        signed = histogram.bounds[0] < 0
        family.add_metric(labels, buckets=histogram.cumulative(), sum_value=None if signed else histogram.total)
