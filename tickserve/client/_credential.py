"""What opens a server's closed APIs: the (header, value) that is given, or that a server of this user wrote down."""

from __future__ import annotations

from tickserve.client._url import parse_endpoint
from tickserve.errors import ComponentError, UsageError
from tickserve.runfile import FILE_MODE, local_servers, same_server

Credential = tuple[str, str]
FOUND_BY = "a server of `tickserve serve`, of this user and XDG_RUNTIME_DIR; or credential=(header, value)"


def local_credential(url: str) -> Credential:
    """The (header, value) that opens the shared-memory API of the server `tickserve serve` runs here at `url`.

    It is read from the run file that the server wrote for its user. A file that others could read or write is refused:
    what it says may be known, or not be the server's. `url` is host:port or http://host:port. The value is a secret.

    Raises UsageError for another kind of address, ComponentError when no such file names the server.
    """
    authority = parse_endpoint(url, "shm").authority
    servers = local_servers()
    for server in servers:
        if not same_server(server.http, authority):
            continue
        if server.exposed:
            raise ComponentError(
                f"the run file of {authority} is open to others",
                field="credential",
                expected=f"a file of this user with mode {FILE_MODE:o}",
                was=server.exposed,
                hint="start the server again",
            )
        return server.credential
    others = ", ".join(sorted(server.http for server in servers)[:8])
    raise ComponentError(
        f"no run file names a server at {authority}",
        field="credential",
        expected=FOUND_BY,
        was=f"servers at {others}" if others else "none",
    )


def header_line(credential: object) -> bytes:
    """The header line that opens the closed APIs; nothing for None. Raises UsageError, which never shows the value."""
    if credential is None:
        return b""
    match credential:
        case (str(name), str(value)) if _is_token(name) and _is_token(value) and ":" not in name:
            return f"{name}: {value}\r\n".encode()
    raise UsageError("not a credential", field="credential", expected="(header, value) of printable ASCII")


def _is_token(text: str) -> bool:
    return text.isascii() and text.isprintable() and text == text.strip() != ""
