"""What a stage took: this process and its children, and the GPUs where NVML lists some."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tickserve import gpu
from tickserve.gpu import GpuSampler
from tickserve.meter import SAMPLE_S, Meter

CHILD = "import time; held = bytearray(80 << 20); print('held', flush=True); time.sleep(30)"


class NvmlStandIn:
    """Stands in for NVML's binding: two devices that are loaded as told."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, used_mb: tuple[int, ...], busy: tuple[int, ...]) -> None:
        self._used, self._busy = used_mb, busy

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._used)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index >= len(self._used):
            raise self.NVMLError
        return index

    def nvmlDeviceGetMemoryInfo(self, index: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=self._used[index] << 20, total=1 << 34)

    def nvmlDeviceGetUtilizationRates(self, index: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=self._busy[index])


def test_memory_is_that_of_the_process_tree() -> None:
    with Meter() as meter:
        before = meter.memory_mb()
        with meter.stage("child"), subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE) as child:
            assert child.stdout
            child.stdout.readline()
            end = time.monotonic() + 20
            while meter.stages[0].peak_memory_mb <= before + 75 and time.monotonic() < end:
                time.sleep(0.05)
            child.kill()
    assert meter.stages[0].peak_memory_mb > before + 75
    assert SAMPLE_S <= 0.05, "what lives for a fraction of a second is seen"


def test_a_stage_as_a_manifest_keeps_it() -> None:
    with Meter() as meter, meter.stage("rows") as stage:
        stage.rows = 1_000
        time.sleep(0.01)
    found = meter.recorded()["rows"]
    assert found["rows_per_s"] == stage.rate
    assert found["rows_per_s"]
    assert found["seconds"]
    assert found["seconds"] >= 0.01


def test_without_a_gpu_nothing_is_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_nvml", lambda: None)
    with Meter() as meter, meter.stage("cpu"):
        pass
    found = meter.recorded()["cpu"]
    assert (found["gpu_memory_mb"], found["gpu_utilisation"]) == (None, None)


def test_gpus_are_sampled_and_those_hidden_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu, "_nvml", lambda: NvmlStandIn((100, 50), (20, 80)))
    with Meter() as meter, meter.stage("gpu"):
        pass
    assert (meter.stages[0].gpu_memory_mb, meter.stages[0].gpu_utilisation) == (150.0, 80.0)
    for visible, memory in (("1", 50.0), ("0,1", 150.0), ("0,7,1", 100.0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        load = GpuSampler().sample()
        assert load
        assert load.memory_mb == memory
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert GpuSampler().sample() is None
