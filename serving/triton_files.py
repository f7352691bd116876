"""NVIDIA's tritonserver inside the nvidia-pytriton wheel: where it is, whether it runs here, and its backends folder.

The wheel carries the server binary, the Python backend and one stub per Python version. Our `onnxruntime` backend joins
them as a library of its own (serving/native.py), or by Triton's Python-based backend rule: a folder of its name that
holds `model.py`, beside the folder `python`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import tickserve
from serving import native
from tickserve.config import BackendKind, ServeSettings
from tickserve.errors import ComponentError, MissingExtraError, UnsupportedPlatformError
from tickserve.model_config import BACKEND

WHEEL, PACKAGE = "nvidia-pytriton", "pytriton"
STUB_NAME = "triton_python_backend_stub"
BACKENDS = Path(__file__).resolve().parent / "backends"
OUR_BACKEND = BACKENDS / BACKEND / "model.py"
CHECK = BACKENDS / "served_version.py"


@dataclass(frozen=True)
class TritonFiles:
    """The parts of the wheel that the embedded server uses."""

    binary: Path
    python_backend: Path
    stub: Path
    caches: Path
    libraries: Path


def find_triton() -> TritonFiles:
    """The embedded server's files.

    Raises UnsupportedPlatformError where the wheel does not cover this platform, MissingExtraError where it is not
    installed, and ComponentError where numpy is too new for its stub.
    """
    _check_platform()
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError.of(WHEEL, "triton")
    # Found, never imported: importing pytriton starts threads and loads its own client.
    package = Path(spec.origin).resolve().parent
    files = TritonFiles(
        binary=package / "tritonserver" / "bin" / "tritonserver",
        python_backend=package / "tritonserver" / "backends" / "python",
        stub=package / "tritonserver" / "python_backend_stubs" / _python_version() / STUB_NAME,
        caches=package / "tritonserver" / "caches",
        libraries=package.parent / "nvidia_pytriton.libs",
    )
    if not files.binary.is_file() or not files.libraries.is_dir():
        raise MissingExtraError.of(f"{WHEEL} (with its tritonserver)", "triton")
    _check_python(files.stub)
    return files


def _python_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def _check_platform() -> None:
    here = f"{platform.system()} {platform.machine()} {platform.libc_ver()[0] or 'without glibc'}"
    if here != "Linux x86_64 glibc":
        raise UnsupportedPlatformError(
            "the embedded Triton does not run here",
            expected="Linux x86_64 glibc",
            was=here,
            hint="run the server image in a container, and point the client at it",
        )


def _check_python(stub: Path) -> None:
    if not stub.is_file():
        stubs = ", ".join(sorted(path.name for path in stub.parents[1].glob("3.*"))) or "none"
        raise UnsupportedPlatformError(
            "the embedded Triton has no stub for this Python", expected=f"Python {stubs}", was=_python_version()
        )
    if find_spec("onnxruntime") is None:
        raise MissingExtraError.of("onnxruntime", "triton")
    numpy_version = metadata.version("numpy")
    if int(numpy_version.partition(".")[0]) >= 2:
        # With numpy 2 the stub hands over wrong inputs without a word.
        raise ComponentError(
            "too new for the embedded Triton's Python stub",
            field="numpy",
            expected="< 2",
            was=numpy_version,
            hint="pip install 'tickserve[triton]' in an environment of the server's own; clients may use numpy 2",
        )


def environment(files: TritonFiles, backends: Path, settings: ServeSettings) -> dict[str, str]:
    """The environment variables of the server and its processes; `backends` is what `lay_out_backends` filled.

    Raises UnsupportedPlatformError, MissingExtraError and ComponentError for what the backend lacks here.
    """
    # The stub embeds Python and finds packages through the first python3 on PATH; PYTHON* variables mean nothing to it.
    interpreter = str(Path(sys.executable).parent)
    libraries = [str(files.libraries), *_libpython_folder()]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return inherited | {
        "PATH": os.pathsep.join([interpreter, os.environ.get("PATH", os.defpath)]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        # Files a server writes into the checkout would be another user's in a container.
        "PYTHONDONTWRITEBYTECODE": "1",
        **(_of_native(backends, settings) if settings.backend == "native" else {}),
    }


def _of_native(backends: Path, settings: ServeSettings) -> dict[str, str]:
    # A little less than the start may take, so that the reason is told and not only that time is up.
    return native.environment(backends / BACKEND / CHECK.name, 0.9 * settings.start_timeout_s)


def _libpython_folder() -> list[str]:
    """Where this interpreter keeps its shared library, which the stub links; nothing when the system has it."""
    name = f"libpython{_python_version()}.so.1.0"
    folder = Path(str(sysconfig.get_config_var("LIBDIR") or ""))
    if (folder / name).is_file():
        return [str(folder)]
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise UnsupportedPlatformError(
            f"the embedded Triton's stub needs {name}",
            hint="install your system's libpython package, or a Python built with --enable-shared",
        ) from error
    return []


def lay_out_backends(files: TritonFiles, folder: Path, kind: BackendKind) -> Path:
    """Fill `folder` with a backends folder that has our backend of `kind`, and return it.

    Links where Triton takes them: it copies nothing that a killed process would leave behind, and a temporary folder
    mounted `noexec` does not keep the stub from starting. It does keep libraries from loading, and Triton refuses one
    that is a link here, so both backends need a temporary folder (TMPDIR) that may hold code. Raises ComponentError
    where the native backend was not built.
    """
    ours = folder / BACKEND
    ours.mkdir(parents=True)
    # Both backends check a version by this file, and read its configuration with this very package.
    (ours / CHECK.name).symlink_to(CHECK)
    (ours / "tickserve").symlink_to(Path(tickserve.__file__).resolve().parent)
    if kind == "native":
        shutil.copy2(native.find_library(), ours / native.LIBRARY_NAME)
    else:
        _lay_out_python(files, folder / "python", ours)
    return folder


def _lay_out_python(files: TritonFiles, python: Path, ours: Path) -> None:
    """NVIDIA's Python backend, and ours on top of it."""
    python.mkdir()
    for library in files.python_backend.glob("*.so"):
        shutil.copy2(library, python / library.name)
    for source in (*files.python_backend.glob("*.py"), files.stub):
        (python / source.name).symlink_to(source)
    (ours / OUR_BACKEND.name).symlink_to(OUR_BACKEND)
