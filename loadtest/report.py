"""A run's report: one HTML page without anything outside it, drawn from the JSON files of the run's folder alone.

Every file may be absent; its section then says that the stage was not run. What the files hold is data: it is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from loadtest import formats
from loadtest.calibration_plot import draw_calibration
from loadtest.formats import FILTERS, count, megabytes, seconds
from tickserve.errors import ArtifactError
from tickserve.store import write_atomic

REPORT_NAME = "report.html"
ARTEFACTS = ("run", "quality", "features", "train", "export", "served", "loadtest", "stages")
METRICS = (
    ("n_eff", "n eff", "count"), ("macro_f1", "macro-F1", "fixed"), ("mcc", "MCC", "signed"), ("ic", "IC", "signed"),
    ("ic_t", "IC t", "signed1"), ("hit_rate", "hit rate", "percent"), ("trades", "trades", "count"),
    ("pnl_bps", "PnL bp", "signed2"),
)  # fmt: skip


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    Raises ArtifactError naming the file when one of the run's JSON files cannot be read or is not what its stage
    writes, and ComponentError when the folder cannot be written.
    """
    run = {name: _read(run_dir / f"{name}.json") for name in ARTEFACTS}
    try:
        page = _template().render(**run, **_derived(run_dir, run))
    except (jinja2.TemplateError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"a file of the run is not what its stage writes: {error}", field=run_dir.name, hint="run the stages again"
        ) from error
    path = run_dir / REPORT_NAME
    write_atomic(path, page.encode())
    return path


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"not JSON: {str(error)[:100]}", field=path.name) from error


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    # A value that a stage did not write is shown as one that does not exist.
    for name, render in FILTERS.items():
        environment.filters[name] = _absent_as_none(render)
    return environment.get_template(f"{REPORT_NAME}.j2")


def _absent_as_none(render: Any) -> Any:
    def filtered(value: Any, *arguments: Any) -> str:
        return str(render(None if isinstance(value, jinja2.Undefined) else value, *arguments))

    return filtered


def _derived(run_dir: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the template needs and no file holds."""
    models = [report for report in run["train"] or [] if report.get("folds")]
    return {
        "metrics": METRICS,
        "models": models,
        "bands": _bands(models),
        "costs": next((report["costs"] for report in models if report.get("costs")), None),
        "children": _children(run["train"] or []),
        "calibrations": [
            (report["model"], draw_calibration(report["calibration"], report["model"]))
            for report in models
            if report.get("calibration")
        ],
        "parity": _parity(run),
        "latency_plot": _data_uri(run_dir / "latency.svg"),
        "stage_rows": _stage_rows(run["stages"] or []),
        "verdict": _verdict(run, models),
        "simulated": any((run[name] or {}).get("simulated") for name in ("run", "quality")),
        "signals": _signals(run["served"]),
        "limits_not_kept": _limits_not_kept(run["train"] or []),
    }


def _limits_not_kept(reports: list[dict[str, Any]]) -> list[str]:
    """A line for each limit of `[limits]` that a model's training only had to warn of."""
    return [
        f"{report['model']}: {gate['detail']}"
        for report in reports
        for gate in report.get("limits") or []
        if not gate["passed"]
    ]


def _children(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [child for report in reports for child in report.get("children") or []]


def _data_uri(path: Path) -> str | None:
    """The plot as an image: a file of the run can then neither run a script nor break the page."""
    if not path.is_file():
        return None
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def _verdict(run: Mapping[str, Any], models: list[dict[str, Any]]) -> str:
    """The run in one or two sentences."""
    about = run["run"]
    if not about:
        return "Parts of a run."
    what = "A simulated order book" if about.get("simulated") else _data_words(about)
    served = run["served"] or {}
    ended = "became a served signal" if served.get("signals_counted") else "was read"
    limits = about.get("limits") or {}
    inside = about["total_s"] <= limits.get("run_s", float("inf")) and about["peak_memory_mb"] <= limits.get(
        "memory_mb", float("inf")
    )
    bounds = f"limits ({seconds(limits.get('run_s'))}, {megabytes(limits.get('memory_mb'))})"
    used = f"{seconds(about['total_s'])} and {megabytes(about['peak_memory_mb'])}"
    parts = [f"{what} {ended} in {used}, {'inside' if inside else 'OUTSIDE'} the {bounds}."]
    if models:
        parts.append(_skill(models))
        parts.append(_earnings(models))
        parts.append(_gated(models))
    return " ".join(part for part in parts if part)


def _data_words(about: Mapping[str, Any]) -> str:
    names = about.get("data") or []
    return names[0] if len(names) == 1 else f"{about.get('symbol', 'Market data')} from {count(len(names))} files"


def _skill(models: list[dict[str, Any]]) -> str:
    """How the models rank out of sample against their best baselines, in the words of their comparisons."""
    alike: dict[str, list[str]] = {}
    for report in models:
        words = (report.get("comparison") or {}).get("words") or "not compared with baselines"
        alike.setdefault(words, []).append(report["model"])
    clauses = [f"{' and '.join(names)}: {words}" for words, names in alike.items()]
    return f"Out of sample, by IC with a 95 % interval: {'; '.join(clauses)}."


def _earnings(models: list[dict[str, Any]]) -> str:
    """Whether the signal pays for its costs: a score that beats baselines can still lose money."""
    known = [report.get("pooled", {}).get("model", {}).get("pnl_bps") for report in models]
    pnl = max((value for value in known if value is not None), default=None)
    if pnl is None:
        return ""
    if pnl > 0:
        return f"After half-spread and fees the best makes {pnl:.2f} bp a trade, latency not counted."
    return f"None pays for its costs: after half-spread and fees the best loses {-pnl:.2f} bp a trade."


def _gated(models: list[dict[str, Any]]) -> str:
    """Which models passed the validation gate, of those it judged."""
    judged = [report for report in models if report.get("gate")]
    passed = [report["model"] for report in judged if report["gate"]["passed"]]
    if not judged:
        return ""
    return f"The validation gate was passed by {' and '.join(passed) if passed else 'none'}."


def _bands(models: list[dict[str, Any]]) -> str:
    """The flat band in basis points: moves up to it are "flat". It is fitted in each fold anew."""
    found = [1e4 * fold["threshold"] for report in models for fold in report["folds"] if "threshold" in fold]
    if not found:
        return ""
    low, high = formats.general(min(found)), formats.general(max(found))
    return f"{low} bp" if low == high else f"{low} to {high} bp, by fold"


def _parity(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per exported model: its gates, and what the server's own answers differed by."""
    served = {item["model"]: item for item in (run["served"] or {}).get("models", [])}
    return [{**item, "served": served.get(item["model"], {})} for item in run["export"] or []]


def _stage_rows(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    longest = max((stage["seconds"] for stage in stages), default=0.0) or 1.0
    heaviest = max((stage["peak_memory_mb"] for stage in stages), default=0.0) or 1.0
    return [
        {
            **stage,
            "time_share": round(100 * stage["seconds"] / longest, 1),
            "memory_share": round(100 * stage["peak_memory_mb"] / heaviest, 1),
        }
        for stage in stages
    ]


def _signals(served: Mapping[str, Any] | None) -> list[tuple[str, int]]:
    """Signals by model, as Triton counted them (a plain number, or its counters)."""
    metrics: dict[str, Any] = (served or {}).get("metrics") or {}
    return [
        (model, int(value.get("success", 0) if isinstance(value, dict) else value)) for model, value in metrics.items()
    ]
