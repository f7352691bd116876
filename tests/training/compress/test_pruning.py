"""Pruning takes whole units out: those that matter least, through every layer that reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.lstm import LstmClassifier
from models.mlp import MlpClassifier
from models.net import Net
from models.tcn import TcnClassifier
from tests.training.small_nets import drawn
from tickserve.errors import ConfigError, MissingExtraError
from training.compress.extras import library
from training.compress.pruning import narrowed, prune, pruned_job, widths
from training.compress.recipe import PruneStep
from training.nets import NetJob


def step(**keys: Any) -> PruneStep:
    return PruneStep(kind="prune", **{"share": 0.5} | keys)


def without_every_second(net: Net) -> Net:
    """The net with every second of its 16 units silent: nothing leads out of them, and little into them."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith("head"):
                parameter.reshape(-1, 16, *parameter.shape[1:])[:, ::2] *= 1e-3
            if parameter.ndim > 1 and parameter.shape[1] == 16:
                parameter[:, ::2] = 0
    return net.eval()


@pytest.mark.parametrize(
    "net",
    [
        drawn(LstmClassifier, features=5, window=6, hidden=16, layers=2),
        drawn(MlpClassifier, features=5, hidden=16, layers=3, activation="relu", norm="none"),
        drawn(TcnClassifier, features=5, window=6, channels=16, kernel=2, layers=3),
    ],
    ids=lambda net: net.kind,
)
def test_silent_units_are_what_goes_and_the_answers_stay(net: Net) -> None:
    whole = without_every_second(net)
    left = narrowed(whole, 8)
    rows = torch.randn(32, *net.input_shape, generator=torch.Generator().manual_seed(1))
    assert left.architecture() == net.architecture() | {"channels" if net.kind == "tcn" else "hidden": 8}
    with torch.no_grad():
        torch.testing.assert_close(left(rows), whole(rows), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(narrowed(whole, 4)(rows), whole(rows), atol=1e-4)


@pytest.mark.parametrize("family", [LstmClassifier, MlpClassifier])
def test_importance_by_gradients_keeps_the_units_the_loss_depends_on(family: type[Net]) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"features": 5, "hidden": 16, "layers": 1}
    sizes |= {"window": 6} if family is LstmClassifier else {"activation": "relu", "norm": "none"}
    net = family(**sizes).eval()
    with torch.no_grad():  # large weights out of units that are always silent: magnitude would keep them
        if family is MlpClassifier:
            net.blocks[0][0].weight[:8], net.blocks[0][0].bias[:8] = 0, -1
        else:
            net.lstm.bias_ih_l0[48:56] = -50  # of the output gate: shut
            net.lstm.weight_hh_l0[:, :8] = 5
        net.head.weight[:, :8] = 5
    rows = torch.randn(64, *net.input_shape)
    torch.nn.functional.cross_entropy(net.logits(rows), torch.randint(0, 3, (64,))).backward()
    with torch.no_grad():
        by_gradient, by_size = narrowed(net, 8, "taylor"), narrowed(net, 8)
        far = [float((left(rows) - net(rows)).abs().max()) for left in (by_gradient, by_size)]
    assert far[0] < 1e-5 < far[1]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [64]),
        ({"rounds": 2}, [72, 64]),
        ({"rounds": 2, "schedule": "linear"}, [96, 64]),
        ({"share": 0.99}, [8]),
        ({"share": 0.5, "rounds": 30}, [120, 112, 104, 96, 88, 80, 72, 64]),
        ({"share": 0.3, "round_to": 1}, [90]),
    ],
)
def test_the_schedule_falls_to_what_is_asked(keys: dict[str, Any], expected: list[int]) -> None:
    assert widths(step(**keys), 128) == expected


def test_a_share_that_takes_no_unit_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"share.*round_to"):
        widths(step(share=0.05), 16)


def test_rounds_learn_again_on_the_folds_rows(teacher, data) -> None:  # noqa: ANN001
    from training.compress.lesson import Lessons

    said: list[str] = []
    wanted = step(rounds=3, epochs=1, learning_rate=0.001)
    [member] = teacher.members
    job: Any = member.job
    smaller: NetJob = pruned_job(wanted, job, data.config)
    lesson = Lessons(teacher, data.examples, 1_000).of(1)
    fit = prune(wanted, smaller, member.fits[1].model, lesson, data.config, said.append)
    assert fit.model.hidden == smaller.settings.hidden == widths(wanted, 24)[-1]
    assert member.fits[1].model.hidden == 24  # the parent is left as it was
    assert len(said) == len(widths(wanted, 24))


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtraError, match=r"'not_there' is not installed.*tickserve\[compress\]"):
        library("not_there.part")
