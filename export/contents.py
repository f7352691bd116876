"""What a published version is made of."""

from __future__ import annotations

from tickserve.errors import ArtifactError
from tickserve.manifest import GOLDEN_NAME, ExportRecord, Manifest
from tickserve.model_config import MODEL_FILE


def export_record(manifest: Manifest) -> ExportRecord:
    """What export added to the manifest. Raises ArtifactError for a bundle."""
    if manifest.export is None:
        raise ArtifactError("expected a published version, was a bundle", field="export")
    return manifest.export


def named_files(manifest: Manifest) -> dict[str, str]:
    """The files of a published version besides its manifest and signature, each with its digest.

    Raises ArtifactError for a bundle.
    """
    record = export_record(manifest)
    return {MODEL_FILE: record.onnx_sha256, GOLDEN_NAME: record.golden_sha256}
