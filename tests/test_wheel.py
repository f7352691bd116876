"""The wheel as a desk meets it: built once, installed on its own, beside packages named as our stages are."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BAR_MB = 100
# Libraries that importing the client must never load: each costs an engine seconds and memory.
HEAVY = ("torch", "xgboost", "polars", "ray", "pyarrow", "sklearn", "pandas", "onnx", "onnxruntime", "numba", "locust")


@dataclass(frozen=True)
class Desk:
    """A project with an environment that holds the wheel, and packages of its own named as our stages are."""

    wheel: Path
    project: Path
    python: Path
    added_bytes: int

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *command], cwd=self.project, capture_output=True, text=True, check=False, env={"PATH": ""}
        )

    def tickserve(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python.parent / "tickserve"), *arguments]
        environment = {"PATH": "", "PYTHONPATH": str(self.project)}
        return subprocess.run(command, cwd=self.project, capture_output=True, text=True, check=False, env=environment)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; compiled `.pyc` files are what an import adds, and are left out."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def build_wheel(out: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def write_own_packages(project: Path) -> None:
    for name in ("market", "training"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text(f'OWNER = "the desk\'s {name}"\n')


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Desk:
    """The wheel, built and installed with its base dependencies as a user would."""
    home = tmp_path_factory.mktemp("desk")
    wheel = build_wheel(home / "dist")
    venv.create(home / "env", with_pip=False)
    python = home / "env" / "bin" / "python"
    packages = home / "env" / "lib" / "python3.11" / "site-packages"
    before, started = size_of(packages), time.perf_counter()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    done = subprocess.run(
        [*pip, "install", "-q", "--no-compile", str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    added = size_of(packages) - before
    seconds = time.perf_counter() - started
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nthe base install of the wheel: {added / 1e6:.0f} MB, {seconds:.0f} s")
    write_own_packages(home / "project")
    return Desk(wheel, home / "project", python, added)


def test_the_wheel_holds_tickserve_alone(desk: Desk) -> None:
    names = zipfile.ZipFile(desk.wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"tickserve"}
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"tickserve", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if name.endswith((".pyc", ".nbi", ".nbc", ".onnx", ".parquet"))]


def test_the_wheel_holds_every_module_of_tickserve(desk: Desk) -> None:
    held = {name for name in zipfile.ZipFile(desk.wheel).namelist() if name.endswith(".py")}
    assert held == {str(path.relative_to(ROOT)) for path in (ROOT / "tickserve").rglob("*.py")}


def test_the_base_install_keeps_its_bar(desk: Desk) -> None:
    assert desk.added_bytes <= BAR_MB * 1e6, f"{desk.added_bytes / 1e6:.0f} MB"


def test_the_size_counts_what_is_installed(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(b"\0" * 5_000)
    (tmp_path / "module.pyc").write_bytes(b"\0" * 5_000)
    assert size_of(tmp_path) == 5_000
    assert desk.added_bytes > 1_000_000


def test_a_desk_keeps_its_own_market_and_training(desk: Desk) -> None:
    code = (
        "import tickserve, market, training; from tickserve.client import Client; import json;"
        "print(json.dumps([market.OWNER, training.OWNER, tickserve.__version__, tickserve.__file__, Client.__name__]))"
    )
    done = desk.run("-c", code)
    assert done.returncode == 0, done.stderr
    market, training, _, file, client = json.loads(done.stdout)
    assert (market, training, client) == ("the desk's market", "the desk's training", "Client")
    assert Path(file).is_relative_to(desk.python.parents[1])


def test_importing_the_client_loads_nothing_heavy(desk: Desk) -> None:
    done = desk.run("-c", "import sys; import tickserve.client; print(' '.join(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "numpy" in loaded
    assert not loaded & set(HEAVY)


def test_heavy_libraries_stay_out_where_they_are_installed() -> None:
    """The same, in the environment of the stack, where an import of one would succeed."""
    code = "import sys; import tickserve.client; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & set(HEAVY)


def test_the_command_works_without_a_checkout(desk: Desk) -> None:
    version = desk.tickserve("--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "tickserve"), version.stderr
    shown = desk.tickserve("config", "show", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["profile"] == {"value": "quick", "origin": "default"}


def test_a_stage_command_says_that_the_stage_is_missing(desk: Desk) -> None:
    """Also with the desk's own `market` first on the path: it is never taken for the stage."""
    done = desk.tickserve("data", "inspect", "x")
    assert done.returncode == 4
    assert "the stage 'market' is not beside the tickserve package" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
