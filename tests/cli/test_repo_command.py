"""`tickserve repo` as a person uses it: keys, publishing, looking, rolling back, moving; exit codes and JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.export.tiny import NAME, publish_seeds


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Three published versions in the scratch folder's default repository."""
    publish_seeds(tmp_path / "model_repository", 1, 2, 3)
    return tmp_path / "model_repository"


def answer(tickserve: Run, *arguments: object, code: int = 0, **environment: str) -> Any:
    done = tickserve("repo", *arguments, "--json", **environment)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_from_keys_to_a_signed_copy_elsewhere(tickserve: Run, models: Path, tmp_path: Path) -> None:
    made = answer(tickserve, "keygen", "desk.pem")
    assert (tmp_path / "desk.pem").stat().st_mode & 0o777 == 0o600
    trust = {"TICKSERVE_REPOSITORY__TRUSTED_KEYS_FILE": "desk.pem.pub"}
    unsigned = tickserve("repo", "verify", **trust)
    assert unsigned.returncode == 3
    assert "3 of 4 cannot be trusted" in unsigned.stderr
    key = (tmp_path / "desk.pem").read_text()
    signed = answer(tickserve, "sign", TICKSERVE_SIGNING_KEY=key)
    assert signed == [{"model": NAME, "version": number, "signed_by": made["key_id"]} for number in (1, 2, 3)]
    assert all(each["ok"] for each in answer(tickserve, "verify", "--require-signature", **trust))
    copied = answer(tickserve, "push", "elsewhere", **trust)
    assert copied == [{"model": NAME, "version": 3, "copied": True, "in_force": True}]
    assert (tmp_path / "elsewhere" / NAME / "3" / "manifest.sig").is_file()
    pulled = answer(tickserve, "pull", "elsewhere", "--repository", "third", **trust)
    assert [each["version"] for each in pulled] == [3]


def test_looking_and_rolling_back(tickserve: Run, models: Path) -> None:
    assert [(each["version"], each["in_force"]) for each in answer(tickserve, "list")] == [
        (1, False),
        (2, False),
        (3, True),
    ]
    shown = tickserve("repo", "list")
    assert sum("in force" in line for line in shown.stdout.splitlines()) == 1
    assert all(len(line.rstrip()) <= 80 for line in shown.stdout.splitlines())
    assert len(shown.stdout.splitlines()) == 2 + 3, "one line a version"
    differs = answer(tickserve, "diff", f"{NAME}@2", f"{NAME}@3")
    assert {"field": "metrics.accuracy", "a": 0.52, "b": 0.53} in differs
    assert answer(tickserve, "rollback", NAME) == {"model": NAME, "before": 3, "now": 2}
    assert tickserve("repo", "rollback", NAME, "--to", "9").returncode == 3
    assert answer(tickserve, "gc", "--keep", "1", "--dry-run")["removed"] == []


def test_where_no_model_is_nothing_is_verified(tickserve: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = tickserve("repo", "verify", "--repository", "empty")
    assert done.returncode == 3
    assert "nothing was verified" in done.stderr


def test_lint_exits_1_on_errors_and_0_on_warnings_and_notes(tickserve: Run, models: Path) -> None:
    assert {each["level"] for each in answer(tickserve, "lint")} == {"note"}
    shown = tickserve("repo", "lint")
    assert (shown.returncode, shown.stdout.count("note ")) == (0, 1)
    assert "(batching): max_queue_size: no bound, on purpose" in shown.stdout
    config = models / NAME / "config.pbtxt"
    config.write_text(config.read_text().replace("  default_queue_policy {\n  }\n", ""))
    assert {each["level"] for each in answer(tickserve, "lint")} == {"warning"}
    (models / NAME / "9").mkdir()
    found = answer(tickserve, "lint", code=1)
    assert found[0]["rule"] == "version"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("list", "--repository", "absent"), 2, "no such folder"),
        (("list", "--repository", "ftp://x"), 2, "s3://bucket/prefix"),
        (("verify", "--require-signature"), 2, "repository.trusted_keys_file"),
        (("verify", "--model", "absent"), 3, "no model of that name"),
        (("sign",), 2, "no key"),
        (("sign", "--version", "1", "--key", "absent.pem"), 2, "cannot read the key file"),
        (("diff", f"{NAME}@1", "model_repository"), 2, "cannot compare a version with a repository"),
        (("diff", NAME, "other"), 2, "argument A: neither a version nor a repository: expected model@version"),
        (("diff", f"{NAME}@1", f"{NAME}@"), 2, "argument B: neither a version nor a repository: expected"),
        (("diff", f"model_repository/{NAME}", "model_repository"), 2, "argument A: neither a version nor a repository"),
        (("pull", "model_repository", "--version", "1", "--all", "--repository", "x"), 2, "contradict"),
    ],
)
def test_wrong_use_is_one_line_and_its_exit_code(
    arguments: tuple[str, ...], code: int, says: str, tickserve: Run, models: Path, tmp_path: Path
) -> None:
    done = tickserve("repo", *arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) not in done.stderr


def test_what_was_tampered_with_is_not_verified_or_moved(tickserve: Run, models: Path, tmp_path: Path) -> None:
    path = models / NAME / "3" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    rows = answer(tickserve, "verify", code=3)
    assert [each["version"] for each in rows if not each["ok"]] == [3]
    assert "model.onnx: wrong digest" in rows[-1]["error"]
    pushed = tickserve("repo", "push", "elsewhere")
    assert pushed.returncode == 3
    assert f"model {NAME!r} version 3: model.onnx" in pushed.stderr
    shutil.rmtree(models)
    assert not list(tmp_path.glob("elsewhere/*/*"))
