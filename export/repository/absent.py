"""The error for a version that a repository does not have."""

from __future__ import annotations

from collections.abc import Sequence

from tickserve.errors import ArtifactError


def no_version(label: str, versions: Sequence[int], model: str, version: int) -> ArtifactError:
    """For the repository called `label`, which has `versions` of `model`."""
    have = ", ".join(map(str, versions)) or "none"
    return ArtifactError(f"{label} has no version {version} of {model!r}", field="version", expected=have)
