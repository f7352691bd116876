"""A full disk and a read-only file system: a typed error, nothing truncated is readable, and the next try is right."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.publish import NO_TERMS, publish
from export.repository import check, collect, force
from export.repository.places import Local
from export.repository.transfer import transfer
from serving.repository import survey
from tests.export.tiny import NAME, SETTINGS, publish_seeds, release
from tickserve.errors import ComponentError
from tickserve.store import STAGING_PREFIX

KEEP = SETTINGS.keep_versions


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file of this process grows past `size` bytes: a write of more fails, as on a disk that fills up in it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def two_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two") / "models"
    publish_seeds(root, 1, 2)
    return root


@pytest.fixture
def two(two_once: Path, tmp_path: Path) -> Local:
    return Local(Path(shutil.copytree(two_once, tmp_path / "models")))


def whole(repository: Local, versions: list[int]) -> None:
    """These versions are there and verify, and nothing else is."""
    assert repository.versions(NAME) == repository.taken(NAME) == versions
    assert [str(each.error) for each in check.verify(repository) if each.error] == []
    assert repository.leftovers() == []


def sizes(two_once: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (two_once / NAME / "2").iterdir()}


FILES = ("model.onnx", "golden.npz", "manifest.json")


@pytest.mark.parametrize("file", FILES)
def test_a_publish_on_a_disk_that_is_full_is_not_seen(file: str, two: Local, two_once: Path) -> None:
    with full_after(sizes(two_once)[file] - 1), pytest.raises(ComponentError, match="cannot write"):
        publish(release(3), two.root, SETTINGS)
    whole(two, [1, 2])
    assert publish(release(3), two.root, SETTINGS)[0] == 3
    whole(two, [1, 2, 3])


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("file", FILES)
def test_a_pull_to_a_disk_that_is_full_is_not_seen(
    file: str, new: bool, two: Local, two_once: Path, tmp_path: Path
) -> None:
    target = Local(tmp_path / "target")
    if not new:
        transfer(two, target, keep=KEEP, terms=NO_TERMS, version=1)
    with full_after(sizes(two_once)[file] - 1), pytest.raises(ComponentError, match="cannot write"):
        transfer(two, target, keep=KEEP, terms=NO_TERMS)
    if new:
        assert target.models() == []
    else:
        whole(target, [1])
    transfer(two, target, keep=KEEP, terms=NO_TERMS)
    whole(target, [2] if new else [1, 2])


def test_a_rollback_on_a_disk_that_is_full_changes_nothing(two: Local) -> None:
    with full_after(10), pytest.raises(ComponentError, match="cannot write"):
        force.rollback(two, NAME, 1, keep=KEEP)
    whole(two, [1, 2])
    assert force.in_force(two, NAME) == 2
    assert sorted(survey(two.root / NAME).served) == [1, 2]


def test_a_collection_on_a_disk_that_is_full_takes_no_version_away(two: Local) -> None:
    publish(release(3), two.root, SETTINGS)
    with full_after(10), pytest.raises(ComponentError, match="cannot write"):
        collect.collect(two, keep=1)
    whole(two, [1, 2, 3])


def test_the_limit_is_what_stops_it(two: Local) -> None:
    """The negative control: with room, the same publish goes through."""
    with full_after(10_000_000):
        assert publish(release(3), two.root, SETTINGS)[0] == 3


# In a mount namespace of its own, with a real small or read-only file system.

INSIDE = """
import shutil, sys
from pathlib import Path
from export.publish import NO_TERMS, publish
from export.repository import check, collect, force
from export.repository.places import Local
from export.repository.transfer import transfer
from tests.export.tiny import NAME, SETTINGS, publish_seeds, release
from tickserve.errors import ComponentError

source, mounted = Local(Path(sys.argv[1])), Path(sys.argv[2])

def refused(act):
    try:
        act()
    except ComponentError as error:
        assert "cannot write" in str(error), error
        return
    raise SystemExit("it went through")
"""
SMALL = """
import os
root = mounted / "models"
transfer(source, Local(root), keep=2, terms=NO_TERMS, version=1)
free = os.statvfs(mounted).f_bavail * os.statvfs(mounted).f_frsize
(mounted / "ballast").write_bytes(b"0" * (free - 8192))
refused(lambda: transfer(source, Local(root), keep=2, terms=NO_TERMS))
refused(lambda: publish(release(3), root, SETTINGS))
assert Local(root).versions(NAME) == Local(root).taken(NAME) == [1]
assert not [each for each in check.verify(Local(root)) if each.error]
(mounted / "ballast").unlink()
transfer(source, Local(root), keep=2, terms=NO_TERMS)
assert Local(root).versions(NAME) == [1, 2]
"""
READ_ONLY = """
before = {path: path.read_bytes() for path in mounted.rglob("*") if path.is_file()}
root = Local(mounted)
refused(lambda: publish(release(3), mounted, SETTINGS))
refused(lambda: force.rollback(root, NAME, 1, keep=2))
refused(lambda: collect.collect(root, keep=1))
refused(lambda: transfer(source, root, keep=2, terms=NO_TERMS))
assert not [each for each in check.verify(root) if each.error]
assert collect.collect(root, keep=1, dry_run=True).versions == []
assert {path: path.read_bytes() for path in mounted.rglob("*") if path.is_file()} == before
"""


@pytest.mark.system
@pytest.mark.parametrize(
    ("mount", "script", "prepare"),
    [
        ("mount -t tmpfs -o size=256k none {0}", SMALL, None),
        ("mount --bind {0} {0} && mount -o remount,bind,ro {0}", READ_ONLY, shutil.copytree),
    ],
)
def test_on_a_real_small_or_read_only_file_system(
    mount: str, script: str, prepare: Callable[..., object] | None, two: Local, tmp_path: Path, root: Path
) -> None:
    place = tmp_path / "mounted"
    if prepare:
        prepare(two.root, place)
    else:
        place.mkdir()
    (tmp_path / "inside.py").write_text(INSIDE + textwrap.dedent(script))
    command = f"{mount.format(place)} && exec {sys.executable} {tmp_path / 'inside.py'} {two.root} {place}"
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", command],
        capture_output=True,
        text=True,
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert not list(place.parent.rglob(f"{STAGING_PREFIX}*"))
