"""What of [trainer] takes effect on this machine for this net: what would not is refused here, with its reason.

The libraries would accept most of it and do nothing: fp16 on a CPU, `torch.compile` of an LSTM, an aligned size that is
none.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

from tickserve.config import NetSettings, TrainerSettings
from tickserve.errors import ComponentError, ConfigError, MissingExtraError

# Sizes of a net that are counts of something, not widths of a matrix.
NOT_A_WIDTH = frozenset({"features", "window", "layers", "blocks", "heads", "kernel", "stride", "dilation", "depth"})
ALLOC_CONF = "PYTORCH_CUDA_ALLOC_CONF"


def device_of(settings: TrainerSettings) -> torch.device:
    """Where the net is trained. Raises ComponentError for a GPU that is not there."""
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise ComponentError("no GPU here", field="trainer.device", expected="auto or cpu", was="cuda")
    return torch.device("cuda" if there and settings.device != "cpu" else "cpu")


def refuse_inert(settings: TrainerSettings, device: torch.device) -> None:
    """Raise ComponentError for what this machine cannot do, MissingExtraError for a library that is not installed."""
    if settings.sharding == "deepspeed" and find_spec("deepspeed") is None:
        raise MissingExtraError("'deepspeed' is not installed", hint="pip install deepspeed, or sharding = 'fsdp'")
    if device.type == "cpu":
        _refuse_gpu_options(settings)
    elif settings.processes > torch.cuda.device_count():
        expected = f"at most {torch.cuda.device_count()}, one for each GPU"
        was = str(settings.processes)
        raise ComponentError("too few GPUs", field="trainer.processes", expected=expected, was=was)
    if settings.compile:
        _refuse_without_compiler()


def _refuse_gpu_options(settings: TrainerSettings) -> None:
    reasons = {
        "precision": (settings.precision == "fp16", "on a CPU it changes nothing: use bf16"),
        "pin_memory": (settings.pin_memory, "page-locked memory is for copies to a GPU"),
        "cudnn_benchmark": (settings.cudnn_benchmark, "cuDNN runs on a GPU"),
        "cuda_alloc_conf": (bool(settings.cuda_alloc_conf), "it is read by the allocator of a GPU"),
        "offload": (settings.offload, "shards are in the CPU's memory already"),
        "sharding": (settings.sharding == "deepspeed", "this trainer runs DeepSpeed on GPUs: use fsdp or ddp"),
    }
    for name, (asked, reason) in reasons.items():
        if asked:
            raise ComponentError(f"no effect without a GPU: {reason}", field=f"trainer.{name}")


def _refuse_without_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        hint = "install g++, or leave trainer.compile off"
        raise ComponentError("no C++ compiler here", field="trainer.compile", hint=hint) from error


def cpu_has_bf16() -> bool:
    """Whether oneDNN, which computes a CPU's LSTM, has bf16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_lstm(net: nn.Module) -> bool:
    return any(isinstance(each, nn.LSTM) for each in net.modules())


def refuse_unfit(family: str, net: nn.Module, settings: NetSettings, trainer: TrainerSettings) -> None:
    """Raise ConfigError for an option that this net has nothing for, or sizes that are not aligned.

    ComponentError for bf16 where this processor has none for an LSTM.
    """
    if trainer.precision == "bf16" and _has_lstm(net) and device_of(trainer).type == "cpu" and not cpu_has_bf16():
        reason = "this processor has no bf16 for an LSTM (oneDNN wants AVX-512)"
        raise ComponentError(reason, field="trainer.precision", expected="fp32", was="bf16")
    if trainer.aligned:
        _refuse_unaligned(family, settings, trainer.aligned)
    if trainer.activation_checkpointing and not blocks_of(net):
        reason = f"{family} has no blocks that could be computed again"
        raise ConfigError(f"no effect: {reason}", field="trainer.activation_checkpointing")
    if trainer.compile and any(isinstance(module, nn.RNNBase) for module in net.modules()):
        reason = f"torch.compile leaves the recurrent layers of {family} as they are"
        raise ConfigError(f"no effect: {reason}", field="trainer.compile")


def _refuse_unaligned(family: str, settings: NetSettings, unit: int) -> None:
    from models.registry import NETS

    for name in ("batch_rows", *NETS[family].sizes):
        size = getattr(settings, name, None)
        if name in NOT_A_WIDTH or size is None or size % unit == 0:
            continue
        below, above = size // unit * unit, (size // unit + 1) * unit
        nearest = f"{below} or {above}" if below else str(above)
        field, expected = f"{family}.{name}", f"a multiple of trainer.aligned ({unit})"
        raise ConfigError("not aligned", field=field, expected=expected, was=str(size), hint=f"nearest: {nearest}")


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The repeated parts of a net, each of which can be computed again: what its `nn.ModuleList`s hold."""
    lists = [module for module in net.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(each) for outer in lists for each in outer.modules() if each is not outer}
    return [block for each in lists if id(each) not in inner for block in each]


@contextmanager
def configured(settings: TrainerSettings, device: torch.device) -> Iterator[None]:
    """CuDNN and the allocator as the settings say, for as long as the block runs.

    Raises ComponentError where the allocator of the GPU is already at work with another configuration.
    """
    _set_allocator(settings)
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    torch.backends.cudnn.deterministic = device.type == "cuda" and not settings.cudnn_benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
        if device.type == "cuda":  # once a fit: within one, PyTorch reuses what it has
            gc.collect()
            torch.cuda.empty_cache()


def _set_allocator(settings: TrainerSettings) -> None:
    wanted = settings.cuda_alloc_conf
    if not wanted or os.environ.get(ALLOC_CONF) == wanted:
        return
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        hint = f"set {ALLOC_CONF} before the process starts"
        raise ComponentError("the GPU's allocator is at work already", field="trainer.cuda_alloc_conf", hint=hint)
    os.environ[ALLOC_CONF] = wanted
