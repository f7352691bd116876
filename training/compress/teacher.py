"""The teacher in every fold: the bundle's own model in the last one, refits by the same configuration in the others.

What is published is the last fold's model, so the bundle holds no other. The earlier folds are fitted again with the
configuration and the seed at hand; each has to rank its test rows as the bundle's report says, since a teacher that was
fitted by weaker settings would make every student look good. A bundle of other data, features, labels, folds or sizes
than those at hand is refused before anything is fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.gbdt import GbdtClassifier
from models.registry import NETS, net_from_bundle
from tickserve.config import Config, NetSettings
from tickserve.errors import ArtifactError
from tickserve.manifest import TREES, Manifest, load_bundle
from training.compress.generation import Generation
from training.compress.recorded import recorded_folds
from training.examples import DataMeta, Examples
from training.families import job_of
from training.job import Fit, Job
from training.metrics import Prediction, rank_correlation

Say = Callable[[str], None]
# Two fits of the same bits rank alike; this is for libraries that add up in another order.
SAME_IC = 1e-6
# Further than this from the recorded IC it is another model: of another learning rate, or of fewer rounds.
MAX_IC_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Data:
    """The examples at hand, what they are made of, and the configuration in force."""

    examples: Examples
    meta: DataMeta
    config: Config


@dataclass(frozen=True)
class Opened:
    """A teacher's bundle that is of the data at hand, its job, and the model that it holds: the last fold's."""

    bundle: Path
    manifest: Manifest
    job: Job
    own: Fit


def open_teacher(bundle: Path, data: Data) -> Opened:
    """Read a bundle; nothing is fitted. Raises ArtifactError for one that is not of these data, folds and settings."""
    manifest = load_bundle(bundle)
    check_same(manifest, data)
    job = job_of(manifest.family, data.examples, data.config)
    return Opened(bundle, manifest, job, _own(bundle, manifest, data.config))


def refitted(opened: Opened, data: Data, say: Say) -> tuple[Generation, list[dict[str, Any]]]:
    """The teacher of every fold, and a row for each refit: its fold, its IC, and the one the bundle's report gives.

    Raises ArtifactError for a refit that ranks otherwise than the bundle's report says.
    """
    job, name = opened.job, opened.manifest.name
    *earlier, last = data.examples.folds
    fits, answers, rows = [], {}, []
    for place, fold in enumerate(earlier):
        say(f"teacher {name}: fold {fold.number}/{last.number} is fitted again")
        fits.append(job.fit(fold))
        judged = job.eligible(fold.rows.test)
        answers[place] = job.predict(fits[-1], judged)
        ic = rank_correlation(Prediction.of(answers[place]).score, data.examples.ret[judged])
        rows.append(_compared(opened.manifest, place, ic))
        if not rows[-1]["same"]:
            say(f"teacher {name}: the refit of fold {fold.number} is not the bundle's to the last digit")
    return Generation(job, (*fits, opened.own), opened.bundle, opened.manifest, answers), rows


def _own(bundle: Path, manifest: Manifest, config: Config) -> Fit:
    last = recorded_folds(manifest)[-1]
    if manifest.family in TREES:
        model = GbdtClassifier.from_bundle(bundle, manifest)
        model.threads = config.gbdt.threads
        return Fit(model, last.best_iteration, last.fit_rows)
    return Fit(net_from_bundle(bundle, manifest), last.best_iteration, last.fit_rows)


def _compared(manifest: Manifest, place: int, ic: float | None) -> dict[str, Any]:
    """A refit's row. Raises ArtifactError for an IC that is not the recorded one."""
    recorded = recorded_folds(manifest)[place].metrics.ic
    apart = abs(ic - recorded) if ic is not None and recorded is not None else None
    if (ic is None) != (recorded is None) or (apart is not None and apart > MAX_IC_DIFFERENCE):
        raise ArtifactError(
            f"the refit of fold {place + 1} is not the model that the bundle {manifest.name!r} reports on",
            field=f"metrics.folds.{place}.metrics.ic",
            expected=f"{_shown(recorded)} as recorded, within {MAX_IC_DIFFERENCE:g}",
            was=_shown(ic),
            hint="compress with the --config, the libraries and the device that the teacher was trained with",
        )
    return {"fold": place + 1, "ic": ic, "recorded_ic": recorded, "same": apart is not None and apart <= SAME_IC}


def _shown(ic: float | None) -> str:
    return "none" if ic is None else f"{ic:+.5f}"


def check_same(manifest: Manifest, data: Data) -> None:
    """Raise ArtifactError unless the bundle is a trained model of these data, features, labels, folds and settings."""
    if manifest.parents or manifest.precision != "fp32" or manifest.state is not None:
        raise _other(
            "parents", "a model that was trained, not one made from it", ", ".join(manifest.parents) or "a state"
        )
    recorded_rows = [(fold.train, fold.validation, fold.threshold) for fold in recorded_folds(manifest)]
    meta, examples, config = data.meta, data.examples, data.config
    said: list[tuple[str, object, object]] = [
        ("provenance.data", manifest.provenance.data, dict(meta.data)),
        ("features.digest", manifest.features.digest, meta.feature_digest),
        ("provenance.seed", manifest.provenance.seed, config.seed),
        ("horizon", manifest.horizon.model_dump(), examples.horizon.model_dump()),
        ("metrics.folds", recorded_rows, _folds(data.examples)),
    ]
    for field, recorded, here in said:
        if recorded != here:
            raise _other(field, str(recorded), str(here))
    _check_settings(manifest, data)


def _folds(examples: Examples) -> list[tuple[int, int, float]]:
    return [(len(fold.rows.train), len(fold.rows.validation), fold.threshold) for fold in examples.folds]


def _check_settings(manifest: Manifest, data: Data) -> None:
    """What the manifest says of the model's sizes is what the configuration would train."""
    if manifest.family in TREES:
        wanted = {"task": data.config.gbdt.task, "max_depth": data.config.gbdt.max_depth}
    else:
        settings: NetSettings = getattr(data.config, manifest.family)
        wanted = NETS[manifest.family].declared(settings, data.examples.columns)
    for key, here in wanted.items():
        recorded = manifest.architecture.get(key)
        if recorded != here:
            raise _other(f"{manifest.family}.{key}", str(recorded), str(here))


def _other(field: str, expected: str, was: str) -> ArtifactError:
    hint = "compress with the data and the --config that the teacher was trained with"
    message = "the teacher is of other data, folds or settings than those at hand"
    return ArtifactError(message, field=field, expected=expected[:120], was=was[:120], hint=hint)
