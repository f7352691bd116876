from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.manifest import (
    MANIFEST_NAME,
    MODEL_NAME_PATTERN,
    Manifest,
    bundle_id_of,
    check_model_name,
    load_bundle,
    load_manifest,
    parse_manifest,
    write_manifest,
)
from tickserve.store import sha256_bytes

Spoil = Callable[[Path], Any]


@pytest.fixture
def bundle(tmp_path: Path, make_manifest: Any) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    files = {"model.ubj": b"model", "golden.npz": b"golden"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    write_manifest(folder, make_manifest(files={name: sha256_bytes(data) for name, data in files.items()}))
    return folder


def test_a_manifest_comes_back_as_it_went(bundle: Path) -> None:
    manifest = load_bundle(bundle)
    assert parse_manifest(manifest.model_dump_json()) == manifest
    assert parse_manifest(manifest.model_dump(mode="json")) == manifest
    with pytest.raises(ValidationError):
        manifest.name = "other"  # type: ignore[misc]


def test_the_digest_names_the_bundle_and_not_its_export(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert manifest.export is not None
    assert manifest.model_copy(update={"export": None}).digest() == manifest.digest()
    assert manifest.model_copy(update={"nan_policy": "reject"}).digest() != manifest.digest()
    files = dict(manifest.files) | {"model.ubj": sha256_bytes(b"other")}
    assert manifest.model_copy(update={"files": files}).digest() != manifest.digest()


def test_a_field_added_later_does_not_change_old_digests(bundle: Path) -> None:
    class Later(Manifest):
        calibration: str | None = None

    assert Later.model_validate(load_manifest(bundle).model_dump()).digest() == load_manifest(bundle).digest()


def test_the_bundle_id_is_the_first_eight_bytes_signed() -> None:
    assert bundle_id_of("sha256:" + "ff" * 32) == -1
    assert bundle_id_of("sha256:" + "00" * 7 + "01" + "ff" * 24) == 1
    assert bundle_id_of("sha256:7f" + "ff" * 31) == 2**63 - 1


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / MANIFEST_NAME).read_bytes())
    change(value)
    (folder / MANIFEST_NAME).write_text(json.dumps(value))


BAD_FIELDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown key": (lambda m: m.update(nane="x"), "nane"),
    "missing key": (lambda m: m.pop("horizon"), "horizon"),
    "unsafe name": (lambda m: m.update(name="../x"), "name"),
    "family": (lambda m: m.update(family="forest"), "family"),
    "schema from the future": (lambda m: m.update(schema_version=2), "schema_version"),
    "dtype": (lambda m: m["inputs"][0].update(dtype="FP64"), "inputs.0.dtype"),
    "threshold": (lambda m: m["horizon"].update(threshold=-1), "horizon.threshold"),
    "horizon": (lambda m: m["horizon"].update(value=0), "horizon.value"),
    "nested unknown key": (lambda m: m["features"].update(extra=1), "features.extra"),
    "infinite range": (lambda m: m["features"].update(minimum=[float("inf")] * 4), "features.minimum.0"),
    "nan tolerance": (lambda m: m["tolerance"].update(atol=float("nan")), "tolerance.atol"),
}


@pytest.mark.parametrize("name", sorted(BAD_FIELDS))
def test_a_wrong_field_is_named(bundle: Path, name: str) -> None:
    change, field = BAD_FIELDS[name]
    rewrite(bundle, change)
    with pytest.raises(ArtifactError) as caught:
        load_bundle(bundle)
    assert caught.value.field == field
    assert str(bundle) not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a":' + b"1" * 5_000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_manifest_is_an_artifact_error(bundle: Path, data: bytes) -> None:
    (bundle / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(ArtifactError):
        load_bundle(bundle)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_artifact_error(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        parse_manifest(data)


def hide(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes(b"model")
    (folder / "model.ubj").unlink()
    (folder / "model.ubj").symlink_to(outside)


def escape(folder: Path) -> None:
    (folder.parent / "outside").write_bytes(b"model")
    rewrite(folder, lambda m: m["files"].update({"../outside": sha256_bytes(b"model")}))


SPOILS: dict[str, tuple[Spoil, type[ArtifactError], str]] = {
    "no manifest": (lambda f: (f / MANIFEST_NAME).unlink(), ArtifactError, "no manifest.json"),
    "missing file": (lambda f: (f / "model.ubj").unlink(), ArtifactError, "not a plain file"),
    "a folder": (lambda f: ((f / "model.ubj").unlink(), (f / "model.ubj").mkdir()), ArtifactError, "not a plain file"),
    "changed byte": (lambda f: (f / "model.ubj").write_bytes(b"modeL"), DigestMismatchError, "wrong digest"),
    "truncated": (lambda f: (f / "golden.npz").write_bytes(b""), DigestMismatchError, "wrong digest"),
    "a pickle in its place": (
        lambda f: (f / "model.ubj").write_bytes(pickle.dumps([1])),
        DigestMismatchError,
        "wrong digest",
    ),
    "unnamed pickle beside": (
        lambda f: (f / "extra.pkl").write_bytes(pickle.dumps([1])),
        ArtifactError,
        "does not name",
    ),
    "symlink out": (hide, ArtifactError, "not a plain file"),
    "path out": (escape, ArtifactError, "not a plain file"),
}


@pytest.mark.parametrize("name", sorted(SPOILS))
def test_a_spoilt_bundle_is_refused(bundle: Path, name: str) -> None:
    load_bundle(bundle)
    spoil, kind, says = SPOILS[name]
    spoil(bundle)
    with pytest.raises(ArtifactError, match=says) as caught:
        load_bundle(bundle)
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", ["a", "btcusdt-l5-gbdt", "0", "a.b_c-d", "x" * 100])
def test_good_model_names(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a..b", "-a", "_a", ".a", "A", "a/b", "a\\b", "a b", "a\n", "a\0", "é", "x" * 101]
)
def test_names_that_are_no_model_names(name: str) -> None:
    with pytest.raises(ValueError, match="model name: expected"):
        check_model_name(name)


@given(st.text(max_size=120))
def test_a_checked_name_stays_inside_its_folder(name: str) -> None:
    try:
        check_model_name(name)
    except ValueError:
        return
    assert MODEL_NAME_PATTERN.fullmatch(name)
    assert (Path("/repository") / name).resolve().parent == Path("/repository")
