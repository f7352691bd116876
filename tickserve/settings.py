"""The configuration in force: one TOML file over a shipped profile, with environment overrides.

What is in force is, in rising order: the defaults (tickserve/config/), the profile (`quick` or `production`), the
TOML file, the environment (`TICKSERVE_<SECTION>__<KEY>`), and what a command line option sets. `Settings.origin` says
where each value came from; `tickserve config show` prints it.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tickserve.config import Config
from tickserve.errors import ConfigError

ENV_PREFIX = "TICKSERVE_"
# Keys whose value is a table of names that the data choose: a value, no section.
TABLES = frozenset({"gbdt.monotone"})
# Read by other tools of the project, not configuration keys.
RESERVED_ENV = frozenset(
    {"TICKSERVE_DATA", "TICKSERVE_PROFILE", "TICKSERVE_CONFIG", "TICKSERVE_SIGNING_KEY", "TICKSERVE_CREDENTIAL"}
)

WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday"]
# Nets that take tens of microseconds a window and a step: all windows of a long recording would take days.
LARGE_FIT = {"epochs": 20, "patience": 4, "max_train_windows": 200_000}
PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {},
    "production": {
        "features": {"max_rows": 0, "bars_max_rows": 0},
        "validation": {"folds": 8},
        "gbdt": {"rounds": 1_000, "early_stopping_rounds": 20, "max_depth": 6, "learning_rate": 0.05, "max_bin": 256},
        "lstm": {"window": 50, "hidden": 104, "layers": 2, "epochs": 40, "patience": 5, "max_train_windows": 0},
        "mlp": {"enabled": True, "hidden": 128, "layers": 3, "epochs": 40, "patience": 5, "max_train_windows": 0},
        "tcn": {"enabled": True, "window": 48, "channels": 64, "layers": 4, **LARGE_FIT},
        "deeplob": {"enabled": True, "window": 48, "channels": 32, "hidden": 64, **LARGE_FIT},
        "tlob": {"enabled": True, "window": 48, "hidden": 64, "heads": 4, "layers": 3, **LARGE_FIT},
        "runtime": {"measure": "full"},
        "tune": {"trials": 100, "workers": 4},
        "limits": {
            "memory_mb": 8_192,
            "run_s": 86_400.0,
            "features_s": 3_600.0,
            "train_s": 28_800.0,
            "train_memory_mb": 8_192,
        },
        "monitoring": {
            "slo_objective": 0.999,
            "error_ratio": 0.01,
            "event_age_s": 1.0,
            # Open in New York in summer and in winter; another market, another session (24 hours: see the defaults).
            "session_days": WEEKDAYS,
            "session_open": "14:30",
            "session_close": "20:00",
        },
    },
}


@dataclass(frozen=True)
class Settings:
    """The configuration in force and, per dotted key, where its value came from."""

    config: Config
    origin: Mapping[str, str]


Flat = dict[str, tuple[Any, str]]


def _known_keys() -> dict[str, Any]:
    return flatten(Config().model_dump())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys: `{"a": {"b": 1}}` is `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        section = isinstance(value, Mapping) and f"{prefix}{key}" not in TABLES
        flat |= flatten(value, f"{prefix}{key}.") if section else {f"{prefix}{key}": value}
    return flat


def _check_known(key: str, origin: str) -> None:
    known = _known_keys()
    if key in known:
        return
    if key in Config.model_fields:
        raise ConfigError(f"not a table in {origin}", field=key, expected=f"[{key}] with keys of its own")
    near = difflib.get_close_matches(key, [*known, *Config.model_fields], n=1, cutoff=0.4)
    hint = f"nearest: {near[0]}" if near else "see 'tickserve config show'"
    raise ConfigError(f"unknown key in {origin}", field=key[:100], hint=hint)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError: unreadable, empty, not UTF-8, not TOML."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("expected UTF-8 text", field=path.name) from error
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror}", field=path.name) from error
    if not text.strip():
        raise ConfigError("the file is empty", field=path.name, hint="leave the option out to take the defaults")
    try:
        tree = tomllib.loads(text)
        flatten(tree)
        return tree
    except (ValueError, RecursionError) as error:  # also numbers too long and tables too deep for Python
        raise ConfigError(f"not TOML: {str(error)[:200]}", field=path.name) from error


def _file_layer(path: Path) -> Flat:
    tree = read_toml(path)
    for name, value in tree.items():
        # An empty table has no keys to look up, yet its name can be misspelt.
        if isinstance(value, dict) and not value and name not in Config.model_fields:
            _check_known(name, path.name)
    flat = flatten(tree)
    for key in flat:
        _check_known(key, path.name)
    return {key: (value, path.name) for key, value in flat.items()}


def _env_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also numbers too long and lists too deep for Python
        return text


def _environment_layer(environ: Mapping[str, str]) -> Flat:
    layer: Flat = {}
    for name, text in sorted(environ.items()):
        if not name.startswith(ENV_PREFIX) or name in RESERVED_ENV:
            continue
        key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
        _check_known(key, f"the environment ({name})")
        layer[key] = (_env_value(text), f"environment {name}")
    return layer


def _nest(flat: Flat) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, (value, _) in flat.items():
        section, _, name = key.rpartition(".")
        target = tree.setdefault(section, {}) if section else tree
        target[name] = tuple(value) if isinstance(value, list) else value
    return tree


def _validate(flat: Flat) -> Config:
    try:
        return Config.model_validate(_nest(flat))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise _refusal(problem["msg"], key, problem["input"], flat) from error


def _refusal(message: str, key: str, value: Any, flat: Flat) -> ConfigError:
    """Pydantic's finding in this project's words."""
    message = message.removeprefix("Value error, ")
    field, separator, rest = message.partition(": expected ")
    if separator:  # found by a validator of tickserve/config/, which names the keys itself
        prefix = f"{key}." if key and not field.startswith(key) else ""
        where = _where_from([prefix + name for name in field.split(", ")], flat)
        return ConfigError(f"expected {rest}{where}", field=prefix + field)
    origin = flat.get(key, (None, "the configuration"))[1]
    expected = message.removeprefix("Input should be ")
    if expected == message:
        return ConfigError(f"{message} (from {origin})", field=key)
    return ConfigError(f"wrong value from {origin}", field=key, expected=expected, was=repr(value)[:80])


def _where_from(keys: Sequence[str], flat: Flat) -> str:
    """Where their values came from, key by key where that differs; nothing for keys that are not known."""
    named: dict[str, list[str]] = {}
    for key in keys:
        if key in flat:
            named.setdefault(flat[key][1], []).append(key.rpartition(".")[2])
    if len(named) < 2:
        return f" (from {next(iter(named))})" if named else ""
    return " (" + "; ".join(f"{', '.join(names)} from {origin}" for origin, names in named.items()) + ")"


def load_settings(
    path: Path | None = None,
    *,
    profile: str | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """The configuration in force. `overrides` are dotted keys from command line options (None values are skipped).

    Raises ConfigError naming the key, what was expected, and for an unknown key the nearest one.
    """
    environ = os.environ if environ is None else environ
    path = path or (Path(environ["TICKSERVE_CONFIG"]) if environ.get("TICKSERVE_CONFIG") else None)
    file_layer = _file_layer(path) if path else {}
    chosen, origin = _choose_profile(profile, environ, file_layer)
    flat: Flat = {key: (value, "default") for key, value in _known_keys().items()}
    flat |= {key: (value, f"profile {chosen}") for key, value in flatten(PROFILES[chosen]).items()}
    flat |= file_layer
    flat |= _environment_layer(environ)
    flat |= {key: (value, "option") for key, value in (overrides or {}).items() if value is not None}
    flat["profile"] = (chosen, origin)
    return Settings(_validate(flat), {key: where for key, (_, where) in flat.items()})


def _choose_profile(option: str | None, environ: Mapping[str, str], file_layer: Flat) -> tuple[str, str]:
    chosen, origin = file_layer.get("profile", ("quick", "default"))
    if environ.get("TICKSERVE_PROFILE"):
        chosen, origin = environ["TICKSERVE_PROFILE"], "environment TICKSERVE_PROFILE"
    if option is not None:
        chosen, origin = option, "option"
    if not isinstance(chosen, str) or chosen not in PROFILES:
        raise ConfigError(
            f"unknown profile (from {origin})", field="profile", expected=" or ".join(PROFILES), was=repr(chosen)[:80]
        )
    return chosen, origin
