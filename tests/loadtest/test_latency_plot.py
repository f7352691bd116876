from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from loadtest.plot import INK, draw_latency
from tests.loadtest.conftest import load_row

ROWS = [load_row("http", "a"), load_row("grpc", "a", 2.5), load_row("http", "<b>&", 1.3)]


def test_the_same_results_give_the_same_bytes() -> None:
    assert draw_latency(ROWS, 4) == draw_latency(ROWS, 4)


def test_it_is_svg_with_the_pages_ink_and_every_row_named() -> None:
    svg = draw_latency(ROWS, 4).decode()
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "a · http" in text
    assert "a · grpc" in text
    assert "<b>& · http" in text
    assert "4 users" in text
    assert INK not in svg
    assert "currentColor" in svg
    assert "prefers-color-scheme: dark" in svg


def test_rows_without_an_answer_are_left_out() -> None:
    empty = load_row("grpc", "silent") | {"measured": 0, "histogram": []}
    assert b"silent" not in draw_latency([*ROWS, empty], 4)
    assert draw_latency([empty], 4).startswith(b"<svg")
