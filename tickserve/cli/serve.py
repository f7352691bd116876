"""`tickserve serve`: the model repository behind NVIDIA Triton on this machine, loopback only."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tickserve import pipeline, signing, stages
from tickserve.cli import options
from tickserve.cli.output import err, out, says
from tickserve.errors import ServerStartError, UsageError

Port = Annotated[int | None, typer.Option(min=0, max=65_535, help="A port of loopback; 0 takes a free one.")]
POLL_S = 0.5
LOG_LINES = 12


def serve(
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    model: Annotated[list[str] | None, typer.Option("--model", help="Serve only this model; may be repeated.")] = None,
    http_port: Port = None,
    grpc_port: Port = None,
    metrics_port: Port = None,
    log: Annotated[Path | None, typer.Option("--log", help="Triton's log; a temporary file by default.")] = None,
    require_signature: options.RequireSignature = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    print_arguments: Annotated[
        bool, typer.Option("--print-arguments", help="Print Triton's arguments and serve nothing.")
    ] = False,
    target: Annotated[
        Literal["container", "embedded"],
        typer.Option("--target", help="For --print-arguments; embedded: what differs, and why."),
    ] = "container",
) -> None:
    """Serve until interrupted. Ready means that every model answered its golden pairs with research's numbers.

    Ctrl-C and SIGTERM stop a server that is ready in order (exit 0), and a start that is under way at once (130, 143).
    """
    overrides = {
        "serve.http_port": http_port,
        "serve.grpc_port": grpc_port,
        "serve.metrics_port": metrics_port,
        "repository.require_signature": require_signature,
    }
    settings = options.settings_of(config, profile, overrides).config
    if print_arguments:
        _print_arguments(settings.serve, target)
        return
    trusted = signing.trusted_keys(settings.repository)
    if not pipeline.models_in(repository):
        raise UsageError("no published model in the repository", field="--repository", hint="tickserve export first")
    embedded = stages.load("serving.embedded")
    says("starting the embedded Triton (loopback only; for production use the container image)")
    with embedded.EmbeddedTriton(repository, settings.serve, models=model, log=log, trusted=trusted) as server:
        stop = _told_to_stop()
        for name, versions in server.refused.items():
            for version, reason in versions.items():
                warns(f"model {name} version {version} is not served: {reason}")
        for name in server.models:
            out.print(f"ready: {name}")
        with stages.load("serving.runfile").announced(server.target, server.metrics_url):
            out.print(f"http {server.http_url}  grpc {server.grpc_url}  metrics {server.metrics_url}")
            _wait(server, stop)
    says("stopped")


def _told_to_stop() -> threading.Event:
    """Set by Ctrl-C and SIGTERM from now on: until the server is there they end the start (exit 130, 143)."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _print_arguments(settings: Any, target: str) -> None:
    """Triton's arguments, one a line; for the embedded server what differs from production, and why."""
    arguments = stages.load("serving.arguments")
    if target == "container":
        for argument in arguments.container_arguments(settings):
            out.print(argument, markup=False)
        return
    for difference in arguments.DIFFERENCES:
        out.print(f"{difference.production} -> {difference.embedded}: {difference.reason}", markup=False)


def _wait(server: Any, stop: threading.Event) -> None:
    """Until told to stop. Raises ServerStartError (exit code 4) once anything of the server ended by itself."""
    while not stop.wait(POLL_S):
        problem = server.problem
        if problem is None:
            continue
        lines = server.tail(LOG_LINES)
        server.stop()
        for line in lines:
            warns(f"  {line[:300]}")
        raise ServerStartError(problem, hint=f"its log: {server.log}" if server.log else "its log is gone")


def warns(text: str) -> None:
    """One line on standard error, as it is."""
    err.print(text, style="yellow", markup=False, soft_wrap=True)
