"""One process's part in the training of a net: Accelerate around the net and its optimizer, sharded as configured.

Accelerate ignores its FSDP plugin on a CPU and wraps the net for DDP instead, without a word; so the shards are
PyTorch's own `fully_shard` (FSDP2), on CPUs and GPUs alike. Letters: n rows of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from models.net import Net
from tickserve.config import NetSettings, TrainerSettings
from training.nets.machine import blocks_of
from training.nets.windows import Batch

Weights = dict[str, torch.Tensor]
PREFIX = "net."
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class _Logits(nn.Module):
    """A net whose forward pass gives logits: what is trained, and what DDP, FSDP and autocast hook into."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.net.logits(rows)


class Engine:
    """`net` and its optimizer, ready to learn. `world` processes take part, of which this is `rank`."""

    def __init__(self, net: Net, settings: NetSettings, trainer: TrainerSettings, device: torch.device) -> None:
        self._trainer, self._net = trainer, net
        self.accelerator = _accelerator(settings, trainer, device)
        self.device: torch.device = self.accelerator.device
        self.world, self.rank = int(self.accelerator.num_processes), int(self.accelerator.process_index)
        if trainer.activation_checkpointing:
            _recompute(net)
        module = _Logits(net)
        if trainer.compile:
            module.compile()
        self.module, self.optimizer = self._prepared(module, settings.learning_rate)
        # Taken now: shards are whole tensors, and other parameters, between a forward pass and the next backward one.
        self._trained = [(name, each) for name, each in net.named_parameters() if each.requires_grad]
        needs_autocast = trainer.sharding == "fsdp" and trainer.precision != "fp32"
        self._autocast = self.accelerator.autocast if needs_autocast else nullcontext

    def _prepared(self, module: nn.Module, rate: float) -> tuple[nn.Module, Any]:
        if self._trainer.sharding == "fsdp":
            _shard(module, self._net, self.device, self._trainer.offload)
            return module, self.accelerator.prepare(_adam(module, rate))
        # DeepSpeed takes both at once; the others keep the parameters that the optimizer was given.
        return tuple(self.accelerator.prepare(module.to(self.device), _adam(module, rate)))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the batch's n rows, float32."""
        with self._autocast():
            logits = self.module(batch.rows.to(self.device, non_blocking=True))
        classes = batch.classes.to(self.device, non_blocking=True)
        return nn.functional.cross_entropy(logits.float(), classes, reduction="sum")

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient; the processes add theirs up at the `last` batch of a step."""
        with nullcontext() if last or self.world == 1 else self._apart():
            self.accelerator.backward(loss)

    def _apart(self) -> AbstractContextManager[None]:
        if self._trainer.sharding != "fsdp":
            return self.accelerator.no_sync(self.module)  # type: ignore[no-any-return]
        return _fsdp_apart(self.module)

    def step(self, rate: float) -> None:
        """One step of the optimizer with the gradient cut to the norm that is configured."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.clip_grad_norm_(self.module.parameters(), self._trainer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def total(self, value: float) -> float:
        """The sum of a number over the processes."""
        if self.world == 1:
            return value
        summed = self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "sum")
        return float(summed)

    def weights(self) -> Weights:
        """A copy of all weights in the CPU's memory: of the first process, elsewhere empty."""
        if self._trainer.sharding == "deepspeed":
            state = self.accelerator.get_state_dict(self.module) or {}
            return {name.removeprefix(PREFIX): _copy(tensor) for name, tensor in state.items()}
        return self._whole(self._net.state_dict())

    def optimizer_state(self) -> tuple[Weights, dict[str, Any]]:
        """A copy of the optimizer's tensors, named `<parameter>/<what>`, and the rest of its state as JSON values."""
        state = self.optimizer.optimizer.state
        tensors = {f"{name}/{key}": tensor for name, each in self._trained for key, tensor in state[each].items()}
        groups = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        scaler = self.accelerator.scaler
        return self._whole(tensors), {"groups": groups, "scaler": scaler.state_dict() if scaler else None}

    def _whole(self, tensors: Mapping[str, torch.Tensor]) -> Weights:
        """Copies of whole tensors, one after the other, so that no process ever holds all of another's shards."""
        kept = {}
        for name, tensor in tensors.items():
            whole = _copy(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
            if self.rank == 0:
                kept[name] = whole
        return kept

    def restore(self, weights: Weights, tensors: Weights, rest: Mapping[str, Any]) -> None:
        """Put back what `weights` and `optimizer_state` gave; each process takes its part of every tensor."""
        with torch.no_grad():
            for name, tensor in self._net.state_dict().items():
                tensor.copy_(_part(weights[name], tensor))
        optimizer = self.optimizer.optimizer
        for name, parameter in self._trained:
            own = {key.rpartition("/")[2]: each for key, each in tensors.items() if key.rpartition("/")[0] == name}
            optimizer.state[parameter] = {
                key: _part(each, parameter) if each.shape == parameter.shape else each for key, each in own.items()
            }
        for group, said in zip(optimizer.param_groups, rest["groups"], strict=True):
            group.update(said)
        if rest["scaler"]:
            self.accelerator.scaler.load_state_dict(rest["scaler"])

    def random_state(self) -> Weights:
        """Where the random numbers of each process are: uint8 [world, bytes], of the CPU and of its GPU."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {name: self.accelerator.gather(state[None].to(self.device)).cpu() for name, state in states.items()}

    def restore_random_state(self, states: Weights) -> None:
        """Put back this process's part of what `random_state` gave."""
        # Cloned: given a view into a larger tensor, set_rng_state ends the process.
        torch.set_rng_state(states["cpu"][self.rank].clone())
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"][self.rank].clone(), self.device)


def _accelerator(settings: NetSettings, trainer: TrainerSettings, device: torch.device) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    # Accelerate keeps the settings of the first fit of a process for every later one.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=MIXED[trainer.precision],
        deepspeed_plugin=_deepspeed(settings, trainer) if trainer.sharding == "deepspeed" else None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _deepspeed(settings: NetSettings, trainer: TrainerSettings) -> Any:
    from accelerate import DeepSpeedPlugin

    where = "cpu" if trainer.offload else "none"
    plugin = DeepSpeedPlugin(
        zero_stage=trainer.zero_stage,
        gradient_clipping=trainer.clip_norm,
        offload_optimizer_device=where,
        offload_param_device=where if trainer.zero_stage == 3 else "none",
    )
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.batch_rows
    return plugin


def _adam(module: nn.Module, rate: float) -> torch.optim.Adam:
    return torch.optim.Adam([each for each in module.parameters() if each.requires_grad], lr=rate)


def _recompute(net: nn.Module) -> None:
    """Have each block forget what its backward pass needs, and compute it again; names of weights stay the same."""
    for block in blocks_of(net):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _shard(module: nn.Module, net: nn.Module, device: torch.device, offload: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for part in (*blocks_of(net), module):
        fully_shard(part, mesh=mesh, offload_policy=policy)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


@contextmanager
def _fsdp_apart(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def _part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What of a tensor this process holds, where it holds `like`; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
