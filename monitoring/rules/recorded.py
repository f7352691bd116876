"""What is recorded: shares, rates and quantiles that alerts and dashboards ask for again and again."""

from __future__ import annotations

from collections.abc import Iterator

from monitoring.rules.rule import Group, Recording, duration
from monitoring.rules.series import (
    CALLS,
    CLIENT,
    ERRORS,
    FAILED,
    FALLBACKS,
    LATE,
    MISSES,
    OK,
    PENDING,
    QUANTILES,
    REJECTED,
    SERVER,
    Series,
    share,
)
from tickserve.config import MonitoringSettings

HISTOGRAMS = {
    "client_call_seconds": ("tickserve_client_call_seconds_bucket", CLIENT),
    "client_stage_seconds": ("tickserve_client_stage_seconds_bucket", f"{CLIENT}, stage"),
    "event_age_seconds": ("tickserve_client_event_age_seconds_bucket", CLIENT),
}


def recorded_group(settings: MonitoringSettings) -> Group:
    """The recording rules."""
    series = Series(settings)
    rules = (*_shares(series), *_rates(series), *_quantiles(series), *_servers(series, settings))
    return Group("tickserve-recorded", rules)


def _shares(series: Series) -> Iterator[Recording]:
    for seconds in series.windows:
        yield Recording(series.misses(seconds), share(MISSES, CALLS, CLIENT, duration(seconds)))
    for of, part in (
        ("stale", f'{CALLS}{{status="STALE"}}'),
        # Flat because of drift is the desk's own rule, and has an alert of its own.
        ("fallback", f'{FALLBACKS}{{fallback!="drift"}}'),
        ("client_error", f'{ERRORS}{{error!~"{LATE}|{REJECTED}"}}'),
        ("rejected_input", f'{ERRORS}{{error="{REJECTED}"}}'),
    ):
        yield Recording(series.share(of), share(part, CALLS, CLIENT, series.window))
    # A cancelled request is its caller's doing.
    counted = series.served(FAILED, 'reason!="CANCELED"')
    failed = f"sum by ({SERVER}) (rate({counted}[{series.window}]))"
    yield Recording(
        series.share("server_error"),
        f"{failed}\n/ (sum by ({SERVER}) (rate({series.served(OK)}[{series.window}])) + {failed})",
    )


def _rates(series: Series) -> Iterator[Recording]:
    for of, metric, by in (
        ("calls", CALLS, CLIENT),
        ("requests", series.served(OK), SERVER),
        ("rows", series.served("nv_inference_count"), SERVER),
        ("executions", series.served("nv_inference_exec_count"), SERVER),
    ):
        yield Recording(series.rate(of), f"sum by ({by}) (rate({metric}[{series.window}]))")


def _quantiles(series: Series) -> Iterator[Recording]:
    for of, (metric, by) in HISTOGRAMS.items():
        for name, value in QUANTILES.items():
            expr = f"histogram_quantile({value}, sum by ({by}, le) (rate({metric}[{series.window}])))"
            yield Recording(series.quantile(of, name), expr)


def _servers(series: Series, settings: MonitoringSettings) -> Iterator[Recording]:
    window = series.queue_window
    yield Recording(
        series.queue_seconds,
        f"sum by ({SERVER}) (rate({series.served('nv_inference_queue_duration_us')}[{window}])) / 1e6\n"
        f"/ (sum by ({SERVER}) (rate({series.served(OK)}[{window}])) > 0)",
    )
    yield Recording(series.pending, f"sum by ({SERVER}) ({series.served(PENDING)})")
    jobs, pods = settings.server_jobs, settings.server_pods
    yield Recording(
        series.memory,
        "max by (namespace, pod, container)"
        f' (container_memory_working_set_bytes{{pod=~"{pods}", container!="", container!="POD"}})\n'
        f'or max by (namespace, job, instance) (process_resident_memory_bytes{{job=~"{jobs}"}})',
    )
