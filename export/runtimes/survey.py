"""Every candidate for one model, judged and timed in one interleaved run: the record that goes into the manifest."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from export import runtime
from export.parity import Recorded, Served, first_difference
from export.research import Research
from export.runtimes.candidates import ALL_OPTIMISATIONS, CPU, GPUS, Contestant, Found, cores, cpu_name, find, gpu_of
from export.runtimes.choose import choose, one_thread_only
from export.runtimes.measure import AGAIN, EFFORTS, Effort, interleaved, picked, timing
from tickserve.config import ExportSettings
from tickserve.manifest import Manifest
from tickserve.runtimes import RuntimeCandidate, RuntimeRecord, Timing

DEFAULT_THREADS = 1
JUDGED_ROWS = 256
VERSIONS = ("onnxruntime", "treelite", "xgboost")


@dataclass(frozen=True)
class Options:
    """What the configuration asks of ONNX Runtime. `graph_level` is Triton's; `gpu` is cuda, tensorrt or empty."""

    threads: int = DEFAULT_THREADS
    graph_level: int = ALL_OPTIMISATIONS
    gpu: str = ""


def options_of(record: RuntimeRecord | None, settings: ExportSettings) -> Options:
    """What is in force: threads that the settings name, else what was measured, else one thread."""
    if record is None:
        return Options(settings.threads or DEFAULT_THREADS)
    return Options(settings.threads or record.threads, record.graph_level, gpu_of(record.chosen))


def open_chosen(graph: bytes, options: Options) -> Any:
    """The session that the gates judge: set up as the configuration will ask for it. Raises ArtifactError."""
    providers = [GPUS[options.gpu], CPU] if options.gpu else [CPU]
    return runtime.open_session(graph, threads=options.threads, graph_level=options.graph_level, providers=providers)


def batches_of(settings: ExportSettings) -> list[int]:
    """A lone row, each preferred batch, and the largest."""
    return sorted({1, *settings.preferred_batch_rows, settings.max_batch})


def survey(
    graph: bytes,
    manifest: Manifest,
    recorded: Recorded,
    research: Research | None,
    settings: ExportSettings,
    effort: Literal["quick", "full"],
    beside: Sequence[Contestant] = (),
) -> RuntimeRecord:
    """Judge and time every candidate on recorded rows, and choose. `graph` is a checked one.

    `beside` are timed in the same run and never chosen.
    """
    threads = settings.threads or DEFAULT_THREADS
    found = [*find(graph, manifest, research, threads=threads, instances=settings.instances), *beside]
    here = [each for each in found if isinstance(each, Contestant)]
    verdicts = {each.name: judge(each, recorded.head(JUDGED_ROWS), manifest) for each in here}
    runs = [each for each in here if not verdicts[each.name].startswith("cannot")]
    timings = time_all(runs, recorded, batches_of(settings), EFFORTS[effort])
    rows = [_row(each, verdicts, timings, manifest, settings) for each in found]
    default = cpu_name(threads)
    chosen, _ = choose(rows, default)
    if chosen == default:
        return _record(rows, default, effort)
    pair = [each for each in runs if each.name in (default, chosen)]
    again = time_all(pair, recorded, batches_of(settings), AGAIN[effort])
    return _record(_confirmed(rows, again, default), default, effort)


def _confirmed(
    rows: Sequence[RuntimeCandidate], again: Mapping[str, tuple[Timing, ...]], default: str
) -> list[RuntimeCandidate]:
    """The rows, with a reason against the winner where it does not win again."""
    pair = [each.model_copy(update={"timings": again[each.name]}) for each in rows if each.name in again]
    if choose(pair, default)[0] != default:
        return list(rows)
    noise = {"reason": "was faster once and not when it was timed again beside the default"}
    return [each.model_copy(update=noise) if each.name in again and each.name != default else each for each in rows]


def judge(contestant: Contestant, recorded: Recorded, manifest: Manifest) -> str:
    """Why its decisions are not research's on the recorded rows; empty where they are."""
    try:
        served: Served = contestant.answer(recorded.rows)
    except Exception as error:  # each engine raises types of its own
        return f"cannot score: {(str(error).splitlines() or [type(error).__name__])[0][:150]}"
    difference = first_difference(recorded.probabilities, served, manifest)
    if difference is None:
        return ""
    return f"another answer in {difference.field}: expected {difference.expected}, was {difference.was}"[:200]


def time_all(
    contestants: Sequence[Contestant], recorded: Recorded, batches: Sequence[int], effort: Effort
) -> dict[str, tuple[Timing, ...]]:
    """By contestant, one timing for each batch size; within a size they take turns."""
    timings: dict[str, list[Timing]] = {each.name: [] for each in contestants}
    for size in batches:
        rows = recorded.rows[picked(len(recorded.rows), size)]
        taken = interleaved({each.name: each.prepare(rows) for each in contestants}, effort)
        for name, times in taken.items():
            timings[name].append(timing(size, times))
    return {name: tuple(found) for name, found in timings.items()}


def _row(
    found: Found,
    verdicts: Mapping[str, str],
    timings: Mapping[str, tuple[Timing, ...]],
    manifest: Manifest,
    settings: ExportSettings,
) -> RuntimeCandidate:
    if not isinstance(found, Contestant):
        reason = f"not here: {found.reason}"
        return RuntimeCandidate(name=found.name, served=found.served, gpu=found.gpu, decisions="not run", reason=reason)
    if found.sibling:
        reason = "another artefact, with gates and a table of its own"
        timed = timings.get(found.name, ())
        return RuntimeCandidate(name=found.name, served=False, decisions="not run", reason=reason, timings=timed)
    wrong = verdicts[found.name]
    reason = wrong or _ruled_out(found, manifest, settings)
    return RuntimeCandidate(
        name=found.name,
        served=found.served,
        gpu=found.gpu,
        threads=found.threads,
        graph_level=found.graph_level,
        decisions="differ" if wrong else "same",
        reason=reason or None,
        timings=timings.get(found.name, ()),
    )


def _ruled_out(found: Contestant, manifest: Manifest, settings: ExportSettings) -> str:
    """What decides against a candidate whatever was measured; empty where there is nothing."""
    if found.gpu:
        accelerated = settings.tensorrt == "accelerator"
        return "" if accelerated == (gpu_of(found.name) == "tensorrt") else f"export.tensorrt is {settings.tensorrt!r}"
    if found.served and settings.threads and found.threads != settings.threads:
        return f"export.threads asks for {settings.threads}"
    if found.served and not settings.threads and one_thread_only(manifest.family, found.threads):
        return "trees are bit for bit research's on one thread only; export.threads may ask for more"
    return ""


def _record(
    rows: Sequence[RuntimeCandidate], default: str, effort: Literal["quick", "full"], because: str = ""
) -> RuntimeRecord:
    name, reason = choose(rows, default)
    chosen = next(each for each in rows if each.name == name)
    gpu_measured = any(each.gpu and each.timings for each in rows)
    return RuntimeRecord(
        effort=effort,
        chosen=name,
        threads=chosen.threads or DEFAULT_THREADS,
        graph_level=chosen.graph_level or ALL_OPTIMISATIONS,
        # Without a GPU here nothing is known of one: the GPU where there is one, else the CPU.
        kind="KIND_CPU" if gpu_measured and not chosen.gpu else "KIND_AUTO",
        reason=because + reason,
        machine=machine(),
        candidates=tuple(rows),
    )


def without(record: RuntimeRecord, settings: ExportSettings, reason: str) -> RuntimeRecord | None:
    """The choice without the one chosen, which a gate refused; None when that was the default."""
    default = cpu_name(settings.threads or DEFAULT_THREADS)
    if record.chosen == default:
        return None
    refused = {"decisions": "differ", "reason": f"refused by a gate: {reason}"[:200]}
    rows = [each.model_copy(update=refused) if each.name == record.chosen else each for each in record.candidates]
    return _record(rows, default, record.effort, f"{record.chosen!r} was refused by a gate; ")


def machine() -> str:
    """The processor, its cores and the libraries behind the numbers."""
    known = []
    for package in VERSIONS:
        try:
            known.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{_processor()}, {cores()} cores; {', '.join(known)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())[:80]
