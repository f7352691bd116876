"""LSTMs of the sizes that trading firms time inference hardware by: untrained, for latency only, and never published.

The three shapes of STAC-ML Markets (Inference) (docs.stacresearch.com/ml), read as window x features and layers x
hidden units. Weights are random from a seed, so their numbers mean nothing; a manifest made from such a net's
`architecture()` says so, and export refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from models.lstm import LstmClassifier

UNTRAINED: Final = "untrained latency shape"
STATUS: Final = "status"


@dataclass(frozen=True)
class LatencyShape:
    """A window of `window` rows of `features` columns, through `layers` LSTM layers of `hidden` units."""

    name: str
    window: int
    features: int
    layers: int
    hidden: int

    @property
    def architecture(self) -> dict[str, Any]:
        """The sizes, as a manifest declares them, and that nothing was learned."""
        sizes = {"features": self.features, "window": self.window, "hidden": self.hidden, "layers": self.layers}
        return {"kind": "lstm", **sizes, STATUS: UNTRAINED}

    def net(self, seed: int = 7) -> LstmClassifier:
        """The net with random weights, in evaluation mode; the caller's random numbers are left alone."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _labelled().from_architecture(self.architecture).eval()


SHAPES: Final[Mapping[str, LatencyShape]] = {
    shape.name: shape
    for shape in (
        LatencyShape("a", window=50, features=100, layers=2, hidden=100),
        LatencyShape("b", window=100, features=250, layers=3, hidden=200),
        LatencyShape("c", window=100, features=500, layers=4, hidden=1_000),
    )
}


def is_untrained(architecture: Mapping[str, Any]) -> bool:
    """Whether a manifest's `architecture` is that of a net that learned nothing."""
    return architecture.get(STATUS) == UNTRAINED


def _labelled() -> type[LstmClassifier]:
    from models.lstm import LstmClassifier

    class Untrained(LstmClassifier):
        def architecture(self) -> dict[str, Any]:
            return super().architecture() | {STATUS: UNTRAINED}

    return Untrained
