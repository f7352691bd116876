"""Where the trees are trained: on a GPU that XGBoost can use, or on the CPU; what is not there is refused.

XGBoost itself only warns: `device="cuda"` without a GPU trains on the CPU, and `use_rmm` in a build without RMM does
nothing.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from tickserve.config import GbdtSettings
from tickserve.errors import ComponentError

DRIVER = "libcuda.so.1"
POOLS = {"cuda_async": "use_cuda_async_pool", "rmm": "use_rmm"}


@dataclass(frozen=True)
class Placement:
    """The device that is used, and how its memory is handed out."""

    device: Literal["cpu", "cuda"]
    pool: Literal["none", "cuda_async", "rmm"] = "none"

    def context(self) -> AbstractContextManager[Any]:
        """XGBoost's settings while it trains; as before afterwards."""
        import xgboost

        return nullcontext() if self.pool == "none" else xgboost.config_context(**{POOLS[self.pool]: True})

    def to_json(self) -> dict[str, str]:
        """For the manifest."""
        return {"device": self.device} | ({} if self.pool == "none" else {"memory_pool": self.pool})


def place(settings: GbdtSettings) -> Placement:
    """The placement of `gbdt.device` and `gbdt.memory_pool`. Raises ComponentError naming the one without effect."""
    import xgboost

    build = xgboost.build_info()
    missing = "" if settings.device == "cpu" else _why_no_gpu(build)
    if settings.device == "cuda" and missing:
        raise _refused("device", "auto or cpu here", "cuda", missing)
    device: Literal["cpu", "cuda"] = "cpu" if missing or settings.device == "cpu" else "cuda"
    pool = settings.memory_pool
    if pool != "none" and device == "cpu":
        raise _refused("memory_pool", "none on the CPU", pool, missing)
    if pool == "rmm" and not build.get("USE_RMM"):
        raise _refused("memory_pool", "none or cuda_async", pool, "this build of XGBoost has no RMM")
    return Placement(device, pool)


def _why_no_gpu(build: dict[str, Any]) -> str:
    if not build.get("USE_CUDA"):
        return "this build of XGBoost has no CUDA"
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return f"no NVIDIA driver: {DRIVER} is not here"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
        return "the NVIDIA driver shows no GPU"
    return ""


def _refused(key: str, expected: str, was: str, why: str) -> ComponentError:
    return ComponentError("would have no effect here", field=f"gbdt.{key}", expected=expected, was=was, hint=why)
