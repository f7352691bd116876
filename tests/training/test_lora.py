"""Adapters of a base net: nothing else learns, the merged net says the same; nets that cannot be adapted are told."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from models.net import Net
from models.registry import NETS
from tests.training.small_nets import BlockNet, block_job
from tickserve.config import Config, TrainerSettings
from tickserve.errors import ArtifactError, ConfigError, GateRefusedError
from training.examples import Examples
from training.nets import NetJob, lora

LORA = TrainerSettings(lora_rank=4, lora_alpha=8, lora_base="base")


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    yield
    NETS.pop("blocks", None)


@pytest.fixture
def base(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> Net:
    """A base net, learned on the first fold of other settings, as if its bundle had been opened."""
    net: Net = block_job(examples, TrainerSettings(), seed=3).fit(examples.folds[0]).model
    monkeypatch.setattr(lora, "load_bundle", lambda folder: None)
    monkeypatch.setattr(lora, "net_from_bundle", lambda folder, manifest: net)
    return net


def test_the_adapted_net_is_the_base_plus_changes_of_low_rank(examples: Examples, base: Net) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    fit = block_job(examples, LORA).fit(examples.folds[1])
    assert type(fit.model) is BlockNet
    after = fit.model.state_dict()
    assert set(after) == set(before)
    scaled = {"mean", "std"}  # the symbol's own, of its training rows
    for name, tensor in before.items():
        change = after[name] - tensor
        if name.endswith("bias"):
            assert not change.any(), name
        elif name not in scaled:
            rank = int(torch.linalg.matrix_rank(change, atol=1e-5))
            assert 0 < rank <= 4, name
    np.testing.assert_array_equal(base.state_dict()["head.weight"], before["head.weight"])


def test_merged_weights_say_what_the_adapters_said(examples: Examples) -> None:
    torch.manual_seed(0)
    net, rows = BlockNet(examples.features.shape[1], 16, 3).eval(), torch.from_numpy(examples.features[500:900])
    names = lora.attach(net, 4, 8)
    assert names == [name for name, each in net.named_modules() if name in names]
    assert len(names) == 8
    for name, parameter in net.named_parameters():
        if "lora_B" in name:  # begins at 0: an adapter that has learned nothing says nothing
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        adapted = net(rows)
        lora.merge(net)
        merged = net(rows)
        plain = BlockNet(examples.features.shape[1], 16, 3)
        plain.load_state_dict(net.state_dict())
        assert torch.equal(plain.eval()(rows), merged)
    assert float((merged - adapted).abs().max()) < 1e-6


def test_a_merge_that_loses_the_adapters_is_refused(
    examples: Examples, base: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)
    with pytest.raises(GateRefusedError, match="merged adapters say something else"):
        block_job(examples, LORA).fit(examples.folds[0])


def test_a_base_of_other_sizes_is_refused(examples: Examples, base: Net) -> None:
    with pytest.raises(ArtifactError, match=r"trainer\.lora_base: another architecture: expected .*width=24.*width=16"):
        block_job(examples, LORA, width=24).fit(examples.folds[0])


def test_an_lstm_is_refused_with_the_reason(examples: Examples, config: Config, trained) -> None:  # noqa: ANN001
    bundle = trained.bundles["btcusd-bars-lstm"].path
    job = NetJob("lstm", examples, config.lstm, 7, LORA.model_copy(update={"lora_base": str(bundle)}))
    with pytest.raises(ConfigError, match=r"trainer\.lora_rank: LSTM 'lstm' cannot be adapted: peft has no adapter"):
        job.fit(examples.folds[0])


def test_convolutions_and_nets_without_linear_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="Conv1d '0' cannot be adapted"):
        lora.adapted_layers(nn.Sequential(nn.Conv1d(2, 2, 3, dilation=2), nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="no linear layer"):
        lora.adapted_layers(nn.Sequential(nn.GELU()))
    assert lora.adapted_layers(nn.TransformerEncoderLayer(8, 2, 16)) == ["linear1", "linear2"]
