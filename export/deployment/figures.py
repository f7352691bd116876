"""What is known of a published model when it is deployed: its version in force, batching, service times, deadline.

Each figure carries its source. A figure that is not known is None; nothing is put in its place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.batching import ServiceTimes, Setting, setting_of_config
from export.triton_config import read_config
from tickserve import pipeline
from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest, load_manifest
from tickserve.model_config import CONFIG_NAME
from tickserve.store import sha256_file

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Rate:
    """The peak that is to be served: requests a second, and rows in each on average."""

    per_second: float
    rows: float
    source: str


@dataclass(frozen=True)
class Service:
    """Measured service times; `served`: by a server, so that what a request costs beside its batch is known too."""

    times: ServiceTimes
    served: bool
    source: str


@dataclass(frozen=True)
class Cpu:
    """Processor time of the whole server for one request, in microseconds."""

    us: float
    source: str


@dataclass(frozen=True)
class ModelFigures:
    """One model as it is published in `folder` (its version in force)."""

    name: str
    version: int
    manifest: Manifest
    manifest_sha256: str
    setting: Setting
    threads: int
    bytes: int
    service: Service | None
    deadline_us: float
    deadline_source: str
    rate: Rate | None = None
    cpu: Cpu | None = None

    def to_json(self) -> dict[str, Any]:
        """What the record beside the values keeps."""
        return {
            "name": self.name,
            "version": self.version,
            "manifest_sha256": self.manifest_sha256,
            "max_batch": self.setting.max_batch,
            "instances": self.setting.instances,
            "threads": self.threads,
            "deadline_ms": self.deadline_us / 1_000,
            "service": None
            if self.service is None
            else {"source": self.service.source, **self.service.times.to_json()},
            "cpu_us": None if self.cpu is None else self.cpu.us,
            "rate": None
            if self.rate is None
            else {"per_second": self.rate.per_second, "rows": self.rate.rows, "source": self.rate.source},
        }


@dataclass(frozen=True)
class Derived:
    """What `tickserve batching derive` left of a model: deadline, peak and service times."""

    name: str
    deadline_us: float
    service: ServiceTimes
    rate: Rate | None


def read_derived(folder: Path, model: str) -> Derived | None:
    """The table of `batching derive`; None where there is none. Raises ArtifactError for what is not one."""
    path = folder / f"{model}.json"
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text("utf-8"))
        peak, where = table["peak"], f"{path.name} of tickserve batching derive"
        # A table from before rows were counted gives no rate: requests alone do not say what they cost.
        rate = (
            Rate(float(peak["per_second"]), float(peak["rows"]) / float(peak["requests"]), f"peak in {where}")
            if peak.get("rows") and peak.get("per_second")
            else None
        )
        return Derived(path.name, float(table["deadline_us"]), ServiceTimes.from_json(table["service"]), rate)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError("not a table that batching derive writes", field=path.name) from error


def read_model(
    repository: Path,
    model: str,
    *,
    derived: Derived | None,
    deadline_us: float | None,
    default_deadline_us: float,
    measured: ServiceTimes | None = None,
) -> ModelFigures:
    """The figures of a model's version in force. Raises ArtifactError for what is not published whole.

    Service times: the derived table's, else `measured` (served just now), else those of the manifest's runtime record.
    """
    folder = pipeline.newest_version(repository, model)
    manifest = load_manifest(folder)
    if manifest.export is None:
        raise ArtifactError("expected a published version, was a bundle", field=f"{model}/{folder.name}")
    options = read_config(repository / model / CONFIG_NAME)
    setting = setting_of_config(repository / model / CONFIG_NAME)
    if derived is not None and derived.service.sizes[-1] != options.max_batch:
        raise ArtifactError(
            "the table is of another export of this model: its largest batch",
            field=derived.name,
            expected=str(options.max_batch),
            was=str(derived.service.sizes[-1]),
            hint="run tickserve batching derive again",
        )
    deadline, source = _deadline(deadline_us, derived, default_deadline_us)
    return ModelFigures(
        name=model,
        version=int(folder.name),
        manifest=manifest,
        manifest_sha256=sha256_file(folder / MANIFEST),
        setting=setting,
        threads=options.intra_op_threads,
        bytes=sum(path.stat().st_size for path in (repository / model).rglob("*") if path.is_file()),
        service=_service(manifest, derived, measured),
        deadline_us=deadline,
        deadline_source=source,
    )


def _deadline(asked: float | None, derived: Derived | None, default: float) -> tuple[float, str]:
    if asked is not None:
        return asked, "--deadline-ms"
    if derived is not None:
        return derived.deadline_us, f"deadline_us in {derived.name} of tickserve batching derive"
    return default, "export.deadline_us of the configuration"


def _service(manifest: Manifest, derived: Derived | None, measured: ServiceTimes | None) -> Service | None:
    if derived is not None:
        return Service(derived.service, True, f"service times in {derived.name} of tickserve batching derive")
    if measured is not None:
        return Service(measured, True, "service times measured now on the embedded server of this machine")
    record = manifest.export.runtime if manifest.export else None
    timings = record.candidate(record.chosen).timings if record else ()
    if record is None or not timings:
        return None
    samples = {each.rows: np.array([each.p50_us]) for each in timings}
    where = "export.runtime of the manifest: calls in the exporting process, without server and network"
    return Service(ServiceTimes(samples, 0.0, 0.0, where), False, where)
