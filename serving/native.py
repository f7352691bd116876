"""The native `onnxruntime` backend: its library, compiled from serving/backends/native, and what it needs at run time.

It scores in the server's own process, which saves each request the way to a Python process and back. `make install`
compiles it with the compiler that the package `ziglang` carries: pinned, from pip, the same on every machine. The
library's name holds the digest of its sources, so that a stale one is never served with.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tickserve.errors import ComponentError, MissingExtraError, TickserveError
from tickserve.model_config import BACKEND
from tickserve.store import unwritable

SOURCES = Path(__file__).resolve().parent / "backends" / "native"
LIBRARY_NAME = f"libtriton_{BACKEND}.so"
# The oldest C library that the wheel of ONNX Runtime runs with: what is compiled here runs wherever that does.
TARGET = "x86_64-linux-gnu.2.28"
FLAGS = (
    *("-std=c11", "-D_GNU_SOURCE", "-O2", "-g0", "-s", "-shared", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-fno-sanitize=undefined", "-target", TARGET),
)
COMPILER = "ziglang"


def find_library() -> Path:
    """The compiled backend of these sources. Raises ComponentError when it was not built."""
    path = _library_path()
    if not path.is_file():
        raise ComponentError(
            "the native backend is not built",
            field="serve.backend",
            expected="native",
            was="no library of these sources",
            hint="make install builds it (with a network); serve.backend = 'python' does without",
        )
    return path


def environment(check: Path, limit_s: float) -> dict[str, str]:
    """Where the backend finds Python, ONNX Runtime and the check of a version, which may take `limit_s`.

    Raises MissingExtraError and ComponentError.
    """
    return {
        "TICKSERVE_BACKEND_PYTHON": sys.executable,
        "TICKSERVE_BACKEND_CHECK": str(check),
        "TICKSERVE_BACKEND_CHECK_LIMIT_S": f"{limit_s:g}",
        "TICKSERVE_BACKEND_ONNXRUNTIME": str(_onnxruntime()),
    }


def build() -> Path:
    """Compile the backend and return its library; what other sources left is removed.

    Raises MissingExtraError without a compiler, and ComponentError with the compiler's first words.
    """
    if find_spec(COMPILER) is None:
        raise MissingExtraError(f"{COMPILER} is needed to build the native backend", hint="make install brings it")
    path = _library_path()
    with tempfile.TemporaryDirectory(prefix="tickserve-build-") as folder:
        built = Path(folder) / LIBRARY_NAME
        cache = {f"ZIG_{kind}_CACHE_DIR": str(Path(folder) / kind) for kind in ("GLOBAL", "LOCAL")}
        command = [
            sys.executable,
            "-m",
            COMPILER,
            "cc",
            *FLAGS,
            *map(str, sorted(SOURCES.glob("*.c"))),
            "-o",
            str(built),
        ]
        done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ComponentError("the native backend does not compile", hint=done.stderr[-1_000:])
        _put(built, path)
    return path


def _put(built: Path, path: Path) -> None:
    try:
        staged = path.with_suffix(f".{os.getpid()}")
        staged.write_bytes(built.read_bytes())
        staged.chmod(0o755)
        staged.replace(path)
        for other in SOURCES.glob("*.so"):
            if other != path:
                other.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def _library_path() -> Path:
    digest = hashlib.sha256(repr(FLAGS).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + source.read_bytes())
    return SOURCES / f"{LIBRARY_NAME.removesuffix('.so')}-{digest.hexdigest()[:16]}.so"


def _onnxruntime() -> Path:
    """The library of ONNX Runtime inside its wheel, which the check uses too: one build, the same numbers."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise MissingExtraError.of("onnxruntime", "triton")
    found = sorted((Path(spec.origin).resolve().parent / "capi").glob("libonnxruntime.so.*"))
    if len(found) != 1:
        raise ComponentError(
            "this onnxruntime has no library of its own",
            field="serve.backend",
            expected="one capi/libonnxruntime.so",
            was=str(len(found)),
            hint="serve.backend = 'python' does without",
        )
    return found[0]


if __name__ == "__main__":
    if "--is-built" in sys.argv[1:]:
        sys.exit(0 if _library_path().is_file() else 1)
    try:
        print(f"native backend ready: {build().name}")  # noqa: T201 - what `make install` shows
    except TickserveError as error:
        sys.exit(f"error: {error}")
