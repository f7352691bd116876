"""What differs between two versions, or between two repositories, field by field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.contents import named_files
from export.repository.force import in_force
from export.repository.places import Repository
from tickserve.errors import ArtifactError
from tickserve.manifest import MANIFEST_NAME, Manifest, load_manifest
from tickserve.model_config import CONFIG_NAME, MANIFEST_PARAMETER
from tickserve.settings import flatten
from tickserve.signing import signed_by
from tickserve.store import sha256_file


@dataclass(frozen=True)
class Difference:
    """One field, and what either side holds; None where it holds nothing."""

    field: str
    a: Any
    b: Any


def versions(a: Path, b: Path) -> list[Difference]:
    """What differs between two version folders: contract, features, metrics, gates, files, configuration.

    Raises ArtifactError for a folder that is no version.
    """
    return _differences(_version(a), _version(b))


def _version(folder: Path) -> dict[str, Any]:
    manifest = load_manifest(folder)
    stored = flatten({key: value for key, value in manifest.stored().items() if key not in ("features", "gates")})
    fields = {key: _listed(value) for key, value in stored.items() if not key.startswith("export.gates")}
    fields |= _features(manifest) | _gates(manifest)
    fields |= {f"published.{name}": digest for name, digest in named_files(manifest).items()}
    fields[f"published.{MANIFEST_NAME}"] = sha256_file(folder / MANIFEST_NAME)
    fields["signed_by"] = signed_by(folder)
    return fields | _config(folder.parent / CONFIG_NAME)


def _listed(value: Any) -> Any:
    return [dict(each) if isinstance(each, dict) else each for each in value] if isinstance(value, list) else value


def _features(manifest: Manifest) -> dict[str, Any]:
    contract = manifest.features
    fields: dict[str, Any] = {"features.spec": contract.spec, "features.digest": contract.digest}
    for index, name in enumerate(contract.columns):
        place = {"position": index, "minimum": contract.minimum[index], "maximum": contract.maximum[index]}
        fields |= {f"features.{name}.{key}": value for key, value in place.items()}
    return fields


def _gates(manifest: Manifest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for where, gates in (("gates", manifest.gates), ("export.gates", manifest.export.gates if manifest.export else ())):
        for gate in gates:
            found = {"passed": gate.passed, "measured": gate.measured, "limits": gate.limits}
            fields |= flatten(found, f"{where}.{gate.name}.")
    return fields


def _config(path: Path) -> dict[str, Any]:
    """The fields of config.pbtxt, but for the versions' digests, which differ by nature."""
    try:
        message = text_format.Parse(path.read_text("utf-8"), schema.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        return {CONFIG_NAME: "unreadable"}
    fields = flatten(json_format.MessageToDict(message, preserving_proto_field_name=True), "config.")
    return {key: value for key, value in fields.items() if not MANIFEST_PARAMETER.match(key.removeprefix(_PARAMETERS))}


_PARAMETERS = "config.parameters."


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    names = [*a, *(name for name in b if name not in a)]
    return [Difference(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def repositories(a: Repository, b: Repository) -> list[Difference]:
    """What differs between two repositories: models, versions by their manifests' digests, choices, configurations."""
    found = []
    for model in sorted({*a.models(), *b.models()}):
        found += _differences(_model(a, model), _model(b, model))
    return found


def _model(repository: Repository, model: str) -> dict[str, Any]:
    if model not in repository.models():
        return {}
    folder = repository.root / model
    fields: dict[str, Any] = {f"{model}.in_force": in_force(repository, model)}
    for version in repository.versions(model):
        fields[f"{model}.{version}"] = sha256_file(folder / str(version) / MANIFEST_NAME)
        fields[f"{model}.{version}.signed_by"] = _signer(folder / str(version))
    return fields | {f"{model}.{key}": value for key, value in _config(folder / CONFIG_NAME).items()}


def _signer(folder: Path) -> str | None:
    try:
        return signed_by(folder)
    except ArtifactError as error:
        return str(error)
