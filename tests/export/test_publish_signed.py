"""Publishing under a key, and what is in force afterwards."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.publish import Terms, find_published, publish
from export.triton_config import policy_of, read_config
from export.verify import verify_versions
from serving.repository import survey
from tests.export.tiny import NAME, SETTINGS, publish_seeds, release
from tickserve import signing
from tickserve.config import ExportSettings, RepositorySettings
from tickserve.current import CURRENT_NAME, read_current
from tickserve.errors import ArtifactError, DigestMismatchError, SignatureError, TickserveError
from tickserve.manifest import MANIFEST_NAME
from tickserve.signing import SIGNATURE_NAME, SigningKey

TINY = Path("models") / NAME


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return signing.generate_key()


@pytest.fixture(scope="module")
def terms(key: SigningKey) -> Terms:
    return Terms(key, {key.key_id: key.public()})


@pytest.fixture(scope="module")
def signed_once(terms: Terms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("signed") / "models"
    publish_seeds(root, 1, 2, terms=terms)
    return root


@pytest.fixture
def signed(signed_once: Path, tmp_path: Path) -> Path:
    """A repository of two signed versions, for a test to spoil."""
    return Path(shutil.copytree(signed_once, tmp_path / "models"))


def test_what_is_signed_is_served_and_named(signed: Path, terms: Terms, key: SigningKey) -> None:
    assert terms.trusted is not None
    assert sorted(survey(signed / NAME, terms.trusted).served) == [1, 2]
    assert signing.verify_signature(signed / NAME / "2", terms.trusted) == key.key_id
    names = {path.name for path in (signed / NAME / "2").iterdir()}
    assert names == {"model.onnx", "golden.npz", MANIFEST_NAME, SIGNATURE_NAME}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def swap_manifests(model: Path) -> None:
    shutil.copy(model / "1" / MANIFEST_NAME, model / "2" / MANIFEST_NAME)


def copy_signature(model: Path) -> None:
    shutil.copy(model / "1" / SIGNATURE_NAME, model / "2" / SIGNATURE_NAME)


def copy_whole_version(model: Path) -> None:
    """An old version, signed as it is, passed off as the newest one, with the configuration to match."""
    shutil.rmtree(model / "2")
    shutil.copytree(model / "1", model / "2")
    digests = read_config(model / "config.pbtxt").manifests
    text = (model / "config.pbtxt").read_text().replace(digests[2], digests[1])
    (model / "config.pbtxt").write_text(text)


def sign_by_another(model: Path) -> None:
    signing.sign_version(model / "2", 2, signing.generate_key())


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda model: flip(model / "2" / "model.onnx"), DigestMismatchError),
        (lambda model: flip(model / "2" / "golden.npz"), DigestMismatchError),
        (lambda model: flip(model / "2" / MANIFEST_NAME), SignatureError),
        (lambda model: flip(model / "2" / SIGNATURE_NAME), SignatureError),
        (lambda model: (model / "2" / SIGNATURE_NAME).unlink(), SignatureError),
        (swap_manifests, SignatureError),
        (copy_signature, SignatureError),
        (copy_whole_version, SignatureError),
        (sign_by_another, SignatureError),
    ],
)
def test_a_version_that_was_tampered_with_is_never_served(
    spoil: Callable[[Path], object], error: type[TickserveError], signed: Path, terms: Terms
) -> None:
    spoil(signed / NAME)
    verified, refused = verify_versions(signed / NAME, terms.trusted)
    assert (sorted(verified), sorted(refused)) == ([1], [2])
    assert isinstance(refused[2], error)
    found = survey(signed / NAME, terms.trusted)
    assert sorted(found.served) == [1]
    shutil.rmtree(signed / NAME / "1")
    with pytest.raises(error, match="version 2"):
        survey(signed / NAME, terms.trusted)


def test_an_old_version_in_a_new_place_passes_every_check_but_the_signature(signed: Path) -> None:
    """The negative control: without trusted keys, digests alone let this one through."""
    copy_whole_version(signed / NAME)
    assert sorted(survey(signed / NAME).served) == [1, 2]


def test_unsigned_is_served_where_no_key_is_trusted(tmp_path: Path, terms: Terms) -> None:
    publish_seeds(tmp_path / "models", 1)
    assert sorted(survey(tmp_path / TINY).served) == [1]
    with pytest.raises(SignatureError, match=r"model 'tiny' version 1: .*unsigned"):
        survey(tmp_path / TINY, terms.trusted)


def test_a_publish_that_nobody_would_trust_is_refused_before_anything_is_written(
    tmp_path: Path, terms: Terms, key: SigningKey
) -> None:
    other = signing.generate_key()
    with pytest.raises(SignatureError, match=f"not trusted: expected key {key.key_id}, was key {other.key_id}"):
        publish_seeds(tmp_path / "models", 1, terms=dataclasses.replace(terms, key=other))
    with pytest.raises(SignatureError, match=f"no key to sign with: expected key {key.key_id}"):
        publish_seeds(tmp_path / "models", 1, terms=dataclasses.replace(terms, key=None))
    assert not (tmp_path / "models").exists()


def test_the_same_bundle_again_is_not_taken_from_an_unsigned_version(signed: Path, terms: Terms) -> None:
    manifest = release(2).manifest
    assert find_published(signed, manifest, SETTINGS, terms.trusted) == 2
    (signed / NAME / "2" / SIGNATURE_NAME).unlink()
    with pytest.raises(SignatureError, match="unsigned"):
        publish(release(2), signed, SETTINGS, terms)


def test_terms_come_from_settings_and_environment(
    tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing.write_key(key, tmp_path / "key.pem")
    files = {"signing_key_file": str(tmp_path / "key.pem"), "trusted_keys_file": str(tmp_path / "key.pem.pub")}
    found = Terms.of(RepositorySettings(**files))
    assert found.key is not None
    assert (found.key.key_id, found.trusted, found.activate) == (key.key_id, {key.key_id: key.public()}, True)
    monkeypatch.setenv(signing.SIGNING_KEY_ENV, (tmp_path / "key.pem").read_text())
    found = Terms.of(RepositorySettings(), activate=False)
    assert found.key is not None
    assert (found.key.key_id, found.trusted, found.activate) == (key.key_id, None, False)


def in_force(model: Path) -> tuple[int, int | None]:
    current = read_current(model)
    assert current is not None
    return current.version, current.previous


def test_each_publish_is_in_force_unless_it_is_not_to_be(tmp_path: Path) -> None:
    model = tmp_path / TINY
    publish_seeds(tmp_path / "models", 1)
    assert in_force(model) == (1, None)
    publish_seeds(tmp_path / "models", 2)
    assert in_force(model) == (2, 1)
    publish_seeds(tmp_path / "models", 3, terms=Terms(activate=False))
    assert in_force(model) == (2, 1)
    assert policy_of((model / "config.pbtxt").read_text()) == ("specific", [1, 2])
    assert sorted(survey(model).served) == [1, 2]
    publish_seeds(tmp_path / "models", 4)
    assert in_force(model) == (4, 2)
    assert policy_of((model / "config.pbtxt").read_text()) == ("specific", [2, 4])


def test_a_version_not_to_be_in_force_is_not_so_for_lack_of_a_choice(tmp_path: Path) -> None:
    """A repository from before there was a current.json: its newest counts, and a silent publish must not become it."""
    model = tmp_path / TINY
    publish_seeds(tmp_path / "models", 1)
    (model / CURRENT_NAME).unlink()
    publish_seeds(tmp_path / "models", 2, terms=Terms(activate=False))
    assert in_force(model) == (1, None)
    assert sorted(survey(model).served) == [1]


def test_the_same_bundle_again_does_not_undo_a_rollback(tmp_path: Path) -> None:
    from tickserve.current import write_current

    publish_seeds(tmp_path / "models", 1, 2)
    write_current(tmp_path / TINY, 1)
    publish_seeds(tmp_path / "models", 2)
    assert in_force(tmp_path / TINY) == (1, 2)
    assert policy_of((tmp_path / TINY / "config.pbtxt").read_text()) == ("specific", [1])


def test_the_version_in_force_stays_loaded_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where one version is all that is kept: in the moment before current.json changes, both are loaded."""
    import export.publish as publishing

    one = ExportSettings(max_batch=16, preferred_batch_rows=(4, 8), keep_versions=1)
    publish(release(1), tmp_path / "models", one)
    model, seen = tmp_path / TINY, []
    original = publishing.write_current

    def look(folder: Path, version: int) -> object:
        seen.append(sorted(survey(folder).served))
        return original(folder, version)

    monkeypatch.setattr(publishing, "write_current", look)
    publish(release(2), tmp_path / "models", one)
    assert seen == [[1, 2]]
    assert sorted(survey(model).served) == [2]


def test_a_damaged_choice_is_replaced_by_the_next_publish(tmp_path: Path) -> None:
    publish_seeds(tmp_path / "models", 1)
    (tmp_path / TINY / CURRENT_NAME).write_text("{")
    with pytest.raises(ArtifactError):
        read_current(tmp_path / TINY)
    publish_seeds(tmp_path / "models", 2)
    assert in_force(tmp_path / TINY) == (2, None)


def test_the_choice_is_plain_json(tmp_path: Path) -> None:
    publish_seeds(tmp_path / "models", 1, 2)
    value = json.loads((tmp_path / TINY / CURRENT_NAME).read_text())
    assert sorted(value) == ["manifest_sha256", "previous", "version"]


def test_the_real_triton_serves_a_signed_version_past_its_signature(signed: Path, terms: Terms) -> None:
    """Triton ignores manifest.sig and current.json; a version whose signature is gone is not among those it loads."""
    from serving.embedded import EmbeddedTriton
    from tickserve.client import Client
    from tickserve.config import ServeSettings

    (signed / NAME / "1" / SIGNATURE_NAME).unlink()
    ports = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
    with (
        EmbeddedTriton(signed, ports, trusted=terms.trusted) as server,
        Client(server.http_url, manifest=signed, deadline_ms=5_000) as client,
    ):
        assert sorted(server.refused[NAME]) == [1]
        assert client.score(NAME, np.zeros((1, 4), np.float32)).version == 2
