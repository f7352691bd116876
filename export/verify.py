"""Whether a published version can be trusted: its signature, its digests, its graph, its configuration."""

from __future__ import annotations

import re
from pathlib import Path

from export import check_model, parity, runtime
from export.contents import export_record, named_files
from export.largest_batch import over_gated
from export.onnx_graph import PROBABILITIES
from export.triton_config import check_config_matches, chosen_by_policy, read_config
from tickserve import golden
from tickserve.errors import ArtifactError, DigestMismatchError, TickserveError, UnsafeModelError
from tickserve.manifest import GOLDEN_NAME, MANIFEST_NAME, Manifest, load_manifest, verify_file
from tickserve.model_config import CONFIG_NAME, MODEL_FILE, BackendOptions
from tickserve.signing import TrustedKeys, verify_signature
from tickserve.store import sha256_file

CODE_PATTERN = re.compile(r"\.so(\.|$)|\.py[a-z]?$", re.IGNORECASE)
VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,17}")


def versions_of(model_folder: Path) -> list[int]:
    """The published versions of a model, oldest first: numbered folders that hold a manifest."""
    return [version for version in numbers_in(model_folder) if (model_folder / str(version) / MANIFEST_NAME).is_file()]


def numbers_in(model_folder: Path) -> list[int]:
    """Whatever is named like a version, in order; what is not one, an empty folder say, keeps its number taken."""
    if not model_folder.is_dir():
        return []
    return sorted(int(path.name) for path in model_folder.iterdir() if VERSION_PATTERN.fullmatch(path.name))


def verify_version(folder: Path, *, run_golden: bool = False) -> Manifest:
    """The manifest of a published version, once its files are what the manifest names and the graph is safe.

    With `run_golden`, ONNX Runtime also has to give research's numbers for the golden rows. Raises ArtifactError,
    DigestMismatchError, UnsafeModelError, GateRefusedError.
    """
    manifest = load_manifest(folder)
    record = export_record(manifest)
    if record.bundle_digest != manifest.digest() or record.bundle_id != manifest.bundle_id():
        raise DigestMismatchError(
            "wrong digest", field="export.bundle_digest", expected=manifest.digest(), was=record.bundle_digest[:100]
        )
    refuse_code(folder)
    parity.check_tolerance(manifest)
    for name, digest in named_files(manifest).items():
        verify_file(folder, name, digest)
    model = check_model.read_model(folder / MODEL_FILE)
    check_model.check_signature(model, manifest.inputs, manifest.outputs)
    if run_golden:
        _run_golden(folder, manifest)
    return manifest


def refuse_code(folder: Path) -> None:
    """Refuse a folder of a model or a version that holds what Triton would load and run beside a model file.

    Triton looks for a backend's library, or its `model.py`, there before it looks among its backends. No digest and no
    signature covers a file that no manifest names. Raises UnsafeModelError.
    """
    for path in folder.iterdir():
        if CODE_PATTERN.search(path.name):
            raise UnsafeModelError("code beside a model", field=path.name[:100], expected="no library and no program")


def verify_versions(
    folder: Path, trusted: TrustedKeys | None = None
) -> tuple[dict[int, Manifest], dict[int, TickserveError]]:
    """The versions of a model that can be trusted, and why each other one cannot.

    With `trusted` keys, each also has to be signed by one of them as the number it has. Raises ArtifactError when
    config.pbtxt itself cannot be read or asks for what is not honoured, and UnsafeModelError for code beside it.
    """
    refuse_code(folder)
    options = read_config(folder / CONFIG_NAME)
    verified: dict[int, Manifest] = {}
    refused: dict[int, TickserveError] = {}
    for version in numbers_in(folder):
        try:
            verified[version] = verify_served(folder, version, options, trusted)
        except TickserveError as error:
            refused[version] = error
        except OSError as error:
            name = Path(str(error.filename or folder)).name
            refused[version] = ArtifactError(f"cannot read: {error.strerror}", field=name)
    text = (folder / CONFIG_NAME).read_text("utf-8")
    while over := _over_gated(text, options, verified):
        # Without these the policy may choose older ones, which are looked at in turn.
        refused |= over
        verified = {version: manifest for version, manifest in verified.items() if version not in over}
    return verified, refused


def _over_gated(text: str, options: BackendOptions, verified: dict[int, Manifest]) -> dict[int, TickserveError]:
    """Those that the configuration loads with more rows than their gates judged."""
    found = {version: over_gated(options, verified[version]) for version in chosen_by_policy(text, sorted(verified))}
    return {version: error for version, error in found.items() if error is not None}


def verify_served(folder: Path, version: int, options: BackendOptions, trusted: TrustedKeys | None = None) -> Manifest:
    """`verify_version`, and the version held against its model's configuration and the trusted keys, if any.

    The largest batch is not looked at here: it is changed to suit a version when that is loaded.
    """
    path = folder / str(version)
    if not (path / MANIFEST_NAME).is_file():
        raise ArtifactError(f"no {MANIFEST_NAME}: not a published version", field=MANIFEST_NAME)
    if trusted is not None:
        verify_signature(path, trusted, version)
    digest, listed = sha256_file(path / MANIFEST_NAME), options.manifests.get(version, "none")
    if listed != digest:
        raise DigestMismatchError("wrong digest", field=f"manifest.{version}", expected=listed, was=digest)
    manifest = verify_version(path)
    if manifest.name != folder.name:
        raise ArtifactError("wrong model name", field="name", expected=folder.name, was=manifest.name)
    check_config_matches(options, check_model.read_model(path / MODEL_FILE))
    return manifest


def _run_golden(folder: Path, manifest: Manifest) -> None:
    """Hold the graph against the golden pairs as the gates do, and as the backend will when it loads them."""
    pairs = golden.read_golden(folder / GOLDEN_NAME, manifest.inputs, manifest.outputs)
    rows = pairs[manifest.inputs[0].name]
    served = runtime.score_onnx(folder / MODEL_FILE, {tensor.name: pairs[tensor.name] for tensor in manifest.inputs})
    parity.hold("golden", rows, pairs[PROBABILITIES], served, manifest)
    golden.compare(pairs, served, manifest.outputs, tolerance=manifest.tolerance, bundle_id=manifest.bundle_id())
