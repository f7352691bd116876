"""`tickserve tensorrt`: engines for the GPU of this machine, judged and timed, or the job that does so where one is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline, stages
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.errors import ArtifactError, ComponentError
from tickserve.manifest import MANIFEST_NAME, load_manifest

app = typer.Typer(help="TensorRT engines of versions, to judge and time; none is served.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="A published model.")]
Version = Annotated[int | None, typer.Option("--version", help="By default the version in force.")]


@app.command("build")
def build(
    model: Model,
    version: Version = None,
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    job: Annotated[
        Path | None, typer.Option("--job", help="The job's file without a GPU; else runs/tensorrt/<job's name>.yaml.")
    ] = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Build the engine of a version, hold it against the golden pairs and time it; without a GPU, write the job for it.

    No server loads an engine that was built here: on a GPU, export.tensorrt = "accelerator" makes ONNX Runtime build
    its own (docs/runtimes.md).
    """
    settings = options.settings_of(config, profile).config
    folder = _folder(repository, model, version)
    accept = stages.load("export.tensorrt.accept")
    ordered = accept.order(folder, settings)
    lacks = stages.load("export.tensorrt.target").missing()
    if lacks:
        _write_job(model, folder, settings, job, lacks, as_json)
    built = accept.build(ordered, settings)
    result = {
        "model": model,
        "version": int(folder.name),
        "path": str(built.path),
        "reused": built.reused,
        "gates": [gate.model_dump(mode="json") for gate in built.gates],
        "timings": [timing.model_dump(mode="json") for timing in built.timings],
    }
    emit(result, as_json, lambda: _show(result))


def _folder(repository: Path, model: str, version: int | None) -> Path:
    if version is None:
        return pipeline.newest_version(repository, model)
    folder = repository / model / str(version)
    if not (folder / MANIFEST_NAME).is_file():
        raise ArtifactError(f"no published version {version} of {model!r}", field="--version")
    return folder


def _write_job(model: str, folder: Path, settings: Any, path: Path | None, lacks: list[str], as_json: bool) -> None:
    jobs = stages.load("export.tensorrt.job")
    version = int(folder.name)
    written = jobs.write_job(path or jobs.default_path(model, version), model, version, settings)
    emit({"missing": lacks, "job": str(written)}, as_json, lambda: out.print(str(written)))
    for lack in lacks:
        says(f"missing: {lack}")
    hint = f"on the cluster: kubectl apply -f {written}"
    raise ComponentError(f"no engine is built on this machine; its job is in {written}", field="tensorrt", hint=hint)


def _show(result: dict[str, Any]) -> None:
    rows = [(each["rows"], each["calls"], each["p50_us"], each["p99_us"]) for each in result["timings"]]
    if rows:
        table("one call, with its copies", ("rows", "calls", "p50 us", "p99 us"), rows)
    out.print(f"{'there already' if result['reused'] else 'built'}: {result['path']}")
    out.print("no server loads it: it says what TensorRT would give and cost here (docs/runtimes.md)")


@app.command("list")
def list_plans(
    model: Model,
    version: Version = None,
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    as_json: options.AsJson = False,
) -> None:
    """Show the plans of a version, and whether each is whole and for this machine; exit code 3 where one is not."""
    folder = _folder(repository, model, version)
    accept, plan = stages.load("export.tensorrt.accept"), stages.load("export.tensorrt.plan")
    manifest, rows, refused = load_manifest(folder), [], 0
    for path in accept.plans_of(folder):
        row = {"plan": path.name}
        try:
            _, key = plan.read_whole(path)
            row |= {"sm": key.sm, "tensorrt": key.tensorrt, "driver": key.driver}
            row["state"] = accept.check_here(path, manifest)
        except ArtifactError as error:
            refused += 1
            row["state"] = f"refused: {error}"
        rows.append(row)
    emit(rows, as_json, lambda: _show_plans(rows))
    if refused:
        raise ArtifactError(f"{refused} of {len(rows)} plans refused", field="plans")


def _show_plans(rows: list[dict[str, str]]) -> None:
    columns = ("plan", "sm", "tensorrt", "driver", "state")
    table("plans", columns, [[row.get(name, "") for name in columns] for row in rows])
