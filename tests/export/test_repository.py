"""A published repository: what is loaded, listed, verified, signed, compared and rolled back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.publish import publish
from export.repository import check, compare, force, listing
from export.repository.force import rollback
from export.repository.loaded import by_number, versions_to_load
from export.repository.places import Local
from export.repository.sign import sign
from export.triton_config import policy_of, read_config
from tests.export.four import KEEP, config, edit, loaded, rolled_back, spoil, wrong
from tests.export.tiny import NAME, SETTINGS, release
from tickserve import signing
from tickserve.current import CURRENT_NAME, Current, read_current
from tickserve.errors import ArtifactError, DigestMismatchError, SignatureError
from tickserve.manifest import MANIFEST_NAME

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
    for only in (2, None):
        with pytest.raises(DigestMismatchError, match="model 'tiny' version 2: "):
            sign(four, old, model=NAME, version=only)
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
