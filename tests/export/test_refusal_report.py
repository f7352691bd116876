"""What a refused export says to a person, and to a program."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tickserve.cli import demo
from tickserve.errors import ComponentError, GateRefusedError


@pytest.fixture
def refused_bundle(trees_bundle: Path, rewrite: Callable[..., Any]) -> Path:
    """A bundle whose recorded numbers are another model's in one row."""
    with np.load(trees_bundle / "parity.npz") as arrays:
        rows, probabilities = arrays["features"], arrays["probabilities"].copy()
    probabilities[3] = probabilities[3][::-1]
    np.savez(trees_bundle / "parity.npz", features=rows, probabilities=probabilities)
    rewrite(trees_bundle)
    return trees_bundle


def test_a_refusal_reaches_whoever_asked_as_json(refused_bundle: Path, tmp_path: Path) -> None:
    tickserve = str(Path(sys.executable).with_name("tickserve"))
    command = [tickserve, "export", str(refused_bundle), "--repository", str(tmp_path / "served")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout[:1]) == (1, "{"), done.stderr
    said = json.loads(done.stdout)
    assert "gate parity.recorded refused: row 3" in said["refused"]
    assert said["counterexample"]["kind"] == "recorded numbers"
    assert len(said["counterexample"]["row"]) == 6
    assert "gate parity.recorded refused: row 3" in done.stderr


def test_a_run_that_was_refused_keeps_the_case() -> None:
    written: dict[str, Any] = {}
    run = SimpleNamespace(folder=Path("a-run"), write=lambda name, value: written.update({name: value}))
    case = {"kind": "row", "changed": [{"column": "spread", "base": 1.0, "value": 2.0}]}
    error = GateRefusedError("gate parity.recorded refused: row 3", counterexample=case)
    demo._unfinished(run, SimpleNamespace(symbol="BTCUSD"), error)  # type: ignore[arg-type]
    assert written["run.json"]["status"] == "failed"
    assert written["run.json"]["counterexample"] == case
    demo._unfinished(run, SimpleNamespace(symbol="BTCUSD"), ComponentError("no server"))  # type: ignore[arg-type]
    assert "counterexample" not in written["run.json"]
