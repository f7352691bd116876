"""Rows 71, 72, 73, 75, 76 of the fault list, through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_show_names_where_each_value_came_from(tickserve: Run, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[gbdt]\nrounds = 70\n")
    done = tickserve(
        "config", "show", "--profile", "production", "--config", "my.toml", "--json", TICKSERVE_GBDT__MAX_DEPTH="5"
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["gbdt.rounds"] == {"value": 70, "origin": "my.toml"}
    assert shown["gbdt.max_depth"] == {"value": 5, "origin": "environment TICKSERVE_GBDT__MAX_DEPTH"}
    assert shown["lstm.layers"] == {"value": 2, "origin": "profile production"}
    assert shown["seed"] == {"value": 7, "origin": "default"}
    assert shown["profile"] == {"value": "production", "origin": "option"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[gbdt]\nround = 3\n", "nearest: gbdt.rounds"),
        (b"[gdbt]\n", "nearest: "),
        (b"[gbdt]\nrounds = 'many'\n", "gbdt.rounds: wrong value from wrong.toml: expected a valid integer, was"),
        (
            b"[gbdt]\nrounds = 0\n",
            "gbdt.rounds: wrong value from wrong.toml: expected greater than or equal to 1",
        ),
        (b"[gbdt]\nrounds = true\n", "gbdt.rounds: wrong value from wrong.toml: expected a valid integer, was"),
        (b"[gbdt]\nlearning_rate = nan\n", "gbdt.learning_rate: wrong value"),
        (b"gbdt = 3\n", "gbdt: not a table in wrong.toml"),
        (b"[gbdt]\nenabled = false\n[lstm]\nenabled = false\n", "expected at least one true"),
        (b"[serve]\nhttp_port = 8001\n", "expected three different ports"),
        (b"[loadtest]\ntransports = []\n", "loadtest.transports"),
        (
            b"[export]\nqueue_delay_us = 600000\n",
            "export.queue_delay_us: expected less than deadline_us (500000)",
        ),
        (
            b"[export]\nqueue_policy = 'reject'\nqueue_timeout_us = 500000\n",
            "export.queue_timeout_us: expected less than deadline_us (500000)",
        ),
        (b"", "the file is empty"),
        (b"\xff\xfe[gbdt]", "expected UTF-8 text"),
        (b"[gbdt\n", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_key(tickserve: Run, tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "wrong.toml").write_bytes(text)
    done = tickserve("config", "check", "--config", "wrong.toml")
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_and_an_unknown_profile(tickserve: Run) -> None:
    assert tickserve("config", "check", "--config", "none.toml").returncode == 2
    done = tickserve("config", "check", "--profile", "fast")
    assert done.returncode == 2
    assert "quick or production, was 'fast'" in done.stderr


def test_an_unknown_environment_override_is_refused(tickserve: Run) -> None:
    done = tickserve("config", "check", TICKSERVE_GBDT__ROUND="3")
    assert done.returncode == 2
    assert "TICKSERVE_GBDT__ROUND" in done.stderr
    assert "nearest: gbdt.rounds" in done.stderr


def test_a_wrong_environment_value_is_refused(tickserve: Run) -> None:
    done = tickserve("config", "check", TICKSERVE_SERVE__HTTP_PORT="70000")
    assert done.returncode == 2
    assert "serve.http_port" in done.stderr
