"""The examples of docs/stream.md do what the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tickserve.features.spec import default_book_spec
from tickserve.testing import UP_ANSWER, make_manifest, mock_client


def examples(root: Path) -> list[dict[str, Any]]:
    """What each Python block of the page defines."""
    defined = []
    for block in re.findall(r"```python\n(.*?)```", (root / "docs" / "stream.md").read_text(), re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(block, "docs/stream.md", "exec"), names)
        defined.append(names)
    return defined


def within(ms: float, make: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the same with a deadline that a busy machine keeps, in place of the page's 20 ms."""

    def made(*arguments: Any, deadline_ms: float, **options: Any) -> Any:
        assert deadline_ms == 20
        return make(*arguments, deadline_ms=ms, **options)

    return made


def test_the_engine_of_the_page(root: Path) -> None:
    loop, _ = examples(root)
    loop["Stream"] = within(20_000, loop["Stream"])
    client = mock_client(make_manifest(spec=default_book_spec(1)), then=UP_ANSWER)
    row = np.array([0, 0, 0, 0, 100.0, 1, 100.1, 1])
    events = [(1_700_000_000 * 10**9 + step, row) for step in range(203)]
    signals: list[Any] = []
    loop["trade"](client, "mock-model", events, signals.append)
    assert [signal.decision for signal in signals] == [("up",)] * 3


def test_the_test_of_the_page(root: Path) -> None:
    _, testing = examples(root)
    testing["mock_client"] = within(400, testing["mock_client"])  # its late answer takes 500
    testing["test_my_engine_holds_its_position_when_the_server_is_late"]()
