"""A recipe run: children that name their parents, measured on the same rows; a refused step leaves its numbers only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.job import export_bundle
from export.validation import refuse_ungated
from tests.training.compress.conftest import DENSE, WEIGHTS, quiet, recipe_of
from tickserve.config import ExportSettings, LimitSettings
from tickserve.errors import (
    ArtifactError,
    ConfigError,
    GateRefusedError,
    LimitExceededError,
    UsageError,
)
from tickserve.limits import not_kept, of_training
from tickserve.manifest import load_bundle
from training.bundles import TrainedBundle
from training.compress import chain
from training.compress.chain import Outcome, compress, run_recipe, teacher_of
from training.compress.former import REPORT, remove_former
from training.compress.gates import decisions_gate
from training.compress.generation import Teacher
from training.compress.recipe import Recipe
from training.compress.teacher import Data

LIMITS = ("train_s", "train_memory_mb", "hit_rate")
PRUNE = {"kind": "prune", "share": 0.5, "rounds": 2, "epochs": 1, "teacher_weight": 0.5}


def accept(patch: pytest.MonkeyPatch) -> None:
    """Have every gate but the goal let everything through: what is tested is what happens then."""
    for name in ("quality_gate", "decisions_gate", "latency_gate", "size_gate"):
        patch.setattr(chain, name, lambda *given: decisions_gate(0.0, None))


@pytest.fixture
def accepting(monkeypatch: pytest.MonkeyPatch) -> None:
    accept(monkeypatch)


@pytest.fixture(scope="module")
def outcome(teacher: Teacher, data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path, list[str]]:
    """Distilled, pruned, quantized."""
    out, said = tmp_path_factory.mktemp("children"), []
    with pytest.MonkeyPatch.context() as patch:
        accept(patch)
        return run_recipe(teacher, {}, recipe_of(DENSE, PRUNE, WEIGHTS), data, out, said.append), out, said


def test_each_child_names_its_parent_and_carries_its_gates(
    outcome: tuple[Outcome, Path, list[str]], folder: Path
) -> None:
    made, out, _ = outcome
    lineage = [load_bundle(folder), *(load_bundle(bundle.path) for bundle in made.bundles)]
    assert [child.parents for child in lineage[1:]] == [(parent.digest(),) for parent in lineage[:-1]]
    assert [child.precision for child in lineage] == ["fp32", "fp32", "fp32", "int8"]
    assert [child.family for child in lineage] == ["mlp", "mlp", "mlp", "mlp"]
    assert [child.architecture["hidden"] for child in lineage] == [24, 16, 8, 8]
    for child in lineage[1:]:
        assert child.gates
        assert child.metrics["against_teacher"]["teacher_ic"] == pytest.approx(made.report["teacher"]["ic"], abs=0.02)
        assert [row["fold"] for row in child.metrics["folds"]] == [1, 2]
        assert child.features == lineage[0].features
    assert {path.name for path in out.iterdir()} == {*(bundle.manifest.name for bundle in made.bundles), REPORT}


def test_a_child_carries_the_gate_of_validation_measured_on_itself(
    outcome: tuple[Outcome, Path, list[str]], folder: Path, data: Data
) -> None:
    teacher, child = load_bundle(folder).metrics, outcome[0].bundles[-1].manifest
    assert {"gate", "deflation", "regimes", "resampling"} <= set(child.metrics)
    told = {line["name"]: line["was"] for line in child.metrics["gate"]["reasons"]}
    assert f"{child.metrics['pooled']['model']['ic']:+.3f}" in told["ic_interval"]
    assert child.metrics["deflation"] != teacher["deflation"]
    if child.metrics["gate"]["passed"]:
        refuse_ungated([child], data.config.validation)
    else:
        with pytest.raises(GateRefusedError, match=r"not passed \(expected"):
            refuse_ungated([child], data.config.validation)


def test_the_report_has_each_step_and_what_was_said_counts_folds(outcome: tuple[Outcome, Path, list[str]]) -> None:
    made, out, said = outcome
    report = json.loads((out / REPORT).read_text())
    assert report == json.loads(json.dumps(made.report))
    assert [row["step"] for row in report["steps"]] == ["distill", "prune", "quantize"]
    assert report["accepted"] is True
    for row in report["steps"]:
        assert {"size_bytes", "p50_us", "p99_us", "ic", "ic_share", "flips"} <= set(row["measured"])
        rounds = row["measured"]["calls"] // 200
        assert row["measured"]["timing"].endswith(f"the quietest of {rounds} rounds of 200 calls")
        assert {gate["name"] for gate in row["limits"]} == {f"limit.{key}" for key in LIMITS}
        assert row["seconds"] > 0
    assert any("step 2/3, prune" in line for line in said)
    assert any("prune fold 2, round 1/1: 8 units left" in line for line in said)


def test_the_children_pass_every_parity_gate_of_export(
    outcome: tuple[Outcome, Path, list[str]], tmp_path: Path
) -> None:
    settings = ExportSettings(parity_rows=100, max_batch=8, preferred_batch_rows=(8,))
    for bundle in outcome[0].bundles:
        published = export_bundle(bundle.path, tmp_path, settings)
        assert all(gate.passed for gate in published.gates)


def test_a_student_sees_the_folds_training_rows_and_never_its_test_rows(teacher: Teacher, data: Data) -> None:
    from training.compress.lesson import Lessons

    lessons = Lessons(teacher, data.examples, 500)
    for place, fold in enumerate(data.examples.folds):
        lesson = lessons.of(place)
        assert np.isin(lesson.train.rows, fold.rows.train).all()
        assert np.isin(lesson.validation.rows, fold.rows.validation).all()
        assert len(lesson.train.rows) == 500
        own = teacher.first.job.predict(teacher.first.fits[place], lesson.train.rows)
        np.testing.assert_array_equal(lesson.train.soft, own)
    assert not np.array_equal(lessons.of(0).train.soft, lessons.of(1).train.soft)


@pytest.mark.system
@pytest.mark.parametrize("method", ["static", "qat"])
def test_rounded_activations_export_with_the_tolerance_of_their_kind(
    teacher: Teacher, data: Data, accepting: None, tmp_path: Path, method: str
) -> None:
    recipe = recipe_of(DENSE, {"kind": "quantize", "method": method}, max_rows=1_000)
    made = run_recipe(teacher, {}, recipe, data, tmp_path / "out", quiet)
    child = made.bundles[-1]
    assert child.manifest.architecture["rounded"] == "activations"
    assert child.manifest.tolerance.atol == pytest.approx(1e-2)
    settings = ExportSettings(parity_rows=100, max_batch=8, preferred_batch_rows=(8,))
    assert all(gate.passed for gate in export_bundle(child.path, tmp_path / "repository", settings).gates)


def limited(data: Data, **limits: object) -> Data:
    tree = data.config.model_dump()
    tree["limits"] |= limits
    return Data(data.examples, data.meta, type(data.config).model_validate(tree))


@pytest.mark.parametrize("key", LIMITS)
def test_a_limit_that_is_to_fail_ends_the_run_and_leaves_nothing(
    teacher: Teacher, data: Data, accepting: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    def only_the_second(settings: LimitSettings, *measured: Any) -> Any:
        found = of_training(settings, *measured)
        return found if (tmp_path / f"{teacher.name}-test-1-distill").exists() else ()

    monkeypatch.setattr(chain, "of_training", only_the_second)
    bound = 1.0 if key == "hit_rate" else 1 if key == "train_memory_mb" else 1e-6
    failing = limited(data, **{key: bound, f"on_{key}": "fail"})
    said: list[str] = []
    with pytest.raises(LimitExceededError, match=rf"limits\.{key}"):
        run_recipe(teacher, {}, recipe_of(DENSE, WEIGHTS, max_rows=1_000), failing, tmp_path, said.append)
    assert any("-2-quantize: limit not kept" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_warns_is_said_and_in_the_manifest(
    teacher: Teacher, data: Data, accepting: None, tmp_path: Path
) -> None:
    said: list[str] = []
    made = run_recipe(teacher, {}, recipe_of(WEIGHTS), limited(data, train_memory_mb=1), tmp_path, said.append)
    assert made.accepted
    assert any("limit not kept: training took" in line for line in said)
    manifest = load_bundle(made.bundles[0].path)
    assert [gate.name for gate in not_kept(manifest.gates)] == ["limit.train_memory_mb"]
    assert (manifest.provenance.stages["compress"]["peak_memory_mb"] or 0) > 1


def test_refits_are_held_to_the_limits_of_training(folder: Path, data: Data) -> None:
    with pytest.raises(LimitExceededError, match=r"limits\.train_s"):
        teacher_of([folder], limited(data, train_s=1e-6, on_train_s="fail"), quiet)
    teacher_of([folder], limited(data, hit_rate=1.0, on_hit_rate="fail"), quiet)


def test_several_teachers_become_one(
    bundles: dict[str, TrainedBundle], data: Data, accepting: None, tmp_path: Path
) -> None:
    both = [bundles["gbdt"].path, bundles["mlp"].path]
    with pytest.raises(UsageError, match="expected distill"):
        compress(both, recipe_of({"kind": "truncate"}), data, tmp_path, quiet)
    made = compress(both, recipe_of(DENSE, max_rows=1_000), data, tmp_path, quiet)
    [child] = made.bundles
    assert child.manifest.parents == tuple(bundles[name].manifest.digest() for name in ("gbdt", "mlp"))
    assert all(row["same"] for refits in made.report["refits"].values() for row in refits)
    assert len(made.report["refits"]) == 2
    assert child.manifest.metrics["refits"] == made.report["refits"]


def test_a_teacher_given_twice_is_refused(
    bundles: dict[str, TrainedBundle], folder: Path, data: Data, tmp_path: Path
) -> None:
    for again in (folder, shutil.copytree(folder, tmp_path / "copy")):
        with pytest.raises(UsageError, match=r"BUNDLE: one teacher is counted twice.*btcusd-bars-mlp twice"):
            compress([folder, bundles["gbdt"].path, again], recipe_of(DENSE), data, tmp_path / "out", quiet)
    assert not list((tmp_path / "out").iterdir())


def refusing(**keys: Any) -> Recipe:
    """A pruning that leaves eight units of 24 and teaches them nothing."""
    torn = {"kind": "prune", "share": 0.9, "epochs": 0}
    return recipe_of(torn, WEIGHTS, gates={"min_ic_share": 1.5, "max_latency_ratio": 1.25}, **keys)


def test_a_refused_step_leaves_its_measurements_and_nothing_else(teacher: Teacher, data: Data, tmp_path: Path) -> None:
    made = run_recipe(teacher, {}, refusing(), data, tmp_path, quiet)
    assert (made.accepted, made.bundles, made.report["not_tried"]) == (False, (), ["quantize"])
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]
    [row] = made.report["steps"]
    assert row["digest"] is None
    assert row["measured"]["size_bytes"] < row["measured"]["parent_size_bytes"]
    assert "150.0% needed" in row["verdict"]


def test_what_an_earlier_run_of_the_recipe_left_is_gone_and_nothing_else(
    outcome: tuple[Outcome, Path, list[str]], teacher: Teacher, folder: Path, tmp_path: Path
) -> None:
    _, children, _ = outcome
    out = shutil.copytree(children, tmp_path / "out")
    name = f"{teacher.name}-test-"
    (out / f"{name}4-prune").mkdir()  # no bundle
    trained = shutil.copytree(folder, out / f"{name}5-prune")  # of another name
    manifest = json.loads((trained / "manifest.json").read_text())
    shutil.copytree(trained, out / f"{name}6-prune")
    (out / f"{name}6-prune" / "manifest.json").write_text(json.dumps(manifest | {"name": f"{name}6-prune"}))  # trained
    shutil.copytree(children / f"{name}1-distill", out / f"{teacher.name}-tests-1-distill")
    (out / f"{name}7-prune").symlink_to(children / f"{name}2-prune")
    kept = {f"{name}4-prune", f"{name}5-prune", f"{name}6-prune", f"{name}7-prune", f"{teacher.name}-tests-1-distill"}
    remove_former(out, teacher.name, recipe_of(PRUNE))
    assert {path.name for path in out.iterdir()} == kept
    assert (children / f"{name}2-prune" / "manifest.json").is_file()


def test_a_run_that_ends_early_leaves_no_earlier_result(
    outcome: tuple[Outcome, Path, list[str]],
    folder: Path,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = shutil.copytree(outcome[1], tmp_path / "out")

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(ArtifactError, match="parents"):  # what is wrong from the first takes nothing away
        compress([outcome[0].bundles[0].path], recipe_of(PRUNE), data, out, quiet)
    assert (out / REPORT).is_file()
    monkeypatch.setattr(chain, "refitted", killed)
    with pytest.raises(KeyboardInterrupt):
        compress([folder], recipe_of(PRUNE), data, out, quiet)
    assert list(out.iterdir()) == []


def test_skip_goes_on_from_the_parent_of_what_was_refused(teacher: Teacher, data: Data, tmp_path: Path) -> None:
    made = run_recipe(teacher, {}, refusing(on_refusal="skip"), data, tmp_path, quiet)
    assert [row["parent"] for row in made.report["steps"]] == [teacher.name, teacher.name]
    assert made.report["not_tried"] == []
    assert not made.accepted


def test_a_goal_that_is_missed_refuses_the_last_step(
    teacher: Teacher, data: Data, accepting: None, tmp_path: Path
) -> None:
    recipe = recipe_of(WEIGHTS, goal={"speedup": 50.0, "shrink": 1.2})
    made = run_recipe(teacher, {}, recipe, data, tmp_path, quiet)
    assert not made.accepted
    assert "speedup_p50 over the teacher is" in made.report["steps"][0]["verdict"]
    assert "shrink" not in made.report["steps"][0]["verdict"]


def test_a_teacher_of_other_data_and_a_child_are_refused(
    folder: Path, data: Data, outcome: tuple[Outcome, Path, list[str]]
) -> None:
    from dataclasses import replace

    other = replace(data, meta=replace(data.meta, data={"other.parquet": "sha256:" + "2" * 64}))
    with pytest.raises(ArtifactError, match=r"provenance.data"):
        teacher_of([folder], other, quiet)
    with pytest.raises(ArtifactError, match=r"parents"):
        teacher_of([outcome[0].bundles[0].path], data, quiet)


def test_a_student_that_the_data_have_nothing_for_is_refused_at_once(folder: Path, data: Data, tmp_path: Path) -> None:
    deep = {"kind": "distill", "family": "deeplob"}
    with pytest.raises(ConfigError):
        compress([folder], recipe_of(deep), data, tmp_path, quiet)
    wrong = DENSE | {"settings": {"hiden": 8}}
    with pytest.raises(ConfigError, match=r"step.settings.hiden.*nearest: hidden"):
        compress([folder], recipe_of(wrong), data, tmp_path, quiet)
