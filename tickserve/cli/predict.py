"""`tickserve predict`: ask a running server for signals, and hold them against the research model's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tickserve import pipeline
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.client import Client, Resilience
from tickserve.client._local import LocalModel
from tickserve.config import Config
from tickserve.errors import GateRefusedError, SchemaError, UsageError
from tickserve.manifest import Manifest, load_manifest
from tickserve.model_config import served_rows
from tickserve.pipeline import FloatArray

MAX_SHOWN = 20


def predict(
    model: Annotated[str, typer.Argument(help="The served model.")],
    url: Annotated[
        str, typer.Option("--url", help="host:port, http://host:port or grpc://host:port.")
    ] = "127.0.0.1:8000",
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    data: options.Data = None,
    last: Annotated[
        int | None, typer.Option("--last", min=1, max=4_096, help="With --data: the newest rows; 1 by default.")
    ] = None,
    rows: Annotated[Path | None, typer.Option("--rows", help="A JSON file: a list of feature rows.")] = None,
    symbol: options.Symbol = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Score golden rows (the default), the newest rows of market data, or rows of a JSON file.

    Golden rows carry research's numbers: a served number outside the manifest's tolerance exits 1.
    """
    settings = options.settings_of(config, profile).config
    if data and rows:
        raise UsageError("give one of them", field="--data, --rows")
    if last is not None and not data:
        raise UsageError("names the newest rows of market data", field="--last", expected="with --data", was="without")
    version = pipeline.newest_version(repository, model)
    manifest = load_manifest(version)
    inputs: pipeline.Arrays
    expected = times = None
    if data:
        source = pipeline.open_source(data, settings, symbol=symbol)
        built = pipeline.build_features(source, settings)
        if manifest.provenance.symbol not in ("", source.symbol):
            says(f"note: {model} was trained on {manifest.provenance.symbol}, this data is {source.symbol}")
        inputs, times = _last(built, manifest, last or 1, version)
    elif rows:
        inputs = _as_inputs(_rows_of(rows), manifest, version)
    else:
        inputs, expected = pipeline.golden_inputs(version, manifest)
    result = _ask(url, version, manifest, inputs, settings, times)
    if expected is not None:
        result |= _compare(result, expected, manifest)
    result.pop("_probabilities")
    emit(result, as_json, lambda: _show(result))
    if result.get("within_tolerance") is False:
        raise GateRefusedError("the served numbers are not research's", field=model)


def _last(built: Any, manifest: Manifest, last: int, version: Path) -> tuple[pipeline.Arrays, Any]:
    if manifest.state is None:
        rows, times = pipeline.last_inputs(built, manifest, last)
        return {manifest.inputs[0].name: rows}, times
    return pipeline.last_stepped_inputs(built, manifest, last, LocalModel(version).answer)


def _as_inputs(rows: FloatArray, manifest: Manifest, version: Path) -> pipeline.Arrays:
    """The rows; of a stateful model the consecutive rows of one stream, which starts from zeros."""
    if manifest.state is None:
        return {manifest.inputs[0].name: rows}
    width = len(manifest.features.columns)
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
        raise SchemaError("wrong rows", field="--rows", expected=f"rows of {width} numbers", was=str(list(rows.shape)))
    return pipeline.stepped_inputs(rows, manifest, len(rows), LocalModel(version).answer)


def _rows_of(path: Path) -> FloatArray:
    """The rows of a JSON file as float32; what float32 cannot hold, and what is no number, is refused."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path.name!r}: {error.strerror}", field="--rows") from error
    except (ValueError, RecursionError) as error:
        raise SchemaError("not JSON", field=path.name, hint=str(error)[:100]) from error
    try:
        rows = np.array(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise SchemaError("wrong rows", field=path.name, expected="lists of numbers of one length") from error
    if _holds_other_than_numbers(values):
        raise SchemaError("wrong rows", field=path.name, expected="numbers", was="text, true, false or null")
    if np.abs(rows[np.isfinite(rows)]).max(initial=0.0) > np.finfo(np.float32).max:
        raise SchemaError("a value is too large", field=path.name, expected="what FP32 can hold")
    return rows.astype(np.float32)


def _holds_other_than_numbers(values: object) -> bool:
    if isinstance(values, list):
        return any(_holds_other_than_numbers(value) for value in values)
    return isinstance(values, bool) or not isinstance(values, int | float)


def _ask(
    url: str, version: Path, manifest: Manifest, inputs: pipeline.Arrays, config: Config, times: Any
) -> dict[str, Any]:
    """The answers of exactly `version`: one that a server has not loaded is said as that, not as a foreign answer."""
    transport = options.transport_to(url, config)
    count = len(inputs[manifest.inputs[0].name])
    limit = served_rows(version, manifest) or count
    starts = range(0, count or 1, limit)
    resilience = None if url.startswith("local://") else Resilience.of(config.client)
    with Client(
        url, manifest=version, transport=transport, deadline_ms=config.client.deadline_ms, resilience=resilience
    ) as client:
        parts = [
            client.score(manifest.name, {name: array[start : start + limit] for name, array in inputs.items()})
            for start in starts
        ]
    signal = parts[0]
    times = [None] * count if times is None else times
    rows = [
        row
        for start, part in zip(starts, parts, strict=True)
        for row in pipeline.signal_rows(part, times[start : start + limit])
    ]
    return {
        "model": signal.model,
        "version": signal.version,
        "bundle_digest": signal.bundle_digest,
        "bundle_id": signal.bundle_id,
        "feature_digest": signal.feature_digest,
        "status": signal.status,
        "flags": sorted({flag for part in parts for flag in part.flags}),
        "stage_us": {name: round(value, 1) for name, value in signal.stage_us.items()},
        "signals": rows,
        "_probabilities": np.concatenate([part.probabilities for part in parts]),
    }


def _compare(result: dict[str, Any], expected: dict[str, FloatArray], manifest: Manifest) -> dict[str, Any]:
    served, research = result["_probabilities"], expected["probabilities"]
    limit = manifest.tolerance.atol + manifest.tolerance.rtol * np.abs(research)
    return {
        "max_abs_difference": float(np.max(np.abs(served - research))),
        "tolerance": manifest.tolerance.model_dump(),
        "within_tolerance": bool(np.all(np.abs(served - research) <= limit)),
    }


def _show(result: dict[str, Any]) -> None:
    out.print(
        f"{result['model']} version {result['version']}  {result['status']}  bundle {result['bundle_digest'][:19]}"
    )
    out.print(f"bundle_id {result['bundle_id']}")
    signals = result["signals"]
    table("signals", list(signals[0]), [list(row.values()) for row in signals[-MAX_SHOWN:]])
    if len(signals) > MAX_SHOWN:
        out.print(f"(the newest {MAX_SHOWN} of {len(signals)}; --json prints all)")
    if "max_abs_difference" in result:
        verdict = "within" if result["within_tolerance"] else "OUTSIDE"
        out.print(f"research's numbers: max difference {result['max_abs_difference']:.2e}, {verdict} the tolerance")
    for flag in result["flags"]:
        out.print(f"flag: {flag}", markup=False)
