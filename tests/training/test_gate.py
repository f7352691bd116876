"""The gate: noise is refused line by line, skill passes, and the answer is in every manifest, the children's too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.validation import sentence
from market.build import FeatureTable
from tests.training.conftest import COLUMNS, quick_config
from tickserve.config import ValidationSettings
from tickserve.errors import GateRefusedError
from tickserve.manifest import load_bundle
from training.examples import DataMeta
from training.gate import gate_of, refuse_models
from training.train import Demands, train_table

SETTINGS = ValidationSettings()


def report_of(**changes: Any) -> dict[str, Any]:
    """A report that passes, but for the changes."""
    known = {
        "outcome": "better", "difference": [0.01, 0.05], "ic": 0.1, "interval": [0.05, 0.15], "n_eff": 900.0,
        "trials": 1, "probability": 0.99,
    } | changes  # fmt: skip
    words = {"better": "better than every baseline"}.get(known["outcome"], "no clear difference from linear")
    return {
        "pooled": {"model": {"ic": known["ic"], "n_eff": known["n_eff"], "interval": {"ic": known["interval"]}}},
        "comparison": {
            "outcome": known["outcome"], "words": words, "baseline": "linear", "ic_difference": 0.03,
            "ic_difference_95": known["difference"],
        },
        "deflation": {"trials": known["trials"], "ic_probability": known["probability"]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "line", "words"),
    [
        ({"outcome": "none"}, "baselines", "no clear difference from linear: IC +0.030 from that of linear"),
        ({"outcome": "none", "difference": None}, "baselines", "(too few independent rows)"),
        ({"interval": [-0.01, 0.2]}, "ic_interval", "IC +0.100 (95 % interval -0.010 to +0.200)"),
        ({"interval": [0.0, 0.2]}, "ic_interval", "+0.000 to +0.200"),
        ({"interval": None}, "ic_interval", "IC +0.100 (too few independent rows)"),
        ({"ic": None, "interval": None}, "ic_interval", "no IC: it ranks in no fold"),
        ({"probability": 0.949, "trials": 40}, "deflated_probability", "0.949 as the best of 40 trials"),
        ({"probability": None}, "deflated_probability", "none: no IC"),
        ({"n_eff": 99.9}, "effective_rows", "100"),
        ({"n_eff": 42.0}, "effective_rows", "42"),
    ],
)
def test_each_line_alone_refuses(changes: dict[str, Any], line: str, words: str) -> None:
    found = gate_of(report_of(**changes), SETTINGS)
    assert not found["passed"]
    missed = [each for each in found["reasons"] if not each["passed"]]
    assert [each["name"] for each in missed] == [line]
    assert words in missed[0]["was"]
    assert sentence(found).startswith("validation gate: NOT PASSED: expected ")
    assert words in sentence(found)


def test_all_lines_met_pass_and_the_limits_are_the_configurations() -> None:
    found = gate_of(report_of(), SETTINGS)
    assert found["passed"]
    assert sentence(found) == "validation gate: passed"
    assert [each["name"] for each in found["reasons"]] == [
        "baselines", "ic_interval", "deflated_probability", "effective_rows"
    ]  # fmt: skip
    stricter = ValidationSettings(min_deflated_probability=0.999, min_effective_rows=1_000)
    missed = [each["name"] for each in gate_of(report_of(), stricter)["reasons"] if not each["passed"]]
    assert missed == ["deflated_probability", "effective_rows"]


def test_refused_models_are_named_with_their_numbers() -> None:
    refuse_models({})
    gate = gate_of(report_of(interval=[-0.01, 0.2]), SETTINGS)
    with pytest.raises(
        GateRefusedError, match=r"one: validation gate: NOT PASSED.*IC \+0.100 \(95 % interval"
    ) as caught:
        refuse_models({"one": gate, "two": gate})
    assert "two: validation gate" in str(caught.value)
    assert caught.value.counterexample == {"gates": {"one": gate, "two": gate}}


def skilled(table: FeatureTable, meta: DataMeta) -> tuple[FeatureTable, DataMeta]:
    """A column that knows a part of the answer: too little to be refused as a leak, enough to beat every baseline."""
    future = np.roll(table.mid, -5) / table.mid - 1
    noise = np.random.default_rng(2).normal(0.0, 2.5 * np.nanstd(future), len(future))
    features = np.column_stack([table.features, future + noise]).astype(np.float32)
    return replace(table, features=features), replace(meta, columns=(*COLUMNS, "known"))


def test_the_answer_is_in_every_manifest_passed_or_not(trained) -> None:  # noqa: ANN001
    for name in ("btcusd-bars-gbdt", "btcusd-bars-lstm"):
        bundle = trained.bundles[name]
        gate = load_bundle(bundle.path).metrics["gate"]
        assert gate == bundle.report["gate"]
        assert gate["passed"] is False  # minutes bars of one month: no family beats the baselines there
        assert f"{name}: {sentence(gate)}" in trained.said
        assert load_bundle(bundle.path).metrics["deflation"]["trials"] == 2  # the families trained beside each other
    for child in ("fp16", "int8"):
        gate = load_bundle(trained.bundles[f"btcusd-bars-lstm-{child}"].path).metrics["gate"]
        assert gate == trained.bundles["btcusd-bars-lstm"].report["gate"] | {"of": "btcusd-bars-lstm"}


def test_noise_is_refused_and_written_nowhere(table: FeatureTable, meta: DataMeta, tmp_path: Path) -> None:
    """Columns of noise alone: what a search for luck would feed it."""
    noise = np.random.default_rng(0).normal(size=table.features.shape).astype(np.float32)
    said: list[str] = []
    with pytest.raises(GateRefusedError, match=r"btcusd-bars-gbdt: validation gate: NOT PASSED.*the best of 50 trials"):
        train_table(
            replace(table, features=noise), meta, quick_config(validation__trials=50), tmp_path / "out",
            ("gbdt",),
            progress=said.append, demands=Demands(gate=True),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert any("btcusd-bars-gbdt: no clear difference" in line or "worse than" in line for line in said)


def test_skill_passes_where_there_are_rows_enough(table: FeatureTable, meta: DataMeta, tmp_path: Path) -> None:
    table, meta = skilled(table, meta)
    config = quick_config(gbdt__rounds=40)
    demands = Demands(gate=True)
    (bundle,) = train_table(table, meta, config, tmp_path, ("gbdt",), demands=demands)
    assert bundle.manifest.metrics["gate"]["passed"] is True
    assert bundle.manifest.metrics["deflation"]["ic_probability"] > 0.999
    interval = bundle.manifest.metrics["pooled"]["model"]["interval"]["ic"]
    assert 0 < interval[0] < bundle.report["pooled"]["model"]["ic"] < interval[1]
    never = quick_config(gbdt__rounds=40, validation__min_effective_rows=100_000)
    with pytest.raises(GateRefusedError, match="expected at least 100,000 effective rows"):
        train_table(table, meta, never, tmp_path / "none", ("gbdt",), demands=demands)


def test_the_model_that_passes_is_written_beside_the_one_that_does_not(
    table: FeatureTable, meta: DataMeta, tmp_path: Path
) -> None:
    table, meta = skilled(table, meta)
    config = quick_config(gbdt__rounds=40, lstm__epochs=1, lstm__learning_rate=1e-6)
    with pytest.raises(GateRefusedError, match="btcusd-bars-lstm: validation gate") as caught:
        train_table(table, meta, config, tmp_path, ("gbdt", "lstm"), demands=Demands(gate=True))
    assert [path.name for path in tmp_path.iterdir()] == ["btcusd-bars-gbdt"]
    assert "btcusd-bars-gbdt: validation" not in str(caught.value)


def test_every_regime_has_its_count_and_small_ones_no_number(trained) -> None:  # noqa: ANN001
    report = trained.bundles["btcusd-bars-gbdt"].report
    rows = {row["regime"]: row for row in report["regimes"]}
    assert len(rows) == 6
    for kind in ("volatility", "trend"):
        mine = [row for name, row in rows.items() if name.startswith(kind)]
        assert 0.95 < sum(row["rows"] for row in mine) / report["pooled"]["model"]["rows"] <= 1
        assert sum(row["trades"] for row in mine) <= report["pooled"]["model"]["trades"]
    for row in rows.values():
        assert (row["ic"] is None) == (row["n_eff"] < 50)
        assert (row["pnl_bps"] is None) == (row["trades"] < 50)
