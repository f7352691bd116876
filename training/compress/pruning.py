"""Structured pruning: whole hidden units and channels go, so that what is left is a smaller net of the same family.

Zeros scattered over a matrix make no call faster; fewer columns do. Dense layers and convolutions are cut by
torch-pruning, which follows a unit through every layer that reads it; it asserts on an LSTM, which is cut by hand. The
rounds of a schedule take out more and more, with learning in between: Zhu and Gupta, To prune, or not to prune, 2017
(arXiv:1710.01878); the importance by gradients is that of Molchanov et al., Importance Estimation for Neural Network
Pruning, CVPR 2019. Letters: H units before, K units kept, F features.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from models.lstm import LstmClassifier
from models.net import Net
from models.registry import NETS
from tickserve.config import Config
from tickserve.errors import ConfigError
from training.compress.distill import validated
from training.compress.extras import library
from training.compress.lesson import Course, Lesson, Say
from training.compress.recipe import PruneStep
from training.examples import Examples
from training.job import Fit
from training.nets import NetJob, reproducible

# The size that a family's pruning lowers.
WIDTH = {"mlp": "hidden", "lstm": "hidden", "tcn": "channels"}
GATES = 4
GRADIENT_ROWS = 2_048
Tensors = dict[str, torch.Tensor]


def widths(step: PruneStep, width: int) -> list[int]:
    """The width after each round, falling to `1 - share` of `width`, each a multiple of `round_to`.

    Rounds that would take nothing out are left out. Raises ConfigError where the last one does.
    """
    found: list[int] = []
    for number in range(1, step.rounds + 1):
        done = number / step.rounds
        taken = step.share * (done if step.schedule == "linear" else 1 - (1 - done) ** 3)
        left = max(step.round_to, round(width * (1 - taken) / step.round_to) * step.round_to)
        if left < (found[-1] if found else width):
            found.append(left)
    if not found:
        expected = f"one that takes at least {step.round_to} (round_to) of {width} units out"
        raise ConfigError("nothing is taken out", field="step.share", expected=expected, was=str(step.share))
    return found


def pruned_job(step: PruneStep, job: NetJob, config: Config) -> NetJob:
    """The job of the net that is left. Raises ConfigError where nothing would be taken out."""
    size = WIDTH[job.family]
    settings = validated(job.settings, {size: widths(step, getattr(job.settings, size))[-1]})
    return NetJob(job.family, job.examples, settings, config.seed, config.trainer)


def prune(step: PruneStep, job: NetJob, parent: Net, lesson: Lesson, config: Config, say: Say) -> Fit:
    """The pruned net of one fold; `job` is that of the net that is left."""
    started = time.perf_counter()
    net, best, rows = copy.deepcopy(parent), 0, 0
    rounds = widths(step, int(getattr(parent, WIDTH[job.family])))
    for number, width in enumerate(rounds, start=1):
        course = Course(net, job, lesson, step, config.trainer)
        with reproducible(job.seed, job.settings.threads):
            if step.importance == "taylor":
                course.gradients(GRADIENT_ROWS)
            net = narrowed(net, width, step.importance)
        course = Course(net, job, lesson, step, config.trainer)
        learned = course.learn(from_start=False)
        best, rows = learned.best, len(course.lesson.train.rows)
        say(
            f"prune fold {lesson.fold.number}, round {number}/{len(rounds)}: {width} units left, validation loss "
            f"{learned.loss:.5f} after {learned.best} epochs, {time.perf_counter() - started:.1f} s"
        )
    return Fit(net.eval(), best, rows)


def narrowed(net: Net, width: int, importance: str = "magnitude") -> Net:
    """A net of the same family with the `width` most important units of each layer.

    With "taylor" the parameters have to carry gradients.
    """
    weights = (
        _narrowed_lstm(net, width, importance) if isinstance(net, LstmClassifier) else _traced(net, width, importance)
    )
    smaller = NETS[net.kind].from_architecture(net.architecture() | {WIDTH[net.kind]: width})
    smaller.load_state_dict(weights)
    return smaller.eval()


def _traced(net: Net, width: int, importance: str) -> Tensors:
    """The weights of a net of dense layers and convolutions, cut by torch-pruning."""
    pruning: Any = library("torch_pruning")
    rank = {
        "magnitude": pruning.importance.GroupMagnitudeImportance,
        "taylor": pruning.importance.GroupTaylorImportance,
    }
    before = int(getattr(net, WIDTH[net.kind]))
    net = _with_gradients(net)
    with torch.enable_grad():  # a layer's readers are found through autograd
        pruner = pruning.pruner.BasePruner(
            net,
            torch.zeros(2, *net.input_shape),
            importance=rank[importance](),
            # Halfway between two widths, so that no rounding of the quotient takes one unit too many.
            pruning_ratio=1 - (width + 0.5) / before,
            ignored_layers=[net.head],
        )
        pruner.step()
    return {name: tensor.contiguous() for name, tensor in net.state_dict().items()}


def _with_gradients(net: Net) -> Net:
    """A copy that can be cut, its gradients too."""
    copied = copy.deepcopy(net)
    for own, other in zip(net.parameters(), copied.parameters(), strict=True):
        other.grad = None if own.grad is None else own.grad.clone()
    return copied


def _narrowed_lstm(net: Any, width: int, importance: str) -> Tensors:
    """The weights of an LSTM, of which each unit is a row of all four gates and a column wherever it is read."""
    weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    ranked = {name: _importance(parameter, importance) for name, parameter in net.named_parameters()}
    kept = [_kept(ranked, layer, net.layers, net.hidden, width) for layer in range(net.layers)]
    for layer, units in enumerate(kept):
        rows = torch.cat([units + gate * net.hidden for gate in range(GATES)])
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            weights[f"lstm.{name}_l{layer}"] = weights[f"lstm.{name}_l{layer}"][rows]
        for name in _readers(layer, net.layers):
            weights[name] = weights[name][:, units]
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _importance(parameter: nn.Parameter, importance: str) -> torch.Tensor:
    """What each single weight counts: its square, or the square of what the loss would change by without it."""
    if importance == "magnitude":
        return parameter.detach() ** 2
    if parameter.grad is None:
        raise ValueError("importance by gradients needs gradients")
    return (parameter.detach() * parameter.grad) ** 2


def _kept(ranked: Tensors, layer: int, layers: int, hidden: int, width: int) -> torch.Tensor:
    """The units [K] of a layer that stay, in their order: those with the largest sum over all weights they touch."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    parts = [ranked[f"lstm.{name}_l{layer}"].reshape(GATES, hidden, -1).sum(dim=(0, 2)) for name in names]
    parts += [ranked[name].sum(dim=0) for name in _readers(layer, layers)]
    total = torch.stack(parts).sum(dim=0)
    return total.topk(width).indices.sort().values


def _readers(layer: int, layers: int) -> Iterator[str]:
    """The matrices whose columns are the units of a layer."""
    yield f"lstm.weight_hh_l{layer}"
    yield "head.weight" if layer == layers - 1 else f"lstm.weight_ih_l{layer + 1}"


def check_examples(examples: Examples, job: NetJob) -> None:
    """Raise ConfigError for a width at which the family would be built otherwise: a TCN as wide as its rows."""
    if job.family == "tcn" and getattr(job.settings, "channels", 0) == examples.features.shape[1]:
        was = f"{examples.features.shape[1]} channels and as many columns"
        raise ConfigError("a block would lose its first convolution", field="step.share", expected="another", was=was)
