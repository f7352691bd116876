"""`tickserve compress`: a trained bundle made smaller and faster by a recipe, each step judged by gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline, stages
from tickserve.cli import options
from tickserve.cli.output import counting, emit, out, says, table
from tickserve.errors import UsageError


def compress(
    bundles: Annotated[list[Path], typer.Argument(help="The teacher's bundle; several are averaged and distilled.")],
    recipe: Annotated[
        str,
        typer.Option("--recipe", help="A TOML file of steps, or a shipped recipe's name (docs/compression.md)."),
    ],
    data: options.Data = None,
    symbol: options.Symbol = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Children and report.json go here.")] = Path(
        "runs/compress"
    ),
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Distil, prune, truncate, quantize: each step is measured in every fold, and kept when its gates accept it.

    Takes the data and the configuration that the teacher was trained with. Exits 1 when the last step was refused.
    """
    settings = options.settings_of(config, profile).config
    wanted = stages.load("training.compress.recipe").find_recipe(recipe)
    for bundle in bundles:
        if not bundle.is_dir():
            raise UsageError("no such folder", field="BUNDLE", expected="a bundle", was=str(bundle))
    source = pipeline.open_source(data, settings, symbol=symbol)
    with counting(f"features of {source.symbol}", "events") as advance:
        built = pipeline.build_features(source, settings, advance)
    chain, trained = stages.load("training.compress.chain"), stages.load("training.train")
    meta = trained.meta_of(built)
    examples = stages.load("training.examples").prepare(
        stages.load("market.feature_matrix").load_table(built, settings.trainer), meta, settings
    )
    given = stages.load("training.compress.teacher").Data(examples, meta, settings)
    outcome = chain.compress(bundles, wanted, given, out_folder, says)
    emit(outcome.report, as_json, lambda: _show(outcome.report, out_folder))
    if not outcome.accepted:
        raise typer.Exit(1)


def _show(report: dict[str, Any], folder: Path) -> None:
    teacher = report["teacher"]
    first = (teacher["model"], *_numbers(teacher, 1.0), "-", "")
    rows = [first]
    for row in report["steps"]:
        share, flips = row["quality"]["ic_share"], f"{row['measured']['flips']:.1%}"
        rows.append((row["model"], *_numbers(row["measured"], share), flips, row["verdict"].partition(":")[0]))
    table("compression", ("model", "bytes", "p50 us", "p99 us", "IC", "share", "flips", ""), rows)
    for row in report["steps"]:
        if not row["passed"]:
            out.print(f"{row['model']}: {row['verdict']}", markup=False)
    out.print(f"report: {folder / 'report.json'}", markup=False)
    if report["accepted"]:
        out.print(f"next: tickserve export {folder / report['steps'][-1]['model']}", markup=False)


def _numbers(row: dict[str, Any], share: float) -> tuple[str, ...]:
    numbers = (f"{row['size_bytes']:,}", f"{row['p50_us']:.1f}", f"{row['p99_us']:.1f}", f"{row['ic']:+.4f}")
    return (*numbers, f"{share:.1%}")
