"""What every net of this project has in common: it reads raw feature rows, and scaling and imputation are in the graph.

What research trains and what a server runs then take the same rows, and no scaler travels beside the model.
Letters: B rows, T steps of a window (oldest first), F features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest

# A z-score beyond this says "extreme" and no more: one wild print must not saturate every gate.
Z_LIMIT = 10.0


class Net(nn.Module):
    """Raw rows `[B, F]` or windows `[B, T, F]`, float32, to `[B, 3]` probabilities (down, flat, up).

    A family sets `kind` and `sizes` (the constructor's arguments, each with its largest value), keeps each size as an
    attribute, and defines `logits`. NaN and infinite values become the training mean, so a hole says "nothing
    unusual"; z-scores are cut at +-10.
    """

    kind: ClassVar[str]
    sizes: ClassVar[dict[str, int]]
    features: int
    window: int
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(F,), or (T, F) for a family that has a `window` among its sizes."""
        return (self.window, self.features) if "window" in self.sizes else (self.features,)

    def set_scaler(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Fix the scaler (both float32 [F], of the training rows only; `std` above 0)."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """Raw feature rows `[..., F]` as the net reads them: imputed, standardised, cut."""
        known = torch.where(torch.isfinite(rows), rows, self.mean)
        return torch.clamp((known - self.mean) / self.std, -Z_LIMIT, Z_LIMIT)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Raw rows to unnormalised `[B, 3]`: what cross-entropy is taken of."""
        raise NotImplementedError

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Raw rows to probabilities `[B, 3]`."""
        return torch.softmax(self.logits(rows), dim=-1)

    def architecture(self) -> dict[str, Any]:
        """What a manifest declares, and `from_architecture` builds again."""
        return {"kind": self.kind} | {name: getattr(self, name) for name in self.sizes}

    @classmethod
    def from_architecture(cls, declared: dict[str, Any]) -> Self:
        """An untrained net of the declared sizes. Raises ArtifactError naming what is missing or absurd."""
        if declared.get("kind") != cls.kind:
            was = repr(declared.get("kind"))[:40]
            raise ArtifactError("unknown architecture", field="architecture.kind", expected=cls.kind, was=was)
        for name, limit in cls.sizes.items():
            value = declared.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                expected = f"an integer from 1 to {limit}"
                raise ArtifactError("bad size", field=f"architecture.{name}", expected=expected, was=repr(value)[:40])
        return cls(**{name: declared[name] for name in cls.sizes})

    @classmethod
    def from_bundle(cls, folder: Path, manifest: Manifest) -> Self:
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
