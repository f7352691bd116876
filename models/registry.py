"""Which class builds the net of a family, by the `kind` its manifest declares."""

from __future__ import annotations

from pathlib import Path

from models.deeplob import DeepLobClassifier
from models.lstm import LstmClassifier
from models.mlp import MlpClassifier
from models.net import Net
from models.tcn import TcnClassifier
from models.tlob import TlobClassifier
from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest

FAMILIES: tuple[type[Net], ...] = (MlpClassifier, LstmClassifier, TcnClassifier, DeepLobClassifier, TlobClassifier)
NETS: dict[str, type[Net]] = {net.kind: net for net in FAMILIES}


def net_class(kind: object) -> type[Net]:
    """The class of a family of nets. Raises ArtifactError for a kind there is none of."""
    if not isinstance(kind, str) or kind not in NETS:
        expected, was = ", ".join(sorted(NETS)), repr(kind)[:40]
        raise ArtifactError("unknown architecture", field="architecture.kind", expected=expected, was=was)
    return NETS[kind]


def net_from_bundle(folder: Path, manifest: Manifest) -> Net:
    """The trained net of a verified bundle, in evaluation mode. Raises ArtifactError."""
    return net_class(manifest.architecture.get("kind")).from_bundle(folder, manifest)
