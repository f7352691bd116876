"""Signing what is published already: a new key, or versions from before there was one."""

from __future__ import annotations

import json

from export.repository.absent import no_version
from export.repository.naming import naming
from export.repository.places import Repository, require_model
from export.triton_config import read_config
from export.verify import verify_served
from tickserve.manifest import MANIFEST_NAME
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import SIGNATURE_NAME, SigningKey, signature_of


def sign(
    repository: Repository, key: SigningKey, *, model: str | None = None, version: int | None = None
) -> list[tuple[str, int]]:
    """Sign the versions (of `model`, or the one `version`) and say which.

    Raises ArtifactError and below, naming it, for one that does not verify, which is then not signed, nor any after it.
    """
    done = []
    with repository.locked():
        for name in [require_model(repository, model)] if model else repository.models():
            versions = repository.versions(name)
            if version is not None and version not in versions:
                raise no_version(repository.label, repository.versions(name), name, version)
            for number in [version] if version is not None else versions:
                with naming(name, number):
                    _sign(repository, key, name, number)
                done.append((name, number))
    return done


def _sign(repository: Repository, key: SigningKey, model: str, version: int) -> None:
    folder = repository.folder(model, version)
    verify_served(folder.parent, version, read_config(folder.parent / CONFIG_NAME))
    signature = signature_of((folder / MANIFEST_NAME).read_bytes(), version, key)
    data = (json.dumps(signature, indent=2) + "\n").encode()
    repository.put(f"{model}/{version}/{SIGNATURE_NAME}", data)
