"""What a running server serves beside what its repository holds."""

from __future__ import annotations

from typing import Any

from export.verify import versions_of
from serving import view
from serving.target import Target
from tickserve.current import read_current
from tickserve.errors import ArtifactError, ModelNotFoundError
from tickserve.model_config import CONFIG_NAME


def listed(target: Target) -> list[dict[str, Any]]:
    """For each model of the repository: the loaded versions, the one in force, and the newest published one.

    Raises TransportError when the server does not answer.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(target.repository.glob(f"[a-z0-9]*/{CONFIG_NAME}")):
        folder = path.parent
        published = versions_of(folder)
        loaded = _loaded(target, folder.name)
        rows.append(
            {
                "model": folder.name,
                "loaded": [version for version in loaded if target.control.ready(folder.name, version)],
                "in_force": _in_force(target, folder.name),
                "newest": published[-1] if published else None,
            }
        )
    return rows


def _loaded(target: Target, model: str) -> tuple[int, ...]:
    if target.view is not None:
        return view.shown(target.view / model)
    try:
        return target.control.versions(model)
    except ModelNotFoundError:
        return ()


def _in_force(target: Target, model: str) -> int | None:
    try:
        current = read_current(target.repository / model)
    except ArtifactError:
        return None
    return None if current is None else current.version
