"""`tickserve repo sync` as a pod's init container runs it: what it prints, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from export.publish import Terms
from tests.export.tiny import NAME, publish_seeds
from tickserve import signing
from tickserve.cli.commands import app
from tickserve.cli.sync import bytes_of
from tickserve.errors import ComponentError, ConfigError, SignatureError, TickserveError, UsageError

KEY = signing.generate_key()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    publish_seeds(folder / "models", 1, 2, terms=Terms(KEY, {KEY.key_id: KEY.public()}))
    (folder / "desk.pub").write_text(KEY.public_line())
    (folder / "other.pub").write_text(signing.generate_key().public_line())
    return folder


def sync(source: object, into: Path, *options: object) -> Result:
    words = ["repo", "sync", "--source", source, "--into", into, *options]
    result: Any = CliRunner().invoke(app, [str(word) for word in words])
    return result  # type: ignore[no-any-return]


def refused(source: object, into: Path, *options: object) -> TickserveError:
    error = sync(source, into, *options).exception
    assert isinstance(error, TickserveError)
    assert not (into / NAME).exists()
    return error


def test_it_says_what_is_in_force(desk: Path, tmp_path: Path) -> None:
    into = tmp_path / "models"
    done = sync(desk / "models", into, "--public-key", desk / "desk.pub", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(row["model"], row["version"], row["signed_by"]) for row in found["models"]] == [(NAME, 2, KEY.key_id)]
    assert found["removed"] == []
    assert "no signature is checked" not in done.stderr
    shown = sync(desk / "models", into)
    assert f"{into}: 1 in force, 0 removed" in shown.stdout
    assert "no signature is checked: --public-key names one" in " ".join(shown.stderr.split())


def test_what_is_wrong_has_its_exit_code(desk: Path, tmp_path: Path) -> None:
    models, into = desk / "models", tmp_path / "models"
    wrong: list[tuple[tuple[object, ...], type[TickserveError], int]] = [
        ((models, into, "--public-key", desk / "other.pub"), SignatureError, 3),
        ((models, into, "--size-limit", "1k"), TickserveError, 3),
        ((models, into, "--require-signature"), ConfigError, 2),
        ((models, into, "--public-key", desk / "gone.pub"), ConfigError, 2),
        ((models, into, "--size-limit", "much"), UsageError, 2),
        ((desk / "gone", into), UsageError, 2),
        (("https://host/models", into), UsageError, 2),
        ((models, tmp_path / "file" / "models"), ComponentError, 4),
    ]
    (tmp_path / "file").write_text("no folder")
    for words, kind, code in wrong:
        error = refused(*words)  # type: ignore[arg-type]
        assert isinstance(error, kind), (words, error)
        assert error.exit_code == code, (words, error)


@pytest.mark.parametrize(
    ("quantity", "wanted"),
    [("0", 0), ("7", 7), ("1k", 1_000), ("2Ki", 2_048), ("3M", 3_000_000), ("512Mi", 2**29), ("4Gi", 2**32)],
)
def test_a_size_is_read_as_kubernetes_writes_it(quantity: str, wanted: int) -> None:
    assert bytes_of(quantity) == wanted


@pytest.mark.parametrize("quantity", ["", "Gi", "-1", "1.5Gi", "1ki", "1K", "1 Gi", "1GiB", "9" * 16, "1e3", "٣"])
def test_what_is_no_size_is_refused(quantity: str) -> None:
    with pytest.raises(UsageError, match="--size-limit: not a size"):
        bytes_of(quantity)
