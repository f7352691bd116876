"""The repository sync: exactly what is in force, verified before it is seen, and the old one until then."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.repository import check, lint
from export.repository import sync as module
from export.repository.force import rollback
from export.repository.places import Local
from export.repository.source import Folder, open_source
from export.repository.sync import MARKER_NAME, Result, sync
from export.triton_config import parse_config, policy_of
from tests.export.mirror import KEY, OTHER, SIGNED, TRUSTED, files, in_force
from tests.export.tiny import NAME, SETTINGS, publish_seeds, release
from tickserve import signing
from tickserve.config import RepositorySettings
from tickserve.current import CURRENT_NAME
from tickserve.errors import (
    ArtifactError,
    DigestMismatchError,
    SignatureError,
    TickserveError,
    UsageError,
)
from tickserve.manifest import GOLDEN_NAME, MANIFEST_NAME
from tickserve.model_config import CONFIG_NAME, MODEL_FILE

FOREIGN = signing.generate_key()


def run(desk: Path, into: Path, **options: Any) -> Result:
    return sync(Folder(desk), into, **({"trusted": TRUSTED} | options))


def all_verify(into: Path) -> bool:
    return [each.error for each in check.verify(Local(into), trusted=TRUSTED) if each.error] == []


def test_exactly_the_versions_in_force_arrive(desk: Path, into: Path) -> None:
    result = run(desk, into)
    assert [(each.model, each.version, each.copied, each.signed_by) for each in result.models] == [
        (OTHER, 1, True, KEY.key_id),
        (NAME, 3, True, KEY.key_id),
    ]
    assert in_force(into) == {NAME: 3, OTHER: 1}
    assert all_verify(into)
    assert {path.name for path in (into / NAME).iterdir()} == {CONFIG_NAME, CURRENT_NAME, "3"}
    for path in (desk / NAME / "3").iterdir():
        assert (into / NAME / "3" / path.name).read_bytes() == path.read_bytes()
    text = (into / NAME / CONFIG_NAME).read_text()
    assert policy_of(text) == ("specific", [3])
    assert list(parse_config(text).manifests) == [3]
    assert not list(into.parent.rglob(".staging-*"))
    assert [each for each in lint.lint(Local(into), trusted=TRUSTED) if each.rule == "stray"] == []


def test_a_second_sync_changes_nothing(desk: Path, into: Path) -> None:
    run(desk, into)
    before = {path: path.stat().st_mtime_ns for path in into.rglob("*") if path.is_file()}
    result = run(desk, into)
    assert [each.copied for each in result.models] == [False, False]
    assert result.removed == []
    after = {path: path.stat().st_mtime_ns for path in into.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {into / MARKER_NAME}


def test_a_rollback_at_the_source_is_followed_and_the_old_version_goes(desk: Path, into: Path) -> None:
    run(desk, into)
    rollback(Local(desk), NAME, 2, keep=SETTINGS.keep_versions)
    result = run(desk, into)
    assert result.removed == [f"{NAME}/3"]
    assert in_force(into) == {NAME: 2, OTHER: 1}
    assert json.loads((into / NAME / CURRENT_NAME).read_text())["previous"] == 3


def test_only_the_models_asked_for_are_served(desk: Path, into: Path) -> None:
    run(desk, into)
    assert run(desk, into, models=[OTHER]).removed == [NAME]
    assert in_force(into) == {OTHER: 1}
    with pytest.raises(ArtifactError, match=r"no model of that name: expected other, tiny, was 'gone'"):
        run(desk, into, models=["gone"])


def test_without_a_choice_the_newest_listed_version_is_in_force(desk: Path, into: Path) -> None:
    (desk / NAME / CURRENT_NAME).unlink()
    shutil.copytree(desk / NAME / "3", desk / NAME / "4")  # half a publish: no configuration lists it
    run(desk, into)
    assert in_force(into)[NAME] == 3


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def sign_as(desk: Path, version: int, number: int, key: signing.SigningKey) -> None:
    signing.sign_version(desk / NAME / str(version), number, key)


def edit(old: str, new: str) -> Callable[[Path], object]:
    def change(desk: Path) -> None:
        path = desk / NAME / CONFIG_NAME
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return change


def put_in_place_of(desk: Path) -> None:
    """An old version, signed as it is, in the place of the newest."""
    shutil.rmtree(desk / NAME / "3")
    shutil.copytree(desk / NAME / "1", desk / NAME / "3")
    old, new = (parse_config((desk / NAME / CONFIG_NAME).read_text()).manifests[each] for each in (1, 3))
    for name in (CONFIG_NAME, CURRENT_NAME):
        path = desk / NAME / name
        path.write_text(path.read_text().replace(new, old))


WRONG: dict[str, tuple[Callable[[Path], object], type[TickserveError], str]] = {
    "damaged model": (lambda desk: flip(desk / NAME / "3" / MODEL_FILE), DigestMismatchError, "model.onnx"),
    "damaged golden": (lambda desk: flip(desk / NAME / "3" / GOLDEN_NAME), DigestMismatchError, "golden.npz"),
    "damaged manifest": (lambda desk: flip(desk / NAME / "3" / MANIFEST_NAME), DigestMismatchError, r"manifest\.3"),
    "cut model": (lambda desk: os.truncate(desk / NAME / "3" / MODEL_FILE, 100), DigestMismatchError, "model.onnx"),
    "model missing": (lambda desk: (desk / NAME / "3" / MODEL_FILE).unlink(), ArtifactError, "model.onnx: missing"),
    "manifest missing": (lambda desk: (desk / NAME / "3" / MANIFEST_NAME).unlink(), ArtifactError, "missing"),
    "model a folder": (
        lambda desk: ((desk / NAME / "3" / MODEL_FILE).unlink(), (desk / NAME / "3" / MODEL_FILE).mkdir()),
        ArtifactError,
        "missing",
    ),
    "unsigned": (lambda desk: (desk / NAME / "3" / "manifest.sig").unlink(), SignatureError, "unsigned"),
    "foreign key": (lambda desk: sign_as(desk, 3, 3, FOREIGN), SignatureError, "not trusted"),
    "another number": (lambda desk: sign_as(desk, 3, 2, KEY), SignatureError, "signed as another version"),
    "old in new place": (put_in_place_of, SignatureError, "signed as another version"),
    "choice of nothing": (
        lambda desk: (desk / NAME / CURRENT_NAME).write_text('{"version": 3}'),
        ArtifactError,
        "manifest_sha256",
    ),
    "choice of a version that is not there": (
        lambda desk: (desk / NAME / CURRENT_NAME).write_text(
            json.dumps({"version": 9, "manifest_sha256": "sha256:" + "0" * 64})
        ),
        ArtifactError,
        "missing",
    ),
    "another backend": (edit('backend: "onnxruntime"', 'backend: "python"'), ArtifactError, "backend"),
    "a library": (
        edit("response_cache {", 'model_operations {\n  op_library_filename: "libx.so"\n}\nresponse_cache {'),
        ArtifactError,
        "model_operations",
    ),
    "a larger batch": (edit("max_batch_size: 16", "max_batch_size: 64"), ArtifactError, "max_batch_size"),
    "another tensor": (edit("  dims: 4\n", "  dims: 5\n"), ArtifactError, "input"),
    "other text": (edit("name:", "name :"), ArtifactError, "config.pbtxt line 2"),
    "another model's": (edit('name: "tiny"', 'name: "other"'), ArtifactError, "wrong model name"),
    "no model": (shutil.rmtree, ArtifactError, "holds no model"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_verify_leaves_the_old_version_in_force(wrong: str, desk: Path, into: Path) -> None:
    """Fault 15 at this level; and with an empty folder nothing at all is seen."""
    damage, error, message = WRONG[wrong]
    rollback(Local(desk), NAME, 2, keep=SETTINGS.keep_versions)
    run(desk, into)
    before = files(into)
    rollback(Local(desk), NAME, 3, keep=SETTINGS.keep_versions)
    damage(desk)
    if not desk.exists():
        desk.mkdir()
    for target in (into, into.with_name("empty")):
        with pytest.raises(error, match=message):
            run(desk, target)
    assert files(into) == before
    assert in_force(into) == {NAME: 2, OTHER: 1}
    assert files(into.with_name("empty")) == {} if into.with_name("empty").exists() else True
    assert not list(into.parent.rglob(".staging-*"))


def test_without_keys_what_is_unsigned_arrives(desk: Path, into: Path) -> None:
    """The negative control of the signature: digests alone let it through."""
    (desk / NAME / "3" / "manifest.sig").unlink()
    result = run(desk, into, trusted=None)
    assert {each.model: each.signed_by for each in result.models} == {NAME: None, OTHER: KEY.key_id}


def test_code_beside_a_model_does_not_arrive(desk: Path, into: Path) -> None:
    for place in (desk / NAME, desk / NAME / "3"):
        (place / "model.py").write_text("raise SystemExit")
        (place / "libtriton_onnxruntime.so").write_bytes(b"\x7fELF")
    run(desk, into)
    assert {path.name for path in into.rglob("*") if path.is_file()} == {
        *(CONFIG_NAME, CURRENT_NAME, MODEL_FILE, GOLDEN_NAME, MANIFEST_NAME, "manifest.sig"),
        *(MARKER_NAME, ".publish.lock"),
    }


def test_models_larger_than_the_limit_are_refused_together(desk: Path, into: Path) -> None:
    sizes = [each.size_bytes for each in run(desk, into).models]
    empty = into.with_name("empty")
    with pytest.raises(ArtifactError, match=f"model 'tiny' version 3.*expected {sizes[1] - 1} bytes"):
        run(desk, empty, limit_bytes=sum(sizes) - 1)
    assert files(empty) == {}
    assert len(run(desk, empty, limit_bytes=sum(sizes)).models) == 2


def test_a_folder_of_something_else_is_not_taken_for_a_mirror(desk: Path, into: Path) -> None:
    with pytest.raises(UsageError, match="holds what no sync put there"):
        run(desk, desk)
    into.mkdir()
    (into / "lost+found").mkdir()
    with pytest.raises(UsageError, match=r"lost\+found.*name a folder inside it"):
        run(desk, into)
    assert list(into.iterdir()) == [into / "lost+found"]
    assert in_force(desk) == {NAME: 3, OTHER: 1}


def test_a_damaged_copy_is_replaced_and_another_versions_number_is_not(desk: Path, into: Path, tmp_path: Path) -> None:
    run(desk, into)
    flip(into / NAME / "3" / MODEL_FILE)
    (into / NAME / CURRENT_NAME).write_text("{")
    assert {each.model: each.copied for each in run(desk, into).models} == {NAME: True, OTHER: False}
    assert in_force(into) == {NAME: 3, OTHER: 1}
    publish_seeds(tmp_path / "elsewhere", 7, 8, 9, terms=SIGNED)
    with pytest.raises(ArtifactError, match="lies in the folder already, with other content"):
        run(tmp_path / "elsewhere", into)
    assert in_force(into) == {NAME: 3, OTHER: 1}


def test_a_new_signature_is_taken_over(desk: Path, into: Path) -> None:
    run(desk, into)
    sign_as(desk, 3, 3, FOREIGN)
    keys = TRUSTED | {FOREIGN.key_id: FOREIGN.public()}
    assert {each.signed_by: each.copied for each in run(desk, into, trusted=keys).models}[FOREIGN.key_id] is False
    assert signing.verify_signature(into / NAME / "3", keys) == FOREIGN.key_id


def die_at(count: int) -> None:
    """End this process, as a SIGKILL does, before its change number `count` of the file system."""
    changes = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and next(changes) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(count: int, work: Callable[[], object]) -> bool:
    """Whether the work, in a process of its own, was killed at its change number `count`; else it got to its end."""
    child = os.fork()
    if child == 0:
        try:
            die_at(count)
            work()
            os._exit(0)
        finally:
            os._exit(9)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("first", [True, False])
def test_killed_at_any_change_either_version_is_served_whole(first: bool, desk: Path, tmp_path: Path) -> None:
    """Fault 16 at this level, and the next sync finishes it."""
    old = {} if first else {NAME: 2, OTHER: 1}
    ready = tmp_path / "ready"
    if not first:
        rollback(Local(desk), NAME, 2, keep=SETTINGS.keep_versions)
        run(desk, ready)
        rollback(Local(desk), NAME, 3, keep=SETTINGS.keep_versions)
    states = []
    for count in itertools.count(1):
        case = tmp_path / f"case-{count}" / "models"
        case.parent.mkdir()
        if not first:
            shutil.copytree(ready, case)
        died = killed(count, functools.partial(run, desk, case))
        states.append(in_force(case))
        run(desk, case)
        assert in_force(case) == {NAME: 3, OTHER: 1}
        assert all_verify(case)
        assert not list(case.parent.rglob(".staging-*")), count
        if not died:
            break
    assert states[0] == old
    assert states[-1] == {NAME: 3, OTHER: 1}
    assert len(states) > 15, "it was killed at every change"
    allowed = [old, {OTHER: 1}, {NAME: 3, OTHER: 1}] if first else [old, {NAME: 3, OTHER: 1}]
    assert [state for state in states if state not in allowed] == []


def test_a_mount_is_staged_inside(desk: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a mount point lies another file system, or a read-only one."""
    seen = []
    original = module._commit

    def look(staged: Any, target: Path, staging: Path) -> list[str]:
        seen.append(staging.parent)
        return original(staged, target, staging)

    monkeypatch.setattr(module, "_commit", look)
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    run(desk, into)
    assert set(seen) == {into}
    assert in_force(into) == {NAME: 3, OTHER: 1}


@pytest.mark.parametrize("where", ["http://host/models", "oci://registry/models", "no-such-folder"])
def test_another_kind_of_address_is_refused(where: str) -> None:
    with pytest.raises(UsageError, match="--source"):
        open_source(where, RepositorySettings())


def test_a_bundle_that_no_publish_gated_is_no_version(tmp_path: Path, into: Path) -> None:
    publish_seeds(tmp_path / "one", 1, terms=SIGNED)
    manifest = release(1).manifest.model_copy(update={"export": None})
    folder = tmp_path / "one" / NAME / "1"
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest.stored()))
    with pytest.raises(TickserveError):
        run(tmp_path / "one", into)
    assert files(into) == {}
