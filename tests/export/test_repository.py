"""A published repository: what is listed, verified, compared, linted, rolled back, signed and collected."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.publish import Terms, publish
from export.repository import check, collect, compare, force, lint, listing
from export.repository.force import rollback
from export.repository.loaded import by_number, versions_to_load
from export.repository.lock import locked
from export.repository.places import Local, open_repository
from export.repository.sign import sign
from export.repository.transfer import transfer
from export.triton_config import policy_of, read_config
from serving.repository import survey
from tests.export.tiny import NAME, SETTINGS, publish_seeds, release
from tickserve import signing
from tickserve.config import ExportSettings, RepositorySettings
from tickserve.current import CURRENT_NAME, Current, read_current
from tickserve.errors import ArtifactError, ComponentError, DigestMismatchError, SignatureError, UsageError
from tickserve.manifest import MANIFEST_NAME
from tickserve.signing import SIGNATURE_NAME
from tickserve.store import STAGING_PREFIX

KEEP = SETTINGS.keep_versions


@pytest.fixture(scope="module")
def four_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("four") / "models"
    publish_seeds(root, 1, 2, 3, 4)
    publish_seeds(root, 5, name="other")
    return root


@pytest.fixture
def four(four_once: Path, tmp_path: Path) -> Local:
    """Four versions of `tiny` and one of `other`, for a test to spoil."""
    return Local(Path(shutil.copytree(four_once, tmp_path / "models")))


def loaded(repository: Local) -> list[int]:
    return sorted(survey(repository.root / NAME).served)


def rolled_back(repository: Local, to: int | None = None) -> tuple[int | None, int]:
    move = rollback(repository, NAME, to, keep=KEEP)
    return move.before, move.now


def spoil(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# What Triton loads.


@pytest.mark.parametrize(
    ("versions", "current", "keep", "load"),
    [
        ([1, 2, 3], None, 2, [2, 3]),
        ([1, 2, 3], Current(3, "", 2), 2, [2, 3]),
        ([1, 2, 3], Current(3, "", 1), 2, [1, 3]),
        ([1, 2, 3], Current(2, "", 3), 2, [1, 2]),
        ([1, 2, 3], Current(1, "", 3), 2, [1]),
        ([1, 2, 3], Current(2, "", None), 1, [2]),
        ([1, 2, 3], Current(9, "", None), 2, [2, 3]),
        ([], None, 2, []),
    ],
)
def test_nothing_newer_than_the_version_in_force_is_loaded(
    versions: list[int], current: Current | None, keep: int, load: list[int]
) -> None:
    assert versions_to_load(versions, current, keep) == load
    assert by_number(versions, load, keep) == (None if load == versions[-keep:] else load)


# Rolling back.


def test_a_rollback_goes_to_the_version_before_and_on(four: Local) -> None:
    assert rolled_back(four) == (4, 3)
    assert read_current(four.root / NAME) == Current(3, read_config(config(four)).manifests[3], previous=4)
    assert loaded(four) == [2, 3]
    assert rolled_back(four) == (3, 2)
    assert rolled_back(four) == (2, 1)
    with pytest.raises(ArtifactError, match="no version before"):
        rolled_back(four)
    assert rolled_back(four, 4) == (1, 4)
    assert loaded(four) == [1, 4]


def config(repository: Local) -> Path:
    return repository.root / NAME / "config.pbtxt"


def test_after_a_rollback_the_next_publish_goes_back_to_what_was_good(four: Local) -> None:
    rolled_back(four, 2)
    publish(release(6), four.root, SETTINGS)
    assert loaded(four) == [2, 5]
    assert rolled_back(four) == (5, 2)


def test_a_rollback_leaves_the_rest_of_the_configuration_alone(four: Local) -> None:
    edit(four, "preferred_batch_size: 4", "preferred_batch_size: 2")
    rolled_back(four)
    assert "preferred_batch_size: 2" in config(four).read_text()


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz", MANIFEST_NAME])
def test_a_version_that_does_not_verify_is_not_rolled_back_to(file: str, four: Local) -> None:
    spoil(four.root / NAME / "3" / file)
    before = (config(four).read_bytes(), (four.root / NAME / CURRENT_NAME).read_bytes())
    with pytest.raises(ArtifactError):
        rolled_back(four)
    assert (config(four).read_bytes(), (four.root / NAME / CURRENT_NAME).read_bytes()) == before
    assert loaded(four) == [2, 4]


def test_versions_and_models_that_are_not_there(four: Local) -> None:
    with pytest.raises(ArtifactError, match=r"has no version 9 of 'tiny': expected 1, 2, 3, 4"):
        rolled_back(four, 9)
    with pytest.raises(ArtifactError, match="no model of that name: expected other, tiny, was 'absent'"):
        rollback(four, "absent", None, keep=KEEP)
    with pytest.raises(ArtifactError, match="no version before"):
        rollback(four, "other", None, keep=KEEP)


class Stops(Local):
    """A writer that dies before its n-th write."""

    left = 0

    def put(self, name: str, data: bytes) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        super().put(name, data)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_rollback_cut_short_serves_either_version_whole_and_can_be_finished(writes: int, four: Local) -> None:
    cut = Stops(four.root)
    cut.left = writes
    with pytest.raises(KeyboardInterrupt):
        rollback(cut, NAME, 1, keep=KEEP)
    current = read_current(four.root / NAME)
    assert current is not None
    assert current.version == (4 if writes < 2 else 1)
    assert current.version in loaded(four)
    assert {1, 4} <= set(loaded(four)) or writes == 0
    rolled_back(four, 1)
    assert loaded(four) == [1]


def test_a_rollback_waits_for_no_unsigned_version(four: Local) -> None:
    key = signing.generate_key()
    with pytest.raises(SignatureError, match="unsigned"):
        rollback(four, NAME, 3, keep=KEEP, trusted={key.key_id: key.public()})
    assert force.in_force(four, NAME) == 4


# Listing.


def test_the_list_says_what_is_in_force_loaded_and_kept(four: Local) -> None:
    rolled_back(four, 2)
    found = listing.entries(four, keep=1, model=NAME)
    assert [(each.version, each.in_force, each.loaded, each.kept) for each in found] == [
        (1, False, True, True),
        (2, True, True, True),
        (3, False, False, False),
        (4, False, False, True),
    ]
    assert {each.signature for each in found} == {"unsigned"}
    assert all(
        each.size_bytes == sum(p.stat().st_size for p in (four.root / NAME / str(each.version)).iterdir())
        for each in found
    )
    assert {each.created for each in found} == {"2026-01-01T00:00:00Z"}
    assert [each.model for each in listing.entries(four, keep=1)] == ["other", *[NAME] * 4]


def test_the_list_says_whose_signature_it_is(four: Local) -> None:
    ours, theirs = signing.generate_key(), signing.generate_key()
    trusted = {ours.key_id: ours.public()}
    assert sign(four, ours, model=NAME, version=3) == [(NAME, 3)]
    assert sign(four, theirs, model=NAME, version=4) == [(NAME, 4)]
    found = [
        (each.version, each.signed_by, each.signature)
        for each in listing.entries(four, keep=1, trusted=trusted, model=NAME)
    ]
    assert found[1:] == [(2, None, "unsigned"), (3, ours.key_id, "trusted"), (4, theirs.key_id, "refused")]
    assert listing.entries(four, keep=1, model=NAME)[2].signature == "unchecked"


def test_a_broken_version_is_listed_with_its_problem(four: Local) -> None:
    (four.root / NAME / "2" / MANIFEST_NAME).write_text("{}")
    assert "manifest is not valid" in (listing.entries(four, keep=1, model=NAME)[1].problem or "")


# Verifying.


def wrong(repository: Local, trusted: signing.TrustedKeys | None = None) -> dict[int | None, str]:
    return {
        each.version: str(each.error) for each in check.verify(repository, model=NAME, trusted=trusted) if each.error
    }


def test_what_was_just_published_verifies(four: Local) -> None:
    assert [each.error for each in check.verify(four)] == [None] * 7


@pytest.mark.parametrize(
    ("break_it", "where", "says"),
    [
        (lambda model: spoil(model / "2" / "model.onnx"), 2, "model.onnx: wrong digest"),
        (lambda model: spoil(model / "2" / "golden.npz"), 2, "golden.npz: wrong digest"),
        (lambda model: (model / "2" / "golden.npz").unlink(), 2, "golden.npz"),
        (lambda model: spoil(model / "2" / MANIFEST_NAME), 2, "manifest.2: wrong digest"),
        (lambda model: (model / CURRENT_NAME).write_text("{}"), None, CURRENT_NAME),
        (lambda model: shutil.rmtree(model / "4"), None, "has no version 4"),
        (lambda model: (model / "config.pbtxt").unlink(), None, "missing"),
    ],
)
def test_what_is_wrong_is_named(break_it: Callable[[Path], Any], where: int | None, says: str, four: Local) -> None:
    break_it(four.root / NAME)
    assert says in wrong(four)[where]


def test_a_choice_that_triton_does_not_load_is_found(four: Local) -> None:
    text = config(four).read_text()
    assert policy_of(text) == ("latest", [KEEP])
    (four.root / NAME / CURRENT_NAME).write_bytes(force.choose(four.root / NAME, 1).to_json())
    assert "does not load the version in force" in wrong(four)[None]


# Signing.


def test_signing_twice_replaces_and_a_broken_version_is_not_signed(four: Local) -> None:
    old, new = signing.generate_key(), signing.generate_key()
    sign(four, old)
    assert wrong(four, {old.key_id: old.public()}) == {}
    sign(four, new)
    assert set(wrong(four, {old.key_id: old.public()})) == {1, 2, 3, 4}
    assert wrong(four, {new.key_id: new.public()}) == {}
    spoil(four.root / NAME / "2" / "model.onnx")
    with pytest.raises(DigestMismatchError):
        sign(four, old, model=NAME, version=2)
    assert signing.signed_by(four.root / NAME / "2") == new.key_id
    with pytest.raises(ArtifactError, match="has no version 9"):
        sign(four, old, model=NAME, version=9)


# Comparing.


def test_two_versions_differ_in_what_differs(four: Local) -> None:
    found = {each.field: (each.a, each.b) for each in compare.versions(four.folder(NAME, 1), four.folder(NAME, 2))}
    assert found["metrics.accuracy"] == (0.51, 0.52)
    assert found["provenance.seed"] == (1, 2)
    assert {"published.model.onnx", "published.golden.npz", "published.manifest.json"} <= set(found)
    assert not any(field.startswith(("features.", "config.")) for field in found)
    assert compare.versions(four.folder(NAME, 1), four.folder(NAME, 1)) == []


def test_features_are_compared_by_name(tmp_path: Path) -> None:
    one = release(1).manifest
    moved = one.features.model_copy(update={"columns": ("f1", "f0", "f2", "f9"), "maximum": (4.0, 4.0, 4.0, 5.0)})
    first = publish(release(1), tmp_path / "a", SETTINGS)[1]
    other = publish(release(1, features=moved), tmp_path / "b", SETTINGS)[1]
    found = {each.field: (each.a, each.b) for each in compare.versions(first, other)}
    assert found["features.f0.position"] == (0, 1)
    assert found["features.f9.maximum"] == (None, 5.0)
    assert found["features.f3.maximum"] == (4.0, None)
    assert "features.f2.position" not in found


def test_two_repositories_differ_by_model_version_choice_and_configuration(four: Local, tmp_path: Path) -> None:
    copy = Local(Path(shutil.copytree(four.root, tmp_path / "copy")))
    assert compare.repositories(four, copy) == []
    rolled_back(copy)
    shutil.rmtree(copy.root / "other")
    found = {each.field: (each.a, each.b) for each in compare.repositories(four, copy)}
    assert found["tiny.in_force"] == (4, 3)
    assert found["other.in_force"] == (1, None)
    assert any(field.startswith("tiny.config.version_policy") for field in found)


# Linting.


def rules(repository: Local, trusted: signing.TrustedKeys | None = None) -> set[tuple[str, str, str]]:
    return {(each.level, each.rule, each.place) for each in lint.lint(repository, trusted=trusted)}


def edit(repository: Local, old: str, new: str) -> None:
    text = config(repository).read_text()
    assert old in text
    config(repository).write_text(text.replace(old, new))


def test_what_was_just_published_has_no_errors(four: Local) -> None:
    assert {rule for _, rule, _ in rules(four)} <= {"batching"}
    assert not any(level == "error" for level, _, _ in rules(four))


def link(repository: Local) -> None:
    (repository.root / NAME / "2" / "golden.npz").unlink()
    (repository.root / NAME / "2" / "golden.npz").symlink_to(repository.root / NAME / "1" / "golden.npz")


@pytest.mark.parametrize(
    ("break_it", "finding"),
    [
        (lambda r: (r.root / NAME / "9").mkdir(), ("error", "version", "tiny/9")),
        (lambda r: (r.root / NAME / "2" / "notes.txt").touch(), ("warning", "stray", "tiny/2/notes.txt")),
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
