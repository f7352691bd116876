"""What every family promises: holes are the mean, rows do not meet, the architecture builds the net again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.deeplob import DeepLobClassifier
from models.registry import NETS, net_from_bundle
from models.tlob import positions
from tests.models.families import COLUMNS, rows_for, small
from tickserve.errors import ArtifactError, ConfigError
from tickserve.features.spec import default_spec
from tickserve.manifest import Manifest

KINDS = sorted(NETS)
WINDOWED = [kind for kind in KINDS if "window" in NETS[kind].sizes]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_holes_are_the_mean_and_extremes_are_cut(kind: str) -> None:
    net = small(kind)
    rows = rows_for(net, 4)
    for hole in (float("nan"), float("inf"), float("-inf")):
        holed, filled = rows.clone(), rows.clone()
        holed[..., 1], filled[..., 1] = hole, net.mean[1]
        assert torch.equal(net(holed), net(filled)), hole
    wild = rows.clone()
    wild[..., 2] = 3.4e38
    assert torch.allclose(net(wild).sum(dim=1), torch.ones(4))
    assert not torch.equal(net(wild), net(rows))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_row_is_answered_alike_in_any_company(kind: str) -> None:
    net = small(kind)
    rows, company = rows_for(net, 4), rows_for(net, 60, seed=2) * 1e3
    together = net(torch.cat([company, rows]))[-4:]
    assert torch.allclose(net(rows), together, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_architecture_builds_the_net_again(kind: str, tmp_path: Path) -> None:
    net = small(kind)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, tmp_path / "model.safetensors")
    declared = net.architecture() | {"stride": 4}
    manifest = Manifest.model_construct(architecture=declared, model_file="model.safetensors")
    rows = rows_for(net, 3)
    assert torch.equal(net_from_bundle(tmp_path, manifest)(rows), net(rows))


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        *[(kind, {name: bad}, name) for kind in KINDS for name in NETS[kind].sizes for bad in (0, 10**9, True, None)],
        ("mlp", {"activation": "tanh"}, "activation"),
        ("mlp", {"norm": 1}, "norm"),
        ("mlp", {"features": 10_000, "hidden": 8_192, "layers": 32}, "sizes"),
        ("lstm", {"hidden": 8_192, "layers": 32}, "sizes"),
        ("tcn", {"window": 14}, "window"),
        ("tlob", {"heads": 3}, "heads"),
        ("deeplob", {"levels": 1}, "levels"),
        ("deeplob", {"levels_end": 2}, "levels"),
        ("deeplob", {"levels_end": 10_000}, "levels"),
    ],
)
def test_an_absurd_architecture_is_refused(kind: str, change: dict[str, object], field: str) -> None:
    net = small(kind)
    with pytest.raises(ArtifactError, match=rf"architecture\.{field}"):
        NETS[kind].from_architecture(net.architecture() | change)


@pytest.mark.parametrize("kind", WINDOWED)
@torch.inference_mode()
def test_every_row_of_the_window_counts(kind: str) -> None:
    net = small(kind)
    rows = rows_for(net, 1)
    for step in range(rows.shape[1]):
        changed = rows.clone()
        changed[0, step] += 3
        assert not torch.equal(net(changed), net(rows)), step


@torch.inference_mode()
def test_the_tcn_looks_back_as_far_as_it_says() -> None:
    """13 rows with kernel 3 and 2 layers: the first of them still counts, a fourteenth is refused above."""
    net = NETS["tcn"].from_architecture(small("tcn").architecture() | {"window": 13}).eval()
    for parameter in net.parameters():
        parameter.abs_()  # some weights leave a path on the flat side of every ReLU: the answer is silent about it
    rows = rows_for(net, 1)
    changed = rows.clone()
    changed[0, 0] += 5
    assert not torch.equal(net(changed), net(rows))


@torch.inference_mode()
def test_tlob_knows_where_a_step_stands() -> None:
    """Sines and cosines of the step's number, as in Attention Is All You Need, and the answer depends on them."""
    expected = [[0.0, 1.0, 0.0], [0.84147, 0.54030, 0.00215]]
    assert torch.allclose(positions(2, 3), torch.tensor(expected), atol=1e-4)
    net = small("tlob")
    rows = rows_for(net, 2)
    before = net(rows)
    net.position.zero_()
    assert not torch.equal(net(rows), before)


@torch.inference_mode()
def test_deeplob_convolves_the_levels_and_only_those() -> None:
    net = small("deeplob")
    assert isinstance(net, DeepLobClassifier)
    assert COLUMNS[net.levels_end - net.levels : net.levels_end] == tuple(f"level_imbalance_{n}" for n in (1, 2, 3))
    seen: list[torch.Tensor] = []
    net.blocks[0].register_forward_hook(lambda _module, given, _answer: seen.append(given[0]))
    rows = rows_for(net, 2)
    net(rows)
    assert torch.equal(seen[0][:, 0], net.scaled(rows)[..., net.levels_end - net.levels : net.levels_end])


@pytest.mark.parametrize("columns", [default_spec("bars", 0).columns, default_spec("book", 1).columns, COLUMNS[::-1]])
def test_deeplob_without_levels_in_order_is_refused(columns: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"deeplob: no levels to convolve: expected columns level_imbalance_1"):
        DeepLobClassifier.column_sizes(columns)
