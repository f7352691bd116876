"""What the GPUs of this machine are doing, as NVML tells it; nothing is known where there is no driver or no binding.

A figure is of the whole device, whoever uses it: in a container NVML does not know the processes by their numbers.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

MB = 2**20


@dataclass(frozen=True)
class Load:
    """Memory in use on all visible GPUs together, in MB, and the share of time the busiest was at work, in percent.

    `utilisation` is None where only PyTorch could be asked, which does not know it.
    """

    memory_mb: float
    utilisation: float | None


@dataclass(frozen=True)
class Gpu:
    """One GPU: its product name, driver release, and memory in MB."""

    name: str
    driver: str
    memory_mb: float


def _nvml() -> Any:
    """NVML's binding, started; None where the binding, the driver or a GPU is missing."""
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        nvml.nvmlInit()
        return nvml if nvml.nvmlDeviceGetCount() else None
    except nvml.NVMLError:
        return None


def _handles(nvml: Any) -> list[Any]:
    """The devices that CUDA_VISIBLE_DEVICES leaves, by number or UUID; those after an unknown one are hidden too."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    handles = []
    for each in filter(None, map(str.strip, chosen.split(","))):
        try:
            by_number = nvml.nvmlDeviceGetHandleByIndex
            handles.append(by_number(int(each)) if each.isdigit() else nvml.nvmlDeviceGetHandleByUUID(each))
        except nvml.NVMLError:
            break
    return handles


def gpus() -> list[Gpu]:
    """The visible GPUs that NVML lists."""
    nvml = _nvml()
    if nvml is None:
        return []
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    return [
        Gpu(_text(nvml.nvmlDeviceGetName(each)), driver, round(nvml.nvmlDeviceGetMemoryInfo(each).total / MB, 1))
        for each in _handles(nvml)
    ]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class GpuSampler:
    """Asks NVML, or where its binding is missing PyTorch, how the GPUs are loaded; `sample` is None without a GPU."""

    def __init__(self) -> None:
        self._nvml = _nvml()
        self._handles = _handles(self._nvml) if self._nvml is not None else []

    def sample(self) -> Load | None:
        """The load now."""
        if not self._handles:
            return _load_by_torch()
        try:
            memory = sum(self._nvml.nvmlDeviceGetMemoryInfo(each).used for each in self._handles)
            busiest = max(self._nvml.nvmlDeviceGetUtilizationRates(each).gpu for each in self._handles)
        except self._nvml.NVMLError:  # a device that does not tell, as parts of a shared one
            return _load_by_torch()
        return Load(memory / MB, float(busiest))


def _load_by_torch() -> Load | None:
    """What PyTorch knows, in a process that already uses a GPU through it: asking never starts CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return None
    used = 0
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        used += total - free
    return Load(used / MB, None)
