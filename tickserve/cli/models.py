"""`tickserve models`: which versions a running server serves, and swapping them while it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import stages
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.config import Config
from tickserve.errors import UsageError
from tickserve.signing import trusted_keys

app = typer.Typer(no_args_is_help=True, help="The models of a running server: list, swap, roll back.")

Pid = Annotated[int | None, typer.Option("--pid", help="Which `tickserve serve`, where several run.")]
Url = Annotated[str | None, typer.Option("--url", help="A server elsewhere: host:port of its HTTP.")]
SwapUrl = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="A server elsewhere: host:port of its HTTP. Its own trusted keys are not known here: "
        "signatures are held to repository.trusted_keys_file of this command alone.",
    ),
]
GrpcUrl = Annotated[str | None, typer.Option("--grpc-url", help="Its gRPC in plaintext: loads then hold nobody up.")]
Version = Annotated[int | None, typer.Option("--version", min=1, help="The newest published one by default.")]
Model = Annotated[str, typer.Argument(help="The model's name.")]
Repository = Annotated[
    Path, typer.Option("--repository", help="With --url: a folder with the versions that the server's own holds.")
]


def _target(pid: int | None, url: str | None, grpc_url: str | None, repository: Path, config: Config) -> Any:
    remote = stages.load("serving.remote")
    if url is None:
        for field, given in (("--grpc-url", grpc_url), ("--repository", repository != options.DEFAULT_REPOSITORY)):
            if given:
                raise UsageError("goes with --url; a server that runs here has its own", field=field)
        return remote.local_target(pid)
    if pid is not None:
        raise UsageError("contradict each other", field="--pid, --url")
    return remote.remote_target(url, grpc_url, repository, config.swap)


@app.command("list")
def list_models(
    pid: Pid = None,
    url: Url = None,
    repository: Repository = options.DEFAULT_REPOSITORY,
    as_json: options.AsJson = False,
    config: options.ConfigFile = None,
) -> None:
    """The loaded versions of each model, and which one is in force."""
    settings = options.settings_of(config, None).config
    target = _target(pid, url, None, repository, settings)
    rows = stages.load("serving.listing").listed(target)
    emit(rows, as_json, lambda: _show(rows))


def _show(rows: list[dict[str, Any]]) -> None:
    table(
        "models",
        ("model", "loaded", "in force", "newest published"),
        [
            (row["model"], ", ".join(map(str, row["loaded"])) or "none", row["in_force"] or "", row["newest"] or "")
            for row in rows
        ],
    )


@app.command("swap")
def swap(
    model: Model,
    version: Version = None,
    pid: Pid = None,
    url: SwapUrl = None,
    grpc_url: GrpcUrl = None,
    repository: Repository = options.DEFAULT_REPOSITORY,
    as_json: options.AsJson = False,
    config: options.ConfigFile = None,
) -> None:
    """Serve another version of MODEL in place of the one in force: verified, warm, right, and not leaking, or not."""
    _move(config, pid, url, grpc_url, repository, as_json, lambda swap: (swap.swap, (model, version)))


@app.command("rollback")
def rollback(
    model: Model,
    pid: Pid = None,
    url: SwapUrl = None,
    grpc_url: GrpcUrl = None,
    repository: Repository = options.DEFAULT_REPOSITORY,
    as_json: options.AsJson = False,
    config: options.ConfigFile = None,
) -> None:
    """Swap MODEL back to the version before the one in force."""
    _move(config, pid, url, grpc_url, repository, as_json, lambda swap: (swap.rollback, (model,)))


def _move(
    config_file: Path | None,
    pid: int | None,
    url: str | None,
    grpc_url: str | None,
    repository: Path,
    as_json: bool,
    choose: Callable[[Any], tuple[Callable[..., Any], tuple[Any, ...]]],
) -> None:
    config = options.settings_of(config_file, None).config
    target = _target(pid, url, grpc_url, repository, config)
    act, arguments = choose(stages.load("serving.swap"))
    says("verify, load beside, warm, golden pairs, memory, flip, drain, unload")
    done = act(
        target,
        *arguments,
        settings=config.swap,
        keep=config.export.keep_versions,
        trusted=trusted_keys(config.repository),
    )
    emit(done.to_json(), as_json, lambda: _tell(done))


def _tell(done: Any) -> None:
    was = "" if done.previous is None else f" (was {done.previous})"
    out.print(f"{done.model}: version {done.version} serves{was}")
    out.print("  " + "  ".join(f"{step} {spent:g} ms" for step, spent in done.steps_ms.items()))
    if isinstance(done.memory, str):
        out.print(f"  memory {done.memory}")
    else:
        out.print(f"  memory {done.memory.growth_mb:+g} MB over {done.memory.requests} batches")
    if not done.drained:
        out.print(f"  version {done.previous} is still asked for and stays loaded; the next swap drops it")
