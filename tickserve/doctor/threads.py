"""Threads of the numeric libraries, and the kernels PyTorch computes with on a CPU."""

from __future__ import annotations

import importlib
import os
from typing import Any

from tickserve.doctor.finding import Finding, unknown


def findings() -> list[Finding]:
    """Cores, OpenMP's threads, PyTorch's, ONNX Runtime's."""
    cores = len(os.sched_getaffinity(0))
    return [
        Finding("cores", str(cores), True),
        openmp(os.environ.get("OMP_NUM_THREADS"), cores),
        *_torch(cores),
        *_ort(),
    ]


def openmp(value: str | None, cores: int) -> Finding:
    """OMP_NUM_THREADS against the cores this process may use: more threads than cores only wait for each other."""
    what, fix = "OMP_NUM_THREADS", f"export OMP_NUM_THREADS={cores}, or a smaller number where several processes share"
    if value is None:
        return Finding(what, f"not set: libraries take all {cores} cores unless a setting says otherwise", True)
    first = value.split(",")[0].strip()
    return Finding(what, value, first.isdigit() and 1 <= int(first) <= cores, fix)


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:  # not installed, or its libraries do not load here
        return None


def _torch(cores: int) -> list[Finding]:
    torch = _imported("torch")
    install = "pip install 'tickserve[train]'"
    if torch is None:
        return [unknown(f"PyTorch: {what}", "PyTorch does not load", install) for what in ("threads", "MKL", "oneDNN")]
    used = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    build = "use a PyTorch build with it; matrix products are slower without"
    return [
        Finding(
            "PyTorch: threads", f"{used} ({torch.get_num_interop_threads()} between operators)", used <= cores,
            f"export OMP_NUM_THREADS={cores}",
        ),
        Finding("PyTorch: MKL", _there(torch.backends.mkl.is_available()), torch.backends.mkl.is_available(), build),
        Finding(
            "PyTorch: oneDNN", f"{_there(torch.backends.mkldnn.is_available())}, {capability} instructions",
            torch.backends.mkldnn.is_available(), build,
        ),
    ]  # fmt: skip


def _there(available: bool) -> str:
    return "built in" if available else "not built in"


def _ort() -> list[Finding]:
    ort = _imported("onnxruntime")
    what = "ONNX Runtime"
    if ort is None:
        return [unknown(what, "ONNX Runtime does not load", "pip install 'tickserve[inprocess]'")]
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())
    found = f"{ort.__version__}, providers {providers}; threads by export.threads, one operator at a time"
    return [Finding(what, found, True)]
