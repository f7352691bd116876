"""Trading: were the calls right, and what were they worth?"""

from __future__ import annotations

from monitoring.dashboards.panel import Dashboard, Panel, Query
from monitoring.dashboards.variables import HERE, INTERVAL, OF_MODEL
from tickserve.config import MonitoringSettings

BY_VERSION = "{{model}} version {{version}}"


def trading(settings: MonitoringSettings) -> Dashboard:
    """The page of the desk."""
    return Dashboard(
        uid="tickserve-trading",
        title="Tickserve: trading",
        about="Right calls, profit and loss, and turnover, from the journal and its outcomes.",
        variables=OF_MODEL,
        rows={"Right calls": _hits(settings), "Profit and loss": _money()},
    )


def _hits(settings: MonitoringSettings) -> list[Panel]:
    return [
        Panel(
            "Hit rate",
            "Share of right calls among those whose outcome is known.",
            [Query(f"tickserve_trading_hit_ratio{{{HERE}}}", BY_VERSION)],
            unit="percentunit",
            limit=settings.hit_ratio,
            bad="below",
        ),
        Panel(
            "Outcomes",
            "Calls whose outcome is known; a hit rate of few says little.",
            [Query(f"tickserve_trading_outcomes_total{{{HERE}}}", BY_VERSION)],
        ),
        Panel(
            "Decisions to trade",
            "Calls up and down a second.",
            [
                Query(
                    "sum by (model, decision)"
                    f' (rate(tickserve_client_decisions_total{{{HERE}, decision!="flat"}}[{INTERVAL}]))',
                    "{{model}} {{decision}}",
                )
            ],
            unit="ops",
        ),
    ]


def _money() -> list[Panel]:
    return [
        Panel(
            "Profit and loss",
            "Basis points, summed since the journal began to be read.",
            [Query(f"tickserve_trading_pnl_bp_total{{{HERE}}}", BY_VERSION)],
            minimum=None,
        ),
        Panel(
            "Profit and loss of a trade",
            "Basis points for each unit of turnover.",
            [
                Query(
                    f"tickserve_trading_pnl_bp_total{{{HERE}}} / (tickserve_trading_turnover_total{{{HERE}}} > 0)",
                    BY_VERSION,
                )
            ],
            minimum=None,
        ),
        Panel(
            "Turnover",
            "Positions changed, summed since the journal began to be read.",
            [Query(f"tickserve_trading_turnover_total{{{HERE}}}", BY_VERSION)],
        ),
    ]
