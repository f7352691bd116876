"""Pictures: tables and bars are of now, curves of the whole time, and what is left out is counted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from matplotlib.figure import Figure

from monitoring.dashboards.panel import Panel, Query
from monitoring.picture import MAX_LINES, _panel, _Source


def series(count: int, **sample: Any) -> list[dict[str, Any]]:
    return [{"metric": {"model": f"m{number}"}, **sample} for number in range(count)]


@pytest.fixture
def source() -> Iterator[_Source]:
    """A Prometheus in which three of 23 series are still there."""
    answers = {
        "/api/v1/query": series(3, value=[100.0, "1"]),
        "/api/v1/query_range": series(23, values=[[10.0, "2"], [20.0, "2"]]),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": {"result": answers[urlsplit(self.path).path]}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield _Source(f"http://127.0.0.1:{server.server_address[1]}", 0.0, 100.0, "5m")
    server.shutdown()
    server.server_close()
    thread.join()


def drawn(source: _Source, kind: Any) -> Any:
    axis = Figure().subplots()
    _panel(axis, Panel("Title", "About.", [Query("x", "{{model}}")], kind=kind), source)
    return axis


def test_what_has_ended_is_in_no_table_and_no_bar(source: _Source) -> None:
    (table,) = drawn(source, "table").texts
    assert [line.split() for line in table.get_text().splitlines()] == [[f"m{number}", "1"] for number in range(3)]
    assert len(drawn(source, "bargauge").patches) == 3


def test_lines_that_are_left_out_are_counted(source: _Source) -> None:
    curves = drawn(source, "timeseries")
    assert len(curves.lines) == MAX_LINES
    assert curves.get_title(loc="right") == f"and {23 - MAX_LINES} more"
    assert drawn(source, "table").get_title(loc="right") == ""
