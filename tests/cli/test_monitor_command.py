"""`tickserve monitor render` and `picture`: what is written, and one line for what goes wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tickserve.cli.commands import app
from tickserve.errors import ComponentError, ProtocolError, TickserveError, UsageError


def command(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, ["monitor", *map(str, arguments)], env=environment)


def test_render_writes_rules_and_dashboards_with_the_thresholds_in_force(tmp_path: Path) -> None:
    done = command("render", "--out", tmp_path / "a", "--json", TICKSERVE_MONITORING__PSI="0.125")
    assert done.exit_code == 0
    files = [Path(name) for name in json.loads(done.stdout)["files"]]
    assert sorted({path.parent.name for path in files}) == ["dashboards", "rules"]
    assert all(path.read_text() for path in files)
    assert "> 0.125" in (tmp_path / "a" / "rules" / "models.yaml").read_text()
    assert '"value": 0.125' in (tmp_path / "a" / "dashboards" / "tickserve-models.json").read_text()
    told = command("render", "--out", tmp_path / "a", "--profile", "production")
    assert "promtool check rules" in told.stdout
    assert "> 0.25" in (tmp_path / "a" / "rules" / "models.yaml").read_text()


def test_a_folder_that_cannot_be_written_is_one_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = command("render", "--out", tmp_path / "file")
    assert isinstance(done.exception, ComponentError)
    assert "cannot write" in str(done.exception)


@pytest.fixture
def answering() -> Iterator[tuple[str, list[bytes]]]:
    """Something that answers HTTP with the body a test puts there."""
    bodies: list[bytes] = [b""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bodies[0])

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", bodies
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b'{"data": 3}', b'{"data": {"result": [3]}}', b'{"data": {"result": [{}]}}', b"\xff"],
)
def test_what_is_no_prometheus_is_one_typed_error(
    answering: tuple[str, list[bytes]], tmp_path: Path, body: bytes
) -> None:
    url, bodies = answering
    bodies[0] = body
    done = command("picture", "--url", url, "--out", tmp_path)
    assert isinstance(done.exception, ProtocolError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "kind"),
    [("http://127.0.0.1:1", ComponentError), ("file:///etc", UsageError), ("127.0.0.1:9090", UsageError)],
)
def test_nobody_or_a_wrong_address_is_one_typed_error(url: str, kind: type[TickserveError], tmp_path: Path) -> None:
    done = command("picture", "--url", url, "--out", tmp_path)
    assert isinstance(done.exception, kind)


@pytest.mark.system
def test_an_empty_prometheus_is_drawn_as_such(answering: tuple[str, list[bytes]], tmp_path: Path) -> None:
    url, bodies = answering
    bodies[0] = b'{"status": "success", "data": {"resultType": "matrix", "result": []}}'
    done = command("picture", "--url", url, "--out", tmp_path, "--json")
    assert done.exit_code == 0
    files = json.loads(done.stdout)["files"]
    assert len(files) == 5
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in files)
