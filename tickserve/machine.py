"""The machine behind a figure: what two results must share before their times may be compared."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from tickserve.gpu import gpus

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")


def fingerprint() -> dict[str, Any]:
    """System, processor, cores this process may use, memory in GB and GPUs. No name of the host, no address.

    Two machines of one model have the same fingerprint; a machine whose cores were limited has another.
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": _memory_gb(),
        "gpus": [f"{gpu.name}, driver {gpu.driver}" for gpu in gpus()],
    }


def cpu_name() -> str:
    """The processor's name as the kernel says it, or as the platform does."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _memory_gb() -> int | None:
    """Memory to the nearest GB: the kernel keeps a little of it, and not always the same."""
    lines = MEMINFO.read_text().splitlines() if MEMINFO.is_file() else []
    sizes = (int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    return next((round(size / 2**20) for size in sizes), None)
