"""Columns that say nothing, and rows that prove nothing (row 56 of the list of bad inputs).

Our int8 is weight-only, so there is no calibration set; what could be empty or constant in its place is the training
column a scaler is fitted to, and the rows a child is judged on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.runtime import open_session, run
from market.feature_store import FeatureTable
from models.lstm import LstmClassifier
from tests.training.conftest import COLUMNS, meta_of, quick_config
from tickserve.config import CompressSettings
from training.bundles import TrainedBundle
from training.quantize import Teacher, children, hold
from training.train import train_table

ROWS = 4_000
# Beside zero: a value that float16 and float32 round, and one that float16 cannot hold.
CONSTANTS = (0.0, 0.1, 1e6)


@pytest.fixture(scope="module")
def bundles(table: FeatureTable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedBundle]:
    """Nets and children of real bars with three constant columns, and one that was never known."""
    nothing = [np.full((ROWS, 1), value, np.float32) for value in (*CONSTANTS, np.nan)]
    wider = replace(
        table,
        features=np.concatenate([table.features[:ROWS], *nothing], axis=1),
        **{name: getattr(table, name)[:ROWS] for name in ("ts_ns", "mid", "half_spread", "session")},
    )
    names = (*COLUMNS, *(f"constant_{n}" for n in range(len(CONSTANTS))), "unknown")
    config = quick_config(compress__fp16=True, compress__int8=True)
    made = train_table(wider, meta_of(names), config, tmp_path_factory.mktemp("constant"))
    return {bundle.path.name: bundle for bundle in made}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_child_of_constant_columns_is_its_teacher_still(bundles: dict[str, TrainedBundle], precision: str) -> None:
    """Also where such a column moves after training: finite, and as the teacher reads it."""
    teacher, child = bundles["btcusd-bars-lstm"], bundles[f"btcusd-bars-lstm-{precision}"]
    assert child.manifest.gates[0].passed
    net = LstmClassifier.from_bundle(teacher.path, teacher.manifest)
    assert (net.std > 0).all()
    with np.load(teacher.path / "parity.npz") as arrays:
        rows = arrays["window"][:64].copy()
    session = open_session(child.path / "model.onnx")
    for moved in (0.0, 0.5):
        rows[:, :, len(COLUMNS) :] += np.float32(moved)
        said = run(session, {"window": rows})["probabilities"]
        with torch.inference_mode():
            wanted = net(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(said, wanted, atol=0.02)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (lambda rows: rows[:0], "no rows to judge it on"),
        (lambda rows: np.repeat(rows[:1], len(rows), axis=0), "all the same"),
    ],
    ids=["empty", "constant"],
)
def test_a_child_is_not_judged_by_rows_that_prove_nothing(
    bundles: dict[str, TrainedBundle], tmp_path: Path, keep: Callable[[np.ndarray], np.ndarray], says: str
) -> None:
    bundle = bundles["btcusd-bars-lstm"]
    net = LstmClassifier.from_bundle(bundle.path, bundle.manifest)
    with np.load(bundle.path / "parity.npz") as arrays:
        inputs, expected = keep(arrays["window"]), keep(arrays["probabilities"])
    ret = expected[:, 2] - expected[:, 0]
    teacher = Teacher(net, bundle, bundle.manifest.inputs[0], inputs, expected, ret.astype(np.float64))
    gate = hold(teacher, expected, 10, 100)
    assert (gate.passed, says in gate.detail) == (False, True)
    made, rows = children(teacher, CompressSettings(fp16=False, int8=True), tmp_path, lambda _: None)
    assert made == []
    assert "refused" in rows[0]["verdict"]
