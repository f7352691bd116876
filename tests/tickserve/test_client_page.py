"""The code of docs/client.md, run against the real Triton."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.relay import Relay


def test_the_pages_code_runs(triton: Any, rows: np.ndarray, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "client.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    with Relay(triton.http) as one, Relay(triton.http) as other:
        for block in blocks:
            code = block.replace("127.0.0.1:8000", one.address).replace("127.0.0.1:9000", other.address)
            code = code.replace('"model_repository"', repr(str(triton.repository))).replace("=50", "=5_000")
            scope: dict[str, Any] = {"model": "hand-l1-gbdt", "rows": rows}
            exec(code, scope)
            if "client" in scope:
                scope["client"].close()
    printed = capsys.readouterr().out
    assert "after asking 1" in printed
    assert "True" in printed
