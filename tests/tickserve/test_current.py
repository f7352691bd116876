"""The version in force: written atomically, read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tickserve.current import CURRENT_NAME, Current, folder_in_force, read_current, write_current
from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.manifest import MANIFEST_NAME
from tickserve.store import sha256_file

DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for number in (1, 2, 3):
        folder = tmp_path / "model" / str(number)
        folder.mkdir(parents=True)
        (folder / MANIFEST_NAME).write_text(f'{{"number": {number}}}\n')
    return tmp_path / "model"


def test_what_is_written_is_read_with_the_choice_before_it(model: Path) -> None:
    assert read_current(model) is None
    assert folder_in_force(model) is None
    digest = sha256_file(model / "2" / MANIFEST_NAME)
    assert write_current(model, 2) == read_current(model) == Current(2, digest)
    assert json.loads((model / CURRENT_NAME).read_text()) == {"version": 2, "manifest_sha256": digest}
    write_current(model, 3)
    assert (read_current(model) or Current(0, "")).previous == 2
    write_current(model, 3)
    assert (read_current(model) or Current(0, "")).previous == 2
    assert folder_in_force(model) == model / "3"
    assert sorted(path.name for path in model.iterdir()) == ["1", "2", "3", CURRENT_NAME]


def test_a_version_that_is_not_there_cannot_be_put_in_force(model: Path) -> None:
    write_current(model, 2)
    with pytest.raises(ArtifactError, match="has no version 4"):
        write_current(model, 4)
    assert folder_in_force(model) == model / "2"


def test_another_manifest_under_the_number_is_refused(model: Path) -> None:
    write_current(model, 2)
    (model / "2" / MANIFEST_NAME).write_text("{}")
    with pytest.raises(DigestMismatchError, match="version 2 is not the one put in force"):
        folder_in_force(model)
    (model / "2" / MANIFEST_NAME).unlink()
    with pytest.raises(ArtifactError, match="has no version 2"):
        folder_in_force(model)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 3_000,
        " " * 5_000,
        '{"version": 1}',
        json.dumps({"version": "1", "manifest_sha256": DIGEST}),
        json.dumps({"version": True, "manifest_sha256": DIGEST}),
        json.dumps({"version": 0, "manifest_sha256": DIGEST}),
        json.dumps({"version": 1, "manifest_sha256": "sha256:0"}),
        json.dumps({"version": 1, "manifest_sha256": DIGEST, "previous": 0}),
        json.dumps({"version": 1, "manifest_sha256": DIGEST, "path": "../../x"}),
    ],
)
def test_what_is_no_choice_is_refused_and_can_be_replaced(model: Path, content: str) -> None:
    (model / CURRENT_NAME).write_text(content)
    with pytest.raises(ArtifactError, match=CURRENT_NAME):
        read_current(model)
    assert write_current(model, 1).previous is None
    assert folder_in_force(model) == model / "1"


def test_a_folder_in_its_place_is_a_typed_error(model: Path) -> None:
    (model / CURRENT_NAME).mkdir()
    with pytest.raises(ArtifactError, match="cannot read"):
        read_current(model)
