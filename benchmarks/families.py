"""What every family is worth out of sample, beside the baselines, on recorded data: one table for each symbol.

    python -m benchmarks.families --data PATH [--data PATH ...] [--families gbdt lstm] [--rows 20000] [--out FILE]

`--data` takes files and folders; files of one symbol belong together. Every family that fits the data is walked forward
with the profile's settings (its own hyper-parameters, no search) over the same rows, folds, labels and costs as the
baselines, and nothing is written but the table. An interval is the 95 % one of the block bootstrap; "few" stands where
there are too few independent rows for one. The trials behind the gate are `validation.trials` times the families of the
table: the best of them is the best of that many. With `--rows`, of more rows every k-th is kept.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.harness import machine
from export.validation import sentence
from market.feature_store import FeatureTable
from market.readers.grouping import Group, group_sources
from tickserve import pipeline
from tickserve.config import Config
from tickserve.errors import TickserveError
from tickserve.manifest import Family
from tickserve.settings import load_settings
from tickserve.store import write_atomic
from training import baselines
from training.examples import DataMeta, Examples, prepare
from training.families import job_of, misfit
from training.leakage import refuse_leaks
from training.train import meta_of
from training.walk import Run, walk

NS_PER_S = 1e9
# A recording shorter than this is minutes of one market on one day.
MINUTES_S = 2 * 3_600
NO_CLAIM = "minutes of data: no claim beyond this recording"
COLUMNS = (
    *("predictor", "n eff", "macro-F1", "MCC", "IC", "IC t", "trades", "turnover per row", "per day"),
    *("PnL bp after costs", "at 0 / 2 x fee", "deflated p", "gate", "s"),
)


@dataclass(frozen=True)
class Subject:
    """One symbol's rows, labelled and cut into folds."""

    name: str
    meta: DataMeta
    examples: Examples
    span_s: float
    seconds: float


def read(group: Group, config: Config) -> Subject:
    """Features, labels and folds of a symbol. Raises TickserveError."""
    started = time.perf_counter()
    built = pipeline.build_features(group.open(config.features.levels), config)
    table, meta = built.load(), meta_of(built)
    examples = prepare(table, meta, config)
    refuse_leaks(examples, meta.columns)
    return Subject(group.name, meta, examples, recorded_s(table), time.perf_counter() - started)


def recorded_s(table: FeatureTable) -> float:
    """Seconds of market in a table: its sessions, without what lies between them."""
    opens = np.flatnonzero(np.diff(table.session, prepend=table.session[0] - 1))
    closes = np.append(opens[1:], len(table)) - 1
    return float((table.ts_ns[closes] - table.ts_ns[opens]).sum()) / NS_PER_S


def walked(subject: Subject, families: Sequence[str], config: Config) -> dict[str, dict[str, Any]]:
    """The report of every family."""
    examples = subject.examples
    yardsticks = {fold.number: baselines.predict_all(examples, fold, subject.meta.columns) for fold in examples.folds}
    reports = {}
    for family in families:
        run = Run(examples, subject.meta, config, job_of(family, examples, config), yardsticks, _quiet)
        reports[family] = walk(run)[1]
    return reports


def _quiet(text: str) -> None:
    pass


def lines_of(subject: Subject, families: Sequence[str], config: Config) -> Iterator[str]:
    """The table of a symbol, in Markdown."""
    kept = [family for family in families if misfit(family, subject.meta) is None]
    tried = config.validation.trials * max(1, len(kept))
    config = config.model_copy(update={"validation": config.validation.model_copy(update={"trials": tried})})
    reports = walked(subject, kept, config)
    yield from (f"## {subject.name}", "", *facts(subject, families, kept, config), "")
    if not reports:
        return
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---|" + "---:|" * (len(COLUMNS) - 3) + "---|---:|"
    for family, report in reports.items():
        yield row(f"**{family}**", report["pooled"]["model"], report)
    # A window's first rows cannot be judged: of the baselines those beside the family that judges most rows are shown.
    most = max(reports.values(), key=lambda report: report["pooled"]["model"]["rows"])
    for name, values in most["pooled"]["baselines"].items():
        yield row(name.replace("_", " "), values, None)
    yield ""
    yield from (f"- {family}: {report['verdict']}; {sentence(report['gate'])}" for family, report in reports.items())
    yield ""


def facts(subject: Subject, families: Sequence[str], kept: Sequence[str], config: Config) -> Iterator[str]:
    """How much data there is, and what a reader must not take it for."""
    examples, folds = subject.examples, subject.examples.folds
    judged = sum(len(fold.rows.test) for fold in folds)
    unit = "ms" if examples.horizon_unit == "ms" else "rows"
    yield (
        f"{subject.span_s / 86_400:,.3g} days recorded, {len(examples.ret):,} rows (one event in "
        f"{examples.stride} kept), {judged:,} judged in {len(folds)} folds; horizon {examples.horizon_value:,} {unit}; "
        f"fee {config.costs.fee_bps:g} bp a side, half-spread assumed in {examples.assumed_spreads:.0%} of rows; "
        f"trials: {config.validation.trials}."
    )
    if subject.span_s < MINUTES_S:
        yield f"**{NO_CLAIM}** ({subject.span_s / 60:,.1f} minutes)."
    if subject.meta.simulated:
        yield "**simulated data: no market produced it.**"
    for family in families:
        found = misfit(family, subject.meta)
        if found is not None:
            yield f"{family} left out: it reads {found.expected}, and this is {found.was}."
    if not kept:
        yield "No family that was asked for fits."


def row(name: str, values: dict[str, Any], report: dict[str, Any] | None) -> str:
    """A line of the table; `report` is None for a baseline, which no gate judges."""
    fees = values["pnl_bps_by_fees"]
    cells = [
        name,
        f"{values['n_eff']:,.0f}",
        *(spanned(values, key, places) for key, places in (("macro_f1", ".3f"), ("mcc", "+.3f"), ("ic", "+.3f"))),
        shown(values["ic_t"], "+.1f"),
        f"{values['trades']:,}",
        shown(values["turnover_per_row"], ".4f"),
        shown(values["turnover_per_day"], ",.0f"),
        spanned(values, "pnl_bps", "+.2f"),
        f"{shown(fees['0'], '+.2f')} / {shown(fees['2'], '+.2f')}",
        "" if report is None else shown(report["deflation"]["ic_probability"], ".3f"),
        "" if report is None else ("passed" if report["gate"]["passed"] else "not passed"),
        "" if report is None else f"{report['seconds']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def spanned(values: dict[str, Any], key: str, places: str) -> str:
    """A number and its interval."""
    if values[key] is None:
        return "-"
    span = values["interval"][key]
    return f"{values[key]:{places}} " + (f"[{span[0]:{places}}, {span[1]:{places}}]" if span else "[few]")


def shown(value: float | None, places: str) -> str:
    return "-" if value is None else f"{value:{places}}"


def configured(arguments: argparse.Namespace, store: str) -> Config:
    """The profile's configuration with features kept apart, and a limit on rows where one is asked for."""
    changes: dict[str, Any] = {"features.store": store}
    if arguments.rows:
        changes |= {"features.max_rows": arguments.rows, "features.bars_max_rows": arguments.rows}
    return load_settings(arguments.config, profile=arguments.profile, overrides=changes).config


def tables(arguments: argparse.Namespace) -> Iterator[str]:
    """The whole output, line by line."""
    yield from ("# Families out of sample", "", f"{machine()}. Profile {arguments.profile}.", "")
    with tempfile.TemporaryDirectory(prefix="tickserve-families-") as folder:
        config = configured(arguments, arguments.store or folder)
        for group in group_sources(arguments.data):
            try:
                yield from lines_of(read(group, config), arguments.families, config)
            except TickserveError as error:
                yield from (f"## {group.name}", "", f"not judged: {error}", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(get_args(Family))
    parser.add_argument("--data", type=Path, action="append", required=True, help="files or folders, repeatable")
    parser.add_argument("--families", nargs="+", choices=known, default=known)
    parser.add_argument("--rows", type=int, default=0, help="at most so many rows; 0: the profile's limits")
    parser.add_argument("--profile", default="quick", choices=("quick", "production"))
    parser.add_argument("--config", type=Path, help="a configuration file over the profile")
    parser.add_argument("--store", help="folder of the feature cache; a scratch one by default")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    written = []
    for line in tables(arguments):
        print(line, flush=True)
        written.append(line)
    if arguments.out:
        write_atomic(arguments.out, ("\n".join(written) + "\n").encode())


if __name__ == "__main__":
    main()
