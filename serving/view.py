"""The repository as Triton gets to see it: the verified versions and nothing else, in a folder of our own.

Triton picks versions by their folders' names alone, so a corrupt newest version, or a stray folder with a number for a
name, would take a model down. The view names the versions to serve one by one; what was refused is not in it. It is
also what says which versions are to be served while the server runs: a swap changes it, then asks Triton to look.

A version that is served already is not loaded again when only the list of versions changes; any other change of
config.pbtxt loads all of them anew. So the digest of a version's manifest, which config.pbtxt of the repository lists
as a parameter for each version, is written into the version's folder here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.largest_batch import fit_to
from tickserve.manifest import GOLDEN_NAME, MANIFEST_NAME
from tickserve.model_config import CONFIG_NAME, MANIFEST_PARAMETER, MODEL_FILE, manifest_parameter

DIGEST_NAME = "manifest.sha256"


def lay_out_models(repository: Path, versions: Mapping[str, Iterable[int]], folder: Path) -> Path:
    """Fill `folder` with the named versions of each model, and return it."""
    for name, chosen in versions.items():
        show(repository / name, folder / name, chosen)
    return folder


def show(source: Path, target: Path, versions: Iterable[int]) -> None:
    """Make `target` the view of the model in `source` with exactly `versions`; a server that looks sees all of it.

    It serves the largest batch of the configuration, or fewer rows where one of `versions` was gated for fewer.
    """
    numbers = sorted(versions)
    config = text_format.Parse((source / CONFIG_NAME).read_text("utf-8"), schema.ModelConfig())
    digests = {number: config.parameters[manifest_parameter(number)].string_value for number in numbers}
    for name in [name for name in config.parameters if MANIFEST_PARAMETER.fullmatch(name)]:
        del config.parameters[name]
    config.version_policy.Clear()
    config.version_policy.specific.versions.extend(numbers)
    fit_to(config, source, numbers)
    target.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        _show_version(source.resolve() / str(number), target / str(number), digests[number])
    # Staged outside: Triton takes a new file in the model's folder for a change of every version.
    staged = target.parent.parent / f".{target.name}.{CONFIG_NAME}"
    staged.write_text(text_format.MessageToString(config), "utf-8")
    staged.replace(target / CONFIG_NAME)


def shown(target: Path) -> tuple[int, ...]:
    """The versions a view of a model holds, oldest first; none without a view."""
    try:
        config = text_format.Parse((target / CONFIG_NAME).read_text("utf-8"), schema.ModelConfig())
    except OSError:
        return ()
    return tuple(sorted(config.version_policy.specific.versions))


def instances(target: Path) -> int:
    """How many processes score one version of the model in this view."""
    config = text_format.Parse((target / CONFIG_NAME).read_text("utf-8"), schema.ModelConfig())
    return sum(max(1, group.count) for group in config.instance_group) or 1


def forget(target: Path, version: int) -> None:
    """Remove a version's folder from a view that does not list it any more."""
    with suppress(OSError):
        shutil.rmtree(target / str(version))


def _show_version(source: Path, target: Path, digest: str) -> None:
    if target.is_dir():
        return
    target.mkdir()
    # What a version is made of and nothing else: Triton would load a library that lies beside a model.
    for name in (MANIFEST_NAME, MODEL_FILE, GOLDEN_NAME):
        (target / name).symlink_to(source / name)
    (target / DIGEST_NAME).write_text(digest, "utf-8")
