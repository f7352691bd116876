"""The repository as Triton gets to see it: the verified versions and nothing else, as links in a folder of our own.

Triton picks versions by their folders' names alone, so a corrupt newest version, or a stray folder with a number for a
name, would take a model down. The view names the versions to serve one by one; what was refused is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from tickserve.model_config import CONFIG_NAME


def lay_out_models(repository: Path, versions: Mapping[str, Iterable[int]], folder: Path) -> Path:
    """Fill `folder` with the named versions of each model, and return it."""
    for name, chosen in versions.items():
        source, target = repository.resolve() / name, folder / name
        target.mkdir(parents=True)
        numbers = sorted(chosen)
        config = text_format.Parse((source / CONFIG_NAME).read_text("utf-8"), schema.ModelConfig())
        config.version_policy.Clear()
        config.version_policy.specific.versions.extend(numbers)
        (target / CONFIG_NAME).write_text(text_format.MessageToString(config), "utf-8")
        for number in numbers:
            (target / str(number)).symlink_to(source / str(number))
    return folder
