"""The report in a real browser: Debian's Chromium, without a network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loadtest.report import write_report
from tests.loadtest.conftest import whole_run, write_run

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000",
)  # fmt: skip
# A frame as wide as a phone: headless Chromium's own window is never narrower than 500 pixels.
FRAME = """<!doctype html><body><iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const style = page.defaultView.getComputedStyle(page.body);
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg")
    && e.getBoundingClientRect().right > {width} + 0.5).map(e => e.tagName + "." + e.className);
  const image = page.querySelector("img");
  document.body.dataset.seen = JSON.stringify({{
    client: root.clientWidth, scroll: root.scrollWidth, wide, plot: image ? image.naturalWidth : 0,
    font: parseFloat(style.fontSize), sections: page.querySelectorAll("section").length,
  }});
}});
</script></body>"""


def render(folder: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    chromium = shutil.which("chromium")
    assert chromium, "Debian's chromium is missing: run this through make test-system"
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)


@pytest.mark.system
@pytest.mark.parametrize("width", [360, 390, 1200])
def test_the_page_fits_its_screen_and_says_nothing_to_the_console(tmp_path: Path, width: int) -> None:
    files = whole_run()
    files["train"][0]["model"] = "a-model-whose-name-is-as-long-as-the-rules-allow-" + "x" * 50
    write_report(write_run(tmp_path, files))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width))
    done = render(tmp_path, frame, "--window-size=1400,1000", "--dump-dom")
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["wide"] == []
    assert seen["scroll"] <= seen["client"] <= width
    assert seen["plot"] > 0
    assert seen["font"] >= 16
    assert seen["sections"] == 9
    assert "CONSOLE" not in done.stderr


@pytest.mark.system
def test_the_check_catches_a_page_that_is_too_wide(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path, whole_run()))
    path.write_text(path.read_text().replace("<main>", '<main><p style="width:900px">wide</p>'))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=390))
    found = re.search(r'data-seen="([^"]*)"', render(tmp_path, frame, "--dump-dom").stdout)
    assert found
    assert json.loads(html.unescape(found[1]))["wide"] != []
