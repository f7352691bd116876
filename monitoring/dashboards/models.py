"""Models: what they say, on what inputs, and whether that is still what they were trained for."""

from __future__ import annotations

from monitoring.dashboards.panel import Dashboard, Panel, Query
from monitoring.dashboards.variables import HERE, INTERVAL, OF_MODEL
from monitoring.rules.series import QUANTILES, Series
from tickserve.config import MonitoringSettings


def models(settings: MonitoringSettings) -> Dashboard:
    """The page of whoever trained the model."""
    series = Series(settings)
    return Dashboard(
        uid="tickserve-models",
        title="Tickserve: models",
        about="Signals, drift, calibration and the age of inputs.",
        variables=OF_MODEL,
        rows={
            "Signals": _signals(),
            "Inputs": _inputs(series, settings),
            "Drift and calibration": _drift(settings),
        },
    )


def _signals() -> list[Panel]:
    return [
        Panel(
            "Scores",
            "How often each score is given, from -1 (down) to 1 (up).",
            [Query(f"sum by (le) (increase(tickserve_client_score_bucket{{{HERE}}}[{INTERVAL}]))", "{{le}}")],
            kind="heatmap",
            minimum=None,
        ),
        Panel(
            "Score quantiles",
            "A median away from 0 is a position that the model always wants.",
            [
                Query(
                    f"histogram_quantile({value}, sum by (model, le)"
                    f" (rate(tickserve_client_score_bucket{{{HERE}}}[{INTERVAL}])))",
                    f"{{{{model}}}} p{value * 100:g}",
                )
                for value in (0.1, 0.5, 0.9)
            ],
            minimum=None,
        ),
        Panel(
            "Decisions",
            "Share of down, flat and up.",
            [
                Query(
                    f"sum by (model, decision) (rate(tickserve_client_decisions_total{{{HERE}}}[{INTERVAL}]))"
                    " / on (model) group_left ()"
                    f" sum by (model) (rate(tickserve_client_decisions_total{{{HERE}}}[{INTERVAL}]))",
                    "{{model}} {{decision}}",
                )
            ],
            unit="percentunit",
        ),
    ]


def _inputs(series: Series, settings: MonitoringSettings) -> list[Panel]:
    return [
        Panel(
            "Age of the newest event",
            "When a call begins, as the engines see it.",
            [
                Query(f"{series.quantile('event_age_seconds', name)}{{{HERE}}}", f"{{{{model}}}} {name}")
                for name in QUANTILES
            ],
            unit="s",
            limit=settings.event_age_s,
        ),
        Panel(
            "Age of the features",
            "As the journal has it.",
            [Query(f"tickserve_feature_age_seconds{{{HERE}}}", "{{model}} {{quantile}}")],
            unit="s",
        ),
        Panel(
            "Stale",
            "Share of calls whose newest event was too old for a number.",
            [Query(f"{series.share('stale')}{{{HERE}}}", "{{model}}")],
            unit="percentunit",
            limit=settings.stale_ratio,
        ),
        Panel(
            "Fallback",
            "Share of calls that the fallback answered; without those that drift turned flat.",
            [Query(f"{series.share('fallback')}{{{HERE}}}", "{{model}}")],
            unit="percentunit",
            limit=settings.fallback_ratio,
        ),
        Panel(
            "Fallbacks by name",
            "Which fallback answered.",
            [
                Query(
                    f"sum by (model, fallback) (rate(tickserve_client_fallbacks_total{{{HERE}}}[{INTERVAL}]))",
                    "{{model}} {{fallback}}",
                )
            ],
            unit="reqps",
        ),
        Panel(
            "Flags",
            "Answers that carry a flag, such as out_of_range.",
            [
                Query(
                    f"sum by (model, flag) (rate(tickserve_client_flags_total{{{HERE}}}[{INTERVAL}]))",
                    "{{model}} {{flag}}",
                )
            ],
            unit="reqps",
        ),
    ]


def _drift(settings: MonitoringSettings) -> list[Panel]:
    return [
        Panel(
            "Drift",
            "Population stability index of the feature that drifts most, against the training data.",
            [Query(f"tickserve_drift_psi_max{{{HERE}}}", "{{model}} version {{version}}")],
            limit=settings.psi,
        ),
        Panel(
            "Features that drift most",
            "Population stability index of the ten largest; score is the model's own score.",
            [Query(f"topk(10, tickserve_drift_psi{{{HERE}}})", "{{model}} {{feature}}")],
            kind="bargauge",
            limit=settings.psi,
        ),
        Panel(
            "Drift action",
            "What the clients do about drift now: 1 is in force.",
            [Query(f"tickserve_drift_action{{{HERE}}}", "{{model}} {{action}}")],
        ),
        Panel(
            "Calibration error",
            "Expected calibration error of decisions whose outcome is known.",
            [Query(f"tickserve_calibration_error{{{HERE}}}", "{{model}} version {{version}}")],
            unit="percentunit",
            limit=settings.calibration_error,
        ),
        Panel(
            "Calibration",
            "Predicted and realised share of each bin; a calibrated model has them equal.",
            [Query(f"tickserve_calibration_bin_ratio{{{HERE}}}", "{{model}} {{bin}} {{kind}}")],
            unit="percentunit",
            kind="bargauge",
        ),
        Panel(
            "Journal",
            "Records read, by how the call ended.",
            [
                Query(
                    f"sum by (model, status) (rate(tickserve_journal_records_total{{{HERE}}}[{INTERVAL}]))",
                    "{{model}} {{status}}",
                )
            ],
            unit="ops",
        ),
    ]
