"""An LSTM that reads raw feature windows and answers class probabilities: scaling and imputation are in the graph.

What research trains and what a server runs then take the same rows, and no scaler travels beside the model.
Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997.
Letters: B rows, T steps of a window (oldest first), F features, H hidden units.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tickserve.errors import ArtifactError
from tickserve.manifest import CLASSES, Manifest

KIND = "lstm"
# A z-score beyond this says "extreme" and no more: one wild print must not saturate every gate.
Z_LIMIT = 10.0
MAX_SIZES = {"features": 10_000, "window": 10_000, "hidden": 8_192, "layers": 32}


class LstmClassifier(nn.Module):
    """`[B, T, F]` float32 windows to `[B, 3]` probabilities (down, flat, up).

    NaN and infinite values become the training mean, so a hole says "nothing unusual"; z-scores are cut at +-10.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, features: int, window: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.features, self.window, self.hidden, self.layers = features, window, hidden, layers
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, len(CLASSES))

    def set_scaler(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Fix the scaler (both float32 [F], of the training rows only; `std` above 0)."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """Raw feature rows `[..., F]` as the net reads them: imputed, standardised, cut."""
        known = torch.where(torch.isfinite(rows), rows, self.mean)
        return torch.clamp((known - self.mean) / self.std, -Z_LIMIT, Z_LIMIT)

    def logits(self, window: torch.Tensor) -> torch.Tensor:
        """`[B, T, F]` to unnormalised `[B, 3]`: what cross-entropy is taken of."""
        steps, _ = self.lstm(self.scaled(window))  # [B, T, H]
        answer: torch.Tensor = self.head(steps[:, -1])
        return answer

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """`[B, T, F]` to probabilities `[B, 3]`."""
        return torch.softmax(self.logits(window), dim=-1)

    def architecture(self) -> dict[str, Any]:
        """What a manifest declares, and `from_architecture` builds again."""
        return {
            "kind": KIND,
            "features": self.features,
            "window": self.window,
            "hidden": self.hidden,
            "layers": self.layers,
        }

    @classmethod
    def from_architecture(cls, declared: dict[str, Any]) -> LstmClassifier:
        """An untrained net of the declared sizes. Raises ArtifactError naming what is missing or absurd."""
        if declared.get("kind") != KIND:
            was = repr(declared.get("kind"))[:40]
            raise ArtifactError("unknown architecture", field="architecture.kind", expected=KIND, was=was)
        for name, limit in MAX_SIZES.items():
            value = declared.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                expected = f"an integer from 1 to {limit}"
                raise ArtifactError("bad size", field=f"architecture.{name}", expected=expected, was=repr(value)[:40])
        return cls(**{name: declared[name] for name in MAX_SIZES})

    @classmethod
    def from_bundle(cls, folder: Path, manifest: Manifest) -> LstmClassifier:
        """The trained net of a verified bundle, in evaluation mode.

        Raises ArtifactError when the weights are unreadable, do not fit the declared architecture, or are not finite.
        """
        net = cls.from_architecture(manifest.architecture)
        try:
            weights = load_file(folder / manifest.model_file)
            net.load_state_dict(weights)
        except (SafetensorError, OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ArtifactError(f"the weights do not load: {reason}", field=manifest.model_file) from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
            raise ArtifactError("NaN or infinite weights", field=manifest.model_file)
        return net.eval()
