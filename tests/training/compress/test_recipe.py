"""A recipe is read strictly: what is unknown, inert, out of order or looser than a gate may be is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tickserve.errors import ConfigError
from training.compress.recipe import SHIPPED, families_of, find_recipe, read_recipe

PRUNE = '[[step]]\nkind = "prune"\nshare = 0.5\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_found_by_name_and_named_so(path: Path) -> None:
    recipe = find_recipe(path.stem)
    assert recipe.name == path.stem
    first = "gbdt" if recipe.step[0].kind == "truncate" else "lstm"
    assert len(families_of(recipe, first)) == len(recipe.step)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "a"\nstep = []\n', "step"),
        (f'name = "../a"\n{PRUNE}', "name: expected"),
        (f'name = "a"\nonrefusal = "skip"\n{PRUNE}', "nearest: on_refusal"),
        (f'name = "a"\n{PRUNE}shares = 1\n', "nearest: share"),
        (
            'name = "a"\n[[step]]\nkind = "prune"\nshar = 0.5\n',
            "step 1.shar: unknown key in recipe.toml (nearest: share)",
        ),
        ('name = "a"\n[[step]]\nkind = "prune"\n', "step 1.share: missing in recipe.toml"),
        ('name = "a"\n[[step]]\nkind = "shrink"\n', "step"),
        (f'name = "a"\n{PRUNE}schedule = "linear"\n', "no effect with rounds 1"),
        (f'name = "a"\n{PRUNE}epochs = 0\nlearning_rate = 0.1\n', "no effect with epochs 0"),
        (f'name = "a"\n{PRUNE}teacher_weight = 0.0\ntemperature = 2.0\n', "no effect with teacher_weight 0"),
        ('name = "a"\n[[step]]\nkind = "truncate"\nrounds = 3\nmax_loss = 0.1\n', "no effect with rounds 3"),
        ('name = "a"\n[[step]]\nkind = "quantize"\nmethod = "weights"\nepochs = 2\n', "no effect with method weights"),
        ('name = "a"\n[[step]]\nkind = "quantize"\nmethod = "qat"\ncalibration = "entropy"\n', "no effect with method"),
        (f'name = "a"\n[[step]]\nkind = "quantize"\nmethod = "static"\n{PRUNE}', "expected quantize last"),
        ('name = "a"\n[[step]]\nkind = "distill"\nfamily = "gbdt"\n', "expected a net, was gbdt"),
        (f'name = "a"\n[gates]\nmin_ic_share = 0.5\n{PRUNE}', "gates.min_ic_share"),
        (f'name = "a"\n[gates]\nmax_ic_loss = 0.5\n{PRUNE}', "gates.max_ic_loss"),
        (f'name = "a"\n[gates]\nmax_flips = 0.5\n{PRUNE}', "gates.max_flips"),
        (f'name = "a"\n[gates]\nmax_latency_ratio = 9.0\n{PRUNE}', "gates.max_latency_ratio"),
        (f'name = "a"\n[gates]\nmax_size_ratio = 2.0\n{PRUNE}', "gates.max_size_ratio"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_recipe(written(tmp_path, text))


@pytest.mark.parametrize(
    ("family", "step", "said"),
    [
        ("gbdt", 'kind = "prune"\nshare = 0.5', "expected mlp or tcn or lstm, was gbdt"),
        ("tlob", 'kind = "prune"\nshare = 0.5', "tied to each other"),
        ("lstm", 'kind = "truncate"', "expected gbdt, was lstm"),
        ("gbdt", 'kind = "quantize"\nmethod = "weights"', "distill first"),
        ("lstm", 'kind = "quantize"\nmethod = "static"', "no static INT8 LSTM"),
    ],
)
def test_a_step_is_for_the_families_it_can_work_on(tmp_path: Path, family: str, step: str, said: str) -> None:
    recipe = read_recipe(written(tmp_path, f'name = "a"\n[[step]]\n{step}\n'))
    with pytest.raises(ConfigError, match=said):
        families_of(recipe, family)


def test_a_recipe_that_is_not_there_is_refused_with_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--recipe.*fast"):
        find_recipe(str(tmp_path / "none.toml"))


def test_defaults_are_inside_their_bounds(tmp_path: Path) -> None:
    recipe: Any = read_recipe(written(tmp_path, f'name = "a"\n{PRUNE}'))
    assert recipe.gates.min_ic_share == 0.98
    assert recipe.step[0].epochs == 2
