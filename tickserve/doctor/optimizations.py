"""Which of the project's optimisations the configuration in force uses on this machine, which not, and why.

A line says what is set, or what is missing for the setting to take effect. Whether an optimisation pays is measured, by
the benchmark or the export that its page in docs/ names; this list only says what is at work.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Literal

from tickserve.config import Config
from tickserve.gpu import gpus
from tickserve.manifest import TREES

Need = Literal["nets", "lstm", "trees", "gpu", "ray", "blocks", "compiled"]


@dataclass(frozen=True)
class Machine:
    """What decides whether a setting can take effect here."""

    gpu: bool
    compiler: bool
    ray: bool


@dataclass(frozen=True)
class Optimization:
    """One optimisation: active or not, why, and the key that sets it (empty: always so)."""

    name: str
    active: bool
    why: str
    key: str = ""

    def to_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """An optimisation that `key` asks for when `asked` of its value is true, and that also takes what `needs` names."""

    name: str
    key: str
    asked: Callable[[Any], bool] = bool
    needs: tuple[Need, ...] = ()


def machine_here() -> Machine:
    """What the machine that asks has."""
    compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return Machine(bool(gpus()), compiler, find_spec("ray") is not None)


def _above(least: float) -> Callable[[Any], bool]:
    return lambda value: bool(value > least)


def _is_not(*names: str) -> Callable[[Any], bool]:
    return lambda value: value not in names


def _is(*names: str) -> Callable[[Any], bool]:
    return lambda value: value in names


RULES: tuple[Rule, ...] = (
    Rule("rows thinned to every k-th", "features.max_rows"),
    Rule("mixed precision", "trainer.precision", _is_not("fp32"), ("nets",)),
    Rule("torch.compile", "trainer.compile", needs=("compiled",)),
    Rule("loader workers", "trainer.loader_workers", needs=("nets",)),
    Rule("batches prefetched", "trainer.loader_workers", needs=("nets",)),
    Rule("page-locked batches", "trainer.pin_memory", needs=("nets", "gpu")),
    Rule("features in shared memory", "trainer.shared_memory", needs=("nets",)),
    Rule("gradient accumulation", "trainer.accumulate", _above(1), ("nets",)),
    Rule("activation checkpointing", "trainer.activation_checkpointing", needs=("blocks",)),
    Rule("cuDNN benchmark", "trainer.cudnn_benchmark", needs=("nets", "gpu")),
    Rule("CUDA allocator settings", "trainer.cuda_alloc_conf", needs=("nets", "gpu")),
    Rule("Tensor Core aligned sizes", "trainer.aligned", needs=("nets",)),
    Rule("several processes", "trainer.processes", _above(1), ("nets",)),
    Rule("sharding", "trainer.sharding", _is("fsdp", "deepspeed"), ("nets",)),
    Rule("CPU offload", "trainer.offload", needs=("nets", "gpu")),
    Rule("checkpoints", "trainer.checkpoint_steps", needs=("nets",)),
    Rule("LoRA adapters", "trainer.lora_rank", needs=("nets",)),
    Rule("trees on a GPU", "gbdt.device", _is("auto", "cuda"), ("trees", "gpu")),
    Rule("XGBoost memory pool", "gbdt.memory_pool", _is_not("none"), ("trees", "gpu")),
    Rule("external memory", "gbdt.external_memory", needs=("trees",)),
    Rule("row sampling", "gbdt.subsample", lambda value: value < 1, ("trees",)),
    Rule("gradient-based sampling", "gbdt.sampling_method", _is("gradient_based"), ("trees",)),
    Rule("selected columns", "gbdt.top_features", needs=("trees",)),
    Rule("fp16 child", "compress.fp16", needs=("lstm",)),
    Rule("INT8 child", "compress.int8", needs=("lstm",)),
    Rule("stateful child", "lstm.stepped", needs=("lstm",)),
    Rule("pruned trials", "tune.pruner", _is_not("none")),
    Rule("parallel trials", "tune.workers", _above(1)),
    Rule("next symbol prepared meanwhile", "universe.ahead"),
    Rule("symbols trained in parallel", "universe.workers", _above(1)),
    Rule("Ray cluster", "universe.engine", _is("ray"), ("ray",)),
    Rule("runtime chosen by measurement", "runtime.measure", _is_not("off")),
    Rule("TensorRT in ONNX Runtime", "export.tensorrt", _is("accelerator"), ("gpu",)),
    Rule("preferred batch sizes", "export.preferred_batch_rows"),
    Rule("wait for a fuller batch", "export.queue_delay_us"),
    Rule("bounded queue", "export.queue_policy", _is("reject")),
    Rule("priority lanes", "export.priority_lanes"),
    Rule("several model instances", "export.instances", _above(1)),
    Rule("native backend", "serve.backend", _is("native")),
    Rule("gRPC", "client.transport", _is("grpc")),
    Rule("shared memory with the server", "client.transport", _is("shm")),
    Rule("hedged calls", "client.hedge_budget", _above(0)),
)
# What no setting turns off.
ALWAYS: tuple[tuple[str, str], ...] = (
    ("feature cache by content", "keyed by spec, data and code"),
    ("features computed in chunks", "features.chunk_rows at a time, with the overlap that windows need"),
    ("windows as views of the table", "never copied but for a batch"),
    (
        "graph optimisation of the ONNX model",
        "by ONNX Runtime when it loads the graph; the file itself stays as exported",
    ),
    ("dynamic batching", "Triton puts waiting requests together; export.queue_delay_us = 0 makes none wait for it"),
)


def optimizations(config: Config, machine: Machine) -> list[Optimization]:
    """Every optimisation, in the order of the pipeline."""
    found = [Optimization(name, True, why) for name, why in ALWAYS]
    return [*found, _quantile_matrix(config), _memory_map(config), *(_judged(rule, config, machine) for rule in RULES)]


def _judged(rule: Rule, config: Config, machine: Machine) -> Optimization:
    value = _value(config, rule.key)
    shown = list(value) if isinstance(value, tuple) else value
    why = f"{rule.key} = {shown if shown != '' else 'empty'}"
    if not rule.asked(value):
        return Optimization(rule.name, False, why, rule.key)
    reasons = [reason for need in rule.needs if (reason := _lacking(need, config, machine))]
    if rule.key == "trainer.precision" and value == "fp16" and not machine.gpu:
        reasons.append("fp16 has no effect without a GPU: training refuses it")
    return Optimization(rule.name, not reasons, "; ".join([why, *reasons]), rule.key)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _nets(config: Config) -> set[str]:
    return set(config.families) - TREES


def _lacking(need: Need, config: Config, machine: Machine) -> str:
    """What is missing for a setting to take effect; empty where nothing is."""
    nets = _nets(config)
    lacks: dict[Need, tuple[bool, str]] = {
        "blocks": (not nets - {"lstm"}, "no net with blocks is trained"),
        "nets": (not nets, "no net is trained"),
        "lstm": (not config.lstm.enabled, "lstm.enabled = False"),
        "trees": (not config.gbdt.enabled, "gbdt.enabled = False"),
        "gpu": (not machine.gpu, "no GPU here"),
        "ray": (not machine.ray, "Ray is not installed"),
    }
    if need == "compiled":
        return _not_compiled(nets, machine)
    lacking, reason = lacks[need]
    return reason if lacking else ""


def _not_compiled(nets: set[str], machine: Machine) -> str:
    if not nets - {"lstm"}:
        return "no net that it compiles is trained: recurrent layers stay as they are"
    return "" if machine.compiler else "no C++ compiler here"


def _quantile_matrix(config: Config) -> Optimization:
    name = "quantile matrices"
    if not config.gbdt.enabled:
        return Optimization(name, False, "gbdt.enabled = False", "gbdt.enabled")
    return Optimization(name, True, "trees learn from rows binned once (gbdt.max_bin)", "gbdt.max_bin")


def _memory_map(config: Config) -> Optimization:
    name, key, above = "memory-mapped features", "trainer.memmap", config.trainer.memmap_above_mb
    if config.trainer.memmap:
        return Optimization(name, True, f"{key} = True", key)
    later = f"from trainer.memmap_above_mb = {above:,} on" if above else "trainer.memmap_above_mb = 0"
    return Optimization(name, False, f"{key} = False; {later}", key)
