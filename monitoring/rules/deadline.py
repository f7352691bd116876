"""The deadline's error budget: alerts when it goes too fast, over a long window and still over a short one.

The pairs of windows and factors are those of Google's SRE workbook (chapter 5, "Alerting on SLOs"): 14.4 times too fast
spends 2 % of a month's budget in an hour, 6 times 5 % in six hours, 1 times 10 % in three days.
"""

from __future__ import annotations

from monitoring.rules.rule import Alert, Group, Severity, duration, number
from monitoring.rules.series import CLIENT, MISSES, Series
from tickserve.config import MonitoringSettings

SPEEDS: tuple[tuple[str, Severity], ...] = (("Fast", "critical"), ("Steady", "critical"), ("Slow", "warning"))


def deadline_alerts(settings: MonitoringSettings) -> Group:
    """One alert for each pair of windows."""
    # The chart refuses another slo.objective beside these limits.
    note = f"slo_objective = {number(settings.slo_objective)}"
    return Group("tickserve-deadline", [_burns(settings, index) for index in range(len(SPEEDS))], note)


def _burns(settings: MonitoringSettings, index: int) -> Alert:
    series, (speed, severity) = Series(settings), SPEEDS[index]
    factor, long, short = (
        values[index] for values in (settings.burn_factors, settings.burn_long_s, settings.burn_short_s)
    )
    # The burnt share a page is about: written out, since an expression is read at night.
    limit = number(factor * (1 - settings.slo_objective))
    return Alert(
        alert=f"TickserveDeadlineBurn{speed}",
        severity=severity,
        # A share of few calls says little: one miss of ten is a tenth.
        expr=f"{series.misses(long)} > {limit}\nand {series.misses(short)} > {limit}\n"
        f"and sum by ({CLIENT}) (increase({MISSES}[{duration(short)}])) > {number(settings.burn_misses)}",
        # The short window is what holds a passing moment back.
        after_s=0,
        summary=f"{{{{ $labels.model }}}} misses deadlines at {factor:g} times the rate its budget allows",
        description=(
            f"{{{{ $value | humanizePercentage }}}} of calls missed their deadline over {duration(long)}, and more"
            f" than {float(limit):.2%} still do over {duration(short)};"
            f" the objective allows {1 - settings.slo_objective:.2%}."
        ),
        keys=("slo_objective", "burn_factors", "burn_long_s", "burn_short_s", "burn_misses"),
    )
