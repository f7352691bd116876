"""What Triton will serve of a model's folder: those its config.pbtxt chooses, every digest and signature checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.triton_config import chosen_by_policy
from export.verify import verify_versions
from tickserve.errors import ArtifactError, TickserveError
from tickserve.manifest import Manifest
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import TrustedKeys


@dataclass(frozen=True)
class Survey:
    """The versions to serve, and why others cannot be trusted."""

    served: dict[int, Manifest]
    refused: dict[int, str]


def survey(folder: Path, trusted: TrustedKeys | None = None) -> Survey:
    """Verify every version of the model in `folder`, and choose as its configuration does among the good ones.

    With `trusted` keys, a version that none of them signed is not good. Raises ArtifactError, DigestMismatchError,
    SignatureError, UnsafeModelError or GateRefusedError, naming model and version, when no version is left or the
    configuration itself cannot be trusted.
    """
    try:
        verified, refused = verify_versions(folder, trusted)
    except OSError as error:
        name = Path(str(error.filename or folder)).name
        raise ArtifactError(f"cannot read the model {folder.name!r}: {error.strerror}", field=name) from error
    except TickserveError as error:
        raise _named(error, f"model {folder.name!r}") from error
    chosen = chosen_by_policy((folder / CONFIG_NAME).read_text("utf-8"), sorted(verified))
    if not chosen:
        # The newest with a reason of its own: an older one says less about what is wrong now.
        for version in sorted(refused, reverse=True):
            raise _named(refused[version], f"model {folder.name!r} version {version}") from refused[version]
        raise ArtifactError(f"model {folder.name!r} has no version to serve", field="version_policy")
    return Survey({version: verified[version] for version in chosen}, {v: str(e) for v, e in refused.items()})


def _named(error: TickserveError, where: str) -> TickserveError:
    hint = "publish it again, remove its folder, or choose the other models with --model"
    named = type(error)(f"{where}: {error}", hint=hint)
    named.field, named.expected, named.was = error.field, error.expected, error.was
    return named
