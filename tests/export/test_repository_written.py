"""The configuration as the sync reads it, without protobuf, is the one that protobuf reads; nothing else is read."""

from __future__ import annotations

from typing import Any

import pytest

from export.repository.written import read_written
from export.triton_config import build_config, parse_config, policy_of
from tests.export.tiny import NAME, manifest_of
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError
from tickserve.manifest import TensorSpec
from tickserve.model_config import BACKEND

DIGESTS = {1: "sha256:" + "1" * 64, 2: "sha256:" + "2" * 64, 12: "sha256:" + "3" * 64}
WINDOW = (TensorSpec(name="features", dtype="FP32", shape=(8, 4)),)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bounded": {"queue_policy": "reject"},
    "bounded, with lanes": {"queue_policy": "reject", "priority_lanes": True},
    "TensorRT": {"tensorrt": "accelerator"},
}


def text_of(name: str) -> str:
    settings = ExportSettings(**SETTINGS[name])
    manifest = manifest_of(NAME, 1, family="lstm", inputs=WINDOW) if name == "TensorRT" else manifest_of(NAME, 1)
    return build_config(manifest, settings, DIGESTS)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_reads_what_protobuf_reads(name: str) -> None:
    text = text_of(name)
    read = read_written(text.encode()).options
    assert read == parse_config(text)
    assert read.tensorrt == (name == "TensorRT")


def test_cut_to_some_versions_the_rest_is_unchanged() -> None:
    text = text_of("bounded, with lanes")
    cut = read_written(text.encode()).only({12: DIGESTS[12], 3: "sha256:" + "4" * 64})
    whole, now = parse_config(text), parse_config(cut)
    assert now.manifests == {3: "sha256:" + "4" * 64, 12: DIGESTS[12]}
    assert policy_of(cut) == ("specific", [3, 12])
    assert {**vars(whole), "manifests": None} == {**vars(now), "manifests": None}
    assert read_written(cut.encode()).options == now
    assert len(cut.splitlines()) > 60, "the batching and the warm-up are in it too"
    assert "model_warmup {" in cut
    assert "default_queue_policy {" in cut


CHANGES = {
    "a colon before a message": ("version_policy {", "version_policy: {"),
    "two on a line": ("  latest {\n", "  latest { num_versions: 9 } latest {\n"),
    "a comment behind": ('name: "tiny"', 'name: "tiny" # "other"'),
    "an escape": ('name: "tiny"', 'name: "tin\\171"'),
    "single quotes": ('name: "tiny"', "name: 'tiny'"),
    "joined strings": ('name: "tiny"', 'name: "ti" "ny"'),
    "said twice": ('name: "tiny"', 'name: "other"\nname: "tiny"'),
    "a parameter twice": ('key: "manifest.2"', 'key: "manifest.1"'),
    "indented otherwise": ("  latest {", "    latest {"),
    "closed too early": ("  latest {\n", "}\n  latest {\n"),
    "not closed": ("response_cache {\n}\n", "response_cache {\n"),
    "angle brackets": ("response_cache {\n}\n", "response_cache <\n>\n"),
    "a list in brackets": ("  dims: 4\n", "  dims: [ 4 ]\n"),
    "a tab": ("  dims: 4\n", "\tdims: 4\n"),
    "a carriage return": ('name: "tiny"\n', 'name: "tiny"\r\n'),
    "not ASCII": ('name: "tiny"', 'name: "tíny"'),
    "a huge number": ("  dims: 4\n", "  dims: 4" + "0" * 5_000 + "\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_layout_is_refused(change: str) -> None:
    old, new = CHANGES[change]
    text = text_of("plain")
    assert old in text
    with pytest.raises(ArtifactError, match=r"config\.pbtxt.*not written by this project"):
        read_written(text.replace(old, new, 1).encode())


def test_depth_is_bounded() -> None:
    text = "\n".join(f"{'  ' * depth}input {{" for depth in range(5_000))
    with pytest.raises(ArtifactError, match="not written by this project"):
        read_written(text.encode())


def test_what_is_not_honoured_is_refused_as_everywhere() -> None:
    text = text_of("plain").replace(f'backend: "{BACKEND}"', 'backend: "python"')
    with pytest.raises(ArtifactError, match="wrong backend"):
        read_written(text.encode())
