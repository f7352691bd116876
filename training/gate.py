"""Whether a model's scores are a reason to use it: the gate of validation, answered in every trained manifest.

It asks for what luck does not give: a ranking better than every baseline's, an information coefficient whose interval
lies above 0 and whose probability holds after all that was tried, and enough independent rows behind it. It does not
ask for a profit: that depends on costs that the engine knows better (see `pnl_bps_by_fees`). A line that cannot be
judged for want of rows is not passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tickserve.config import ValidationSettings
from tickserve.errors import GateRefusedError
from training.intervals import TOO_FEW


def gate_of(report: Mapping[str, Any], settings: ValidationSettings) -> dict[str, Any]:
    """The report's and the manifest's `gate`: `passed`, and a reason for each line, met or not.

    `report` holds `comparison`, `deflation` and `pooled`, as `training.walk` writes them.
    """
    model = report["pooled"]["model"]
    lines = [
        _baselines(report["comparison"]),
        _interval(model),
        _probability(report["deflation"], settings),
        _rows(model, settings),
    ]
    return {"passed": all(line["passed"] for line in lines), "reasons": lines}


def _line(name: str, passed: bool, expected: str, was: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "expected": expected, "was": was}


def _baselines(comparison: Mapping[str, Any]) -> dict[str, Any]:
    span = comparison["ic_difference_95"]
    shown = TOO_FEW if span is None else f"95 % interval {span[0]:+.3f} to {span[1]:+.3f}"
    was = (
        f"{comparison['words']}: IC {comparison['ic_difference']:+.3f} from that of {comparison['baseline']} ({shown})"
    )
    return _line("baselines", comparison["outcome"] == "better", "better than every baseline out of sample", was)


def _interval(model: Mapping[str, Any]) -> dict[str, Any]:
    span = model["interval"]["ic"]
    passed = span is not None and span[0] > 0
    if model["ic"] is None:
        was = "no IC: it ranks in no fold"
    else:
        shown = TOO_FEW if span is None else f"95 % interval {span[0]:+.3f} to {span[1]:+.3f}"
        was = f"IC {model['ic']:+.3f} ({shown})"
    return _line("ic_interval", passed, "an IC whose interval lies above 0", was)


def _probability(deflation: Mapping[str, Any], settings: ValidationSettings) -> dict[str, Any]:
    found, wanted, trials = deflation["ic_probability"], settings.min_deflated_probability, deflation["trials"]
    of = f"of {trials:,} {'trial' if trials == 1 else 'trials'}"
    expected = f"a deflated probability of the IC of at least {wanted:g}"
    was = "none: no IC" if found is None else f"{found:.3f} as the best {of}"
    return _line("deflated_probability", found is not None and found >= wanted, expected, was)


def _rows(model: Mapping[str, Any], settings: ValidationSettings) -> dict[str, Any]:
    wanted = settings.min_effective_rows
    expected = f"at least {wanted:,} effective rows out of sample"
    return _line("effective_rows", model["n_eff"] >= wanted, expected, f"{model['n_eff']:,.0f}")


def sentence(gate: Mapping[str, Any]) -> str:
    """The gate's answer in one line: passed, or every line that was not met."""
    if gate["passed"]:
        return "validation gate: passed"
    missed = [f"expected {line['expected']}, was {line['was']}" for line in gate["reasons"] if not line["passed"]]
    return f"validation gate: NOT PASSED: {'; '.join(missed)}"


def refuse_models(refused: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise GateRefusedError for models by name, with the `gate` of each; nothing where there are none."""
    if not refused:
        return
    what = "; ".join(f"{name}: {sentence(gate)}" for name, gate in refused.items())
    raise GateRefusedError(
        f"refused, and no bundle written: {what}",
        field="--require-gate",
        hint="train without it to keep the bundles, labelled so",
        counterexample={"gates": {name: dict(gate) for name, gate in refused.items()}},
    )
