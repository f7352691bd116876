"""One small net of each family, over the default book's columns."""

from __future__ import annotations

import torch

from models.net import Net
from models.registry import NETS
from tickserve.config import Config, DeepLobSettings, LstmSettings, MlpSettings, TcnSettings, TlobSettings
from tickserve.features.spec import default_spec

COLUMNS = default_spec("book", 3).columns
SMALL = Config(
    mlp=MlpSettings(hidden=8, layers=2, norm="layer"),
    lstm=LstmSettings(window=8, hidden=8),
    tcn=TcnSettings(window=8, channels=8, layers=2),
    deeplob=DeepLobSettings(window=8, channels=4, hidden=8),
    tlob=TlobSettings(window=8, hidden=8, layers=1),
)


def small(kind: str, columns: tuple[str, ...] = COLUMNS) -> Net:
    """Seeded weights; a scaler that is not the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETS[kind].from_architecture(NETS[kind].declared(getattr(SMALL, kind), columns))
    places = torch.arange(len(columns), dtype=torch.float32)
    net.set_scaler(places / 10 - 1, 0.5 + places / 20)
    return net.eval()


def rows_for(net: Net, count: int, seed: int = 1) -> torch.Tensor:
    made = torch.randn(count, *net.input_shape, generator=torch.Generator().manual_seed(seed))
    return made * net.std + net.mean
