"""The platform, the stage folders, the libraries of the extras, and the native backend."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from tickserve import stages
from tickserve.doctor.finding import Finding
from tickserve.errors import ComponentError

DISTRIBUTIONS = {
    "pytriton": "nvidia-pytriton",
    "sklearn": "scikit-learn",
    "onnxconverter_common": "onnxconverter-common",
    "prometheus_client": "prometheus-client",
    "torch_pruning": "torch-pruning",
    "modelopt": "nvidia-modelopt",
    "pynvml": "nvidia-ml-py",
}
# Extras that no part of 'tickserve demo' uses.
OPTIONAL_EXTRAS = frozenset({"distributed"})
OPTIONAL = {
    "deepspeed": "pip install deepspeed; for trainer.sharding = 'deepspeed'",
    "torch_pruning": "pip install torch-pruning; for structured pruning",
    "modelopt": "pip install nvidia-modelopt; for QDQ graphs for TensorRT",
    "pynvml": "pip install nvidia-ml-py; GPU memory and utilisation in manifests",
}
PROGRAMS = {
    "py-spy": "pip install 'tickserve[profile]'; for 'tickserve profile --tool py-spy'",
    "nsys": "install NVIDIA Nsight Systems; for 'tickserve profile --tool nsys'",
}


def findings() -> list[Finding]:
    """What is installed, what `tickserve demo` needs first."""
    return [*_platform(), _stage_folders(), numpy(), *_extras(), native_backend(), *_optional(), *_programs()]


def _platform() -> list[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    python = platform.python_version()
    return [
        Finding("platform", system, system == "Linux x86_64", "the embedded server runs on Linux x86_64", needed=True),
        Finding("python", python, sys.version_info[:2] == (3, 11), "use Python 3.11", needed=True),
    ]


def _stage_folders() -> Finding:
    root = stages.checkout_root()
    found = [name for name in stages.STAGES if (root / name / "__init__.py").is_file()]
    missing = sorted(set(stages.STAGES) - set(found))
    fix = "" if not missing else f"missing: {', '.join(missing)}; run from a checkout or the image"
    return Finding("stage folders", f"{len(found)} of {len(stages.STAGES)}", not missing, fix, needed=True)


def numpy() -> Finding:
    """Its version: the embedded server answers wrongly with numpy 2."""
    version = importlib.metadata.version("numpy")
    ok = int(version.partition(".")[0]) < 2
    return Finding("numpy", version, ok, "the embedded server's Python stub needs numpy<2", needed=True)


def _extras() -> list[Finding]:
    return [
        library(module, f"pip install 'tickserve[{extra}]'", needed=extra not in OPTIONAL_EXTRAS)
        for module, extra in stages.EXTRAS.items()
    ]


def _optional() -> list[Finding]:
    return [library(module, fix) for module, fix in OPTIONAL.items()]


def library(module: str, fix: str, needed: bool = False) -> Finding:
    """Whether a module is there, and its version; it is not imported."""
    if find_spec(module) is None:
        return Finding(module, "not installed", False, fix, needed)
    try:
        found = importlib.metadata.version(DISTRIBUTIONS.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        found = "installed, its version is not recorded"
    return Finding(module, found, True, fix, needed)


def native_backend() -> Finding:
    """Whether the library of `serve.backend = native` was built."""
    what = "native backend (serve.backend)"
    try:
        return Finding(what, str(stages.load("serving.native").find_library().name), True, needed=True)
    except ComponentError as error:
        return Finding(what, "not built", False, error.hint or str(error), needed=True)


def _programs() -> list[Finding]:
    return [
        Finding(name, "found" if program(name) else "not installed", program(name) is not None, fix)
        for name, fix in PROGRAMS.items()
    ]


def program(name: str) -> Path | None:
    """An executable of this environment, or one on the PATH."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.is_file() else shutil.which(name)
    return Path(found) if found else None
