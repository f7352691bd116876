from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.manifest import (
    CLASSES,
    MANIFEST_NAME,
    MODEL_NAME_PATTERN,
    Manifest,
    Provenance,
    bundle_id_of,
    check_model_name,
    load_bundle,
    load_manifest,
    parse_manifest,
    write_manifest,
)
from tickserve.store import sha256_bytes

Spoil = Callable[[Path], Any]
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


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


class LaterProvenance(Provenance):
    reviewer: str = "nobody"


class Later(Manifest):
    """The schema as a later release may have it."""

    provenance: LaterProvenance
    calibration: str | None = None


def test_a_field_added_later_does_not_change_old_digests(bundle: Path) -> None:
    stored = json.loads((bundle / MANIFEST_NAME).read_bytes())
    later = Later.model_validate(stored)
    assert later.digest() == load_manifest(bundle).digest()
    assert later.stored() == stored
    assert later.model_copy(update={"calibration": "isotonic"}).digest() != later.digest()


def digest_of_file(path: Path) -> str:
    """As any other language would: nothing of ours."""
    value = json.loads(path.read_bytes())
    value.pop("export", None)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metrics=st.dictionaries(words, anything, max_size=3),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "precision": st.sampled_from(["fp32", "fp16"]),
            "architecture": st.dictionaries(words, anything, max_size=2),
            "parents": st.lists(words, max_size=2).map(tuple),
            "classes": st.just(CLASSES),
        },
    ),
    numbers=st.tuples(st.floats(0, 1), st.integers(0, 3)),
)
def test_the_digest_is_recomputed_from_the_file_alone(
    tmp_path: Path, make_manifest: Any, metrics: Any, changes: Any, numbers: tuple[float, int]
) -> None:
    written = make_manifest(metrics=metrics, tolerance={"atol": numbers[0], "rtol": numbers[1]}, **changes)
    copied = written.model_copy(update={"metrics": {"copied": metrics}})
    for manifest in (written, copied, written.model_copy(update={"export": None})):
        write_manifest(tmp_path, manifest)
        assert digest_of_file(tmp_path / MANIFEST_NAME) == manifest.digest()
        read = load_manifest(tmp_path)
        assert (read.digest(), read.stored()) == (manifest.digest(), manifest.stored())
        write_manifest(tmp_path, read)
        assert digest_of_file(tmp_path / MANIFEST_NAME) == manifest.digest()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m["horizon"].update(threshold=0), "horizon"),
        (lambda m: m["horizon"].update(value="1000"), "horizon"),
        (lambda m: m.pop("classes"), "classes"),
        (lambda m: m.pop("schema_version"), "schema_version"),
    ],
)
def test_a_file_that_would_not_give_its_own_digest_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], Any], field: str
) -> None:
    rewrite(bundle, change)
    with pytest.raises(ArtifactError) as caught:
        load_manifest(bundle)
    assert caught.value.field == field


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
    "classes reversed": (lambda m: m["classes"].reverse(), "classes"),
    "a fourth class": (lambda m: m["classes"].append("hold"), "classes"),
    "outputs in another order": (lambda m: m["outputs"].reverse(), "outputs"),
    "no bundle_id": (lambda m: m["outputs"].pop(), "outputs"),
    "an output of another shape": (lambda m: m["outputs"][1].update(shape=[2]), "outputs"),
    "two inputs": (lambda m: m["inputs"].append(dict(m["inputs"][0], name="more")), "inputs"),
    "no input": (lambda m: m["inputs"].clear(), "inputs"),
    "an input without a size": (lambda m: m["inputs"][0].update(shape=[0]), "inputs.0"),
    "integers in": (lambda m: m["inputs"][0].update(dtype="INT64"), "inputs.0"),
    "a column too few": (
        lambda m: [m["features"][each].pop() for each in ("columns", "minimum", "maximum")],
        "features.columns",
    ),
    "a column twice": (lambda m: m["features"].update(columns=["spread"] * 4), "features.columns"),
    "a range too few": (lambda m: m["features"]["maximum"].pop(), "features.maximum"),
    "a range upside down": (lambda m: m["features"]["minimum"].__setitem__(2, 6.0), "features.minimum"),
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
