"""A version's plan: found, or built, held against the golden pairs in every profile, timed, and only then stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export import check_model, parity
from export.onnx_graph import PROBABILITIES
from export.runtimes.measure import Effort, interleaved, timing
from export.tensorrt.build import build_flags, build_plan, check_buildable
from export.tensorrt.cuda import Cuda
from export.tensorrt.engine import Arrays, Engine
from export.tensorrt.plan import PLANS, PlanKey, plan_folder, read_plan, write_plan
from export.tensorrt.profiles import Profile, profiles_of
from export.tensorrt.target import Target, detect
from export.verify import verify_version
from tickserve import golden
from tickserve.config import Config
from tickserve.errors import ArtifactError, ComponentError
from tickserve.manifest import GOLDEN_NAME, GateResult, Manifest
from tickserve.model_config import MODEL_FILE
from tickserve.runtimes import Timing

TIMED = Effort(1.0, 50, 500)
Answer = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Built:
    """An accepted plan. `reused`: it was there, whole and for this machine."""

    path: Path
    key: PlanKey
    gates: tuple[GateResult, ...] = ()
    timings: tuple[Timing, ...] = ()
    reused: bool = False


@dataclass(frozen=True)
class Order:
    """What is to be built of a version, checked as far as it can be without a GPU."""

    version: Path
    manifest: Manifest
    graph: bytes
    profiles: tuple[Profile, ...]
    flags: dict[str, Any]

    @property
    def onnx_sha256(self) -> str:
        """The digest of the graph, as the version's manifest has it."""
        return self.manifest.export.onnx_sha256 if self.manifest.export else ""


def order(version: Path, config: Config) -> Order:
    """What to build for a published version. Raises ArtifactError for one that cannot be trusted or built."""
    manifest = verify_version(version)
    largest = manifest.export.max_batch if manifest.export else 1
    model = check_model.read_model(version / MODEL_FILE)
    check_buildable(manifest, model)
    preferred = [rows for rows in config.export.preferred_batch_rows if rows <= largest]
    profiles = profiles_of(preferred, largest)
    flags = build_flags(manifest, config.tensorrt, profiles)
    return Order(version, manifest, (version / MODEL_FILE).read_bytes(), profiles, flags)


def build(ordered: Order, config: Config) -> Built:
    """Build, hold against the golden pairs, store.

    Raises ComponentError naming all that is missing here, GateRefusedError when the engine's numbers are not research's
    (nothing is stored then), and ArtifactError.
    """
    target = detect()
    key = PlanKey.of(target, ordered.onnx_sha256, ordered.flags)
    found = existing(ordered, key, target)
    if found is not None:
        return found
    plan = build_plan(ordered.graph, ordered.manifest, ordered.profiles, config.tensorrt)
    device = Cuda()
    try:
        engine = Engine(plan, ordered.manifest, ordered.profiles, device)
        gates = hold(ordered.version, ordered.manifest, ordered.profiles, engine.run)
        timings = time_engine(ordered.version, ordered.manifest, ordered.profiles, engine.run)
    finally:
        device.close()
    extra = {
        "gpu": target.gpu,
        "gates": [gate.model_dump(mode="json") for gate in gates],
        "timings": [each.model_dump(mode="json") for each in timings],
    }
    return Built(write_plan(ordered.version, key, plan, extra), key, gates, timings)


def existing(ordered: Order, key: PlanKey, target: Target) -> Built | None:
    """The plan of this key, where there is one. Raises ArtifactError when it is damaged: remove its folder then."""
    folder = plan_folder(ordered.version, key)
    if not folder.exists():
        return None
    read_plan(folder, target, ordered.onnx_sha256)
    return Built(folder, key, reused=True)


def hold(version: Path, manifest: Manifest, profiles: Sequence[Profile], answer: Answer) -> tuple[GateResult, ...]:
    """The golden pairs through every profile, at its smallest and its largest batch. Raises GateRefusedError."""
    pairs = golden.read_golden(version / GOLDEN_NAME, manifest.inputs, manifest.outputs)
    gates = []
    for rows in sorted({size for profile in profiles for size in (profile.least, profile.most)}):
        batch = _batch(pairs, rows)
        inputs = {tensor.name: batch[tensor.name] for tensor in manifest.inputs}
        served = answer(inputs)
        name = f"tensorrt.golden.rows_{rows}"
        gates.append(parity.hold(name, inputs[manifest.inputs[0].name], batch[PROBABILITIES], served, manifest))
        golden.compare(batch, served, manifest.outputs, tolerance=manifest.tolerance, bundle_id=manifest.bundle_id())
    return tuple(gates)


def time_engine(version: Path, manifest: Manifest, profiles: Sequence[Profile], answer: Answer) -> tuple[Timing, ...]:
    """One call, copies to and from the GPU included, for each profile's best batch."""
    pairs = golden.read_golden(version / GOLDEN_NAME, manifest.inputs, manifest.outputs)

    def call(rows: int) -> Callable[[], object]:
        batch = _batch(pairs, rows)
        inputs = {tensor.name: batch[tensor.name] for tensor in manifest.inputs}
        return lambda: answer(inputs)

    taken = interleaved({str(each.best): call(each.best) for each in profiles}, TIMED)
    return tuple(timing(int(rows), times) for rows, times in taken.items())


def _batch(pairs: Arrays, rows: int) -> Arrays:
    """`rows` golden rows, from the first on and around."""
    return {name: np.ascontiguousarray(array[np.resize(np.arange(len(array)), rows)]) for name, array in pairs.items()}


def plans_of(version: Path) -> list[Path]:
    """The folders of a version's plans."""
    folder = version / PLANS
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def check_here(path: Path, manifest: Manifest) -> str:
    """What can be said of a whole plan on this machine. Raises ForeignPlanError when it is for another one."""
    try:
        target = detect()
    except ComponentError as error:
        return f"whole; not compared with this machine: {error}"
    if manifest.export is None:
        raise ArtifactError("expected a published version, was a bundle", field="export")
    read_plan(path, target, manifest.export.onnx_sha256)
    return "for this machine"
