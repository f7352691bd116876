"""One real Triton over two small models, shared by the tests of this folder, and the files of a whole run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.plot import draw_latency
from serving.embedded import EmbeddedTriton
from tests.serving.conftest import ANY_PORTS, publish_tiny


def publish_both(repository: Path) -> dict[str, Path]:
    """Two models, without a queue policy: these tests are about the load, not about how Triton refuses it."""
    versions = {name: publish_tiny(repository, name, seed).path for name, seed in (("tiny", 1), ("other", 2))}
    for name in versions:
        config = repository / name / "config.pbtxt"
        text = config.read_text()
        config.write_text(re.sub(r"  default_queue_policy \{.*?\n  \}\n", "", text, flags=re.DOTALL))
    return versions


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedTriton, dict[str, Path]]]:
    folder = tmp_path_factory.mktemp("loaded")
    versions = publish_both(folder / "models")
    with EmbeddedTriton(folder / "models", ANY_PORTS) as server:
        yield server, versions


def metrics(ic: float | None = 0.1) -> dict[str, Any]:
    return {
        "rows": 900, "n_eff": 111.0, "macro_f1": 0.41, "mcc": -0.07, "ic": ic, "ic_t": None if ic is None else 2.2,
        "hit_rate": 0.571, "trades": 58, "pnl_bps": -1.72,
    }  # fmt: skip


def pooled_metrics(ic: float | None = 0.1) -> dict[str, Any]:
    """As `metrics`, with what is known of all folds only."""
    spans = {"macro_f1": [0.39, 0.43], "mcc": [-0.11, -0.03], "hit_rate": [0.51, 0.63], "pnl_bps": None}
    return metrics(ic) | {
        "interval": spans | {"ic": None if ic is None else [ic - 0.05, ic + 0.05]}, "days": 0.5,
        "turnover_per_row": 0.0644, "turnover_per_day": 116.0, "pnl_bps_by_fees": {"0": 0.28, "1": -1.72, "2": -3.72},
    }  # fmt: skip


def validated() -> dict[str, Any]:
    """What a report says of the validation of its model."""
    lines = [
        {"name": "baselines", "passed": True, "expected": "better than every baseline", "was": "better"},
        {"name": "ic_interval", "passed": False, "expected": "an IC whose interval lies above 0", "was": "IC +0.100"},
    ]
    regimes = [
        {"regime": "volatility low", "rows": 700, "n_eff": 88.0, "ic": 0.123, "ic_interval": None, "hit_rate": 0.6,
         "calls": 90, "trades": 55, "pnl_bps": -0.77},
        {"regime": "trend up", "rows": 77, "n_eff": 9.0, "ic": None, "ic_interval": None, "hit_rate": None,
         "calls": 9, "trades": 5, "pnl_bps": None},
    ]  # fmt: skip
    return {
        "gate": {"passed": False, "reasons": lines}, "regimes": regimes,
        "resampling": {"coverage": 0.95, "draws": 2_000, "blocks": 41, "note": None},
        "deflation": {
            "trials": 20, "expected_maximum": 1.87, "ic_probability": 0.631, "sharpe": -0.2, "sharpe_trades": 58,
            "sharpe_probability": 0.012,
        },
    }  # fmt: skip


def load_row(transport: str, model: str, scale: float = 1.0) -> dict[str, Any]:
    return {
        "transport": transport, "model": model, "requests": 1234, "measured": 1200, "failures": 0, "rps": 800.0,
        "in_flight": 3.9, "queueing_visible": True, "errors": {}, "gave_up": 0, "p50_us": 400.0 * scale,
        "p90_us": 700.0 * scale, "p99_us": 1500.0 * scale, "p99_9_us": 4000.0 * scale, "mean_us": 480.0 * scale,
        "max_us": 9000.0 * scale, "histogram": [[300.0 * scale, 900], [800.0 * scale, 290], [5000.0 * scale, 10]],
    }  # fmt: skip


def whole_run() -> dict[str, Any]:
    """What the stages of one run write, with invented numbers."""
    over_all = {"majority": pooled_metrics(None), "last_move": pooled_metrics(-0.02), "linear": pooled_metrics(0.08)}
    baselines = {"majority": metrics(None), "last_move": metrics(-0.02), "linear": metrics(0.08)}
    folds = [
        {
            "fold": n,
            "train": 8_000 * n,
            "validation": 800,
            "test": 1_000,
            "metrics": metrics(),
            "baselines": baselines,
            "fit_rows": 8_000,
            "threshold": 1.5e-5 * n,
        }
        for n in (1, 2, 3)
    ]
    bins = [
        {"low": 0.0, "high": 0.1, "rows": 0, "predicted": 0.0, "observed": 0.0},
        {"low": 0.3, "high": 0.4, "rows": 700, "predicted": 0.34, "observed": 0.31},
        {"low": 0.6, "high": 0.7, "rows": 50, "predicted": 0.64, "observed": 0.71},
    ]
    report = {
        "model": "btcusdt-l5-gbdt", "family": "gbdt", "precision": "fp32", "folds": folds,
        "pooled": {"model": pooled_metrics(), "baselines": over_all}, **validated(), "calibration": bins,
        "beats_baselines": True,
        "verdict": "better than every baseline: IC +0.100; PnL -1.72 bp a trade after costs",
        "comparison": {
            "outcome": "better", "words": "better than every baseline", "baseline": "linear", "ic_difference": 0.02,
            "ic_difference_95": [0.01, 0.03], "folds_won": 3, "folds": 3,
        },
        "costs": {"fee_bps": 1.0, "bar_half_spread_bps": 1.5, "assumed_spreads": 0.0},
        "children": [{"model": "btcusdt-l5-lstm-int8", "verdict": "2.7 times smaller"}],
    }  # fmt: skip
    gate = {
        "name": "parity.recorded", "passed": True, "limits": {"atol": 1e-6, "rtol": 1e-5},
        "measured": {"rows": 2_000, "max_abs_probability": 1.19e-7, "decision_flips": 0},
    }  # fmt: skip
    return {
        "run": {
            "id": "20260101T000000Z-btcusdt", "started": "2026-01-01T00:00:42+00:00", "command": "tickserve demo",
            "data": ["usdm_btcusdt.jsonl.gz"], "symbol": "btcusdt", "simulated": False, "profile": "quick",
            "machine": "Linux x86_64, 2 cores", "versions": {"numpy": "1.26.4"}, "total_s": 42.3,
            "peak_memory_mb": 1_310.0, "limits": {"run_s": 60.0, "memory_mb": 2_048},
            "next_steps": ["tickserve serve", "tickserve predict btcusdt-l5-gbdt"],
        },
        "quality": {
            "symbol": "btcusdt", "venue": "binance-usdm", "simulated": False,
            "quality": {
                "rows_read": 93_954, "events": 89_509, "trades": 21_308, "book_updates": 68_201,
                "first": "2024-08-08T23:54:15.000000000Z", "last": "2024-08-08T23:59:59.000000000Z",
                "duration_s": 344.0, "spread_bps": {"mean": 0.0439, "min": 0.016, "max": 3.9},
                "quirks": {"crossed": {"count": 7, "meaning": "best bid above best ask; not emitted"}}, "notes": [],
            },
        },
        "features": {
            "spec": "book", "digest": "sha256:" + "a" * 64, "columns": ["spread_bps"], "stride": 2,
            "events_read": 89_509, "rows": 44_655, "reused": True,
            "table": [{"name": "spread_bps", "mean": 0.044, "std": 0.1, "min": 0.016, "max": 3.9, "nan_share": 0.001}],
        },
        "train": [report],
        "export": [
            {
                "model": "btcusdt-l5-gbdt", "version": 3, "bundle_digest": "sha256:" + "b" * 64, "bundle_id": -42,
                "gates": [gate],
            }
        ],
        "served": {
            "models": [{"model": "btcusdt-l5-gbdt", "version": 3, "rows": 64, "golden_max_abs_diff": 2e-8}],
            "metrics": {"btcusdt-l5-gbdt": 12_345}, "signals_counted": 12_345,
        },
        "loadtest": {
            "users": 4, "rule": "2 phases of 2.50 s",
            "rows": [load_row("http", "btcusdt-l5-gbdt"), load_row("grpc", "btcusdt-l5-gbdt", 2.5)],
        },
        "stages": [
            {"stage": "features", "seconds": 6.2, "peak_memory_mb": 520.0, "rows": 89_509, "rate": 14_436.9},
            {"stage": "train", "seconds": 18.4, "peak_memory_mb": 1_310.0, "rows": None, "rate": None},
        ],
    }  # fmt: skip


def write_run(folder: Path, files: dict[str, Any]) -> Path:
    """The run's folder, with the latency plot where there was a load test."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    if "loadtest" in files:
        (folder / "latency.svg").write_bytes(draw_latency(files["loadtest"]["rows"], 4))
    return folder
