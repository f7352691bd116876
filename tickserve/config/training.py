"""How models are trained, searched for, made smaller, and trained for many symbols."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tickserve.config.section import Section
from tickserve.manifest import MODEL_NAME_PATTERN


class TrainerSettings(Section):
    """How nets of every family are trained (docs/trainer.md). What cannot take effect on a machine is refused there."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU where there is one")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the arithmetic; weights stay fp32")
    accumulate: int = Field(1, ge=1, le=4_096, description="batches whose gradients make one step")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    schedule: Literal["constant", "cosine"] = Field("constant", description="cosine: the learning rate falls to 0")
    activation_checkpointing: bool = Field(
        False, description="blocks are computed again in the backward pass instead of kept: less memory, more time"
    )
    compile: bool = Field(False, description="torch.compile; takes a C++ compiler and half a minute")
    cudnn_benchmark: bool = Field(False, description="on a GPU: fastest kernels by trial, other bits in every run")
    cuda_alloc_conf: str = Field("", description="PYTORCH_CUDA_ALLOC_CONF, e.g. expandable_segments:True")
    aligned: int = Field(0, ge=0, le=256, description="sizes have to be multiples of this (Tensor Cores: 8); 0: any")
    processes: int = Field(1, ge=1, le=256, description="on this machine, one a GPU where there are GPUs")
    sharding: Literal["none", "ddp", "fsdp", "deepspeed"] = Field(
        "none", description="ddp: each process has the whole net; fsdp, deepspeed: each has a part of it"
    )
    zero_stage: Literal[1, 2, 3] = Field(2, description="of deepspeed: shards optimizer, and gradients, and weights")
    offload: bool = Field(False, description="of fsdp and deepspeed on GPUs: shards wait in the memory of the CPU")
    memmap: bool = Field(False, description="features are read from a file as they are needed, never all at once")
    memmap_above_mb: int = Field(1_024, ge=0, description="so are features larger than this; 0: never")
    loader_workers: int = Field(0, ge=0, le=64, description="processes that gather batches; 0: the trainer does")
    prefetch: int = Field(0, ge=0, le=1_024, description="batches ahead for each worker; 0: two")
    pin_memory: bool = Field(False, description="batches in page-locked memory, for a GPU")
    shared_memory: bool = Field(False, description="one copy of the features for all workers or processes")
    checkpoint_steps: int = Field(0, ge=0, description="steps from checkpoint to checkpoint; 0: none")
    checkpoint_folder: str = Field(".tickserve/checkpoints", min_length=1)
    checkpoint_async: bool = Field(True, description="written by a thread; training waits for the copy alone")
    checkpoint_keep: int = Field(2, ge=1, le=1_000, description="newest checkpoints of a fit that are kept")
    checkpoint_level: int = Field(3, ge=1, le=19, description="of zstd")
    resume: bool = Field(False, description="go on from the newest checkpoint of the same job")
    lora_rank: int = Field(0, ge=0, le=256, description="train low-rank adapters of a base net only; 0: all weights")
    lora_alpha: int = Field(16, ge=1, description="adapters count alpha / rank")
    lora_base: str = Field("", description="bundle of the net that is adapted")

    @model_validator(mode="after")
    def _belong_together(self) -> TrainerSettings:
        for broken, message in (
            (
                self.processes > 1 and self.sharding == "none",
                f"sharding: expected ddp, fsdp or deepspeed with processes = {self.processes}, was none",
            ),
            (
                self.processes == 1 and self.sharding == "fsdp",
                "processes: expected at least 2 with sharding = fsdp, was 1",
            ),
            (
                self.offload and self.sharding not in ("fsdp", "deepspeed"),
                f"sharding: expected fsdp or deepspeed with offload, was {self.sharding}",
            ),
            (
                self.precision == "fp16" and self.sharding == "fsdp",
                "precision: expected fp32 or bf16 with sharding = fsdp, was fp16",
            ),
            (
                self.prefetch > 0 and not self.loader_workers,
                "loader_workers: expected at least 1 with prefetch, was 0",
            ),
            (
                self.shared_memory and not self.loader_workers and self.processes == 1,
                "loader_workers: expected at least 1, or processes of at least 2, with shared_memory, was 0",
            ),
            (
                self.resume and not self.checkpoint_steps,
                "checkpoint_steps: expected at least 1 with resume, was 0",
            ),
            (
                self.sharding == "deepspeed" and self.checkpoint_steps > 0,
                f"checkpoint_steps: expected 0 with sharding = deepspeed, was {self.checkpoint_steps}",
            ),
            (
                bool(self.lora_rank) != bool(self.lora_base),
                "lora_rank, lora_base: expected both or neither, was one of them",
            ),
        ):
            if broken:
                raise ValueError(message)
        return self


class TuneSettings(Section):
    """The search for hyper-parameters."""

    trials: int = Field(2, ge=1, le=100_000, description="of the study, those of earlier runs included")
    workers: int = Field(1, ge=1, le=256, description="processes that try at the same time")
    objectives: tuple[Literal["ic", "p99_us", "size_bytes"], ...] = Field(
        ("ic", "p99_us", "size_bytes"), min_length=1, description="ic is raised, the others are lowered"
    )
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    pruner: Literal["median", "none"] = Field("median", description="gives up a trial that is worse than half of them")
    pruner_startup_trials: int = Field(5, ge=0, description="trials that are never given up")
    pruner_warmup_steps: int = Field(10, ge=0, description="rounds or epochs of a trial before it may be given up")
    latency_calls: int = Field(1_000, ge=50, description="timed calls of a lone row in each trial")
    max_p99_us: float = Field(0.0, ge=0, description="the chosen trial may not be slower; 0: any")
    folder: str = Field("runs/tune", min_length=1, description="journal, results and report of a study go below it")
    storage: str = Field("", description="database URL for workers on several machines; empty: a journal in the folder")


class UniverseSettings(Section):
    """Many symbols in one run: `tickserve universe train`."""

    engine: Literal["local", "ray"] = Field("local", description="ray: on the machines of a Ray cluster")
    workers: int = Field(1, ge=1, le=256, description="processes that train at the same time; they share the threads")
    ahead: int = Field(1, ge=0, le=8, description="symbols whose features are prepared while others train; 0: none")
    pooled: bool = Field(True, description="also one model from the rows of all symbols")
    name: str = Field("universe", min_length=1, max_length=60, description="the pooled model's name starts with it")
    memory_mb: int = Field(0, ge=0, description="of all processes of the run together; 0: limits.memory_mb")
    ray_address: str = Field("", description="host:port of a cluster; auto: RAY_ADDRESS; empty: a Ray of the run's own")
    folder: str = Field("runs/universe", min_length=1, description="results and bundles of a run go below it")

    @model_validator(mode="after")
    def _address_of_ray(self) -> UniverseSettings:
        if self.ray_address and self.engine != "ray":
            raise ValueError(f"engine: expected ray with ray_address, was {self.engine}")
        if not MODEL_NAME_PATTERN.fullmatch(self.name) or ".." in self.name:
            raise ValueError(f"name: expected [a-z0-9._-] without '..', was {self.name!r}")
        return self


class CompressSettings(Section):
    """Smaller children of the net."""

    fp16: bool = True
    int8: bool = True
