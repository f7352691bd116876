"""What Triton will serve of a model's folder: the versions its config.pbtxt chooses, every digest checked."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.publish import verify_model
from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest
from tickserve.model_config import CONFIG_NAME


def served_versions(folder: Path) -> dict[int, Manifest]:
    """The versions Triton serves of the model in `folder`, with their manifests.

    All versions are verified, served or not. Raises ArtifactError (missing or wrong files, a manifest without an export
    record, nothing to serve), DigestMismatchError and UnsafeModelError.
    """
    try:
        verified = verify_model(folder)
    except OSError as error:
        name = Path(str(error.filename or folder)).name
        raise ArtifactError(f"cannot read the model {folder.name!r}: {error.strerror}", field=name) from error
    chosen = _chosen(folder / CONFIG_NAME, sorted(verified))
    if not chosen:
        raise ArtifactError(f"model {folder.name!r} has no version to serve", field="version_policy")
    return {version: verified[version] for version in chosen}


def _chosen(config: Path, versions: list[int]) -> list[int]:
    """Triton's version policy: the latest, all, or the named ones; without one, the newest."""
    policy = text_format.Parse(config.read_text("utf-8"), schema.ModelConfig()).version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return versions
    if kind == "specific":
        return [version for version in versions if version in set(policy.specific.versions)]
    return versions[-max(1, policy.latest.num_versions) :]
