"""Alerts on what the servers say: queue, errors, versions, traffic, memory, restarts, certificates."""

from __future__ import annotations

from functools import partial

from monitoring.rules.rule import Alert, Group, duration, number
from monitoring.rules.series import OK, PENDING, SERVER, Series
from tickserve.config import MonitoringSettings
from tickserve.config.monitoring import WEEK

MEGABYTE = 1_000_000


def server_alerts(settings: MonitoringSettings) -> Group:
    """Every alert on the servers."""
    return Group(
        "tickserve-servers",
        [
            *_reachable(settings),
            _no_traffic(settings),
            *_queue(settings),
            _errors(settings),
            _skew(settings),
            _memory(settings),
            _restarts(settings),
            _certificate(settings),
        ],
    )


def _reachable(settings: MonitoringSettings) -> list[Alert]:
    alert = partial(Alert, severity="critical", after_s=settings.page_after_s)
    return [
        alert(
            alert="TickserveServerDown",
            expr=f'up{{job=~"{settings.server_jobs}"}} == 0',
            summary="{{ $labels.instance }} of {{ $labels.job }} does not answer",
            description="Prometheus could not scrape it: it has ended, hangs, or cannot be reached.",
            keys=("server_jobs", "page_after_s"),
        ),
        alert(
            alert="TickserveServerAbsent",
            expr=f"absent({Series(settings).served(OK)})",
            summary="No server reports a model",
            description="No target reports a served model: nothing is deployed, loaded or scraped.",
            keys=("server_jobs", "page_after_s"),
        ),
    ]


def in_session(settings: MonitoringSettings) -> str:
    """An expression with one sample during the session and none outside it; all times are UTC."""
    opens, closes = (_minutes(text) for text in (settings.session_open, settings.session_close))
    days = " or ".join(f"day_of_week() == {WEEK.index(day)}" for day in settings.session_days)
    hours = "" if (opens, closes) == (0, 1_440) else _hours(opens, closes)
    return f"({days}){hours}" if len(set(settings.session_days)) < len(WEEK) else hours.removeprefix(" and ")


def in_session_only(settings: MonitoringSettings) -> str:
    """What makes an expression silent outside the session."""
    session = in_session(settings)
    return f"\nand on () ({session})" if session else ""


def _hours(opens: int, closes: int) -> str:
    now = "hour() * 60 + minute()"
    return f" and ({now} >= {opens}) and ({now} < {closes})"


def _minutes(text: str) -> int:
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)


def _no_traffic(settings: MonitoringSettings) -> Alert:
    window = duration(settings.no_traffic_s)
    return Alert(
        alert="TickserveNoTraffic",
        severity="critical",
        expr=f"sum by ({SERVER}) (increase({Series(settings).served(OK)}[{window}])) == 0{in_session_only(settings)}",
        after_s=settings.page_after_s,
        summary="Nobody asks {{ $labels.model }} in session",
        description=f"No request was answered for {window}: the engines or their feed stand still.",
        keys=("no_traffic_s", "session_days", "session_open", "session_close", "page_after_s"),
    )


def _queue(settings: MonitoringSettings) -> list[Alert]:
    series = Series(settings)
    return [
        Alert(
            alert="TickserveQueueGrows",
            severity="critical",
            # The least of the window: a burst that is worked off is no queue that grows.
            expr=f"sum by ({SERVER}) (min_over_time({series.served(PENDING)}[{series.queue_window}]))"
            f" > {number(settings.pending_requests)}",
            after_s=settings.page_after_s,
            summary="Requests for {{ $labels.model }} pile up",
            description=f"At least {{{{ $value }}}} requests waited at any time, over {series.queue_window}.",
            keys=("pending_requests", "queue_window_s", "page_after_s"),
        ),
        Alert(
            alert="TickserveQueueTime",
            severity="warning",
            expr=f"{series.queue_seconds} > {number(settings.queue_seconds)}",
            after_s=settings.page_after_s,
            summary="Requests for {{ $labels.model }} wait in the queue",
            description=f"{{{{ $value | humanizeDuration }}}} before a request is scored, over {series.queue_window}.",
            keys=("queue_seconds", "queue_window_s", "page_after_s"),
        ),
    ]


def _errors(settings: MonitoringSettings) -> Alert:
    series = Series(settings)
    return Alert(
        alert="TickserveServerErrors",
        severity="critical",
        expr=f"{series.share('server_error')} > {number(settings.error_ratio)}",
        after_s=settings.page_after_s,
        summary="The servers fail requests for {{ $labels.model }}",
        description=f"{{{{ $value | humanizePercentage }}}} of requests failed or were rejected, over {series.window}.",
        keys=("error_ratio", "window_s", "page_after_s"),
    )


def _skew(settings: MonitoringSettings) -> Alert:
    # By instance first: on a GPU each model has two series, one of them with a gpu_uuid.
    served = Series(settings).served(OK)
    loaded = f"count by ({SERVER}, version) (count by ({SERVER}, version, instance) ({served}))"
    replicas = f"count by ({SERVER}) (count by ({SERVER}, instance) ({served}))"
    return Alert(
        alert="TickserveVersionSkew",
        severity="warning",
        expr=f"{loaded}\n!= on ({SERVER}) group_left () {replicas}",
        after_s=settings.skew_s,
        summary="Replicas serve different versions of {{ $labels.model }}",
        description="Version {{ $labels.version }} is loaded by {{ $value }} of the replicas and not by all.",
        keys=("skew_s",),
    )


def _memory(settings: MonitoringSettings) -> Alert:
    series, window, half = Series(settings), settings.memory_window_s, settings.memory_window_s / 2
    growth = f"deriv({series.memory}[{duration(window)}]) * {number(window)}"
    before = f"max_over_time({series.memory}[{duration(half)}] offset {duration(half)})"
    return Alert(
        alert="TickserveMemoryGrows",
        severity="warning",
        # Growth by a straight line, and now above all of the first half: a sawtooth is no leak.
        expr=f"{growth} > {number(settings.memory_growth_mb * MEGABYTE)}\nand {series.memory} > {before}",
        after_s=settings.page_after_s,
        summary="{{ or $labels.pod $labels.instance }} takes more and more memory",
        description=f"{{{{ $value | humanize1024 }}}}B more over {duration(window)}, and still rising.",
        keys=("memory_window_s", "memory_growth_mb", "server_jobs", "server_pods", "page_after_s"),
    )


def _restarts(settings: MonitoringSettings) -> Alert:
    window, served = duration(settings.restart_window_s), Series(settings).served(OK)
    return Alert(
        alert="TickserveRestarts",
        severity="warning",
        # Counters that begin anew tell of a restart where kube-state-metrics is not there to count it.
        expr=f"max by (namespace, job, instance) (resets({served}[{window}])) > {settings.restarts}\n"
        "or max by (namespace, pod, container)"
        f' (increase(kube_pod_container_status_restarts_total{{pod=~"{settings.server_pods}"}}[{window}]))'
        f" > {settings.restarts}",
        after_s=0,
        summary="{{ or $labels.pod $labels.instance }} restarts again and again",
        description=f"{{{{ $value | humanize }}}} restarts within {window}.",
        keys=("restarts", "restart_window_s", "server_pods"),
    )


def _certificate(settings: MonitoringSettings) -> Alert:
    return Alert(
        alert="TickserveCertificateExpires",
        severity="warning",
        # Triton does not report its certificate: a blackbox probe of its port does, or cert-manager.
        expr=f'(probe_ssl_earliest_cert_expiry{{job=~"{settings.server_jobs}"}}\n'
        f'or certmanager_certificate_expiration_timestamp_seconds{{name=~"{settings.server_jobs}"}})\n'
        f"- time() < {number(settings.certificate_days * 86_400)}",
        after_s=settings.page_after_s,
        summary="The certificate of {{ or $labels.name $labels.instance }} expires",
        description="It holds {{ $value | humanizeDuration }} more; after that every TLS call fails.",
        keys=("certificate_days", "server_jobs", "page_after_s"),
    )
