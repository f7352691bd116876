"""Dashboards in a Grafana server: brought there, or compared panel by panel with what it has.

A dashboard is known by its uid, so that a second push changes it in place. What the server adds by itself (id, version,
defaults it fills in) is no difference; what it lacks or has otherwise is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import SplitResult, urlsplit

from monitoring.dashboards.panel import Dashboard, Json
from tickserve.errors import ComponentError, ProtocolError, UsageError

TIMEOUT_S = 10.0
FOLDER_UID, FOLDER = "tickserve", "Tickserve"
MESSAGE = "tickserve monitor push"
T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """One thing that the server has otherwise. `panel` is a title; empty: the dashboard itself."""

    dashboard: str
    panel: str
    field: str
    ours: Any
    theirs: Any


@dataclass(frozen=True)
class Pushed:
    """What a push did to one dashboard, and the version that the server has now."""

    dashboard: str
    done: Literal["created", "updated", "unchanged"]
    version: int
    url: str


class Grafana:
    """A server, spoken to with a token. Errors never carry the token."""

    def __init__(self, url: str, token: str, *, timeout_s: float = TIMEOUT_S, verify: bool | str = True) -> None:
        from grafana_api.grafana_face import GrafanaFace

        self._url, place = url, _split(url)
        if place.scheme not in ("http", "https") or not place.hostname or place.username or place.query:
            raise UsageError("wrong address", field="--url", expected="http(s)://host[:port][/path]", was=_plain(url))
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            # What cannot be a header would be printed by whoever refuses it.
            raise UsageError("not a token", field="--token-file", expected="one line of printable ASCII")
        path = place.path.strip("/")
        host = f"[{place.hostname}]" if ":" in place.hostname else place.hostname
        self._face = GrafanaFace(
            auth=token,
            host=host,
            port=place.port,
            url_path_prefix=f"{path}/" if path else "",
            protocol=place.scheme,
            verify=verify,
            timeout=timeout_s,
        )
        # A proxy of this machine's would be asked too, and after a redirect ~/.netrc would replace the token.
        self._face.api.s.trust_env = False

    def push(self, pages: Sequence[Dashboard], folder: str = FOLDER) -> list[Pushed]:
        """Bring every page into the folder; one that is the same already is left alone."""
        uid = self._folder(folder)
        return [self._push(page, uid) for page in pages]

    def diff(self, pages: Sequence[Dashboard]) -> list[Difference]:
        """What the server has otherwise, or not at all."""
        return [difference for page in pages for difference in self._differences(page)]

    def _push(self, page: Dashboard, folder: str) -> Pushed:
        there = self._get(page.uid)
        if there is not None:
            board, meta = there
            if meta.get("folderUid", folder) == folder and not list(compare(page, board)):
                return Pushed(page.uid, "unchanged", _version(board), str(meta.get("url", "")))
        # The version that was compared: whoever saved in between is not overwritten unseen.
        model = page.json() | ({} if there is None else {"version": _version(there[0])})
        body = {"dashboard": model, "folderUid": folder, "overwrite": False, "message": MESSAGE}
        answer = _mapping(self._ask(self._face.dashboard.update_dashboard, body), "the answer to a push")
        version = _version(answer)
        return Pushed(page.uid, "created" if there is None else "updated", version, str(answer.get("url", "")))

    def _differences(self, page: Dashboard) -> Iterator[Difference]:
        there = self._get(page.uid)
        if there is None:
            yield Difference(page.uid, "", "dashboard", "is to be there", "is not there")
        else:
            yield from compare(page, there[0])

    def _get(self, uid: str) -> tuple[Json, Json] | None:
        """The dashboard and its metadata; None where there is none."""
        answer = self._ask(self._face.dashboard.get_dashboard, uid, absent=None)
        if answer is None:
            return None
        whole = _mapping(answer, "a dashboard")
        return _mapping(whole.get("dashboard"), "a dashboard"), _mapping(whole.get("meta", {}), "its metadata")

    def _folder(self, title: str) -> str:
        if self._ask(self._face.folder.get_folder, FOLDER_UID, absent=None) is None:
            self._ask(self._face.folder.create_folder, title, FOLDER_UID)
        return FOLDER_UID

    def _ask(self, call: Callable[..., T], *arguments: Any, **absent: None) -> T | None:
        """One request. With `absent`, 404 is its value. Raises ComponentError, ProtocolError."""
        import requests
        from grafana_api.grafana_api import GrafanaException

        where = _plain(self._url)
        try:
            return call(*arguments)
        except GrafanaException as error:
            if error.status_code == 404 and "absent" in absent:
                return absent["absent"]
            raise _refused(int(error.status_code), where) from None
        except requests.exceptions.Timeout:
            raise ComponentError(f"no answer in time from {where}", field="--url") from None
        except requests.exceptions.JSONDecodeError:
            raise _no_grafana(where) from None
        except requests.exceptions.RequestException as error:
            raise ComponentError(f"cannot reach {where}: {type(error).__name__}", field="--url") from None
        except (ValueError, TypeError, AttributeError, KeyError):
            # The library takes an error's body for a mapping, and stumbles over any other.
            raise _no_grafana(where) from None


REFUSALS = {
    400: "refused as bad input",
    401: "does not take the token",
    403: "does not let this token do that",
    404: "has no such address",
    409: "has a dashboard of that title, or another folder of that name",
    412: "was changed meanwhile by somebody else",
}
NEXT = {
    401: "a service account's token with the role Editor, in --token-file or GRAFANA_TOKEN",
    403: "the service account needs the role Editor",
    404: "is the path of --url that of Grafana?",
    412: "look with 'tickserve monitor diff' and push again",
}


def _refused(status: int, where: str) -> ComponentError:
    text = REFUSALS.get(status, "failed" if status >= 500 else "refused")
    return ComponentError(f"Grafana at {where} {text} (HTTP {status})", field="--url", hint=NEXT.get(status))


def _no_grafana(where: str) -> ProtocolError:
    return ProtocolError(f"what answers at {where} is no Grafana", field="--url")


def _plain(url: str) -> str:
    """`url` without what may be a secret."""
    place = _split(url)
    return f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}"[:200]


def _split(url: str) -> SplitResult:
    try:
        place = urlsplit(url)
        _ = place.port
    except ValueError:
        raise UsageError("wrong address", field="--url", expected="http(s)://host[:port][/path]") from None
    return place


def _mapping(value: Any, what: str) -> Json:
    if not isinstance(value, dict):
        raise ProtocolError(f"{what}: not what Grafana answers", expected="a mapping", was=type(value).__name__)
    return value


def _version(answer: Mapping[str, Any]) -> int:
    version = answer.get("version")
    if not isinstance(version, int):
        raise ProtocolError(
            "not what Grafana answers", field="version", expected="a whole number", was=repr(version)[:50]
        )
    return version


def compare(page: Dashboard, theirs: Json) -> Iterator[Difference]:
    """Every difference of a dashboard that a server has, panel by panel; panels are known by their id."""
    ours = page.json()
    for field, value in ours.items():
        if field != "panels":
            for path, mine, other in _unlike(value, theirs.get(field), field):
                yield Difference(page.uid, "", path, mine, other)
    yield from _panels(page.uid, ours["panels"], theirs.get("panels"))


def _panels(uid: str, ours: Sequence[Json], theirs: Any) -> Iterator[Difference]:
    known = [panel for panel in theirs if isinstance(panel, dict)] if isinstance(theirs, list) else []
    found = {repr(panel.get("id")): panel for panel in known}
    for panel in ours:
        there = found.pop(repr(panel["id"]), None)
        if there is None:
            yield Difference(uid, panel["title"], "panel", "is to be there", "is not there")
            continue
        for path, mine, other in _unlike(panel, there, ""):
            yield Difference(uid, panel["title"], path, mine, other)
    for panel in found.values():
        yield Difference(uid, str(panel.get("title", "")), "panel", "is not to be there", "is there")


def _unlike(ours: Any, theirs: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Where `theirs` lacks or changes a value of `ours`. What it has beside them, a server may have filled in."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from _unlike(value, theirs.get(key), f"{path}.{key}" if path else key)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _unlike(mine, other, f"{path}[{index}]")
    elif ours != theirs:
        yield path, ours, theirs
