"""Capacity: how much more the servers could take, and what they use."""

from __future__ import annotations

from monitoring.dashboards.panel import Dashboard, Panel, Query
from monitoring.dashboards.variables import INTERVAL, OF_SERVER, SERVED
from monitoring.rules.rule import duration
from monitoring.rules.series import OK, Series
from tickserve.config import MonitoringSettings

INSTANCE = "{{instance}}"
COMPUTE = ("compute_input", "compute_infer", "compute_output")


def capacity(settings: MonitoringSettings) -> Dashboard:
    """The page of whoever plans the machines."""
    series = Series(settings)
    return Dashboard(
        uid="tickserve-capacity",
        title="Tickserve: capacity",
        about="Replicas, their load, memory and restarts.",
        variables=OF_SERVER,
        rows={
            "Replicas": _replicas(settings),
            "What they use": _use(series, settings),
            "What watches them": _watchers(series, settings),
        },
    )


def _replicas(settings: MonitoringSettings) -> list[Panel]:
    served = 'namespace=~"$namespace", job=~"$job"'
    busy = " + ".join(f"rate(nv_inference_{stage}_duration_us{{{SERVED}}}[{INTERVAL}])" for stage in COMPUTE)
    return [
        Panel(
            "Replicas",
            "Servers that answer, and servers that do not.",
            [
                Query(f'count by (job) (up{{{served}, job=~"{settings.server_jobs}"}} == 1)', "{{job}} up"),
                Query(f'count by (job) (up{{{served}, job=~"{settings.server_jobs}"}} == 0)', "{{job}} down"),
            ],
        ),
        Panel(
            "Requests of each replica",
            "A second; uneven lines are connections that do not spread.",
            [Query(f"sum by (instance) (rate({OK}{{{SERVED}}}[{INTERVAL}]))", INSTANCE)],
            unit="reqps",
        ),
        Panel(
            "Busy instances",
            "Seconds of scoring a second: at the number of model instances a replica is full. A batch counts for each"
            " of its requests.",
            [Query(f"sum by (instance, model) ({busy}) / 1e6", "{{instance}} {{model}}")],
        ),
    ]


def _use(series: Series, settings: MonitoringSettings) -> list[Panel]:
    window = duration(settings.memory_window_s)
    return [
        Panel(
            "Memory",
            "Of each server's container, or of its process where no container is known.",
            [Query(f'{series.memory}{{namespace=~"$namespace"}}')],
            unit="bytes",
        ),
        Panel(
            "Memory growth",
            f"By a straight line over {window}.",
            [Query(f'deriv({series.memory}{{namespace=~"$namespace"}}[{window}]) * {settings.memory_window_s:g}')],
            unit="bytes",
            limit=settings.memory_growth_mb * 1_000_000,
            minimum=None,
        ),
        Panel(
            "Processor of the machine",
            "Share, as Triton sees it; 0 where the build does not measure it.",
            [Query('nv_cpu_utilization{namespace=~"$namespace", job=~"$job"}', INSTANCE)],
            unit="percentunit",
        ),
        Panel(
            "Restarts",
            f"Within {duration(settings.restart_window_s)}, by counters that began anew.",
            [
                Query(
                    f"max by (instance) (resets({OK}{{{SERVED}}}[{duration(settings.restart_window_s)}]))",
                    INSTANCE,
                )
            ],
            limit=settings.restarts + 1,
        ),
        Panel(
            "Restarts of containers",
            "As Kubernetes counts them, through kube-state-metrics.",
            [
                Query(
                    'sum by (pod, container) (kube_pod_container_status_restarts_total{namespace=~"$namespace",'
                    f' pod=~"{settings.server_pods}"}})',
                    "{{pod}} {{container}}",
                )
            ],
        ),
        Panel(
            "Certificates",
            "Time until each expires, through a blackbox probe or cert-manager.",
            [
                Query(
                    f'(probe_ssl_earliest_cert_expiry{{job=~"{settings.server_jobs}"}}'
                    f' or certmanager_certificate_expiration_timestamp_seconds{{name=~"{settings.server_jobs}"}})'
                    " - time()"
                )
            ],
            unit="s",
            limit=settings.certificate_days * 86_400,
            bad="below",
        ),
    ]


def _watchers(series: Series, settings: MonitoringSettings) -> list[Panel]:
    return [
        Panel(
            "Observations lost",
            "Calls that are missing from the clients' metrics.",
            [Query(f"sum by (instance) (increase(tickserve_client_lost_total[{series.window}]))", INSTANCE)],
            limit=1,
        ),
        Panel(
            "Age of the journal",
            "Of the newest record that was read.",
            [Query("tickserve_journal_lag_seconds", INSTANCE)],
            unit="s",
            limit=settings.journal_lag_s,
        ),
        Panel(
            "Scrapes",
            "Time that Prometheus took to read each target.",
            [Query('scrape_duration_seconds{namespace=~"$namespace"}', "{{job}} {{instance}}")],
            unit="s",
        ),
    ]
