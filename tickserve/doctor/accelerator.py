"""The GPU, its driver, CUDA as PyTorch was built for it, and TensorRT."""

from __future__ import annotations

import ctypes.util
import importlib
import shutil

from tickserve.doctor.finding import Finding, unknown
from tickserve.doctor.installed import library
from tickserve.gpu import gpus


def findings() -> list[Finding]:
    """Driver, GPUs, CUDA and TensorRT."""
    driver = ctypes.util.find_library("cuda") is not None or shutil.which("nvidia-smi") is not None
    return [
        Finding("NVIDIA driver", "found" if driver else "none", driver, "CPU paths are used"),
        _devices(driver),
        _cuda(),
        library("tensorrt", "optional; the ONNX model is served as it is"),
    ]


def _devices(driver: bool) -> Finding:
    what = "GPU"
    found = gpus()
    if found:
        return Finding(what, "; ".join(f"{g.name}, {g.memory_mb:,.0f} MB, driver {g.driver}" for g in found), True)
    if not driver:
        return Finding(what, "none", False, "CPU paths are used")
    return unknown(what, "a driver, but NVML lists no device", "pip install nvidia-ml-py; look at nvidia-smi")


def _cuda() -> Finding:
    what = "CUDA in PyTorch"
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return unknown(what, "PyTorch does not load", "pip install 'tickserve[train]'")
    if torch.version.cuda is None:
        return Finding(what, "a CPU build", False, "on a machine with a GPU: make install TORCH_INDEX=<CUDA wheels>")
    usable = torch.cuda.is_available()
    return Finding(
        what, f"{torch.version.cuda}, {'usable' if usable else 'no GPU to use'}", usable, "CPU paths are used"
    )
