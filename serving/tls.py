"""The certificate of a server: that the files are there, are what they are called, and belong together."""

from __future__ import annotations

import ssl
from pathlib import Path

from tickserve.config import ServeSettings
from tickserve.errors import ConfigError


def check_certificates(settings: ServeSettings) -> None:
    """Raises ConfigError naming the key of a file that is missing, no PEM, or of another pair.

    Triton itself says of a wrong key only that it could not start.
    """
    if not settings.tls_cert:
        return
    for key in ("tls_cert", "tls_key", "tls_client_ca"):
        name = getattr(settings, key)
        if name and not Path(name).is_file():
            raise ConfigError("no such file", field=f"serve.{key}", was=repr(Path(name).name))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password would be asked for on the terminal; a key that has one is refused.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: b"")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"no certificate with its key: {_reason(error)}",
            field="serve.tls_cert, serve.tls_key",
            expected="PEM files that belong together, the key without a password",
        ) from error
    if settings.tls_client_ca:
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError("no certificate", field="serve.tls_client_ca", expected="a PEM file") from error


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or type(error).__name__
