"""Low-rank adapters: a symbol's own small change of a base net that was trained on others, merged before export.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022. Only the adapters of the linear layers learn;
what is served is a net of the base's architecture, with not one operation more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from models.net import Net
from models.registry import net_from_bundle
from tickserve.errors import ArtifactError, ConfigError, GateRefusedError
from tickserve.manifest import load_bundle

if TYPE_CHECKING:
    from training.nets.task import Task

PROBE_ROWS = 256
MERGED_TOLERANCE = 1e-5
Weights = dict[str, torch.Tensor]


def base_weights(bundle: Path, net: Net) -> Weights:
    """The weights of the net in `bundle`. Raises ArtifactError when its architecture is not that of `net`."""
    manifest = load_bundle(bundle)
    base = net_from_bundle(bundle, manifest)
    if base.architecture() != net.architecture():
        raise ArtifactError(
            "another architecture",
            field="trainer.lora_base",
            expected=_said(net),
            was=_said(base),
            hint="adapters take the base's family, sizes and features",
        )
    weights: Weights = base.state_dict()
    return weights


def _said(net: Net) -> str:
    return ", ".join(f"{name}={value}" for name, value in net.architecture().items())


def adapted_layers(net: nn.Module) -> list[str]:
    """Names of the linear layers that take an adapter. Raises ConfigError for a net that cannot be adapted as a whole.

    Attention's output layer is none of them: `nn.MultiheadAttention` reads its weight and never calls it, so that an
    adapter there would learn nothing.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.RNNBase):
            _refuse(name, module, "peft has no adapter for recurrent layers")
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            _refuse(name, module, "peft's adapter of a dilated convolution has another output")
    found = [name for name, module in net.named_modules() if type(module) is nn.Linear]
    if not found:
        raise ConfigError("no linear layer to adapt", field="trainer.lora_rank")
    return found


def _refuse(name: str, module: nn.Module, reason: str) -> None:
    kind = type(module).__name__
    hint = "adapt a net of linear layers (mlp, transformer), or train all weights"
    raise ConfigError(f"{kind} {name!r} cannot be adapted: {reason}", field="trainer.lora_rank", hint=hint)


def attach(net: Net, rank: int, alpha: int) -> list[str]:
    """Put adapters on the linear layers of `net`, in place; nothing but them learns from now on. Their names."""
    from peft import LoraConfig, inject_adapter_in_model

    names = adapted_layers(net)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0), net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad = "lora_" in name
    return names


def merge(net: Net) -> None:
    """Add each adapter of `net` to the weight it adapts and take it away: the layers are plain ones again."""
    from peft.tuners.lora import LoraLayer

    adapted: list[tuple[str, Any]] = [(name, each) for name, each in net.named_modules() if isinstance(each, LoraLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, layer.get_base_layer())


def merged(task: Task, weights: Weights) -> Weights:
    """The weights of a plain net that says what the adapted one with `weights` says.

    Raises GateRefusedError when it does not, on real rows of the task.
    """
    from training.nets.windows import WindowSet

    net = task.new_net()
    attach(net, task.trainer.lora_rank, task.trainer.lora_alpha)
    net.load_state_dict(weights)
    net.eval()
    probe = WindowSet(task.features, task.classes, task.window, net.input_shape)[task.validation[:PROBE_ROWS]].rows
    with torch.no_grad():
        adapted = net(probe).numpy()
        merge(net)
        plain = net(probe).numpy()
    drift = float(np.abs(adapted - plain).max())
    if not drift <= MERGED_TOLERANCE:
        was = f"{drift:.1e}"
        raise GateRefusedError("merged adapters say something else", expected=f"at most {MERGED_TOLERANCE}", was=was)
    return net.state_dict()
