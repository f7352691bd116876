"""Compiled once: the cache is used, keyed by all of the engine's sources, and no vector maths library is in play."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tickserve.features import compile as compile_module
from tickserve.features import jit, kernels

# What a start of the engine does: the kernel loaded from the cache, and whether its code is free of fast-math and SVML.
START = """
from tickserve.features import kernels
hits = sum(kernels.advance.stats.cache_hits.values())
llvm = "" if hits else "".join(kernels.advance.inspect_llvm().values())
print(hits, len(llvm) > 100_000, "__svml" in llvm, "fmul fast" in llvm or "fadd fast" in llvm or "reassoc" in llvm)
"""


def start_engine(cwd: Path, cache: Path) -> list[str]:
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", START]
    result = subprocess.run(command, check=True, cwd=cwd, env=environ, capture_output=True, text=True, timeout=240)
    return result.stdout.split()


@pytest.mark.system
def test_compiled_once_without_fast_math_then_loaded(root: Path, tmp_path: Path) -> None:
    assert start_engine(root, tmp_path) == ["0", "True", "False", "False"]
    assert list(tmp_path.rglob("*.nbi"))
    assert start_engine(root, tmp_path) == ["1", "False", "False", "False"]


def test_no_vector_maths_library() -> None:
    assert os.environ["NUMBA_DISABLE_INTEL_SVML"] == "1"
    assert not jit.config.USING_SVML
    assert not kernels.advance.targetoptions["fastmath"]


def test_the_kernel_serves_every_spec_without_compiling() -> None:
    before = len(kernels.advance.signatures)
    assert compile_module.main() == 0
    assert len(kernels.advance.signatures) == before == 1


def test_the_cache_key_follows_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(Path(jit.__file__).parent, tmp_path / "features"))
    monkeypatch.setattr(jit, "__file__", str(folder / "jit.py"))
    same = jit.source_fingerprint()
    changed = set()
    names = ("windows.py", "elementary.py", "book_stage.py", "book_updates.py", "bar_updates.py", "kernels.py")
    for name in (*names, "catalog.py", "jit.py"):
        (folder / name).write_text((folder / name).read_text() + "# edited\n")
        changed.add(jit.source_fingerprint())
    assert len(changed | {same}) == 9
    (folder / "spec.py").write_text("")
    assert jit.source_fingerprint() in changed


def test_the_kernel_captures_the_fingerprint() -> None:
    cells = [cell.cell_contents for cell in kernels.advance.py_func.__closure__]
    assert cells == [jit.source_fingerprint()]
