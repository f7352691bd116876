"""The latency shapes: the stated sizes, the label wherever they go, and the caller's random numbers left alone."""

from __future__ import annotations

import torch

from models.latency_shapes import SHAPES, UNTRAINED, is_untrained
from models.lstm import LstmClassifier


def test_sizes_label_and_seed() -> None:
    sizes = {name: (each.window, each.features, each.layers, each.hidden) for name, each in SHAPES.items()}
    assert sizes == {"a": (50, 100, 2, 100), "b": (100, 250, 3, 200), "c": (100, 500, 4, 1_000)}
    before = torch.get_rng_state()
    net, again = SHAPES["a"].net(), SHAPES["a"].net()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(net.head.weight, again.head.weight)
    assert isinstance(net, LstmClassifier)
    assert net.architecture() == SHAPES["a"].architecture
    assert net.architecture()["status"] == UNTRAINED == "untrained latency shape"


def test_a_trained_net_is_not_labelled() -> None:
    net = LstmClassifier(features=3, window=5, hidden=4, layers=1)
    assert not is_untrained(net.architecture())
