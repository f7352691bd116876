"""Whether a model's scores are a reason to use it: the gate of validation, answered in every trained manifest.

It asks for what luck does not give: a ranking better than every baseline's, an information coefficient whose interval
lies above 0 and whose probability holds after all that was tried, and enough independent rows behind it. It does not
ask for a profit: that depends on costs that the engine knows better (`pnl_bps_by_fees` in the report). A line that
cannot be judged for want of rows is not passed. The numbers that it judges by are kept beside the answer, and export
judges them again under its own limits: a manifest's word for having passed is not enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tickserve.config import ValidationSettings
from tickserve.errors import ArtifactError, GateRefusedError
from tickserve.manifest import Manifest

NO_RECORD = "no record of the gate"
TOO_FEW = "too few independent rows"
Interval = tuple[float, float]


class Evidence(BaseModel):
    """What the gate judges by: the comparison with the best baseline, the IC and what is behind it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    outcome: Literal["better", "none", "worse"]
    words: str = Field(max_length=200)
    baseline: str = Field(max_length=100)
    ic_difference: float
    ic_difference_95: Interval | None
    ic: float | None
    ic_95: Interval | None
    n_eff: float = Field(ge=0)
    trials: int = Field(ge=1)
    ic_probability: float | None = Field(ge=0, le=1)

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Evidence:
        """From a report's `comparison`, `deflation` and `pooled`, as `training.walk` writes them."""
        model, compared, deflated = report["pooled"]["model"], report["comparison"], report["deflation"]
        names = ("outcome", "words", "baseline", "ic_difference", "ic_difference_95")
        return cls(
            **{name: compared[name] for name in names},
            ic=model["ic"],
            ic_95=model["interval"]["ic"],
            n_eff=model["n_eff"],
            trials=deflated["trials"],
            ic_probability=deflated["ic_probability"],
        )


def judged(evidence: Evidence, settings: ValidationSettings) -> dict[str, Any]:
    """The report's and the manifest's `gate`: `passed`, a reason for each line, met or not, and the evidence."""
    lines = [
        _baselines(evidence),
        _interval(evidence),
        _probability(evidence, settings),
        _rows(evidence, settings),
    ]
    passed = all(line["passed"] for line in lines)
    return {"passed": passed, "reasons": lines, "evidence": evidence.model_dump(mode="json")}


def _line(name: str, passed: bool, expected: str, was: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "expected": expected, "was": was}


def _shown(span: Interval | None) -> str:
    return TOO_FEW if span is None else f"95 % interval {span[0]:+.3f} to {span[1]:+.3f}"


def _baselines(found: Evidence) -> dict[str, Any]:
    span = found.ic_difference_95
    passed = found.outcome == "better" and span is not None and span[0] > 0
    was = f"{found.words}: IC {found.ic_difference:+.3f} from that of {found.baseline} ({_shown(span)})"
    return _line("baselines", passed, "better than every baseline out of sample", was)


def _interval(found: Evidence) -> dict[str, Any]:
    passed = found.ic_95 is not None and found.ic_95[0] > 0
    was = "no IC: it ranks in no fold" if found.ic is None else f"IC {found.ic:+.3f} ({_shown(found.ic_95)})"
    return _line("ic_interval", passed, "an IC whose interval lies above 0", was)


def _probability(found: Evidence, settings: ValidationSettings) -> dict[str, Any]:
    share, wanted, trials = found.ic_probability, settings.min_deflated_probability, found.trials
    of = f"of {trials:,} {'trial' if trials == 1 else 'trials'}"
    expected = f"a deflated probability of the IC of at least {wanted:g}"
    was = "none: no IC" if share is None else f"{share:.3f} as the best {of}"
    return _line("deflated_probability", share is not None and share >= wanted, expected, was)


def _rows(found: Evidence, settings: ValidationSettings) -> dict[str, Any]:
    wanted = settings.min_effective_rows
    expected = f"at least {wanted:,} effective rows out of sample"
    return _line("effective_rows", found.n_eff >= wanted, expected, f"{found.n_eff:,.0f}")


def sentence(gate: Mapping[str, Any]) -> str:
    """The gate's answer in one line: passed, or every line that was not met."""
    return f"validation gate: NOT PASSED: {missed(gate)}" if not gate["passed"] else "validation gate: passed"


def missed(gate: Mapping[str, Any]) -> str:
    """Every line that was not met."""
    lines = [line for line in gate["reasons"] if not line["passed"]]
    return "; ".join(f"expected {line['expected']}, was {line['was']}" for line in lines)


def refuse_ungated(manifests: Sequence[Manifest], settings: ValidationSettings) -> None:
    """Raise GateRefusedError naming every model that does not pass by its own evidence and these settings, and why.

    Raises ArtifactError for a record that is none, or that says otherwise than its evidence. A child without scores of
    its own carries its teacher's.
    """
    refused = {each.name: why for each in manifests if (why := _why_not(each, settings))}
    if refused:
        raise GateRefusedError(
            "refused, and nothing published",
            field="--require-gate",
            expected="models that passed the validation gate",
            was="; ".join(f"{name}: {why}" for name, why in refused.items()),
            hint="train on more data, or export without it",
            counterexample={"refused": refused},
        )


def _why_not(manifest: Manifest, settings: ValidationSettings) -> str:
    """Nothing for a gate that is passed."""
    recorded = manifest.metrics.get("gate")
    if recorded is None:
        return NO_RECORD
    evidence = _evidence(manifest, recorded)
    found = judged(evidence, settings)
    if found["passed"] and recorded.get("passed") is not True:
        return "not passed under the limits of its training"
    return "" if found["passed"] else f"not passed ({missed(found)})"


def _evidence(manifest: Manifest, recorded: Any) -> Evidence:
    """The evidence in a manifest. Raises ArtifactError when it is none, or not what the manifest's own scores say."""
    try:
        evidence = Evidence.model_validate(recorded["evidence"])
        own = Evidence.of(manifest.metrics) if "pooled" in manifest.metrics else evidence
    except (TypeError, KeyError, ValidationError) as error:
        raise ArtifactError(
            "an unreadable record of the validation gate",
            field=f"{manifest.name}: metrics.gate",
            expected="the answer with the evidence it was given on",
            was=str(recorded)[:80],
            hint="train it again",
        ) from error
    if own != evidence:
        raise ArtifactError(
            "the gate's evidence is not what the manifest's scores say", field=f"{manifest.name}: metrics.gate.evidence"
        )
    return evidence
