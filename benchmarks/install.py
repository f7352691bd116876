"""What an install costs: time and disk of the base, of each extra, and of everything that `make install` installs.

    python -m benchmarks.install [base stream ... everything] [--torch-index URL]

Each row is a new environment, made and removed in a temporary folder, installed without pip's cache; so the time holds
the download too, and says as much of the network as of the packages. Disk is what the files take, with the byte code
that pip writes. Which build of PyTorch comes, and with it gigabytes of CUDA libraries or none, is the index's choice:
`train` takes what the default index has newest, `train-pinned` and `everything` install the Makefile's version first.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"


def extras() -> list[str]:
    """The extras of pyproject.toml, in its order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"])


def build_wheel(out: Path) -> Path:
    """The wheel of this checkout."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT], check=True, stdout=2
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def requirements(row: str, wheel: Path, torch_index: str | None) -> list[list[str]]:
    """The arguments of each `pip install` that makes up a row."""
    torch = [*(["--index-url", torch_index] if torch_index else []), TORCH]
    if row == "everything":
        lock = ["--no-deps", "--require-hashes", "-r", str(ROOT / "requirements.lock")]
        return [lock, torch, ["--no-deps", str(wheel)]]
    if row == "train-pinned":
        return [torch, [f"{wheel}[train]"]]
    return [[str(wheel) if row == "base" else f"{wheel}[{row}]"]]


def measure(row: str, home: Path, torch_index: str | None) -> tuple[float, float]:
    """Install one row into an environment of its own. Returns (seconds, megabytes)."""
    wheel, environment = build_wheel(home / "dist"), home / row
    venv.create(environment, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "-q"]
    started = time.perf_counter()
    for arguments in requirements(row, wheel, torch_index):
        subprocess.run([*pip, "--no-cache-dir", "--disable-pip-version-check", *arguments], check=True, stdout=2)
    seconds = time.perf_counter() - started
    size = sum(path.lstat().st_size for path in environment.rglob("*") if path.is_file() and not path.is_symlink())
    return seconds, size / 1e6


def main() -> None:
    """Print a row for each set that is asked for; all of them by default."""
    rows = ["base", *extras(), "train-pinned", "everything"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of: {', '.join(rows)}; all by default")
    parser.add_argument("--torch-index", metavar="URL", help="where the pinned PyTorch comes from")
    options = parser.parse_args()
    chosen = options.rows or rows
    if unknown := sorted(set(chosen) - set(rows)):
        parser.error(f"ROW: expected any of {', '.join(rows)}, was {', '.join(unknown)}")
    print(f"Python {platform.python_version()}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores\n")
    print("| install | MB | s |\n|---|---:|---:|", flush=True)
    for row in chosen:
        # A folder per row: the environment is gone before the next one is made.
        with tempfile.TemporaryDirectory() as folder:
            seconds, megabytes = measure(row, Path(folder), options.torch_index)
        print(f"| {row} | {megabytes:,.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
