from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tickserve import stages
from tickserve.errors import MissingExtraError, StageMissingError


def test_every_stage_of_the_checkout_loads_lazily(root: Path) -> None:
    assert stages.checkout_root() == root
    for name in stages.STAGES:
        assert Path(str(stages.load(name).__file__)).parent == root / name


@pytest.mark.parametrize("name", ["models_of_mine", "", "tests", "os", "../market", "numpy.linalg"])
def test_only_stages_are_loaded(name: str) -> None:
    with pytest.raises(StageMissingError, match="from a checkout"):
        stages.load(name)


def test_a_stage_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stages, "checkout_root", lambda: tmp_path)
    with pytest.raises(StageMissingError, match="'market' is not beside the tickserve package"):
        stages.load("market")


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_a_desks_own_package_of_that_name_is_never_run(tmp_path: Path) -> None:
    for name in ("market", "serving"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("print('the desk runs')")
    code = "from tickserve import stages\ntry: stages.load('market')\nexcept Exception as e: print(type(e).__name__, e)"
    said = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}", tmp_path)
    assert "StageMissingError another package named 'market' hides the stage" in said
    assert "the desk runs" not in said


def stage_needing(tmp_path: Path, module: str) -> str:
    folder = tmp_path / "loadtest"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "needy.py").write_text(f"import {module}.part")
    return (
        "import sys\nfrom pathlib import Path\nfrom tickserve import stages\n"
        f"stages.checkout_root = lambda: Path({str(tmp_path)!r})\nsys.path.insert(0, {str(tmp_path)!r})\n"
        f"sys.modules[{module!r}] = None\n"  # what an import finds where the library is not installed
        "try: stages.load('loadtest.needy')\nexcept Exception as e: print(type(e).__name__, e)"
    )


@pytest.mark.parametrize(
    ("module", "extra"), [("locust", "loadtest"), ("torch", "train"), ("onnxruntime", "inprocess")]
)
def test_a_missing_library_names_its_extra(tmp_path: Path, module: str, extra: str) -> None:
    said = run(stage_needing(tmp_path, module), tmp_path)
    assert "MissingExtraError" in said
    assert f"pip install 'tickserve[{extra}]'" in said
    assert len(said.strip().splitlines()) == 1


def test_a_module_no_extra_brings_is_not_hidden(tmp_path: Path) -> None:
    assert "ModuleNotFoundError" in run(stage_needing(tmp_path, "not_a_library"), tmp_path)
    assert issubclass(MissingExtraError, Exception)


def test_every_extra_that_is_named_exists(root: Path) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert set(stages.EXTRAS.values()) <= set(project["optional-dependencies"])
