"""The net: imputation and clipping in the graph, and weights from outside are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.lstm import LstmClassifier
from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest

SIZES = {"features": 3, "window": 5, "hidden": 4, "layers": 2}


@pytest.fixture
def net() -> LstmClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LstmClassifier(**SIZES).eval()
    made.set_scaler(torch.tensor([10.0, 0.0, -1.0]), torch.tensor([2.0, 1.0, 0.5]))
    return made


@pytest.mark.parametrize("hole", [float("nan"), float("inf"), float("-inf")])
def test_a_hole_is_the_training_mean(net: LstmClassifier, hole: float) -> None:
    window = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    holed, filled = window.clone(), window.clone()
    holed[:, 2, 0], filled[:, 2, 0] = hole, 10.0
    assert torch.equal(net(holed), net(filled))
    assert torch.allclose(net(holed).sum(dim=1), torch.ones(2))


def test_extremes_are_cut_at_ten_standard_deviations(net: LstmClassifier) -> None:
    far, farther = (torch.tensor([[[10.0 + 2.0 * z, 0.0, -1.0]] * 5]) for z in (10.0, 1e6))
    assert torch.equal(net(far), net(farther))
    assert not torch.equal(net(far), net(torch.tensor([[[10.0 + 2.0 * 9, 0.0, -1.0]] * 5])))


def test_architecture_builds_the_same_net(net: LstmClassifier, tmp_path: Path) -> None:
    assert net.architecture() == {"kind": "lstm", **SIZES}
    bundled = manifest(net.architecture() | {"stride": 1})
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    again = LstmClassifier.from_bundle(tmp_path, bundled)
    window = torch.zeros(1, 5, 3)
    assert torch.equal(again(window), net(window))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": "tcn"}, "architecture.kind"),
        ({"hidden": 0}, "architecture.hidden"),
        ({"hidden": 10**9}, "architecture.hidden"),
        ({"layers": True}, "architecture.layers"),
        ({"features": "3"}, "architecture.features"),
    ],
)
def test_an_absurd_architecture_is_refused(net: LstmClassifier, change: dict[str, object], field: str) -> None:
    with pytest.raises(ArtifactError, match=field):
        LstmClassifier.from_architecture(net.architecture() | change)


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(net: LstmClassifier, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        LstmClassifier.from_bundle(tmp_path, manifest(net.architecture()))
    save_file(net.state_dict(), file)
    with pytest.raises(ArtifactError, match="do not load"):
        LstmClassifier.from_bundle(tmp_path, manifest(net.architecture() | {"hidden": 8}))
    net.head.weight.data[0, 0] = float("nan")
    save_file(net.state_dict(), file)
    with pytest.raises(ArtifactError, match="NaN"):
        LstmClassifier.from_bundle(tmp_path, manifest(net.architecture()))


def manifest(architecture: dict[str, object]) -> Manifest:
    """Only what `from_bundle` reads."""
    return Manifest.model_construct(architecture=architecture, model_file="model.safetensors")
