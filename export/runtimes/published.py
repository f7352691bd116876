"""Runtimes of a version that is published already, with its siblings in other precisions beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from export import runtime
from export.onnx_graph import PROBABILITIES
from export.packed import pack
from export.parity import Recorded
from export.research import load_research
from export.runtimes.candidates import Contestant, cpu_name, session_contestant
from export.runtimes.survey import DEFAULT_THREADS, survey
from export.verify import verify_version
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError
from tickserve.golden import read_golden
from tickserve.manifest import GOLDEN_NAME, Manifest, load_bundle
from tickserve.model_config import MODEL_FILE
from tickserve.runtimes import RuntimeRecord


def measure(
    version: Path,
    others: Mapping[str, Path],
    settings: ExportSettings,
    effort: Literal["quick", "full"],
    *,
    bundle: Path | None = None,
) -> RuntimeRecord:
    """Judge and time what can run `version` on its golden rows; `others` are the repository's other models.

    A sibling (another model of the same parents, with the same inputs) is timed as it is served by default and never
    chosen: it is another artefact. Raises ArtifactError for a version or a bundle that cannot be trusted.
    """
    manifest = verify_version(version)
    research = None
    if bundle is not None:
        described = load_bundle(bundle)
        if described.digest() != manifest.digest():
            raise ArtifactError("another bundle", field="--bundle", expected=manifest.digest(), was=described.digest())
        research = load_research(bundle, described)
    pairs = read_golden(version / GOLDEN_NAME, manifest.inputs, manifest.outputs)
    recorded = Recorded(pack(pairs, manifest), pairs[PROBABILITIES])
    beside = list(_siblings(manifest, others, settings.threads or DEFAULT_THREADS))
    return survey((version / MODEL_FILE).read_bytes(), manifest, recorded, research, settings, effort, beside)


def _siblings(manifest: Manifest, others: Mapping[str, Path], threads: int) -> Iterator[Contestant]:
    for name, folder in others.items():
        other = verify_version(folder)
        if other.inputs != manifest.inputs or not related(manifest, other):
            continue
        session = runtime.open_session(folder / MODEL_FILE, threads=threads)
        label = f"{name} ({other.precision}), {cpu_name(threads)}"
        yield session_contestant(label, session, other, sibling=True)


def related(one: Manifest, other: Manifest) -> bool:
    """Whether one was made from the other, or both from the same."""
    family = [{manifest.digest(), *manifest.parents} for manifest in (one, other)]
    return bool(family[0] & family[1])
