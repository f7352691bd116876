"""What may vary: configuration keys of one family and their ranges, the shipped ones or those of a TOML file.

"gbdt.max_depth" = { low = 2, high = 8 }
"gbdt.learning_rate" = { low = 0.02, high = 0.3, log = true }
"gbdt.max_bin" = [64, 128, 256]
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tickserve.config import Config
from tickserve.errors import ConfigError
from tickserve.settings import flatten, read_toml

Value = int | float | str | bool
BATCHES = (256, 512, 1_024)
RATES = {"low": 5e-4, "high": 1e-2, "log": True}
# By family, without its name; a key that the configuration does not have is refused by a test.
SHIPPED: dict[str, dict[str, Any]] = {
    "gbdt": {
        "max_depth": {"low": 2, "high": 8},
        "learning_rate": {"low": 0.02, "high": 0.3, "log": True},
        "subsample": {"low": 0.5, "high": 1.0},
        "max_bin": [64, 128, 256],
    },
    "lstm": {
        "window": [10, 20, 50],
        "hidden": [16, 32, 64, 128],
        "layers": {"low": 1, "high": 2},
        "learning_rate": RATES,
        "batch_rows": BATCHES,
    },
    "mlp": {
        "hidden": [32, 64, 128, 256],
        "layers": {"low": 1, "high": 4},
        "activation": ["gelu", "relu"],
        "norm": ["none", "layer"],
        "learning_rate": RATES,
        "batch_rows": BATCHES,
    },
    "tcn": {
        # Each reaches as far back as 3 layers of kernel 3 do: a longer window would be refused.
        "window": [8, 16, 24],
        "channels": [16, 32, 64],
        "kernel": {"low": 3, "high": 5},
        "layers": {"low": 3, "high": 4},
        "learning_rate": RATES,
        "batch_rows": BATCHES,
    },
    "deeplob": {
        "window": [16, 24, 48],
        "channels": [8, 16, 32],
        "hidden": [16, 32, 64],
        "learning_rate": RATES,
        "batch_rows": BATCHES,
    },
    "tlob": {
        "window": [16, 24, 48],
        "hidden": [16, 32, 64],
        "heads": [1, 2, 4],
        "layers": {"low": 1, "high": 3},
        "learning_rate": RATES,
        "batch_rows": BATCHES,
    },
}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; whole ones where both are."""

    low: float
    high: float
    log: bool = False


Dimension = Range | tuple[Value, ...]
Space = dict[str, Dimension]


def shipped(family: str) -> Space:
    """The space this project ships for a family. Raises ConfigError for one it has none for."""
    if family not in SHIPPED:
        raise ConfigError(
            "no shipped search space", field="--family", expected=", ".join(SHIPPED), was=family, hint="write a --space"
        )
    return {f"{family}.{key}": _dimension(f"{family}.{key}", value) for key, value in SHIPPED[family].items()}


def read_space(path: Path, family: str) -> Space:
    """The space of a TOML file. Raises ConfigError naming the key that is unknown, foreign or no range."""
    tree = _keys(read_toml(path))
    known = [key for key in flatten(Config().model_dump()) if key.startswith(f"{family}.")]
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"nearest: {near[0]}" if near else f"a key of [{family}]"
            raise ConfigError(f"unknown key in {path.name}", field=key[:100], hint=hint)
    return {key: _dimension(key, value) for key, value in tree.items()}


def _keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to what stands behind them; a table with a `low` is a range and no section."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        section = isinstance(value, Mapping) and "low" not in value
        found |= _keys(value, f"{prefix}{key}.") if section else {f"{prefix}{key}": value}
    return found


def _dimension(key: str, value: Any) -> Dimension:
    if isinstance(value, list | tuple) and value and all(isinstance(each, Value) for each in value):
        return tuple(value)
    if isinstance(value, Mapping) and {"low", "high"} <= set(value) <= {"low", "high", "log"}:
        low, high, log = value["low"], value["high"], value.get("log", False)
        numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (low, high))
        if numbers and isinstance(log, bool) and low < high and (low > 0 or not log):
            return Range(low, high, log)
    expected = "a list of values, or low < high (and log, of numbers above 0)"
    raise ConfigError("not a range", field=key, expected=expected, was=repr(value)[:80])


def suggest(space: Space, trial: Any) -> dict[str, Value]:
    """The values an Optuna trial tries, by key."""
    return {key: _suggested(key, dimension, trial) for key, dimension in space.items()}


def _suggested(key: str, dimension: Dimension, trial: Any) -> Value:
    if isinstance(dimension, tuple):
        chosen: Value = trial.suggest_categorical(key, dimension)
        return chosen
    whole = isinstance(dimension.low, int) and isinstance(dimension.high, int)
    ask = trial.suggest_int if whole else trial.suggest_float
    number: float = ask(key, dimension.low, dimension.high, log=dimension.log)
    return number


def applied(config: Config, values: Mapping[str, Value]) -> Config:
    """`config` with `values` in place of its own. Raises ConfigError naming the key that does not take its value."""
    tree = config.model_dump()
    for key, value in values.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        expected = str(problem["msg"]).removeprefix("Input should be ")
        was = repr(problem["input"])[:80]
        raise ConfigError("a value outside its range", field=key, expected=expected, was=was) from error
