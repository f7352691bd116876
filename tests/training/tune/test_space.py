"""Search spaces: the shipped ones fit the configuration; a file with a wrong key or range is refused by name."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from tickserve.config import Config
from tickserve.errors import ConfigError
from training.tune.space import SHIPPED, Range, applied, read_space, shipped, suggest


@pytest.mark.parametrize("family", SHIPPED)
def test_what_a_shipped_space_suggests_is_a_configuration(family: str) -> None:
    space = shipped(family)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(20):
        values = suggest(space, study.ask())
        config = applied(Config(), values)
        assert all(getattr(getattr(config, family), key.partition(".")[2]) == value for key, value in values.items())


def test_a_file_says_the_ranges(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    lines = [
        '"gbdt.max_depth" = { low = 2, high = 6 }',
        "[gbdt]",
        "learning_rate = { low = 0.1, high = 0.2, log = true }",
        "max_bin = [64, 128]",
    ]
    path.write_text("\n".join(lines))
    assert read_space(path, "gbdt") == {
        "gbdt.max_depth": Range(2, 6),
        "gbdt.learning_rate": Range(0.1, 0.2, log=True),
        "gbdt.max_bin": (64, 128),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"gbdt.max_dept" = [1, 2]', r"gbdt.max_dept: unknown key.*nearest: gbdt.max_depth"),
        ('"lstm.hidden" = [8, 16]', r"lstm.hidden: unknown key"),
        ('"gbdt.max_depth" = { low = 5, high = 2 }', r"gbdt.max_depth: not a range"),
        ('"gbdt.max_depth" = []', r"gbdt.max_depth: not a range"),
        ('"gbdt.learning_rate" = { low = 0.0, high = 1.0, log = true }', r"gbdt.learning_rate: not a range"),
        ('"gbdt.learning_rate" = { low = 0.1, high = 1.0, step = 2 }', r"gbdt.learning_rate: not a range"),
        ('"gbdt.max_depth" = 3', r"gbdt.max_depth: not a range"),
    ],
)
def test_a_wrong_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_space(path, "gbdt")


def test_a_value_that_the_configuration_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gbdt.max_depth.*less than or equal to 12.*was 40"):
        applied(Config(), {"gbdt.max_depth": 40})
    with pytest.raises(ConfigError, match="no shipped search space"):
        shipped("forest")
