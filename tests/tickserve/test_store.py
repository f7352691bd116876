from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tickserve import store
from tickserve.errors import ComponentError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=5))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    try:
        text = store.canonical_json(value)
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8
        return
    assert text == store.canonical_json(dict(reversed(value.items())))
    assert json.loads(text) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"a": math.nan}])
def test_canonical_json_has_no_nan(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.canonical_json(value)


def test_digests_of_bytes_and_files_agree(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3_000_000)
    assert store.sha256_file(path) == store.sha256_bytes(b"x" * 3_000_000)
    known = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert store.sha256_bytes(b"") == known


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    store.write_atomic(path, b"one")
    store.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [item.name for item in path.parent.iterdir()] == ["file.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_with_nan_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    store.write_json_atomic(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json_atomic(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_reader_sees_the_old_or_the_new_never_a_part(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", {bytes([65 + n]) * 200_000 for n in range(4)}
    store.write_atomic(path, next(iter(contents)))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                store.write_atomic(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(path.read_bytes() in contents for _ in range(300))
    finally:
        stop.set()
        writer.join()


def unwritable_folders(tmp_path: Path) -> list[Path]:
    """Folders that even root cannot write: under a plain file, and in a file system without files."""
    (tmp_path / "plain").write_bytes(b"kept")
    return [tmp_path / "plain" / "out", Path("/proc/tickserve"), Path("/proc/self/fd")]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_unwritable_folder_is_a_typed_error(tmp_path: Path, which: int) -> None:
    folder = unwritable_folders(tmp_path)[which]
    with pytest.raises(ComponentError, match="choose a writable output folder") as caught:
        store.write_atomic(folder / "file", b"data")
    assert "'file'" in str(caught.value)
    entered = False
    with pytest.raises(ComponentError, match="cannot write"), store.staged_directory(folder / "x"):
        entered = True
    assert not entered
    assert (tmp_path / "plain").read_bytes() == b"kept"


def test_a_full_disk_keeps_the_old_content(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the write fails halfway, in a process of its own."""
    path = tmp_path / "file"
    store.write_atomic(path, b"old")
    limit = 1_000_000
    context = multiprocessing.get_context("fork")
    child = context.Process(target=write_over_the_limit, args=(path, limit))
    child.start()
    child.join()
    assert child.exitcode == 7
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def write_over_the_limit(path: Path, limit: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        store.write_atomic(path, bytes(limit + 1))
    except ComponentError:
        os._exit(7)
    os._exit(1)


def test_a_staged_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "version"
    with store.staged_directory(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a").write_bytes(b"a")
        assert not target.exists()
        assert staging.parent == target.parent
    assert (target / "sub" / "a").read_bytes() == b"a"
    assert target.stat().st_mode & 0o777 == 0o755
    assert [item.name for item in target.parent.iterdir()] == ["version"]


def fill_and_fail(target: Path, *, replace: bool = False) -> None:
    with store.staged_directory(target, replace=replace) as staging:
        (staging / "a").write_bytes(b"new")
        raise ZeroDivisionError


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "version"
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(target)
    assert list(tmp_path.iterdir()) == []


def test_a_version_is_immutable_unless_replaced_on_purpose(tmp_path: Path) -> None:
    target = tmp_path / "version"
    for content, replace in ((b"one", False), (b"two", True)):
        with store.staged_directory(target, replace=replace) as staging:
            (staging / "a").write_bytes(content)
    with pytest.raises(ComponentError, match="exists already"), store.staged_directory(target) as staging:
        (staging / "a").write_bytes(b"three")
    assert (target / "a").read_bytes() == b"two"
    assert [item.name for item in tmp_path.iterdir()] == ["version"]


def test_a_replacement_that_fails_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "version"
    with store.staged_directory(target) as staging:
        (staging / "a").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(target, replace=True)
    assert (target / "a").read_bytes() == b"old"


def stage_and_hang(target: Path) -> None:
    with store.staged_directory(target) as staging:
        (staging / "half").write_bytes(b"half")
        time.sleep(60)


def test_a_writer_killed_in_the_middle_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    target = tmp_path / "version"
    child = multiprocessing.get_context("fork").Process(target=stage_and_hang, args=(target,))
    child.start()
    while not list(tmp_path.glob(f"{store.STAGING_PREFIX}*/half")):
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not target.exists()
    assert all(item.name.startswith(store.STAGING_PREFIX) for item in tmp_path.iterdir())
    with store.staged_directory(target) as staging:
        (staging / "whole").write_bytes(b"whole")
    assert [item.name for item in target.iterdir()] == ["whole"]
