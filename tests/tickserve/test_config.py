from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tickserve.config import Config
from tickserve.errors import ConfigError
from tickserve.settings import PROFILES, flatten, load_settings

# More than Python's own parsers hold: they answer with other errors than "not TOML".
TOO_MUCH = (b"seed = " + b"[" * 100_000, b"seed = " + b"1" * 5_000, b"[" + b"a." * 3_000 + b"b]")


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def read(text: str | bytes, **options: Any) -> Any:
        path = tmp_path / "desk.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_settings(path, environ=options.pop("environ", {}), **options)

    return read


def refused(load: Any, text: str | bytes, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(text, **options)
    return caught.value


def test_every_key_says_where_its_value_came_from(load: Any) -> None:
    settings = load(
        "profile = 'production'\n[gbdt]\nrounds = 3\nmax_depth = 3\nthreads = 3\n",
        environ={"TICKSERVE_GBDT__MAX_DEPTH": "5", "TICKSERVE_GBDT__THREADS": "5", "HOME": "/x"},
        overrides={"gbdt.threads": 7, "gbdt.rounds": None},
    )
    gbdt = settings.config.gbdt
    assert (gbdt.rounds, gbdt.max_depth, gbdt.threads, gbdt.max_bin, gbdt.subsample) == (3, 5, 7, 256, 0.8)
    keys = ("rounds", "max_depth", "threads", "max_bin", "subsample")
    assert [settings.origin[f"gbdt.{key}"] for key in keys] == [
        "desk.toml",
        "environment TICKSERVE_GBDT__MAX_DEPTH",
        "option",
        "profile production",
        "default",
    ]
    assert set(settings.origin) == set(flatten(Config().model_dump()))


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_shipped_profiles_hold(profile: str) -> None:
    settings = load_settings(profile=profile, environ={})
    assert settings.config.profile == profile
    assert settings.origin["profile"] == "option"


def test_profile_from_file_environment_and_option(load: Any) -> None:
    text, environ = "profile = 'production'", {"TICKSERVE_PROFILE": "quick"}
    assert load(text).config.profile == "production"
    assert load(text, environ=environ).config.profile == "quick"
    assert load(text, environ=environ, profile="production").config.profile == "production"
    for options in ({"profile": "fast"}, {"environ": {"TICKSERVE_PROFILE": "fast"}}):
        error = refused(load, text, **options)
        assert (error.field, error.was) == ("profile", "'fast'")
    for value in ("3", "[]", "['quick']"):
        assert refused(load, f"profile = {value}").field == "profile"


@pytest.mark.parametrize(
    ("text", "field", "nearest"),
    [
        ("[gbdt]\nround = 1", "gbdt.round", "gbdt.rounds"),
        ("[lstm]\nlearning_rat = 0.1", "lstm.learning_rat", "lstm.learning_rate"),
        ("[gdbt]\nrounds = 1", "gdbt.rounds", "gbdt.rounds"),
        ("seeds = 1", "seeds", "seed"),
        ("[serv]", "serv", "serve"),
        ("[export]\nqueue_delay_ms = 1", "export.queue_delay_ms", "export.queue_delay_us"),
        ("[gbdt.rounds]\nx = 1", "gbdt.rounds.x", "gbdt.rounds"),
    ],
)
def test_an_unknown_key_names_the_nearest(load: Any, text: str, field: str, nearest: str) -> None:
    error = refused(load, text)
    assert error.field == field
    assert nearest in str(error.hint)
    assert "desk.toml" in str(error)


def test_a_key_like_no_other_points_to_the_list(load: Any) -> None:
    assert "config show" in str(refused(load, "zzzzzzzzzzzz = 1"))
    assert len(str(refused(load, f"{'z' * 10_000} = 1"))) < 300


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[gbdt]\nrounds = 'many'", "gbdt.rounds"),
        ("[gbdt]\nrounds = '10'", "gbdt.rounds"),
        ("[gbdt]\nrounds = 1.0", "gbdt.rounds"),
        ("[gbdt]\nrounds = true", "gbdt.rounds"),
        ("[gbdt]\nrounds = 0", "gbdt.rounds"),
        ("[gbdt]\nenabled = 1", "gbdt.enabled"),
        ("[gbdt]\nlearning_rate = nan", "gbdt.learning_rate"),
        ("[client]\ndeadline_ms = inf", "client.deadline_ms"),
        ("[client]\ndeadline_ms = -1", "client.deadline_ms"),
        ("[client]\ntransport = 'udp'", "client.transport"),
        ("[serve]\nhttp_port = 65536", "serve.http_port"),
        ("[export]\npreferred_batch_rows = 8", "export.preferred_batch_rows"),
        ("gbdt = 3", "gbdt"),
        ("[features]\nlevels = 21", "features.levels"),
        ("[[gbdt]]\nrounds = 1", "gbdt"),
    ],
)
def test_wrong_type_and_range_name_the_key(load: Any, text: str, field: str) -> None:
    error = refused(load, text)
    assert error.field == field
    assert "desk.toml" in str(error)


def test_a_client_may_share_memory_and_the_load_test_may_not(load: Any) -> None:
    assert load("[client]\ntransport = 'shm'").config.client.transport == "shm"
    assert "expected 'http' or 'grpc', was 'shm'" in str(refused(load, "[loadtest]\ntransports = ['shm']"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[export]\nqueue_delay_us = 600000", "queue_delay_us"),
        ("[export]\nmax_batch = 16", "preferred_batch_rows"),
        ("[export]\npreferred_batch_rows = [0]", "preferred_batch_rows"),
    ],
)
def test_contradictions_are_refused(load: Any, text: str, key: str) -> None:
    assert key in str(refused(load, text))


def test_a_contradiction_says_where_each_value_came_from(load: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={"TICKSERVE_SERVE__GRPC_PORT": "9100"}, overrides={"serve.http_port": 9100})
    assert str(caught.value).endswith(
        "was [9100, 9100, 8002] (http_port from option; grpc_port from environment TICKSERVE_SERVE__GRPC_PORT; "
        "metrics_port from default)"
    )
    text = "[serve]\nhttp_port = 1\ngrpc_port = 1\nmetrics_port = 2"
    assert str(refused(load, text)).endswith("was [1, 1, 2] (from desk.toml)")
    assert "default" not in str(refused(load, "[export]\nmax_batch = 16\npreferred_batch_rows = [32]"))


@pytest.mark.parametrize(
    "data", [b"", b"  \n\t", b"\xff\xfe[\x00", b"[gbdt\n", b"a = \n", b"a = 1\na = 2", b"\x00", *TOO_MUCH]
)
def test_files_that_are_no_configuration(load: Any, data: bytes) -> None:
    assert refused(load, data).field == "desk.toml"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read") as caught:
            load_settings(path, environ={})
        assert str(tmp_path.parent) not in str(caught.value)


def test_the_file_named_by_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("seed = 11")
    assert load_settings(environ={"TICKSERVE_CONFIG": str(path)}).config.seed == 11


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("TICKSERVE_GBDT__ROUND", "gbdt.rounds"),
        ("TICKSERVE_GBDT_ROUNDS", "gbdt.rounds"),
        ("TICKSERVE_SEEED", "seed"),
    ],
)
def test_an_unknown_override_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest) as caught:
        load_settings(environ={name: "1"})
    assert name in str(caught.value)


def test_overrides_are_as_strict_as_the_file() -> None:
    environ = {"TICKSERVE_GBDT__ENABLED": "false", "TICKSERVE_EXPORT__PREFERRED_BATCH_ROWS": "[2, 4]"}
    config = load_settings(environ=environ).config
    assert config.gbdt.enabled is False
    assert config.export.preferred_batch_rows == (2, 4)
    for text in ("many", "1.5", '"3"', "", "null", "NaN", "[1]", "{}", "[" * 100_000, "1" * 5_000):
        with pytest.raises(ConfigError) as caught:
            load_settings(environ={"TICKSERVE_GBDT__ROUNDS": text})
        assert caught.value.field == "gbdt.rounds"
        assert "TICKSERVE_GBDT__ROUNDS" in str(caught.value)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config().seed = 3  # type: ignore[misc]


@given(st.binary(max_size=200))
def test_any_file_is_a_configuration_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    with suppress(ConfigError):
        load_settings(path, environ={})
