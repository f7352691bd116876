"""Teachers that a recipe is not run on: of other data, settings or folds, of nothing, or with a report that is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.compress.conftest import DENSE, WEIGHTS, quiet, recipe_of
from tickserve.errors import (
    ArtifactError,
    ComponentError,
    GateRefusedError,
)
from training.bundles import TrainedBundle
from training.compress.chain import compress, run_recipe, teacher_of
from training.compress.generation import Teacher
from training.compress.teacher import Data, _compared

LAST = ("metrics", "folds", 1)


def test_a_teacher_not_clear_of_zero_is_refused_before_any_step(
    teacher: Teacher, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    rng = np.random.default_rng(0)
    noise = replace(
        data.examples, ret=np.where(np.isnan(data.examples.ret), np.nan, rng.normal(size=len(data.examples.ret)))
    )
    with pytest.raises(GateRefusedError, match="not clear of 0"):
        run_recipe(teacher, {}, recipe_of(WEIGHTS), replace(data, examples=noise), tmp_path, quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 8}, "provenance.seed"),
        ({"mlp": {"hidden": 32}}, "mlp.hidden"),
        ({"validation": {"folds": 3}}, "horizon|metrics.folds"),
        ({"labels": {"bars_horizon_rows": 7}}, "horizon"),
    ],
)
def test_a_teacher_of_other_settings_is_refused(
    folder: Path, data: Data, table: Any, change: dict[str, Any], field: str
) -> None:
    from training.examples import prepare

    tree = data.config.model_dump()
    for key, value in change.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    config = type(data.config).model_validate(tree)
    other = Data(prepare(table, data.meta, config), data.meta, config)
    with pytest.raises(ArtifactError, match=field):
        teacher_of([folder], other, quiet)


def test_a_teacher_whose_refits_rank_otherwise_than_it_reports_is_refused(
    bundles: dict[str, TrainedBundle], data: Data
) -> None:
    weaker = data.config.model_dump()
    weaker["gbdt"] |= {"learning_rate": 0.0001}
    other = Data(data.examples, data.meta, type(data.config).model_validate(weaker))
    bundle = bundles["gbdt"]
    recorded = bundle.manifest.metrics["folds"][0]["metrics"]["ic"]
    with pytest.raises(
        ArtifactError, match=rf"refit of fold 1.*\+?{recorded:.5f} as recorded.*was .*--config"
    ) as error:
        teacher_of([bundle.path], other, quiet)
    assert error.value.field == "metrics.folds.0.metrics.ic"


def test_a_refit_within_the_bound_is_said_and_one_beyond_it_refused(teacher: Teacher) -> None:
    manifest = teacher.first.manifest
    recorded = manifest.metrics["folds"][0]["metrics"]["ic"]
    assert _compared(manifest, 0, recorded)["same"] is True
    assert _compared(manifest, 0, recorded + 0.0009)["same"] is False
    for ic in (recorded - 0.0011, None):
        with pytest.raises(ArtifactError, match=r"metrics\.folds\.0"):
            _compared(manifest, 0, ic)


def test_every_bundle_and_the_folder_are_looked_at_before_anything_is_fitted(
    bundles: dict[str, TrainedBundle], data: Data, tmp_path: Path
) -> None:
    tree = data.config.model_dump()
    tree["mlp"] |= {"hidden": 32}
    other = Data(data.examples, data.meta, type(data.config).model_validate(tree))
    both = [bundles["gbdt"].path, bundles["mlp"].path]
    said: list[str] = []
    with pytest.raises(ArtifactError, match=r"mlp\.hidden"):
        compress(both, recipe_of(DENSE), other, tmp_path / "out", said.append)
    (tmp_path / "file").touch()
    with pytest.raises(ComponentError, match="cannot write"):
        compress(both, recipe_of(DENSE), data, tmp_path / "file", said.append)
    assert said == []


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (("metrics",), {}, r"metrics\.folds: .*was nothing"),
        (("metrics", "folds"), 5, r"metrics\.folds: .*expected a valid list, was 5"),
        (("metrics", "folds"), [], r"metrics\.folds: .*at least 1"),
        (("metrics", "folds"), [{}], r"metrics\.folds\.0\.train: .*was nothing"),
        (("metrics", "folds"), ["x"], r"metrics\.folds\.0: .*was 'x'"),
        ((*LAST, "metrics"), None, r"metrics\.folds\.1\.metrics: .*was None"),
        ((*LAST, "metrics"), {}, r"metrics\.folds\.1\.metrics\.ic: .*was nothing"),
        ((*LAST, "best_iteration"), None, r"metrics\.folds\.1\.best_iteration: .*valid integer, was None"),
        ((*LAST, "threshold"), "0.1", r"metrics\.folds\.1\.threshold: .*valid number, was '0.1'"),
    ],
)
def test_a_manifest_that_says_anything_else_is_refused_by_field(
    folder: Path, data: Data, tmp_path: Path, at: tuple[Any, ...], value: object, said: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    tree = json.loads((copy / "manifest.json").read_text())
    node = tree
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(ArtifactError, match=said):
        teacher_of([copy], data, quiet)
