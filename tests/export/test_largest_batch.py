"""Versions gated for different largest batches, side by side: none is served with more rows than it was gated for."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.largest_batch import with_largest_batch
from export.publish import Terms, publish
from export.repository import collect, lint, sync
from export.repository.force import rollback
from export.repository.places import Local
from export.repository.source import Folder
from export.repository.transfer import transfer
from export.repository.written import read_written
from export.triton_config import build_config, parse_config, policy_of, read_config
from tests.export.four import KEEP, config, edit, loaded, rolled_back, wrong
from tests.export.test_repository import Stops
from tests.export.test_repository_written import text_of
from tests.export.tiny import NAME, manifest_of, release
from tickserve.config import ExportSettings
from tickserve.current import CURRENT_NAME
from tickserve.errors import ArtifactError
from tickserve.manifest import load_manifest
from tickserve.model_config import served_rows


def add(repository: Local, seed: int, rows: int, *, activate: bool = True) -> None:
    """The next version, gated for batches of `rows`."""
    settings = ExportSettings(max_batch=rows, preferred_batch_rows=(4, rows))
    publish(release(seed, max_batch=rows), repository.root, settings, Terms(activate=activate))


def serves(repository: Local) -> tuple[int, list[int]]:
    """What `loads` says of a repository in which everything can be trusted."""
    assert wrong(repository) == {}
    assert [each for each in lint.lint(repository) if each.level == "error"] == []
    return loads(repository)


def loads(repository: Local) -> tuple[int, list[int]]:
    """The largest batch, and the versions that are loaded; none of these was gated for less."""
    rows, numbers = read_config(config(repository)).max_batch, loaded(repository)
    assert all(rows <= gated(repository, number) for number in numbers)
    return rows, numbers


def gated(repository: Local, version: int) -> int:
    export = load_manifest(repository.folder(NAME, version)).export
    assert export is not None
    return export.max_batch


@pytest.fixture
def waiting(tmp_path: Path) -> Local:
    """Version 1, for 16 rows, in force; version 2, for 8, waits."""
    repository = Local(tmp_path / "models")
    add(repository, 1, 16)
    add(repository, 2, 8, activate=False)
    return repository


def test_a_version_that_waits_changes_nothing(waiting: Local) -> None:
    assert serves(waiting) == (16, [1])
    assert {each.rule for each in lint.lint(waiting)} <= {"batching"}


def test_putting_it_in_force_serves_its_rows_and_going_back_those_of_before(waiting: Local) -> None:
    assert rolled_back(waiting, 2) == (1, 2)
    assert serves(waiting) == (8, [1, 2])
    written = text_format.Parse(config(waiting).read_text(), schema.ModelConfig())
    assert list(written.dynamic_batching.preferred_batch_size) == [4, 8]
    assert [(each.name, each.batch_size) for each in written.model_warmup] == [
        ("rows_1", 1),
        ("rows_4", 4),
        ("rows_8", 8),
    ]
    assert rolled_back(waiting) == (2, 1)
    assert serves(waiting) == (16, [1])


def test_a_larger_one_is_served_with_its_rows_once_no_smaller_one_is_loaded(tmp_path: Path) -> None:
    repository = Local(tmp_path / "models")
    add(repository, 1, 16)
    add(repository, 2, 32)
    assert serves(repository) == (16, [1, 2])
    assert served_rows(repository.folder(NAME, 2), load_manifest(repository.folder(NAME, 2))) == 16
    found = [each.message for each in lint.lint(repository) if each.rule == "batch"]
    assert found == ["serves up to 16 rows; version 2, in force, was gated for 32"]
    add(repository, 3, 32)
    assert serves(repository) == (32, [2, 3])
    rolled_back(repository, 1)
    assert serves(repository) == (16, [1])


def test_collecting_leaves_it_alone(waiting: Local) -> None:
    add(waiting, 3, 32)
    add(waiting, 4, 32)
    before = serves(waiting)
    assert [version for _, version, _ in collect.collect(waiting, keep=1).versions] == [1, 2]
    assert serves(waiting) == before == (32, [3, 4])


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_rollback_cut_short_loads_none_with_more_rows_than_it_was_gated_for(writes: int, waiting: Local) -> None:
    for to in (2, 1):
        cut = Stops(waiting.root)
        cut.left = writes
        with suppress(KeyboardInterrupt):
            rollback(cut, NAME, to, keep=KEEP)
        serves(waiting)
        rolled_back(waiting, to)


def test_a_configuration_that_serves_more_than_was_gated_is_named_and_mended(waiting: Local) -> None:
    rolled_back(waiting, 2)
    edit(waiting, "max_batch_size: 8", "max_batch_size: 16")
    assert "max_batch_size: config.pbtxt serves a larger batch than was gated: expected at most 8" in wrong(waiting)[2]
    assert list(wrong(waiting)) == [2]
    found = [(each.level, each.rule, each.message) for each in lint.lint(waiting) if each.rule == "batch"]
    assert found == [("error", "batch", "serves up to 16 rows; version 2 was gated for 8")]
    assert loaded(waiting) == [1], "the one that can be served is"
    rolled_back(waiting, 2)
    assert serves(waiting) == (8, [1, 2])


def test_a_repository_whose_waiting_version_took_the_rows_is_served_and_mended(waiting: Local) -> None:
    """As exports before this rule left it."""
    edit(waiting, "max_batch_size: 16", "max_batch_size: 8")
    assert serves(waiting) == (8, [1])
    assert [each.message for each in lint.lint(waiting) if each.rule == "batch"] == [
        "serves up to 8 rows; version 1, in force, was gated for 16"
    ]
    rolled_back(waiting, 1)
    assert serves(waiting) == (16, [1])


def test_no_older_version_comes_in_with_more_rows_where_a_newer_one_is_refused(waiting: Local) -> None:
    """`latest` counts those that can be trusted: a damaged one makes room for one that nobody counted."""
    for seed in (3, 4):
        add(waiting, seed, 32)
    shutil.rmtree(waiting.root / NAME / "1")
    (waiting.root / NAME / CURRENT_NAME).unlink()
    assert policy_of(config(waiting).read_text()) == ("latest", [KEEP])
    (waiting.root / NAME / "4" / "golden.npz").unlink()
    assert loaded(waiting) == [3]


@pytest.mark.parametrize("every", [False, True])
def test_it_is_so_in_a_copy_too(every: bool, waiting: Local, tmp_path: Path) -> None:
    copy = Local(tmp_path / "copy")
    transfer(waiting, copy, keep=KEEP, terms=Terms(), every=every)
    assert serves(copy) == (16, [1])
    transfer(waiting, copy, keep=KEEP, terms=Terms(activate=False), version=2)
    assert serves(copy) == (16, [1])
    transfer(waiting, copy, keep=KEEP, terms=Terms(), version=2)
    assert serves(copy) == (8, [1, 2])


def test_a_version_that_comes_into_a_copy_takes_its_rows_along(waiting: Local, tmp_path: Path) -> None:
    copy = Local(tmp_path / "copy")
    for version, then in ((1, (16, [1])), (2, (8, [1, 2]))):
        transfer(waiting, copy, keep=KEEP, terms=Terms(), version=version)
        assert serves(copy) == then


def test_a_sync_never_shows_a_version_with_more_rows(
    waiting: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into, real, seen = Local(tmp_path / "into"), sync.write_atomic, []

    def watched(path: Path, data: bytes) -> None:
        real(path, data)
        if into.root in path.parents:
            seen.append(loads(into))

    monkeypatch.setattr(sync, "write_atomic", watched)
    for to, then in ((1, (16, [1])), (2, (8, [2])), (1, (16, [1]))):
        rolled_back(waiting, to)
        sync.sync(Folder(waiting.root), into.root)
        assert serves(into) == then
    both = (8, [1, 2])
    assert seen == [both, both, (8, [2]), both, both, (16, [1])]


def test_a_sync_takes_a_version_that_is_served_with_fewer_rows_and_refuses_more(tmp_path: Path) -> None:
    repository, into = Local(tmp_path / "models"), Local(tmp_path / "into")
    add(repository, 1, 16)
    add(repository, 2, 32)
    sync.sync(Folder(repository.root), into.root)
    assert serves(into) == (16, [2])
    edit(repository, "max_batch_size: 16", "max_batch_size: 64")
    with pytest.raises(ArtifactError, match=r"max_batch_size.*expected at most 32, was 64"):
        sync.sync(Folder(repository.root), into.root)
    assert serves(into) == (16, [2])


@pytest.mark.parametrize("name", ["plain", "bounded, with lanes", "TensorRT"])
def test_a_smaller_batch_is_all_that_changes(name: str) -> None:
    text = text_of(name)
    fewer = with_largest_batch(text, 100)
    assert with_largest_batch(text, 256) == with_largest_batch(text, None) == text
    whole, now = parse_config(text), parse_config(fewer)
    assert now.max_batch == 100
    assert {**vars(whole), "max_batch": None} == {**vars(now), "max_batch": None}
    message = text_format.Parse(fewer, schema.ModelConfig())
    assert list(message.dynamic_batching.preferred_batch_size) == [8, 32, 100]
    assert [each.batch_size for each in message.model_warmup] == [1, 8, 32, 100]
    for accelerator in message.optimization.execution_accelerators.gpu_execution_accelerator:
        shapes = [accelerator.parameters[f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max")]
        assert [shape.split(":")[1].split("x")[0] for shape in shapes] == ["1", "100", "100"]
    assert ("trt_profile_max_shapes" in fewer) == (name == "TensorRT")


def test_the_largest_shape_of_tensorrt_grows_with_the_batch() -> None:
    assert ":200x" in with_largest_batch(with_largest_batch(text_of("TensorRT"), 100), 200)


def test_the_sync_cuts_a_configuration_down_without_protobuf() -> None:
    settings = ExportSettings(max_batch=256, preferred_batch_rows=(8, 32, 128), queue_policy="reject")
    text = build_config(manifest_of(NAME, 1), settings, {1: "sha256:" + "1" * 64})
    cut = read_written(text.encode()).only({1: "sha256:" + "1" * 64}, 100)
    message, whole = (text_format.Parse(each, schema.ModelConfig()) for each in (cut, text))
    assert message.max_batch_size == 100
    assert list(message.dynamic_batching.preferred_batch_size) == [8, 32]
    assert [each.batch_size for each in message.model_warmup] == [1, 8, 32]
    assert message.dynamic_batching.default_queue_policy == whole.dynamic_batching.default_queue_policy
    assert read_written(text.encode()).only({1: "sha256:" + "1" * 64}, 512).count("max_batch_size: 256") == 1
