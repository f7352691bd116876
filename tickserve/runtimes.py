"""What a model's runtimes were measured at, as the export record of its manifest keeps it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["KIND_AUTO", "KIND_CPU"]


class Stored(BaseModel):
    """Immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Timing(Stored):
    """One call of `rows` rows in this process, in microseconds.

    `p25_us` is what runtimes are compared by: whatever else runs on a machine only ever adds time.
    """

    rows: int
    calls: int
    p25_us: float
    p50_us: float
    p99_us: float


class RuntimeCandidate(Stored):
    """One way to run the model.

    `served`: config.pbtxt can ask for it, with `threads` and `graph_level`. `decisions`: held against research's on the
    recorded rows. `reason` says why it could not be chosen, or why it is not here; it is then not timed.
    """

    name: str
    served: bool
    gpu: bool = False
    threads: int | None = None
    graph_level: int | None = None
    decisions: Literal["same", "differ", "not run"]
    reason: str | None = None
    timings: tuple[Timing, ...] = ()

    def p50_us(self, rows: int) -> float | None:
        """The median call of `rows` rows, where it was timed."""
        return next((timing.p50_us for timing in self.timings if timing.rows == rows), None)


class Gated(Stored):
    """What the gates judged the graph with: ONNX Runtime's threads and Triton's graph level.

    `asked` is `export.threads` as it was then; None where the choice was automatic.
    """

    threads: int
    graph_level: int
    asked: int | None = None


class RuntimeRecord(Stored):
    """Every candidate, which one config.pbtxt asks for, and why.

    `threads`, `graph_level` (Triton's) and `kind` are what the configuration gets where no setting says otherwise.
    """

    effort: Literal["quick", "full"]
    chosen: str
    threads: int
    graph_level: int
    kind: Kind
    reason: str
    machine: str
    candidates: tuple[RuntimeCandidate, ...]

    def candidate(self, name: str) -> RuntimeCandidate:
        """The candidate of this name. Raises KeyError."""
        return {each.name: each for each in self.candidates}[name]
