"""The GPU, the driver and the TensorRT of this machine: what a plan is built for, or what is missing.

The GPU and its driver are asked of NVML (libnvidia-ml.so.1, part of every driver), without any package. Written to
NVML's documented C interface; no machine with a GPU has run it yet.
"""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tickserve.errors import ComponentError

NVML = "libnvidia-ml.so.1"
TEXT_BYTES = 96


@dataclass(frozen=True)
class Target:
    """What an engine is bound to. `sm` is the compute capability, `8.9`; versions are as their makers write them."""

    gpu: str
    sm: str
    driver: str
    tensorrt: str


def missing() -> list[str]:
    """What this machine lacks to build an engine; empty where it lacks nothing."""
    lacks = []
    try:
        _gpu()
    except ComponentError as error:
        lacks.append(str(error))
    if find_spec("tensorrt") is None:
        lacks.append("the Python package 'tensorrt' is not installed")
    return lacks


def detect() -> Target:
    """The first visible GPU of this machine and the installed TensorRT. Raises ComponentError naming all it lacks."""
    lacks = missing()
    if lacks:
        raise ComponentError("no engine can be built here", field="tensorrt", expected="; ".join(lacks))
    gpu, sm, driver = _gpu()
    return Target(gpu, sm, driver, installed())


def installed() -> str:
    """The version that the `tensorrt` package has loaded."""
    return str(importlib.import_module("tensorrt").__version__)


def _gpu() -> tuple[str, str, str]:
    """Name, compute capability and driver of GPU 0. Raises ComponentError."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError as error:
        raise ComponentError(f"no NVIDIA driver: {NVML} is not here") from error
    _check(nvml.nvmlInit_v2(), "nvmlInit")
    try:
        return _device(nvml)
    finally:
        nvml.nvmlShutdown()


def _device(nvml: Any) -> tuple[str, str, str]:
    driver, name = (ctypes.create_string_buffer(TEXT_BYTES) for _ in range(2))
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    _check(nvml.nvmlSystemGetDriverVersion(driver, TEXT_BYTES), "nvmlSystemGetDriverVersion")
    _check(nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)), "nvmlDeviceGetHandleByIndex")
    _check(nvml.nvmlDeviceGetName(device, name, TEXT_BYTES), "nvmlDeviceGetName")
    capability = nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    _check(capability, "nvmlDeviceGetCudaComputeCapability")
    return (
        name.value.decode("utf-8", "replace"),
        f"{major.value}.{minor.value}",
        driver.value.decode("ascii", "replace"),
    )


def _check(code: int, call: str) -> None:
    if code != 0:
        raise ComponentError(f"no usable NVIDIA GPU: {call} answered {code}")
