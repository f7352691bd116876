"""The LSTM one row at a time: the state goes in and comes out, so that nobody but the caller has to keep it.

The weights are `LstmClassifier`'s. Where that one looks back over a window, this one remembers the whole session. A
step is written out, one product a layer and the gates: an exported `nn.LSTM` of one step carries as many operators that
slice and copy as it has that compute. Letters: B rows (streams), N rows of a session, F features, L layers, H hidden
units, I inputs of a layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.lstm import LstmClassifier
from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest

HIDDEN, CELL = "hidden", "cell"
OUT = "_out"
# Rows of a session that are scored at a time: memory stays flat however long the session is.
CHUNK_ROWS = 65_536

State = tuple[torch.Tensor, torch.Tensor]


class SteppedLstm(nn.Module):
    """`[B, F]` rows and each row's state to `[B, 3]` probabilities and each row's next state.

    The state is the hidden and the cell state, `[B, L, H]` each: batch first, so that rows of several streams can be
    put together and taken apart like any other tensor. `net` is finished: its recurrent weights are taken as they are.
    """

    def __init__(self, net: LstmClassifier) -> None:
        super().__init__()
        self.net = net
        for layer in range(net.layers):
            for name, tensor in zip(("weight", "bias"), _step_weights(net.lstm, layer), strict=True):
                self.register_buffer(f"{name}{layer}", tensor, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H) of each state tensor."""
        return self.net.layers, self.net.hidden

    def forward(
        self, features: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[B, F]`, `[B, L, H]`, `[B, L, H]` to `[B, 3]`, `[B, L, H]`, `[B, L, H]`."""
        layers, units = self.shape
        below, carried = self.net.scaled(features), []
        before = [torch.split(state.reshape(-1, layers * units), units, dim=1) for state in (hidden, cell)]
        for layer, state in enumerate(zip(*before, strict=True)):
            carried.append(self._step(layer, below, *state))
            below = carried[-1][0]
        after = [torch.cat(state, dim=1).reshape(-1, layers, units) for state in zip(*carried, strict=True)]
        return torch.softmax(self.net.head(below), dim=-1), after[0], after[1]

    def _step(self, layer: int, below: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor) -> State:
        """One layer's step: `[B, I]`, `[B, H]`, `[B, H]` to its next hidden and cell state, `[B, H]` each."""
        units = self.net.hidden
        bias, weight = self.get_buffer(f"bias{layer}"), self.get_buffer(f"weight{layer}")
        sums = torch.addmm(bias, torch.cat([below, hidden], dim=1), weight)
        opening, candidate = torch.split(sums, [3 * units, units], dim=1)
        enter, forget, leave = torch.split(torch.sigmoid(opening), units, dim=1)
        cell = forget * cell + enter * torch.tanh(candidate)
        return leave * torch.tanh(cell), cell

    def initial(self, rows: int = 1) -> State:
        """Zeros `[B, L, H]`: the state before the first row of a session."""
        return torch.zeros(rows, *self.shape), torch.zeros(rows, *self.shape)

    def through(self, rows: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Probabilities `[N, 3]` of the consecutive rows `[N, F]` of one stream, and its state `[1, L, H]` after them.

        The same as N calls of `forward`, and the state may be handed to the next call.
        """
        answers = []
        for start in range(0, len(rows), CHUNK_ROWS):
            scaled = self.net.scaled(rows[start : start + CHUNK_ROWS])[None]
            steps, last = self.net.lstm(scaled, _layers_first(*state))
            answers.append(torch.softmax(self.net.head(steps[0]), dim=-1))
            state = _batch_first(*last)
        return torch.cat(answers) if answers else torch.zeros(0, self.net.head.out_features), state

    @classmethod
    def from_bundle(cls, folder: Path, manifest: Manifest) -> SteppedLstm:
        """The net of a verified bundle, in evaluation mode. Raises ArtifactError, as `LstmClassifier.from_bundle`."""
        net = cls(LstmClassifier.from_bundle(folder, manifest)).eval()
        shapes = {tensor.shape for tensor in manifest.state.tensors} if manifest.state else set()
        if shapes != {net.shape}:
            raise ArtifactError(
                "the state does not fit the net", field="state", expected=str(list(net.shape)), was=str(sorted(shapes))
            )
        return net


def _step_weights(lstm: nn.LSTM, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's weights `[I + H, 4 H]` and bias `[4 H]` of a step; gates: input, forget, output, candidate.

    torch has the candidate before the output gate; last, it leaves what a sigmoid takes in one piece.
    """
    names = (f"weight_ih_l{layer}", f"weight_hh_l{layer}", f"bias_ih_l{layer}", f"bias_hh_l{layer}")
    inward, recurrent, one, other = (getattr(lstm, name).detach() for name in names)
    entering, forgetting, candidate, leaving = torch.arange(4 * lstm.hidden_size).chunk(4)
    order = torch.cat([entering, forgetting, leaving, candidate])
    return torch.cat([inward, recurrent], dim=1)[order].t().contiguous(), (one + other)[order]


def _layers_first(hidden: torch.Tensor, cell: torch.Tensor) -> State:
    return hidden.transpose(0, 1).contiguous(), cell.transpose(0, 1).contiguous()


def _batch_first(hidden: torch.Tensor, cell: torch.Tensor) -> State:
    return hidden.transpose(0, 1), cell.transpose(0, 1)


def tensors(net: SteppedLstm) -> tuple[dict[str, Any], ...]:
    """The tensors of a manifest's `state`."""
    return tuple({"input": name, "output": name + OUT, "shape": net.shape} for name in (HIDDEN, CELL))
