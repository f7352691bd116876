"""The options that several commands share, declared once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve.client._url import TransportName
from tickserve.config import Config
from tickserve.settings import Settings, load_settings

Data = Annotated[list[Path] | None, typer.Option("--data", help="A market data file or folder; may be repeated.")]
Symbol = Annotated[str | None, typer.Option("--symbol", help="Which symbol, where a folder holds several.")]
Repository = Annotated[Path, typer.Option("--repository", help="The Triton model repository.")]
Profile = Annotated[str | None, typer.Option("--profile", help="quick or production.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A TOML file over the profile.")]
RequireSignature = Annotated[
    bool | None, typer.Option("--require-signature", help="Refuse to run without trusted keys.", show_default=False)
]
NoActivate = Annotated[bool, typer.Option("--no-activate", help="Publish, and leave the version in force as it is.")]
RequireGate = Annotated[
    bool, typer.Option("--require-gate", help="Refuse all where a manifest does not say that its model passed.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]

DEFAULT_REPOSITORY = Path("model_repository")


def settings_of(config: Path | None, profile: str | None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings in force for a command. Raises ConfigError."""
    return load_settings(config, profile=profile, overrides=overrides)


def transport_to(url: str, config: Config) -> TransportName | None:
    """How to speak to `url`: as its scheme says, else as `client.transport` does."""
    return None if "://" in url else config.client.transport
