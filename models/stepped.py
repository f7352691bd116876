"""The LSTM one row at a time: the state goes in and comes out, so that nobody but the caller has to keep it.

The weights are `LstmClassifier`'s. Where that one looks back over a window, this one remembers the whole session.
Letters: B rows (streams), N rows of a session, F features, L layers, H hidden units.
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
    put together and taken apart like any other tensor.
    """

    def __init__(self, net: LstmClassifier) -> None:
        super().__init__()
        self.net = net

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H) of each state tensor."""
        return self.net.layers, self.net.hidden

    def forward(
        self, features: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[B, F]`, `[B, L, H]`, `[B, L, H]` to `[B, 3]`, `[B, L, H]`, `[B, L, H]`."""
        steps, state = self.net.lstm(self.net.scaled(features)[:, None], _layers_first(hidden, cell))
        answer = torch.softmax(self.net.head(steps[:, 0]), dim=-1)
        return answer, *_batch_first(*state)

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


def _layers_first(hidden: torch.Tensor, cell: torch.Tensor) -> State:
    return hidden.transpose(0, 1).contiguous(), cell.transpose(0, 1).contiguous()


def _batch_first(hidden: torch.Tensor, cell: torch.Tensor) -> State:
    return hidden.transpose(0, 1), cell.transpose(0, 1)


def tensors(net: SteppedLstm) -> tuple[dict[str, Any], ...]:
    """The tensors of a manifest's `state`."""
    return tuple({"input": name, "output": name + OUT, "shape": net.shape} for name in (HIDDEN, CELL))
