"""The stepped child: research's numbers are those of stepping through each session from zeros."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from market.build import FeatureTable
from models.lstm import LstmClassifier
from models.stepped import CELL, HIDDEN, SteppedLstm
from tests.training.conftest import quick_config
from tickserve.features.spec import default_bars_spec
from tickserve.manifest import load_bundle
from training.bundles import TrainedBundle
from training.examples import DataMeta, Examples
from training.stepped import _restarts, stepped_child, walk
from training.train import train_table

SPEC = default_bars_spec()


@pytest.fixture(scope="module")
def described(meta: DataMeta) -> DataMeta:
    """The table's meta, as if it had been computed from a spec; only its session gap is used here."""
    return replace(meta, definition=SPEC.to_json())


@pytest.fixture(scope="module")
def bundles(
    table: FeatureTable, described: DataMeta, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TrainedBundle]:
    config = quick_config(compress__fp16=False, compress__int8=False)
    made = train_table(table, described, config, tmp_path_factory.mktemp("bundles"), families=("lstm",))
    return {bundle.path.name: bundle for bundle in made}


def test_the_child_names_its_teacher_and_its_state(bundles: dict[str, TrainedBundle], examples: Examples) -> None:
    teacher, child = bundles["btcusd-bars-lstm"], bundles["btcusd-bars-lstm-step"]
    manifest = load_bundle(child.path)
    assert manifest.parents == (teacher.manifest.digest(),)
    assert [tensor.name for tensor in manifest.inputs] == ["features", "hidden", "cell"]
    assert [tensor.name for tensor in manifest.outputs][3:] == ["hidden_out", "cell_out"]
    assert manifest.state is not None
    assert manifest.state.session_gap_ns == SPEC.session_gap_ns
    assert manifest.state.stride == examples.stride
    assert manifest.stream == teacher.manifest.stream
    assert manifest.metrics["stepped"]["rows"] > 0
    assert child.report["teacher"] == "btcusd-bars-lstm"
    assert child.report in teacher.report["children"]
    net = SteppedLstm.from_bundle(child.path, manifest)
    assert torch.equal(net.net.head.weight, LstmClassifier.from_bundle(teacher.path, teacher.manifest).head.weight)


def test_recorded_rows_carry_the_states_of_stepping_from_zeros(
    bundles: dict[str, TrainedBundle], examples: Examples
) -> None:
    child = bundles["btcusd-bars-lstm-step"]
    net = SteppedLstm.from_bundle(child.path, child.manifest)
    recorded = dict(np.load(child.path / "parity.npz"))
    rows = {row.tobytes(): place for place, row in enumerate(examples.features)}
    at = [rows[row.tobytes()] for row in recorded["features"]]
    assert at == sorted(at)
    assert not recorded["hidden"][0].any()  # the first of its session
    wanted, state = dict(zip(at, range(len(at)), strict=True)), net.initial()
    with torch.inference_mode():
        for place in range(at[-1] + 1):
            if place == 0 or examples.session[place] != examples.session[place - 1]:
                state = net.initial()
            row = torch.from_numpy(examples.features[place : place + 1])
            answer, *after = net(row, *state)
            if place in wanted:
                for name, tensor in zip(("hidden", "cell"), state, strict=True):
                    np.testing.assert_allclose(recorded[name][wanted[place]], tensor[0].numpy(), atol=2e-5)
                np.testing.assert_allclose(recorded["probabilities"][wanted[place]], answer[0].numpy(), atol=1e-5)
                np.testing.assert_allclose(recorded["cell_out"][wanted[place]], after[1][0].numpy(), atol=2e-5)
            state = (after[0], after[1])


def test_golden_pairs_hold_a_hole_and_every_tensor(bundles: dict[str, TrainedBundle]) -> None:
    child = bundles["btcusd-bars-lstm-step"]
    golden = dict(np.load(child.path / "golden.npz"))
    assert set(golden) == {"features", "hidden", "cell", "probabilities", "score", "hidden_out", "cell_out"}
    assert np.isnan(golden["features"][-1, 0])
    assert all(np.isfinite(golden[name]).all() for name in golden if name != "features")
    assert {len(array) for array in golden.values()} == {16}


@torch.inference_mode()
def test_walk_starts_every_session_from_zeros(bundles: dict[str, TrainedBundle], examples: Examples) -> None:
    child = bundles["btcusd-bars-lstm-step"]
    net = SteppedLstm.from_bundle(child.path, child.manifest)
    opens = int(np.flatnonzero(examples.session == 1)[0])
    last = opens + 40
    wanted = np.array([0, opens - 1, opens, opens + 1], np.int64)
    said, states = walk(net, examples.features, examples.session, wanted, through=last)
    assert len(said) == last + 1
    assert not states[HIDDEN][0].any()
    assert states[CELL][1].any()
    assert not states[CELL][2].any()
    assert states[CELL][3].any()
    alone, _ = net.through(torch.from_numpy(examples.features[opens : last + 1]), net.initial())
    np.testing.assert_allclose(said[opens:], alone.numpy(), atol=1e-6)
    other, _ = walk(net, examples.features, np.zeros_like(examples.session), wanted, through=last)
    assert np.abs(other[opens:] - said[opens:]).max() > 1e-4  # the session is what made the difference


@torch.inference_mode()
def test_restarts_take_the_state_away_every_five_minutes_and_are_measured_beside(
    bundles: dict[str, TrainedBundle], examples: Examples
) -> None:
    child = bundles["btcusd-bars-lstm-step"]
    metrics = child.manifest.metrics
    assert metrics["restarted"]["every_rows"] == 5, "one-minute bars"
    assert child.report["restarted"] == metrics["restarted"]
    assert -1 <= metrics["restarted"]["ic"] <= 1
    assert metrics["restarted"]["ic"] != metrics["stepped"]["ic"]
    net = SteppedLstm.from_bundle(child.path, child.manifest)
    judged = examples.published.rows.test[7:40]
    said, every = _restarts(net, examples, judged)
    opens = next(row for row in judged.tolist() if row % every == 0)
    alone, _ = net.through(torch.from_numpy(examples.features[opens : opens + every]), net.initial())
    np.testing.assert_allclose(said[np.searchsorted(judged, range(opens, opens + every))], alone.numpy(), atol=1e-6)


def refit(bundles: dict[str, TrainedBundle], examples: Examples, out: Path, teacher_ic: float) -> Any:
    teacher = bundles["btcusd-bars-lstm"]
    metrics = teacher.manifest.metrics
    folds = [*metrics["folds"][:-1], metrics["folds"][-1] | {"metrics": {"ic": teacher_ic}}]
    manifest = teacher.manifest.model_copy(update={"metrics": metrics | {"folds": folds}})
    net = SteppedLstm.from_bundle(bundles["btcusd-bars-lstm-step"].path, bundles["btcusd-bars-lstm-step"].manifest).net
    config = quick_config()
    rows = examples.published.rows.test[20:60]
    return stepped_child(
        net, TrainedBundle(teacher.path, manifest, {}), examples, rows, lambda given: given[20:], config, out
    )


def test_a_child_that_forecasts_worse_is_refused_and_leaves_no_bundle(
    bundles: dict[str, TrainedBundle], examples: Examples, tmp_path: Path
) -> None:
    made, row = refit(bundles, examples, tmp_path, teacher_ic=-1.0)
    assert made is not None
    assert row["passed"]
    refused, row = refit(bundles, examples, tmp_path, teacher_ic=0.9)
    assert refused is None
    assert "refused" in row["verdict"]
    assert not (tmp_path / "btcusd-bars-lstm-step").exists()


def test_none_is_made_where_the_configuration_says_so_or_the_session_is_unknown(
    table: FeatureTable, described: DataMeta, meta: DataMeta, tmp_path: Path
) -> None:
    config = quick_config(compress__fp16=False, compress__int8=False, lstm__stepped=False, lstm__epochs=1)
    one = train_table(table, described, config, tmp_path / "one", families=("lstm",))
    assert [bundle.path.name for bundle in one] == ["btcusd-bars-lstm"]
    assert one[0].manifest.stream is not None
    unknown = quick_config(compress__fp16=False, compress__int8=False, lstm__epochs=1)
    other = train_table(table, meta, unknown, tmp_path / "other", families=("lstm",))
    assert [bundle.path.name for bundle in other] == ["btcusd-bars-lstm"]
    assert other[0].manifest.stream is None
