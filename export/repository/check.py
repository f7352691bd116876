"""Verify: whether every version can be trusted, and whether the one in force is there and loaded."""

from __future__ import annotations

from dataclasses import dataclass

from export.largest_batch import over_gated
from export.repository.listing import loaded
from export.repository.places import Repository, require_model
from export.triton_config import read_config
from export.verify import verify_served, verify_version
from tickserve.current import folder_in_force, read_current
from tickserve.errors import ArtifactError, ComponentError, TickserveError
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import TrustedKeys, signed_by


@dataclass(frozen=True)
class Verdict:
    """A version (or, without one, the model itself) and what is wrong with it; None for nothing."""

    model: str
    version: int | None
    signed_by: str | None
    error: TickserveError | None


def verify(
    repository: Repository, *, trusted: TrustedKeys | None = None, model: str | None = None, golden: bool = True
) -> list[Verdict]:
    """A verdict for each model's choice and each version: digests, graph, configuration, signature, golden pairs.

    Raises ArtifactError for an unknown model, ComponentError when a bucket cannot be reached.
    """
    found = []
    for name in [require_model(repository, model)] if model else repository.models():
        found.append(Verdict(name, None, None, _problem_of_choice(repository, name)))
        found += [_verdict(repository, name, version, trusted, golden) for version in repository.versions(name)]
    return found


def _verdict(repository: Repository, model: str, version: int, trusted: TrustedKeys | None, golden: bool) -> Verdict:
    signer = None
    try:
        signer = signed_by(repository.root / model / str(version))
        folder = repository.folder(model, version)
        options = read_config(folder.parent / CONFIG_NAME)
        manifest = verify_served(folder.parent, version, options, trusted)
        error = over_gated(options, manifest) if version in loaded(repository, model) else None
        if error is not None:
            raise error
        if golden:
            verify_version(folder, run_golden=True)
    except ComponentError:
        raise
    except TickserveError as error:
        return Verdict(model, version, signer, error)
    except OSError as error:
        return Verdict(model, version, signer, ArtifactError(f"cannot read: {error.strerror}", field=str(version)))
    return Verdict(model, version, signer, None)


def _problem_of_choice(repository: Repository, model: str) -> TickserveError | None:
    folder = repository.root / model
    try:
        read_config(folder / CONFIG_NAME)
        folder_in_force(folder)
        current = read_current(folder)
    except TickserveError as error:
        return error
    if current and current.version not in loaded(repository, model):
        return ArtifactError(
            "Triton does not load the version in force", field="version_policy", expected=str(current.version)
        )
    return None
