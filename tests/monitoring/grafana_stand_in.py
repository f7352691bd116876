"""A STAND-IN for Grafana's HTTP interface, since no Grafana server can be had where these tests run.

It keeps dashboards and folders the way Grafana's documentation describes (docs: HTTP API, "Dashboard" and "Folder"):
bearer tokens, 401, 404, versions that rise, 412 for a save over another version, ids and defaults that the server adds.
It proves the requests that are made and what is made of the answers, not that a Grafana accepts them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "glsa_stand-in-token_0123"
Answer = tuple[int, Any]


@dataclass
class GrafanaStandIn:
    """What the server holds; tests read and spoil it."""

    url: str = ""
    dashboards: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder_of: dict[str, str] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    # In place of the next answers: a status and a body (bytes are sent as they are), seconds to wait, or an address
    # to go to.
    instead: list[Answer | float | str] = field(default_factory=list)

    def answer(self, method: str, path: str, token: str | None, body: Any) -> Answer:
        self.requests.append((method, path))
        if token != f"Bearer {TOKEN}":
            return 401, {"message": "Invalid API key"}
        parts = path.strip("/").split("/")
        match (method, parts):
            case ("GET", ["api", "folders", uid]):
                return (200, {"uid": uid}) if uid in self.folders else (404, {"message": "folder not found"})
            case ("POST", ["api", "folders"]):
                self.folders[body["uid"]] = body["title"]
                return 200, {"uid": body["uid"], "title": body["title"]}
            case ("GET", ["api", "dashboards", "uid", uid]):
                return self._get(uid)
            case ("POST", ["api", "dashboards", "db"]):
                return self._save(body)
        return 404, {"message": "Not found"}

    def _get(self, uid: str) -> Answer:
        if uid not in self.dashboards:
            return 404, {"message": "Dashboard not found"}
        meta = {"folderUid": self.folder_of[uid], "url": f"/d/{uid}/x"}
        return 200, {"dashboard": self.dashboards[uid], "meta": meta}

    def _save(self, body: dict[str, Any]) -> Answer:
        model, uid = body["dashboard"], body["dashboard"]["uid"]
        before = self.dashboards.get(uid)
        if before is not None and not body.get("overwrite") and model.get("version") != before["version"]:
            return 412, {"message": "The dashboard has been changed by someone else", "status": "version-mismatch"}
        if body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found"}
        version = 1 if before is None else before["version"] + 1
        # Grafana fills in what it knows.
        self.dashboards[uid] = model | {"id": 7, "version": version, "fiscalYearStartMonth": 0}
        self.folder_of[uid] = body["folderUid"]
        return 200, {"status": "success", "uid": uid, "version": version, "url": f"/d/{uid}/x"}


@contextmanager
def standing_in() -> Iterator[GrafanaStandIn]:
    grafana = GrafanaStandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            told, elsewhere = grafana.answer(self.command, self.path, self.headers.get("Authorization"), body), ""
            if grafana.instead:
                instead = grafana.instead.pop(0)
                if isinstance(instead, float):
                    time.sleep(instead)
                elif isinstance(instead, str):
                    told, elsewhere = (308, b""), instead
                else:
                    told = instead
            status, content = told
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if elsewhere:
                    self.send_header("Location", elsewhere)
                self.end_headers()
                self.wfile.write(data)
            except ConnectionError:  # who timed out has gone
                self.close_connection = True

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    grafana.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield grafana
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
