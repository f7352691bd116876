"""`tickserve runtime`: what can run a published model here, judged and timed side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline, stages
from tickserve.cli import options
from tickserve.cli.output import emit, out, table
from tickserve.errors import UsageError

app = typer.Typer(help="Runtimes, measured.", no_args_is_help=True)


@app.command("measure")
def measure(
    model: Annotated[str, typer.Argument(help="A published model.")],
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Its bundle: other engines for trees too.")] = None,
    effort: Annotated[str, typer.Option("--effort", help="quick or full.")] = "full",
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Time every runtime and the model's siblings in other precisions, in one run; nothing is changed."""
    settings = options.settings_of(config, profile).config
    if effort not in ("quick", "full"):
        raise UsageError("unknown effort", field="--effort", expected="quick or full", was=repr(effort)[:40])
    folder = pipeline.newest_version(repository, model)
    siblings = [each for each in pipeline.models_in(repository) if each != model]
    others = {each: pipeline.newest_version(repository, each) for each in siblings}
    look = stages.load("export.runtimes.published")
    result = look.measure(folder, others, settings.export, effort, bundle=bundle).model_dump(mode="json")
    emit(result, as_json, lambda: show(result))


def show(record: dict[str, Any]) -> None:
    """The table of a record, as JSON values."""
    sizes = sorted({timing["rows"] for each in record["candidates"] for timing in each["timings"]})
    rows = []
    for each in record["candidates"]:
        medians = {timing["rows"]: f"{timing['p50_us']:.1f}" for timing in each["timings"]}
        state = "chosen" if each["name"] == record["chosen"] else "" if each["served"] else "beside"
        rows.append((each["name"], *(medians.get(size, "-") for size in sizes), state))
    table("median microseconds of one call in this process, by rows", ("runtime", *map(str, sizes), ""), rows)
    for each in record["candidates"]:
        if each.get("reason"):
            out.print(f"{each['name']}: {each['reason']}", markup=False)
    out.print(f"chosen: {record['chosen']}: {record['reason']}", markup=False)
    out.print(record["machine"], markup=False)
