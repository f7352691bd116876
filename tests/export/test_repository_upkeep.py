"""The upkeep of a published repository: linting, collecting, and copying to another one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.publish import Terms, publish
from export.repository import check, collect, force, lint
from export.repository.lock import locked
from export.repository.places import Local, open_repository
from export.repository.sign import sign
from export.repository.transfer import transfer
from export.triton_config import read_config
from tests.export.four import KEEP, config, edit, loaded, rolled_back, spoil, wrong
from tests.export.tiny import NAME, SETTINGS, publish_seeds, release
from tickserve import signing
from tickserve.config import ExportSettings, RepositorySettings
from tickserve.current import CURRENT_NAME
from tickserve.errors import ArtifactError, ComponentError, DigestMismatchError, SignatureError, UsageError
from tickserve.manifest import MANIFEST_NAME
from tickserve.signing import SIGNATURE_NAME
from tickserve.store import STAGING_PREFIX

# Linting.


def rules(repository: Local, trusted: signing.TrustedKeys | None = None) -> set[tuple[str, str, str]]:
    return {(each.level, each.rule, each.place) for each in lint.lint(repository, trusted=trusted)}


def test_what_was_just_published_has_no_errors(four: Local) -> None:
    # What is left is said: no queue has a bound, on purpose.
    assert rules(four) == {("note", "batching", f"{name}/config.pbtxt") for name in four.models()}


def link(repository: Local) -> None:
    (repository.root / NAME / "2" / "golden.npz").unlink()
    (repository.root / NAME / "2" / "golden.npz").symlink_to(repository.root / NAME / "1" / "golden.npz")


@pytest.mark.parametrize(
    ("break_it", "finding"),
    [
        (lambda r: (r.root / NAME / "9").mkdir(), ("error", "version", "tiny/9")),
        (lambda r: (r.root / NAME / "2" / "notes.txt").touch(), ("warning", "stray", "tiny/2/notes.txt")),
        (lambda r: (r.root / NAME / "libtriton_x.so").touch(), ("error", "code", "tiny/libtriton_x.so")),
        (lambda r: (r.root / NAME / "2" / "model.py").touch(), ("error", "code", "tiny/2/model.py")),
        (lambda r: (r.root / NAME / "notes.txt").touch(), ("warning", "stray", "tiny/notes.txt")),
        (lambda r: (r.root / "notes").write_text(""), ("warning", "stray", "notes")),
        (lambda r: (r.root / NAME / f"{STAGING_PREFIX}x").touch(), ("warning", "leftover", f"tiny/{STAGING_PREFIX}x")),
        (link, ("error", "link", "tiny/2/golden.npz")),
        (lambda r: (r.root / NAME / "2" / "golden.npz").unlink(), ("error", "missing", "tiny/2/golden.npz")),
        (lambda r: (r.root / NAME / "2" / MANIFEST_NAME).write_text("{}"), ("error", "manifest", "tiny/2")),
        (lambda r: spoil(r.root / NAME / "2" / MANIFEST_NAME), ("error", "digest", "tiny/2")),
        (lambda r: edit(r, "manifest.2", "manifest.7"), ("error", "unlisted", "tiny/2")),
        (lambda r: edit(r, "manifest.2", "manifest.7"), ("warning", "listed", "tiny/config.pbtxt")),
        (lambda r: edit(r, 'default_model_filename: "model.onnx"\n', ""), ("warning", "explicit", "tiny/config.pbtxt")),
        (lambda r: edit(r, "  batch_size: 8", "  batch_size: 7"), ("warning", "warmup", "tiny/config.pbtxt")),
        (
            lambda r: edit(r, "preferred_batch_size: 8", "preferred_batch_size: 99"),
            ("error", "batch", "tiny/config.pbtxt"),
        ),
        (
            lambda r: edit(r, "  default_queue_policy {\n  }\n", ""),
            ("warning", "batching", "tiny/config.pbtxt"),
        ),
        (lambda r: config(r).write_text("nonsense"), ("error", "config", "tiny/config.pbtxt")),
        (lambda r: (r.root / NAME / CURRENT_NAME).unlink(), ("warning", "in-force", "tiny/current.json")),
        (lambda r: (r.root / NAME / CURRENT_NAME).write_text("{}"), ("error", "in-force", "tiny/current.json")),
    ],
)
def test_a_finding_names_its_rule_and_place(
    break_it: Callable[[Local], Any], finding: tuple[str, str, str], four: Local
) -> None:
    break_it(four)
    assert finding in rules(four)


def test_choices_that_contradict_the_configuration_are_found(four: Local) -> None:
    (four.root / NAME / CURRENT_NAME).write_bytes(force.choose(four.root / NAME, 1).to_json())
    assert ("error", "in-force", "tiny/current.json") in rules(four)
    (four.root / NAME / CURRENT_NAME).write_bytes(force.choose(four.root / NAME, 3).to_json())
    messages = [each.message for each in lint.lint(four, model=NAME) if each.rule == "in-force"]
    assert messages == ["version 3 is in force, and a request without a version is answered by 4"]


def test_unsigned_is_an_error_where_keys_are_trusted(four: Local) -> None:
    key = signing.generate_key()
    trusted = {key.key_id: key.public()}
    assert {place for _, rule, place in rules(four, trusted) if rule == "signature"} == {
        "other/1",
        *(f"tiny/{version}" for version in (1, 2, 3, 4)),
    }
    sign(four, key)
    assert not any(rule == "signature" for _, rule, _ in rules(four, trusted))


# Collecting.


def collected(repository: Local, keep: int = 1, **options: Any) -> list[int]:
    return [version for _, version, _ in collect.collect(repository, keep=keep, model=NAME, **options).versions]


def test_old_versions_go_and_the_rest_verifies(four: Local) -> None:
    assert collected(four, dry_run=True) == [1, 2]
    assert four.versions(NAME) == [1, 2, 3, 4]
    assert collected(four) == [1, 2]
    assert four.versions(NAME) == [3, 4]
    assert sorted(read_config(config(four)).manifests) == [3, 4]
    assert wrong(four) == {}
    assert collected(four) == []
    assert publish(release(9), four.root, SETTINGS)[0] == 5


def test_what_is_in_force_and_what_came_before_it_never_goes(four: Local) -> None:
    rolled_back(four, 2)
    assert collected(four) == [3]
    assert four.versions(NAME) == [1, 2, 4]
    assert wrong(four) == {}


def test_one_version_loaded_still_keeps_its_predecessor(tmp_path: Path) -> None:
    one = ExportSettings(max_batch=16, preferred_batch_rows=(4, 8), keep_versions=1)
    for seed in (1, 2, 3):
        publish(release(seed), tmp_path / "models", one)
    assert collected(Local(tmp_path / "models")) == [1]


def test_leftovers_of_killed_writers_go_too(four: Local) -> None:
    root = four.root
    left = [root / NAME / f"{STAGING_PREFIX}abc", root.parent / f"{STAGING_PREFIX}models-abcd_123"]
    foreign = root.parent / f"{STAGING_PREFIX}models-other-abcd_123"
    for path in (*left, foreign):
        path.mkdir()
        (path / "model.onnx").write_bytes(b"half")
    found = collect.collect(four, keep=9, dry_run=True)
    assert sorted(found.leftovers) == sorted(path.name for path in left)
    collect.collect(four, keep=9)
    assert not any(path.exists() for path in left)
    assert foreign.exists(), "of a repository beside this one, whose lock nobody holds here"


def test_nothing_goes_while_a_publish_holds_the_lock(four: Local) -> None:
    with locked(four.root), pytest.raises(ComponentError, match="another publish"):
        collected(four)
    assert four.versions(NAME) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", [CURRENT_NAME, "config.pbtxt"])
def test_nothing_goes_where_what_is_in_force_cannot_be_told(name: str, four: Local) -> None:
    (four.root / NAME / name).write_text("{")
    assert collected(four) == []


def test_a_collection_cut_short_leaves_no_version_in_part(four: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: Path, **_: Any) -> None:
        (Path(path) / "model.onnx").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            collected(four)
    assert four.versions(NAME) == [2, 3, 4]
    assert wrong(four) == {2: wrong(four)[2]}, "listed no more, so neither served nor trusted"
    assert loaded(four) == [3, 4]
    assert collected(four) == [2]
    assert not list(four.root.rglob(f"{STAGING_PREFIX}*"))


# From folder to folder.


def copy(source: Local, target: Local, **options: Any) -> list[tuple[str, int, bool]]:
    options = {"terms": Terms(), "keep": KEEP} | options
    return [(each.model, each.version, each.copied) for each in transfer(source, target, **options)]


def test_what_is_in_force_is_copied_and_in_force_there(four: Local, tmp_path: Path) -> None:
    rolled_back(four, 3)
    target = Local(tmp_path / "target")
    assert copy(four, target) == [("other", 1, True), (NAME, 3, True)]
    assert force.in_force(target, NAME) == 3
    assert loaded(target) == [3]
    assert copy(four, target) == [("other", 1, False), (NAME, 3, False)]
    assert [each.error for each in check.verify(target)] == [None] * 4


def test_every_version_is_copied_and_one_is_in_force(four: Local, tmp_path: Path) -> None:
    rolled_back(four, 2)
    target = Local(tmp_path / "target")
    copy(four, target, every=True, models=[NAME])
    assert target.versions(NAME) == [1, 2, 3, 4]
    assert force.in_force(target, NAME) == 2
    assert loaded(target) == [1, 2]


def test_a_version_without_being_put_in_force(four: Local, tmp_path: Path) -> None:
    target = Local(tmp_path / "target")
    copy(four, target, models=[NAME], version=2)
    copy(four, target, models=[NAME], version=4, terms=Terms(activate=False))
    assert (target.versions(NAME), force.in_force(target, NAME), loaded(target)) == ([2, 4], 2, [2])
    copy(four, target, models=[NAME], version=4)
    assert (force.in_force(target, NAME), loaded(target)) == (4, [2, 4])


def test_a_published_number_never_gets_other_content(four: Local, tmp_path: Path) -> None:
    target = tmp_path / "target"
    publish_seeds(target, 7)
    before = {path: path.read_bytes() for path in sorted(target.rglob("*")) if path.is_file()}
    with pytest.raises(ArtifactError, match=r"published already, with other content.*immutable"):
        copy(four, Local(target), models=[NAME], version=1)
    assert {path: path.read_bytes() for path in sorted(target.rglob("*")) if path.is_file()} == before


def test_a_number_taken_by_something_else_is_not_overwritten(four: Local, tmp_path: Path) -> None:
    (tmp_path / "target" / NAME / "4").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="taken by what is no version"):
        copy(four, Local(tmp_path / "target"), models=[NAME])


def test_what_does_not_verify_is_not_copied(four: Local, tmp_path: Path) -> None:
    spoil(four.root / NAME / "4" / "model.onnx")
    with pytest.raises(DigestMismatchError):
        copy(four, Local(tmp_path / "target"), models=[NAME])
    key = signing.generate_key()
    with pytest.raises(SignatureError):
        copy(four, Local(tmp_path / "target"), models=["other"], terms=Terms(trusted={key.key_id: key.public()}))
    assert Local(tmp_path / "target").models() == []


@pytest.mark.parametrize("every", [False, True])
def test_what_was_refused_is_named(every: bool, four: Local, tmp_path: Path) -> None:
    broken = 2 if every else 4
    spoil(four.root / NAME / str(broken) / "model.onnx")
    with pytest.raises(
        DigestMismatchError, match=rf"model 'tiny' version {broken}: model\.onnx: wrong digest"
    ) as refused:
        copy(four, Local(tmp_path / "target"), every=every)
    assert refused.value.field == "model.onnx"
    assert broken not in Local(tmp_path / "target").versions(NAME)


def test_a_signature_goes_along(four: Local, tmp_path: Path) -> None:
    key = signing.generate_key()
    sign(four, key)
    target = Local(tmp_path / "target")
    copy(four, target, models=[NAME], terms=Terms(trusted={key.key_id: key.public()}))
    assert (target.root / NAME / "4" / SIGNATURE_NAME).is_file()
    assert wrong(target, {key.key_id: key.public()}) == {}


@pytest.mark.parametrize("address", ["ftp://host/x", "s3://", "s3://../x", "s3://bucket//x", "absent"])
def test_addresses_that_are_no_repository(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError), open_repository(address, RepositorySettings()):
        pass
    assert not list(tmp_path.iterdir())
