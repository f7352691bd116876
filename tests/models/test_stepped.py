"""The net one row at a time: the same numbers as a sequence, and streams that do not touch each other."""

from __future__ import annotations

import pytest
import torch

from models.lstm import LstmClassifier
from models.stepped import SteppedLstm

LAYERS, HIDDEN, FEATURES = 2, 4, 3


@pytest.fixture
def net() -> SteppedLstm:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LstmClassifier(FEATURES, window=5, hidden=HIDDEN, layers=LAYERS)
    made.set_scaler(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([2.0, 1.0, 0.5]))
    return SteppedLstm(made).eval()


@pytest.fixture
def rows() -> torch.Tensor:
    made = torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(1))
    made[7, 1] = float("nan")
    return made


def steps(net: SteppedLstm, rows: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    state, answers = net.initial(), []
    for row in rows:
        answer, *following = net(row[None], *state)
        state = (following[0], following[1])
        answers.append(answer)
    return torch.cat(answers), state


@torch.inference_mode()
def test_row_by_row_is_the_sequence(net: SteppedLstm, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, state = steps(net, rows)
    monkeypatch.setattr("models.stepped.CHUNK_ROWS", 64)
    together, last = net.through(rows, net.initial())
    assert torch.allclose(alone, together, atol=1e-6)
    for one, other in zip(state, last, strict=True):
        assert one.shape == other.shape == (1, LAYERS, HIDDEN)
        assert torch.allclose(one, other, atol=1e-6)
    assert net.through(rows[:0], net.initial())[0].shape == (0, 3)


@torch.inference_mode()
def test_a_window_from_zeros_is_the_windowed_net(net: SteppedLstm, rows: torch.Tensor) -> None:
    answers, _ = steps(net, rows[:5])
    assert torch.allclose(answers[-1:], net.net(rows[None, :5]), atol=1e-6)


@torch.inference_mode()
def test_streams_of_one_batch_do_not_touch_each_other(net: SteppedLstm, rows: torch.Tensor) -> None:
    _, early = steps(net, rows[:3])
    _, late = steps(net, rows[:30])
    hidden, cell = (torch.cat([a, b]) for a, b in zip(early, late, strict=True))
    answers, after_hidden, after_cell = net(rows[[50, 60]], hidden, cell)
    for place, (row, state) in enumerate(((50, early), (60, late))):
        answer, *after = net(rows[[row]], *state)
        assert torch.allclose(answer[0], answers[place], atol=1e-6)
        assert torch.allclose(after[0][0], after_hidden[place], atol=1e-6)
        assert torch.allclose(after[1][0], after_cell[place], atol=1e-6)


@torch.inference_mode()
def test_a_hole_is_the_training_mean(net: SteppedLstm, rows: torch.Tensor) -> None:
    holed, filled = rows[7:8], rows[7:8].clone()
    filled[0, 1] = 0.0
    _, state = steps(net, rows[:7])
    for one, other in zip(net(holed, *state), net(filled, *state), strict=True):
        assert torch.equal(one, other)
        assert torch.isfinite(one).all()
