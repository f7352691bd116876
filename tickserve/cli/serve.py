"""`tickserve serve`: the model repository behind NVIDIA Triton on this machine, loopback only."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from tickserve import pipeline, stages
from tickserve.cli import options
from tickserve.cli.output import out, says
from tickserve.errors import ServerStartError, UsageError

Port = Annotated[int | None, typer.Option(min=0, max=65_535, help="A port of loopback; 0 takes a free one.")]


def serve(
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    model: Annotated[list[str] | None, typer.Option("--model", help="Serve only this model; may be repeated.")] = None,
    http_port: Port = None,
    grpc_port: Port = None,
    metrics_port: Port = None,
    log: Annotated[Path | None, typer.Option("--log", help="Triton's log; a temporary file by default.")] = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
) -> None:
    """Serve until interrupted. Ready means that every model answered its golden pairs with research's numbers."""
    overrides = {"serve.http_port": http_port, "serve.grpc_port": grpc_port, "serve.metrics_port": metrics_port}
    settings = options.settings_of(config, profile, overrides).config
    if not pipeline.models_in(repository):
        raise UsageError("no published model in the repository", field="--repository", hint="tickserve export first")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    embedded = stages.load("serving.embedded")
    says("starting the embedded Triton (loopback only; for production use the container image)")
    with embedded.EmbeddedTriton(repository, settings.serve, models=model, log=log) as server:
        for name in server.models:
            out.print(f"ready: {name}")
        out.print(f"http {server.http_url}  grpc {server.grpc_url}  metrics {server.metrics_url}")
        _wait(server, stop)
    says("stopped")


def _wait(server: object, stop: threading.Event) -> None:
    while not stop.wait(0.5):
        if not server.running:  # type: ignore[attr-defined]
            raise ServerStartError("the server ended by itself", hint="its log has the reason")
