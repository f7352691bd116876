"""Wall time and peak memory of each stage of a run, over this process and everything it started, and the GPUs' load.

Memory is the sum of the resident set sizes of the process tree, sampled: pages that processes share are counted once
per process, so the figure is an upper bound of what the run takes from the machine. What a GPU does is NVML's word
(tickserve/gpu.py), and None without one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tickserve.errors import MissingExtraError
from tickserve.gpu import GpuSampler, Load

SAMPLE_S = 0.05
# A sample costs what the machine's number of processes makes it cost: the thread rests this many times as long.
REST = 50


@dataclass
class Stage:
    """One stage: `rows` and `rate` (rows per second) are set by the stage where it handles rows.

    `gpu_memory_mb` is the highest sample of all GPUs together, `gpu_utilisation` the mean over samples of the busiest
    one's, in percent; None where there is no GPU, or none that tells.
    """

    stage: str
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    rows: int | None = None
    rate: float | None = None
    gpu_memory_mb: float | None = None
    gpu_utilisation: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The stage as a JSON object."""
        return asdict(self)

    def recorded(self) -> dict[str, float | None]:
        """The stage as a manifest keeps it, under its name."""
        return {
            "seconds": float(self.seconds),
            "rows_per_s": self.rate,
            "peak_memory_mb": self.peak_memory_mb,
            "gpu_memory_mb": self.gpu_memory_mb,
            "gpu_utilisation": self.gpu_utilisation,
        }


class Meter:
    """Samples the tree while its block runs. `stages` holds what has been measured so far."""

    def __init__(self) -> None:
        try:
            import psutil
        except ModuleNotFoundError as error:
            raise MissingExtraError.of("psutil", "train") from error
        self._psutil = psutil
        self._process = psutil.Process()
        self._gpus = GpuSampler()
        self._current: Stage | None = None
        self._utilisation: list[float] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="tickserve-meter", daemon=True)
        self.stages: list[Stage] = []

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    @property
    def peak_memory_mb(self) -> float:
        """The highest sample so far."""
        return max((stage.peak_memory_mb for stage in self.stages), default=0.0)

    def recorded(self) -> dict[str, dict[str, float | None]]:
        """Every stage as a manifest keeps it, by name."""
        return {stage.stage: stage.recorded() for stage in self.stages}

    def memory_mb(self) -> float:
        """What the process tree takes now."""
        return round(self._tree_bytes() / 2**20, 1)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measure the block as one stage."""
        current = Stage(name)
        self.stages.append(current)
        self._current, self._utilisation = current, []
        started = time.perf_counter()
        try:
            yield current
        finally:
            self._record()
            current.seconds = round(time.perf_counter() - started, 3)
            if current.rows:
                current.rate = round(current.rows / max(current.seconds, 1e-9), 1)
            self._current = None

    def _sample(self) -> None:
        rest = SAMPLE_S
        while not self._stopped.wait(rest):
            started = time.thread_time()
            self._record()
            rest = max(SAMPLE_S, REST * (time.thread_time() - started))

    def _record(self) -> None:
        stage = self._current
        if stage is not None:
            stage.peak_memory_mb = max(stage.peak_memory_mb, round(self._tree_bytes() / 2**20, 1))
            load = self._gpus.sample()
            if load is not None:
                self._record_gpus(stage, load)

    def _record_gpus(self, stage: Stage, load: Load) -> None:
        stage.gpu_memory_mb = max(stage.gpu_memory_mb or 0.0, round(load.memory_mb, 1))
        if load.utilisation is not None:
            self._utilisation.append(load.utilisation)
            stage.gpu_utilisation = round(sum(self._utilisation) / len(self._utilisation), 1)

    def _tree_bytes(self) -> int:
        total = 0
        for process in [self._process, *self._children()]:
            try:
                total += process.memory_info().rss
            except self._psutil.Error:  # it ended between the listing and the reading
                continue
        return total

    def _children(self) -> list[Any]:
        try:
            return list(self._process.children(recursive=True))
        except self._psutil.Error:
            return []
