"""Signatures and keys: what is accepted, and every way one can be wrong."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tickserve import signing
from tickserve.config import RepositorySettings
from tickserve.errors import ConfigError, SignatureError
from tickserve.manifest import MANIFEST_NAME
from tickserve.signing import SIGNATURE_NAME, SigningKey


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return signing.generate_key()


@pytest.fixture(scope="module")
def trusted(key: SigningKey) -> dict[str, bytes]:
    return {key.key_id: key.public()}


@pytest.fixture
def version(tmp_path: Path, key: SigningKey) -> Path:
    folder = tmp_path / "model" / "3"
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text('{"name": "model", "padding": "' + "x" * 200 + '"}\n')
    signing.sign_version(folder, 3, key)
    return folder


def test_a_signed_version_names_its_key(version: Path, key: SigningKey, trusted: dict[str, bytes]) -> None:
    assert signing.verify_signature(version, trusted) == signing.signed_by(version) == key.key_id


def test_one_of_several_trusted_keys_is_enough(version: Path, key: SigningKey, trusted: dict[str, bytes]) -> None:
    other = signing.generate_key()
    assert signing.verify_signature(version, {other.key_id: other.public(), **trusted}) == key.key_id


def test_unsigned_is_refused_and_the_wanted_key_named(
    version: Path, key: SigningKey, trusted: dict[str, bytes]
) -> None:
    (version / SIGNATURE_NAME).unlink()
    assert signing.signed_by(version) is None
    with pytest.raises(SignatureError, match=f"unsigned: expected a signature by key {key.key_id}, was no signature"):
        signing.verify_signature(version, trusted)


def test_a_foreign_key_is_refused_and_both_are_named(version: Path, key: SigningKey) -> None:
    other = signing.generate_key()
    with pytest.raises(SignatureError, match=rf"not trusted: expected .*{other.key_id}, was key {key.key_id}"):
        signing.verify_signature(version, {other.key_id: other.public()})


def test_a_key_id_borrowed_from_a_trusted_key_does_not_help(version: Path, trusted: dict[str, bytes]) -> None:
    signing.sign_version(version, 3, signing.generate_key())
    claim = json.loads((version / SIGNATURE_NAME).read_text())
    (version / SIGNATURE_NAME).write_text(json.dumps(claim | {"key_id": next(iter(trusted))}))
    with pytest.raises(SignatureError, match="not over this manifest"):
        signing.verify_signature(version, trusted)


def test_every_changed_byte_of_the_manifest_is_refused(version: Path, trusted: dict[str, bytes]) -> None:
    good = (version / MANIFEST_NAME).read_bytes()
    for index in range(len(good)):
        (version / MANIFEST_NAME).write_bytes(good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :])
        with pytest.raises(SignatureError, match="not over this manifest"):
            signing.verify_signature(version, trusted)
    (version / MANIFEST_NAME).write_bytes(good)
    signing.verify_signature(version, trusted)


def test_a_signature_of_another_version_is_refused(version: Path, trusted: dict[str, bytes], key: SigningKey) -> None:
    other = version.with_name("4")
    shutil.copytree(version, other)
    with pytest.raises(SignatureError, match="signed as another version: expected 4, was 3"):
        signing.verify_signature(other, trusted)
    claim = json.loads((other / SIGNATURE_NAME).read_text())
    (other / SIGNATURE_NAME).write_text(json.dumps(claim | {"version": 4}))
    with pytest.raises(SignatureError, match="not over this manifest"):
        signing.verify_signature(other, trusted)


def test_a_copy_under_any_other_folder_name_is_the_version_it_was_signed_as(
    version: Path, trusted: dict[str, bytes]
) -> None:
    copy = version.with_name("copy")
    shutil.copytree(version, copy)
    signing.verify_signature(copy, trusted)
    with pytest.raises(SignatureError, match="expected 4, was 3"):
        signing.verify_signature(copy, trusted, version=4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 5_000,
        b" " * 5_000,
        b'{"algorithm": "none", "key_id": "0123456789abcdef", "version": 3, "signature": ""}',
        b'{"algorithm": "ed25519", "key_id": "0123456789abcdef", "version": true, "signature": "AAAA"}',
        b'{"algorithm": "ed25519", "key_id": "0123456789abcdef", "version": 3, "signature": "AAAA"}',
        b'{"algorithm": "ed25519", "key_id": "0123456789abcdef", "version": 3, "signature": 7}',
    ],
)
def test_what_is_no_signature_is_refused(version: Path, trusted: dict[str, bytes], content: bytes) -> None:
    (version / SIGNATURE_NAME).write_bytes(content)
    with pytest.raises(SignatureError, match="not a signature"):
        signing.verify_signature(version, trusted)
    with pytest.raises(SignatureError, match="not a signature"):
        signing.signed_by(version)


def test_a_missing_manifest_is_refused(version: Path, trusted: dict[str, bytes]) -> None:
    (version / MANIFEST_NAME).unlink()
    with pytest.raises(SignatureError, match="cannot read manifest"):
        signing.verify_signature(version, trusted)


def test_keys_survive_their_files(tmp_path: Path, key: SigningKey, version: Path) -> None:
    path = tmp_path / "keys" / "desk.pem"
    public = signing.write_key(key, path)
    assert path.stat().st_mode & 0o777 == 0o600
    again = signing.read_signing_key(path)
    assert again is not None
    assert again.key_id == key.key_id
    (tmp_path / "trusted").write_text(f"# the desk\n\n{public.read_text()}")
    assert signing.verify_signature(version, signing.read_trusted_keys(tmp_path / "trusted")) == key.key_id
    with pytest.raises(ConfigError, match="exists already"):
        signing.write_key(key, path)


def test_a_key_from_the_environment(tmp_path: Path, key: SigningKey) -> None:
    signing.write_key(key, tmp_path / "key.pem")
    pem = (tmp_path / "key.pem").read_text()
    found = signing.read_signing_key(environ={signing.SIGNING_KEY_ENV: pem})
    assert found is not None
    assert found.key_id == key.key_id
    assert signing.read_signing_key(environ={}) is None


def test_the_secret_is_never_shown(tmp_path: Path, key: SigningKey) -> None:
    assert repr(key) == f"SigningKey({key.key_id})"
    with pytest.raises(ConfigError) as caught:
        signing.read_signing_key(environ={signing.SIGNING_KEY_ENV: "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n"})
    assert "c2VjcmV0" not in str(caught.value)
    assert caught.value.__cause__ is None


def _rsa() -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
    plain = serialization.NoEncryption()
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


@pytest.mark.parametrize("content", [lambda: b"", lambda: b"\x00\xff", _rsa])
def test_a_file_that_is_no_ed25519_key_is_refused(tmp_path: Path, content: Callable[[], bytes]) -> None:
    (tmp_path / "key.pem").write_bytes(content())
    with pytest.raises(ConfigError, match=r"key\.pem: not a private key: expected an unencrypted PEM ed25519 key"):
        signing.read_signing_key(tmp_path / "key.pem")
    with pytest.raises(ConfigError, match=r"none\.pem: cannot read the key file"):
        signing.read_signing_key(tmp_path / "none.pem")


@pytest.mark.parametrize("line", ["ed25519", "ed25519 AAAA", "rsa " + "A" * 44, "ed25519 not-base64!", "\x00"])
def test_a_wrong_line_among_trusted_keys_is_named(tmp_path: Path, key: SigningKey, line: str) -> None:
    (tmp_path / "trusted").write_text(f"{key.public_line()}{line}\n")
    with pytest.raises(ConfigError, match="trusted line 2: not a public key"):
        signing.read_trusted_keys(tmp_path / "trusted")


def test_settings_say_who_is_trusted(tmp_path: Path, key: SigningKey, trusted: dict[str, bytes]) -> None:
    assert signing.trusted_keys(RepositorySettings()) is None
    with pytest.raises(ConfigError, match=r"repository\.trusted_keys_file"):
        signing.trusted_keys(RepositorySettings(require_signature=True))
    path = tmp_path / "trusted"
    path.write_text("# nobody yet\n")
    with pytest.raises(ConfigError, match="no trusted key"):
        signing.trusted_keys(RepositorySettings(trusted_keys_file=str(path)))
    path.write_text(key.public_line())
    assert signing.trusted_keys(RepositorySettings(trusted_keys_file=str(path))) == trusted


def test_openssl_writes_a_key_and_checks_a_signature(tmp_path: Path, version: Path) -> None:
    """The format is the one other tools know: a key of openssl signs, and openssl verifies without our code."""
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "k.pem"], check=True)
    subprocess.run(["openssl", "pkey", "-in", tmp_path / "k.pem", "-pubout", "-out", tmp_path / "p.pem"], check=True)
    key = signing.read_signing_key(tmp_path / "k.pem")
    assert key is not None
    claim = signing.signature_of((version / MANIFEST_NAME).read_bytes(), 3, key)
    (tmp_path / "sig").write_bytes(base64.b64decode(claim["signature"]))
    (tmp_path / "message").write_bytes(b"tickserve manifest v1\n3\n" + (version / MANIFEST_NAME).read_bytes())
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", tmp_path / "p.pem", "-rawin"]
    subprocess.run([*command, "-in", tmp_path / "message", "-sigfile", tmp_path / "sig"], check=True)


def test_the_module_imports_without_cryptography() -> None:
    code = "import sys; import tickserve.signing; assert 'cryptography' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
