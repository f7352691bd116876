"""Signatures of repository versions: ed25519 over manifest.json, which names the digest of every file.

    <n>/manifest.sig    {"algorithm": "ed25519", "key_id": "...", "version": n, "signature": "<base64>"}

What is signed is `tickserve manifest v1`, a newline, the version number in decimal, a newline, and the bytes of
manifest.json as they are stored. The number is part of it so that an old version, signed as it is, cannot be put in
the place of a newer one; the model's name is in the manifest.

A private key is a PEM file (PKCS 8, as `openssl genpkey -algorithm ed25519` writes it) or the same text in the
environment variable TICKSERVE_SIGNING_KEY. Trusted keys are lines `ed25519 <base64 of the 32 bytes> [comment]`; the
key id is the first 16 hex digits of the SHA-256 of those 32 bytes. Needs the extra `repository` where a key is used.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tickserve.config import RepositorySettings
from tickserve.errors import ConfigError, MissingExtraError, SignatureError
from tickserve.manifest import MANIFEST_NAME
from tickserve.store import unwritable, write_atomic, write_json_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE_NAME = "manifest.sig"
SIGNING_KEY_ENV = "TICKSERVE_SIGNING_KEY"
ALGORITHM = "ed25519"
MAX_BYTES = 4_096
_MEMBERS = {"algorithm", "key_id", "version", "signature"}

TrustedKeys = Mapping[str, bytes]
"""Public keys, 32 bytes each, by their key id."""


@dataclass(frozen=True)
class SigningKey:
    """A private key; its representation shows the id only."""

    key_id: str
    _private: Ed25519PrivateKey

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of the signature."""
        return self._private.sign(message)

    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        return self._private.public_key().public_bytes_raw()

    def public_line(self, comment: str = "") -> str:
        """The line of a file of trusted keys."""
        return f"{ALGORITHM} {base64.b64encode(self.public()).decode()} {comment or self.key_id}\n"

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id})"


def key_id_of(public: bytes) -> str:
    """The id of a public key: 16 hex digits."""
    return hashlib.sha256(public).hexdigest()[:16]


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError.of("cryptography", "repository") from error
    return ed25519


def _key(private: Ed25519PrivateKey) -> SigningKey:
    return SigningKey(key_id_of(private.public_key().public_bytes_raw()), private)


def generate_key() -> SigningKey:
    """A new private key."""
    return _key(_ed25519().Ed25519PrivateKey.generate())


def write_key(key: SigningKey, path: Path) -> Path:
    """Write the private key to `path`, readable by its owner alone, and `<path>.pub`; give the latter.

    Raises ConfigError when either file exists, ComponentError when they cannot be written.
    """
    from cryptography.hazmat.primitives import serialization

    public = path.with_name(path.name + ".pub")
    for file in (path, public):
        if file.exists():
            raise ConfigError("exists already, and a key is never overwritten", field=file.name)
    pem = key._private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(pem)
    except OSError as error:
        raise unwritable(path, error) from error
    write_atomic(public, key.public_line().encode())
    return public


def read_signing_key(path: Path | None = None, environ: Mapping[str, str] | None = None) -> SigningKey | None:
    """The private key of the file, else of TICKSERVE_SIGNING_KEY, else None.

    Raises ConfigError, which never shows the content, for a file or value that is not a PEM ed25519 key.
    """
    environ = os.environ if environ is None else environ
    if path is not None:
        return _parse_private(_read(path), path.name)
    text = environ.get(SIGNING_KEY_ENV)
    return _parse_private(text.encode(), SIGNING_KEY_ENV) if text else None


def _parse_private(pem: bytes, field: str) -> SigningKey:
    ed25519 = _ed25519()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    wrong = ConfigError("not a private key", field=field, expected="an unencrypted PEM ed25519 key")
    try:
        private = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise wrong from None
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise wrong
    return _key(private)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the key file: {error.strerror}", field=path.name) from error


def read_trusted_keys(path: Path) -> TrustedKeys:
    """The public keys of a file, by id. Raises ConfigError naming the line that is wrong, or when there is none."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(_read(path).decode("utf-8", "replace").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if words:
            public = _public(words, f"{path.name} line {number}")
            keys[key_id_of(public)] = public
    if not keys:
        raise ConfigError("no trusted key", field=path.name, expected="lines 'ed25519 <base64> [comment]'")
    return keys


def trusted_keys(settings: RepositorySettings) -> TrustedKeys | None:
    """The keys that `repository.trusted_keys_file` names; None when none is configured, so nothing has to be signed.

    Raises ConfigError for a file that is wrong, and when signatures are required of no key in particular.
    """
    if settings.trusted_keys_file:
        return read_trusted_keys(Path(settings.trusted_keys_file))
    if settings.require_signature:
        raise ConfigError(
            "signatures are required, by whom is not said",
            field="repository.trusted_keys_file",
            expected="a file of trusted keys",
            was="none",
        )
    return None


def signing_key(settings: RepositorySettings) -> SigningKey | None:
    """The key of `repository.signing_key_file`, else of TICKSERVE_SIGNING_KEY, else None. Raises ConfigError."""
    return read_signing_key(Path(settings.signing_key_file) if settings.signing_key_file else None)


def _public(words: list[str], field: str) -> bytes:
    try:
        public = base64.b64decode(words[1], validate=True) if words[0] == ALGORITHM else b""
    except (IndexError, binascii.Error, ValueError):
        public = b""
    if len(public) != 32:
        raise ConfigError("not a public key", field=field, expected="ed25519 <base64 of 32 bytes> [comment]")
    return public


def _message(manifest: bytes, version: int) -> bytes:
    return b"tickserve manifest v1\n" + str(version).encode() + b"\n" + manifest


def signature_of(manifest: bytes, version: int, key: SigningKey) -> dict[str, Any]:
    """What manifest.sig holds for `manifest` (the bytes of manifest.json) as version `version`."""
    signature = base64.b64encode(key.sign(_message(manifest, version))).decode()
    return {"algorithm": ALGORITHM, "key_id": key.key_id, "version": version, "signature": signature}


def sign_version(folder: Path, version: int, key: SigningKey) -> None:
    """Write manifest.sig for the manifest in `folder`, atomically. Raises ComponentError when it cannot be written."""
    write_json_atomic(folder / SIGNATURE_NAME, signature_of((folder / MANIFEST_NAME).read_bytes(), version, key))


def signed_by(folder: Path) -> str | None:
    """The key id that manifest.sig claims, which nothing has checked; None when unsigned. Raises SignatureError."""
    signature = _signature_bytes(folder)
    return None if signature is None else str(_parse_signature(signature)["key_id"])


def verify_signature(folder: Path, trusted: TrustedKeys, version: int | None = None) -> str:
    """The id of the trusted key that signed the version in `folder`.

    `version` is the number it is to be served as, by default the folder's name where that is a number. Raises
    SignatureError for a version that is unsigned, signed by another key, for another number, or over other bytes.
    """
    signature = _signature_bytes(folder)
    if signature is None:
        raise SignatureError("unsigned", field=SIGNATURE_NAME, expected=_expected(trusted), was="no signature")
    if version is None and folder.name.isascii() and folder.name.isdigit():
        version = int(folder.name)
    try:
        manifest = (folder / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise SignatureError(f"cannot read {MANIFEST_NAME}: {error.strerror}", field=SIGNATURE_NAME) from error
    return verify_bytes(manifest, signature, trusted, version)


def verify_bytes(manifest: bytes, signature: bytes, trusted: TrustedKeys, version: int | None = None) -> str:
    """As `verify_signature`, of the bytes of manifest.json and manifest.sig."""
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    claim = _parse_signature(signature)
    if claim["key_id"] not in trusted:
        raise SignatureError(
            "signed by a key that is not trusted",
            field=SIGNATURE_NAME,
            expected=_expected(trusted),
            was=f"key {claim['key_id']}",
        )
    if version is not None and claim["version"] != version:
        raise SignatureError(
            "signed as another version", field=SIGNATURE_NAME, expected=str(version), was=str(claim["version"])
        )
    public = ed25519.Ed25519PublicKey.from_public_bytes(trusted[claim["key_id"]])
    try:
        public.verify(base64.b64decode(claim["signature"]), _message(manifest, claim["version"]))
    except InvalidSignature:
        raise SignatureError(
            f"the signature by key {claim['key_id']} is not over this {MANIFEST_NAME}", field=SIGNATURE_NAME
        ) from None
    return str(claim["key_id"])


def _expected(trusted: TrustedKeys) -> str:
    return f"a signature by key {' or '.join(sorted(trusted))}"


def _signature_bytes(folder: Path) -> bytes | None:
    path = folder / SIGNATURE_NAME
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SignatureError(f"cannot read: {error.strerror}", field=SIGNATURE_NAME) from error


def _parse_signature(data: bytes) -> dict[str, Any]:
    wrong = SignatureError("not a signature", field=SIGNATURE_NAME, expected=", ".join(sorted(_MEMBERS)))
    if len(data) > MAX_BYTES:
        raise wrong
    try:
        claim = json.loads(data)
        valid = (
            isinstance(claim, dict)
            and set(claim) == _MEMBERS
            and claim["algorithm"] == ALGORITHM
            and type(claim["version"]) is int
            and isinstance(claim["key_id"], str)
            and len(claim["key_id"]) == 16
            and claim["key_id"].isalnum()
            and len(base64.b64decode(claim["signature"], validate=True)) == 64
        )
    except (ValueError, TypeError, RecursionError):
        raise wrong from None
    if not valid:
        raise wrong
    return dict(claim)
