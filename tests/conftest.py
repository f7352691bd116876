"""Fixtures every test may use: the recorded market data, found through TICKSERVE_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def market_data() -> Path:
    """The folder of recorded market data; skips where a user has none, fails where CI must have it."""
    folder = Path(os.environ.get("TICKSERVE_DATA") or ROOT / ".." / "shared" / "data").resolve()
    if (folder / "README.md").is_file():
        return folder
    reason = "no recorded market data: set TICKSERVE_DATA to its folder"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT
