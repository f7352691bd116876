"""Serving: is every call answered in time, and where does its time go?"""

from __future__ import annotations

from monitoring.dashboards.panel import Dashboard, Panel, Query
from monitoring.dashboards.variables import HERE, INTERVAL, OF_SERVER, SERVED
from monitoring.rules.rule import duration
from monitoring.rules.series import OK, QUANTILES, Series
from tickserve.config import MonitoringSettings

LABELS = {"p50": "p50", "p99": "p99", "p999": "p99.9"}
# Recorded by the chart, from its values `slo`.
PROMISED, BY_JOB = "tickserve:slo", 'namespace=~"$namespace", job=~"$job"'
SERVER_STAGES = ("queue", "compute_input", "compute_infer", "compute_output")


def serving(settings: MonitoringSettings) -> Dashboard:
    """The page an operator opens first."""
    series = Series(settings)
    return Dashboard(
        uid="tickserve-serving",
        title="Tickserve: serving",
        about="Calls of the engines and what the servers did with them.",
        variables=OF_SERVER,
        rows={
            "Calls, as the engines see them": _calls(series, settings),
            "Time by stage, as the engines see it": [_stage(series, name) for name in QUANTILES],
            "Servers": _servers(series, settings),
            "Versions and alerts": _versions(),
        },
    )


def _calls(series: Series, settings: MonitoringSettings) -> list[Panel]:
    budget = 1 - settings.slo_objective
    long = settings.burn_long_s
    return [
        Panel(
            "Calls",
            "Calls a second, whatever they ended with.",
            [Query(f"{series.rate('calls')}{{{HERE}}}", "{{model}}")],
            unit="reqps",
        ),
        Panel(
            "Time of a call",
            "From the call to its answer or its error, in the engine's process; and what the chart promised.",
            [
                *(
                    Query(f"{series.quantile('client_call_seconds', name)}{{{HERE}}}", f"{{{{model}}}} {label}")
                    for name, label in LABELS.items()
                ),
                Query(f"{PROMISED}:deadline_seconds{{{BY_JOB}}}", "promised by {{job}}"),
            ],
            unit="s",
        ),
        Panel(
            "Deadline misses",
            "Share of calls that missed their deadline. The line is what the objective of the alerts allows.",
            [
                Query(f"{series.misses(settings.window_s)}{{{HERE}}}", "{{model}}"),
                Query(f"1 - {PROMISED}:objective{{{BY_JOB}}}", "promised by {{job}}"),
            ],
            unit="percentunit",
            limit=round(budget, 12),
        ),
        Panel(
            "Error budget",
            "How many times too fast the budget of deadline misses goes; 1 spends all of it in its period.",
            [
                Query(f"{series.misses(seconds)}{{{HERE}}} / {budget:.12g}", f"{{{{model}}}} {duration(seconds)}")
                for seconds in long
            ],
            limit=settings.burn_factors[0],
        ),
        Panel(
            "How calls end",
            "OK, or why there was no number of the model.",
            [
                Query(
                    f"sum by (status) (rate(tickserve_client_calls_total{{{HERE}}}[{INTERVAL}]))",
                    "{{status}}",
                )
            ],
            unit="reqps",
        ),
        Panel(
            "Errors and retries",
            "Errors by type, and calls that were sent again.",
            [
                Query(f"sum by (error) (rate(tickserve_client_errors_total{{{HERE}}}[{INTERVAL}]))", "{{error}}"),
                Query(f"sum (rate(tickserve_client_retries_total{{{HERE}}}[{INTERVAL}]))", "retries"),
            ],
            unit="reqps",
        ),
    ]


def _stage(series: Series, name: str) -> Panel:
    return Panel(
        f"{LABELS[name]} of each stage",
        "features, check, wire, queue, compute and decode of a call.",
        [Query(f"{series.quantile('client_stage_seconds', name)}{{{HERE}}}", "{{model}} {{stage}}")],
        unit="s",
    )


def _servers(series: Series, settings: MonitoringSettings) -> list[Panel]:
    done = f"sum (rate({OK}{{{SERVED}}}[{INTERVAL}]))"
    return [
        Panel(
            "Throughput",
            "Requests and rows a second.",
            [
                Query(f"{series.rate('requests')}{{{SERVED}}}", "{{model}} requests"),
                Query(f"{series.rate('rows')}{{{SERVED}}}", "{{model}} rows"),
            ],
            unit="ops",
        ),
        Panel(
            "Rows of a batch",
            "Mean rows that one execution scored; Triton counts no other figure of batch sizes.",
            [Query(f"{series.rate('rows')}{{{SERVED}}} / {series.rate('executions')}{{{SERVED}}}", "{{model}}")],
        ),
        Panel(
            "Requests that wait",
            "In all servers together.",
            [Query(f"{series.pending}{{{SERVED}}}", "{{model}}")],
            limit=settings.pending_requests,
        ),
        Panel(
            "Wait in the queue",
            "Mean of a request: the figure that scales the servers.",
            [Query(f"{series.queue_seconds}{{{SERVED}}}", "{{model}}")],
            unit="s",
            limit=settings.queue_seconds,
        ),
        Panel(
            "Time in the server",
            "Mean of a request, stage by stage.",
            [
                Query(
                    f"sum (rate(nv_inference_{stage}_duration_us{{{SERVED}}}[{INTERVAL}])) / 1e6 / {done}",
                    stage.replace("_", " "),
                )
                for stage in SERVER_STAGES
            ],
            unit="s",
        ),
        Panel(
            "Failed requests",
            "As the server counts them, by reason.",
            [
                Query(
                    f"sum by (model, reason) (rate(nv_inference_request_failure{{{SERVED}}}[{INTERVAL}]))",
                    "{{model}} {{reason}}",
                )
            ],
            unit="reqps",
        ),
    ]


def _versions() -> list[Panel]:
    return [
        Panel(
            "Versions loaded",
            "How many replicas have each version.",
            [
                Query(
                    f"count by (model, version) (count by (model, version, instance) ({OK}{{{SERVED}}}))",
                    "{{model}} {{version}}",
                )
            ],
            kind="table",
        ),
        Panel(
            "Versions asked for",
            "How many engines hold each version.",
            [
                Query(
                    f"count by (model, version, bundle_digest) (tickserve_client_model_info{{{HERE}}} == 1)",
                    "{{model}} {{version}}",
                )
            ],
            kind="table",
        ),
        Panel(
            "Alerts that fire",
            "Each has a page in docs/runbooks.",
            [
                Query(
                    'count by (alertname, severity) (ALERTS{alertname=~"Tickserve.+", alertstate="firing"})',
                    "{{alertname}}",
                )
            ],
            kind="table",
        ),
    ]
