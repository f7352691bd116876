"""The committed pictures: `python -m tests.monitoring.draw docs/pictures/dashboards` plays the live test."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.monitoring.stage import opened
from tests.monitoring.test_live_alerts import perform

if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as stage:
        for drawn in perform(stage).pictures:
            print(shutil.copy(drawn, target))
