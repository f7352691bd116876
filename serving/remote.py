"""The server a `tickserve models` command works on: the one that `tickserve serve` runs here, or one elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from serving import runfile
from serving.control import Credential
from serving.target import Target
from tickserve.config import SwapSettings
from tickserve.errors import ComponentError, ConfigError, UsageError
from tickserve.signing import TrustedKeys

CREDENTIAL_ENV = "TICKSERVE_CREDENTIAL"


def local_target(pid: int | None = None) -> Target:
    """The server that `tickserve serve` runs here, that of process `pid` where there are several.

    Raises ComponentError when there is none, UsageError when there are several.
    """
    run = runfile.only(pid)
    return Target(run.http, run.grpc, run.credential, Path(run.repository), Path(run.view), run.server_pid, run.keys)


def remote_target(
    http_url: str,
    grpc_url: str | None,
    repository: Path,
    settings: SwapSettings,
    environ: Mapping[str, str] | None = None,
) -> Target:
    """A server elsewhere with explicit control; `repository` holds the same versions as its own.

    Which keys it trusts is not to be known from here, so versions are held to the caller's alone. Where the address is
    that of a server of this user's after all, the keys it was started with hold as well.

    Raises ConfigError for a credential that is none, UsageError for an address that is none.
    """
    for field, url in (("--url", http_url), ("--grpc-url", grpc_url)):
        host, _, port = (url or "host:1").rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise UsageError("not an address", field=field, expected="host:port", was=repr(url)[:80])
    credential = read_credential(settings, os.environ if environ is None else environ)
    return Target(http_url, grpc_url, credential, repository, trusted=_keys_at(http_url))


def _keys_at(http_url: str) -> TrustedKeys | None:
    """The keys that the server at `http_url` was started with, as far as a file of this user's says so."""
    try:
        run = runfile.at(http_url)
    except ComponentError:  # no folder for such files, so none; a swap, which wants it for its lock, says what is wrong
        return None
    return None if run is None else run.keys


def read_credential(settings: SwapSettings, environ: Mapping[str, str]) -> Credential | None:
    """Header and value from `swap.credential_file`, else from TICKSERVE_CREDENTIAL; None without either.

    Raises ConfigError, which never shows the value.
    """
    field, text = CREDENTIAL_ENV, environ.get(CREDENTIAL_ENV, "")
    if settings.credential_file:
        field = "swap.credential_file"
        try:
            text = Path(settings.credential_file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("cannot read the credential", field=field) from error
    if not text:
        return None
    name, separator, value = text.strip().partition("=")
    if not (separator and name and value and text.strip().isprintable()) or " " in name:
        raise ConfigError("not a credential", field=field, expected="one line 'header=value'", was="something else")
    return name.strip().lower(), value.strip()
