"""What every net of this project has in common: it reads raw feature rows, and scaling and imputation are in the graph.

What research trains and what a server runs then take the same rows, and no scaler travels beside the model.
Letters: B rows, T steps of a window (oldest first), F features.
"""

from __future__ import annotations

from collections.abc import Sequence
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
LARGEST = torch.finfo(torch.float32).max
# As many as a served graph may hold (export/check_model.py): sizes within their limits may still be absurd together.
MAX_WEIGHTS = 128 * 1024 * 1024


class Net(nn.Module):
    """Raw rows `[B, F]` or windows `[B, T, F]`, float32, to `[B, 3]` probabilities (down, flat, up).

    A family sets `kind`, `sizes` (the constructor's whole numbers, each with its largest value) and `choices` (its
    words, each with those it may be), keeps each as an attribute, and defines `logits`. NaN and infinite values become
    the training mean, so a hole says "nothing unusual"; z-scores are cut at +-10.
    """

    kind: ClassVar[str]
    sizes: ClassVar[dict[str, int]]
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
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
        # NaN and the infinities compare as false. In a graph `isfinite` is five operators, this is two.
        known = torch.where(rows.abs() <= LARGEST, rows, self.mean)
        return torch.clamp((known - self.mean) / self.std, -Z_LIMIT, Z_LIMIT)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Raw rows to unnormalised `[B, 3]`: what cross-entropy is taken of."""
        raise NotImplementedError

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Raw rows to probabilities `[B, 3]`."""
        return torch.softmax(self.logits(rows), dim=-1)

    def architecture(self) -> dict[str, Any]:
        """What a manifest declares, and `from_architecture` builds again."""
        return {"kind": self.kind} | {name: getattr(self, name) for name in (*self.sizes, *self.choices)}

    @classmethod
    def column_sizes(cls, columns: Sequence[str]) -> dict[str, int]:
        """The sizes that the table's columns decide. Raises ConfigError for columns the family can make nothing of."""
        return {"features": len(columns)}

    @classmethod
    def declared(cls, settings: object, columns: Sequence[str]) -> dict[str, Any]:
        """The architecture of a new net for rows of these columns; the rest is the settings', by the same names."""
        given: dict[str, Any] = {"kind": cls.kind} | cls.column_sizes(columns)
        return given | {name: getattr(settings, name) for name in (*cls.sizes, *cls.choices) if name not in given}

    @classmethod
    def from_architecture(cls, declared: dict[str, Any]) -> Self:
        """An untrained net of the declared sizes. Raises ArtifactError naming what is missing or absurd."""
        if declared.get("kind") != cls.kind:
            raise _absurd("unknown architecture", "kind", cls.kind, declared.get("kind"))
        for name, limit in cls.sizes.items():
            value = declared.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise _absurd("bad size", name, f"an integer from 1 to {limit}", value)
        for name, words in cls.choices.items():
            if declared.get(name) not in words:
                raise _absurd("unknown", name, " or ".join(words), declared.get(name))
        arguments = {name: declared[name] for name in (*cls.sizes, *cls.choices)}
        with torch.device("meta"):  # counted before any memory is taken
            weights = sum(tensor.numel() for tensor in cls(**arguments).state_dict().values())
        if weights > MAX_WEIGHTS:
            raise _absurd("too large a net", "sizes", f"at most {MAX_WEIGHTS} weights", weights)
        return cls(**arguments)

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


def _absurd(message: str, name: str, expected: str, was: object) -> ArtifactError:
    return ArtifactError(message, field=f"architecture.{name}", expected=expected, was=repr(was)[:40])
