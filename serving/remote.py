"""The server a `tickserve models` command works on: the one that `tickserve serve` runs here, or one elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from serving import runfile
from serving.control import Credential
from serving.target import Target
from tickserve.config import SwapSettings
from tickserve.errors import ConfigError, UsageError

CREDENTIAL_ENV = "TICKSERVE_CREDENTIAL"


def local_target(pid: int | None = None) -> Target:
    """The server that `tickserve serve` runs here, that of process `pid` where there are several.

    Raises ComponentError when there is none, UsageError when there are several.
    """
    run = runfile.only(pid)
    trusted = None if run.trusted is None else {key: bytes.fromhex(raw) for key, raw in run.trusted.items()}
    return Target(run.http, run.grpc, run.credential, Path(run.repository), Path(run.view), run.server_pid, trusted)


def remote_target(
    http_url: str,
    grpc_url: str | None,
    repository: Path,
    settings: SwapSettings,
    environ: Mapping[str, str] | None = None,
) -> Target:
    """A server elsewhere with explicit control; `repository` holds the same versions as its own.

    Raises ConfigError for a credential that is none, UsageError for an address that is none.
    """
    for field, url in (("--url", http_url), ("--grpc-url", grpc_url)):
        host, _, port = (url or "host:1").rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise UsageError("not an address", field=field, expected="host:port", was=repr(url)[:80])
    return Target(http_url, grpc_url, read_credential(settings, os.environ if environ is None else environ), repository)


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
