"""`tickserve tune`: the search for hyper-parameters, and the configuration that trains what it chose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline, stages
from tickserve.cli import options
from tickserve.cli.output import counting, emit, out, says, table
from tickserve.errors import UsageError
from tickserve.manifest import MODEL_NAME_PATTERN


def tune(
    data: options.Data = None,
    symbol: options.Symbol = None,
    family: Annotated[str, typer.Option("--family", help="Which family of models.")] = "gbdt",
    study: Annotated[str | None, typer.Option("--study", help="Name; a study that exists is gone on with.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Of the study, earlier runs included.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes that try at the same time.")] = None,
    space: Annotated[Path | None, typer.Option("--space", help="A TOML file of ranges; else the shipped ones.")] = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Search hyper-parameters: information coefficient against the p99 of a lone row and the model's size.

    The last fold, on which the published model is judged, is kept out of the search.
    """
    overrides = {"tune.trials": trials, "tune.workers": workers}
    settings = options.settings_of(config, profile, overrides).config
    ranges = stages.load("training.tune.space")
    found = ranges.read_space(space, family) if space else ranges.shipped(family)
    source = pipeline.open_source(data, settings, symbol=symbol)
    with counting(f"features of {source.symbol}", "events") as advance:
        built = pipeline.build_features(source, settings, advance, says)
    meta = stages.load("training.train").meta_of(built)
    name = _checked(study or f"{meta.tag}-{family}")
    studies, outcomes = stages.load("training.tune.study"), stages.load("training.tune.outcome")
    wanted = studies.Search(built.load, meta, settings, family, found, name)
    result = outcomes.outcome(studies.search(wanted, says), wanted)
    best = outcomes.write_outcome(result, wanted)
    report = stages.load("loadtest.tuning_report").write_tuning_report(wanted.folder)
    files = {"config": str(best), "report": str(report)}
    given = " ".join(f"--data {path}" for path in data or ())
    emit(result | files, as_json, lambda: _show(result, files, given))


def _checked(name: str) -> str:
    if not MODEL_NAME_PATTERN.fullmatch(name) or ".." in name:
        raise UsageError("not a safe name", field="--study", expected="1 to 100 of [a-z0-9._-]", was=name[:40])
    return name


def _show(result: dict[str, Any], files: dict[str, str], data: str) -> None:
    front = [row for row in result["trials"] if row["trial"] in result["pareto_front"]]
    rows = [
        (row["trial"], f"{row['ic']:+.4f}", f"{row['p99_us']:,.0f}", f"{row['size_bytes']:,.0f}", _values(row))
        for row in sorted(front, key=lambda row: -row["ic"])
    ]
    table(f"Pareto front of {result['tried']} trials", ("trial", "IC", "p99 us", "bytes", "values"), rows)
    out.print(f"chosen: trial {result['chosen']}, the highest IC that is fast enough")
    out.print(f"report: {files['report']}")
    out.print(f"next: tickserve train {data} --config {files['config']}".replace("  ", " "))


def _values(row: dict[str, Any]) -> str:
    shown = ((key.partition(".")[2], value) for key, value in sorted(row["values"].items()))
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown)
