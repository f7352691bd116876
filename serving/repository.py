"""What Triton will serve of a model's folder: the versions its config.pbtxt chooses, every digest checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.publish import verify_versions
from tickserve.errors import ArtifactError, TickserveError
from tickserve.manifest import Manifest
from tickserve.model_config import CONFIG_NAME


@dataclass(frozen=True)
class Survey:
    """The versions to serve, and why others cannot be trusted."""

    served: dict[int, Manifest]
    refused: dict[int, str]


def survey(folder: Path) -> Survey:
    """Verify every version of the model in `folder`, and choose as its configuration does among the good ones.

    Raises ArtifactError, DigestMismatchError, UnsafeModelError or GateRefusedError, naming model and version, when no
    version is left or the configuration itself cannot be trusted.
    """
    try:
        verified, refused = verify_versions(folder)
    except OSError as error:
        name = Path(str(error.filename or folder)).name
        raise ArtifactError(f"cannot read the model {folder.name!r}: {error.strerror}", field=name) from error
    except TickserveError as error:
        raise _named(error, f"model {folder.name!r}") from error
    chosen = _chosen(folder / CONFIG_NAME, sorted(verified))
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


def _chosen(config: Path, versions: list[int]) -> list[int]:
    """Triton's version policy: the latest, all, or the named ones; without one, the newest."""
    policy = text_format.Parse(config.read_text("utf-8"), schema.ModelConfig()).version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return versions
    if kind == "specific":
        return [version for version in versions if version in set(policy.specific.versions)]
    return versions[-max(1, policy.latest.num_versions) :]
