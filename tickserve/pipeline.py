"""The stages as functions from settings to results: each command runs one, `demo` runs them all.

Nothing of a stage is imported until its function is called (`tickserve.stages`), and what comes back is what the stage
itself returned, so this room holds the order of the work and none of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve import limits, stages
from tickserve.config import Config
from tickserve.current import folder_in_force
from tickserve.errors import ArtifactError, InsufficientDataError, UsageError
from tickserve.golden import read_golden
from tickserve.manifest import CLASSES, GOLDEN_NAME, MANIFEST_NAME, Manifest, load_bundle, load_manifest
from tickserve.meter import Meter

Advance = Callable[[int], None]
FloatArray = npt.NDArray[np.float32]
TimeArray = npt.NDArray[np.int64]
Arrays = dict[str, FloatArray]


def open_source(data: Sequence[Path] | None, config: Config, *, symbol: str | None = None) -> Any:
    """The market data behind `--data`, or the simulator where none is given. Raises DataError, UsageError."""
    if not data:
        if symbol:
            raise UsageError("--symbol goes with --data", field="--symbol")
        simulator = stages.load("market.simulator")
        return simulator.SimulatedSource(seed=config.seed, levels=config.features.levels)
    return stages.load("market.readers").open_source(list(data), levels=config.features.levels, symbol=symbol)


def inspect(source: Any, config: Config, advance: Advance | None = None) -> dict[str, Any]:
    """Read the source to its end and return its quality summary."""
    done = 0
    for chunk in source.chunks(config.features.chunk_rows):
        done += len(chunk)
        if advance:
            advance(done)
    return describe(source) | {"quality": source.quality.to_json()}


def describe(source: Any) -> dict[str, Any]:
    """What a source is, before it is read."""
    return {
        "symbol": source.symbol,
        "venue": source.venue,
        "kind": source.kind,
        "levels": source.levels,
        "simulated": source.simulated,
        "files": [path.name for path in source.files],
    }


def build_features(
    source: Any, config: Config, advance: Advance | None = None, say: Callable[[str], None] = lambda _: None
) -> Any:
    """The feature set of a source under its default spec, from the cache where nothing changed.

    `say` gets a line where limits.features_s was not kept. Raises LimitExceededError where that is to fail.
    """
    spec = stages.load_core("tickserve.features.spec").default_spec(source.kind, source.levels)
    settings = config.features
    if source.kind == "bars":
        settings = settings.model_copy(update={"max_rows": settings.bars_max_rows})
    with Meter() as meter, meter.stage("features") as stage:
        built = stages.load("market.build").build_features(source, spec, settings, progress=advance)
        stage.rows = None if built.reused else built.meta["events_read"]
    limits.hold(limits.of_features(config.limits, stage.seconds), say)
    return replace(built, took=stage.recorded())


def train(
    feature_set: Any,
    config: Config,
    out: Path,
    *,
    name: str | None = None,
    progress: Any = None,
    require_gate: bool = False,
    probe: bool = False,
) -> list[Any]:
    """Train the enabled families; returns the bundles. Raises InsufficientDataError, GateRefusedError.

    With `require_gate` a model that does not pass the validation gate is refused, with `probe` a job that sees the
    future.
    """
    families = config.families
    if not families:
        raise UsageError("nothing to train", field="<family>.enabled", expected="at least one true")
    job = stages.load("training.train")
    demands = job.Demands(gate=require_gate, probe=probe)
    return list(
        job.train(feature_set, config, out, families=families, name_prefix=name, progress=progress, demands=demands)
    )


def export(bundle: Path, repository: Path, config: Config, *, activate: bool = True) -> Any:
    """Export one bundle, publish it and put it in force, signed where a key is configured.

    Without `activate` what was in force stays so.
    Raises GateRefusedError, ArtifactError and SignatureError; then nothing is published.
    """
    terms = stages.load("export.publish").Terms.of(config.repository, activate=activate)
    return publish(bundle, stages.load("export.repository.places").Local(repository), config, terms)


def publish(bundle: Path, place: Any, config: Config, terms: Any, progress: Callable[[str], None] | None = None) -> Any:
    """As `export`, into an open repository (`export.repository.places`) and on terms that the caller has."""
    transfer = stages.load("export.repository.transfer")
    return transfer.publish_bundle(bundle, place, config.export, terms, progress, config.runtime.measure)


def bundles_in(folder: Path) -> list[Path]:
    """The bundle `folder` is, or the bundles inside it, teachers before their children.

    Raises ArtifactError when there is none.
    """
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}")) if folder.is_dir() else []
    if not found:
        raise ArtifactError(f"no {MANIFEST_NAME} in the folder or one below it", field=folder.name)
    return sorted(found, key=lambda path: len(load_manifest(path).parents))


def bundles_to_publish(folder: Path, config: Config, *, require_gate: bool) -> list[Path]:
    """As `bundles_in`. With `require_gate` as `refuse_ungated` too, before anything of them is published."""
    found = bundles_in(folder)
    if require_gate:
        refuse_ungated(found, config)
    return found


def refuse_ungated(bundles: Sequence[Path], config: Config) -> None:
    """Raise GateRefusedError naming the bundles whose manifests do not say that the validation gate was passed."""
    stages.load("export.validation").refuse_ungated([load_bundle(path) for path in bundles], config.validation)


def newest_version(repository: Path, model: str) -> Path:
    """The folder of a model's version in force, or its newest one. Raises ArtifactError naming what is there."""
    chosen = folder_in_force(repository / model)
    if chosen is not None:
        return chosen
    versions = [path for path in (repository / model).glob("[0-9]*") if (path / MANIFEST_NAME).is_file()]
    if versions:
        return max(versions, key=lambda path: int(path.name))
    have = ", ".join(models_in(repository)) or "none"
    raise ArtifactError(f"the repository has no published model {model!r}", field="model", expected=have)


def models_in(repository: Path) -> list[str]:
    """Names of the models that have a published version."""
    return sorted({path.parents[1].name for path in repository.glob(f"*/[0-9]*/{MANIFEST_NAME}")})


def golden_rows(version: Path, manifest: Manifest) -> tuple[FloatArray, dict[str, FloatArray]]:
    """A version's golden input and the research model's numbers for it. Raises ArtifactError."""
    golden = read_golden(version / GOLDEN_NAME, manifest.inputs, manifest.outputs)
    return golden.pop(manifest.inputs[0].name), golden


def golden_inputs(version: Path, manifest: Manifest) -> tuple[Arrays, Arrays]:
    """A version's golden inputs by name, and the research model's numbers for them. Raises ArtifactError."""
    golden = read_golden(version / GOLDEN_NAME, manifest.inputs, manifest.outputs)
    return {tensor.name: golden.pop(tensor.name) for tensor in manifest.inputs}, golden


def last_inputs(feature_set: Any, manifest: Manifest, count: int) -> tuple[FloatArray, TimeArray]:
    """The last `count` model inputs of a feature set, [B, F] or [B, T, F], and their event times in ns.

    A window lies inside one session. Fewer inputs come back where the data have no more; InsufficientDataError where
    they have none. Raises ArtifactError when the feature set is not the one the model was trained on, UsageError for a
    count below 1.
    """
    if count < 1:
        raise UsageError("nothing asked for", field="count", expected="at least 1", was=str(count))
    keep = _columns_of(feature_set, manifest)
    rows = feature_set.load()
    if len(manifest.inputs[0].shape) == 1:
        return np.ascontiguousarray(rows.features[-count:, keep]), rows.ts_ns[-count:]
    _check_pace(rows, manifest)
    window = manifest.inputs[0].shape[0]
    ends = _window_ends(rows.session, window)[-count:]
    views = np.lib.stride_tricks.sliding_window_view(rows.features[:, keep], window, axis=0)[ends - window + 1]
    return np.ascontiguousarray(views.transpose(0, 2, 1)), rows.ts_ns[ends]


def last_stepped_inputs(
    feature_set: Any, manifest: Manifest, count: int, answer: Callable[[Arrays], Arrays]
) -> tuple[Arrays, TimeArray]:
    """As `last_inputs` of a stateful model: rows and the state each is met with, by name, and their event times in ns.

    `answer` is asked for every row of the newest session, from its first, so that the states are the session's.
    """
    if count < 1:
        raise UsageError("nothing asked for", field="count", expected="at least 1", was=str(count))
    keep = _columns_of(feature_set, manifest)
    rows = feature_set.load()
    _check_pace(rows, manifest)
    first = int(np.flatnonzero(rows.session == rows.session[-1])[0])
    features = rows.features[first:, keep]
    features = np.where(np.isinf(features), np.float32(np.nan), features)
    return stepped_inputs(features, manifest, count, answer), rows.ts_ns[first:][-count:]


def stepped_inputs(
    rows: FloatArray, manifest: Manifest, count: int, answer: Callable[[Arrays], Arrays]
) -> dict[str, FloatArray]:
    """The last `count` of the consecutive rows [N, F] of one stream, with the state each is met with, by name.

    The stream starts from zeros; `answer` takes one row's inputs by name and gives the outputs.
    """
    tensors = manifest.state.tensors if manifest.state else ()
    state = {tensor.input: np.zeros((1, *tensor.shape), np.float32) for tensor in tensors}
    first = manifest.inputs[0].name
    kept: dict[str, list[FloatArray]] = {tensor.name: [] for tensor in manifest.inputs}
    for place, row in enumerate(rows):
        inputs = {first: row[np.newaxis], **state}
        if place >= len(rows) - count:
            for name, array in inputs.items():
                kept[name].append(array)
        said = answer(inputs)
        state = {tensor.input: said[tensor.output] for tensor in tensors}
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def _columns_of(feature_set: Any, manifest: Manifest) -> slice | list[int]:
    """Where a feature set has the model's columns: all of it, or those of a spec narrowed to them.

    Raises ArtifactError where the model was trained on other features.
    """
    spec, contract = feature_set.spec, manifest.features
    if spec.digest == contract.digest:
        return slice(None)
    if set(contract.columns) <= set(spec.columns) and spec.narrowed(contract.columns).digest == contract.digest:
        return [spec.columns.index(name) for name in contract.columns]
    raise ArtifactError(
        "the data gives other features than the model takes",
        field="feature digest",
        expected=contract.digest,
        was=spec.digest,
    )


def _check_pace(rows: Any, manifest: Manifest) -> None:
    stride = manifest.architecture.get("stride", 1)
    if rows.stride != stride:
        raise ArtifactError(
            "the rows are at another pace than the model's steps",
            field="stride",
            expected=str(stride),
            was=str(rows.stride),
            hint="use the features.max_rows and the data the model was trained with",
        )


def _window_ends(session: npt.NDArray[np.int32], window: int) -> npt.NDArray[np.intp]:
    """Rows that end a window of `window` rows of one session, oldest first."""
    inside = session[window - 1 :] == session[: max(0, len(session) - window + 1)]
    ends = np.flatnonzero(inside) + window - 1
    if not len(ends):
        longest = int(np.bincount(session).max()) if len(session) else 0
        raise InsufficientDataError(
            "no session is as long as the model's window",
            field="features",
            expected=f"at least {window} rows in one session",
            was=str(longest),
        )
    return ends


def signal_rows(signal: Any, times_ns: Sequence[int | None]) -> list[dict[str, Any]]:
    """A signal as one JSON object per row, with the row's event time where it is known."""
    rows = []
    for index, (probabilities, score) in enumerate(zip(signal.probabilities, signal.score, strict=True)):
        time_ns = times_ns[index]
        row: dict[str, Any] = {} if time_ns is None else {"time_ns": int(time_ns)}
        row |= {name: round(float(value), 6) for name, value in zip(CLASSES, probabilities, strict=True)}
        row |= {"score": round(float(score), 6), "decision": signal.decision[index]}
        rows.append(row)
    return rows
