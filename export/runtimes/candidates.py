"""What can run a model on this machine, and what cannot, with the reason. Letters: N rows.

ONNX Runtime's variants are what the one config.pbtxt can ask for: threads, level of graph optimisation, CPU or GPU.
Anything else (treelite, XGBoost, buffers bound ahead) is measured beside them and never chosen: it would be served by
another backend or another artefact. Smaller precisions are models of their own, each with a table of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnxruntime as ort

from export import runtime
from export.onnx_graph import BUNDLE_ID, PROBABILITIES, SCORE
from export.packed import feed
from export.parity import Rows, Served, score_of
from export.research import Research
from tickserve.errors import TickserveError
from tickserve.manifest import TREES, Manifest
from tickserve.model_config import GRAPH_LEVELS

CPU = "CPUExecutionProvider"
GPUS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
THREADS = (1, 2, 4, 8)
ALL_OPTIMISATIONS = 0
LEVEL_WORDS = {0: "all", 1: "extended", -1: "basic", 2: "none"}


@dataclass(frozen=True)
class Contestant:
    """Something that runs the model here. `answer` gives its outputs; `prepare` a call on given rows, to be timed.

    A `sibling` is another model, in another precision: its numbers are its own and are not judged here.
    """

    name: str
    answer: Callable[[Rows], Served]
    prepare: Callable[[Rows], Callable[[], object]]
    served: bool = False
    gpu: bool = False
    threads: int | None = None
    graph_level: int | None = None
    sibling: bool = False


@dataclass(frozen=True)
class Absent:
    """What does not run here, and why."""

    name: str
    reason: str
    served: bool = False
    gpu: bool = False


Found = Contestant | Absent


def cpu_name(threads: int, level: int = ALL_OPTIMISATIONS) -> str:
    """What the table calls ONNX Runtime on the CPU with these options."""
    words = f"onnxruntime cpu, {threads} thread{'s' if threads > 1 else ''}"
    return words if level == ALL_OPTIMISATIONS else f"{words}, optimisation {LEVEL_WORDS[level]}"


def gpu_name(word: str) -> str:
    """What the table calls ONNX Runtime on the GPU."""
    return f"onnxruntime {word}"


def gpu_of(name: str) -> str:
    """The key of GPUS that a candidate's name stands for; empty for the CPU."""
    return next((word for word in GPUS if name == gpu_name(word)), "")


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def find(graph: bytes, manifest: Manifest, research: Research | None, *, threads: int, instances: int) -> list[Found]:
    """Every candidate, the default (`threads` of them, all optimisations) first.

    `research` is the bundle's model; without it (a published version has the graph alone) trees have no other engine.
    """
    return list(_found(graph, manifest, research, threads, instances))


def _found(
    graph: bytes, manifest: Manifest, research: Research | None, threads: int, instances: int
) -> Iterator[Found]:
    yield _cpu(graph, manifest, threads, ALL_OPTIMISATIONS)
    for count in THREADS:
        if count != threads and count * instances <= cores():
            yield _cpu(graph, manifest, count, ALL_OPTIMISATIONS)
    for level in GRAPH_LEVELS:
        if level != ALL_OPTIMISATIONS:
            yield _cpu(graph, manifest, threads, level)
    yield _bound(graph, manifest, threads)
    for word, provider in GPUS.items():
        yield _gpu(graph, manifest, word, provider)
    if manifest.family in TREES:
        yield from _forest(manifest, research)


def _cpu(graph: bytes, manifest: Manifest, threads: int, level: int) -> Found:
    name = cpu_name(threads, level)
    try:
        session = runtime.open_session(graph, threads=threads, graph_level=level)
    except TickserveError as error:
        return Absent(name, str(error)[:200], served=True)
    return session_contestant(name, session, manifest, served=True, threads=threads, graph_level=level)


def _gpu(graph: bytes, manifest: Manifest, word: str, provider: str) -> Found:
    name = gpu_name(word)
    if provider not in ort.get_available_providers():
        reason = f"this build of ONNX Runtime ({ort.__version__}) has no {provider}"
        return Absent(name, reason, served=True, gpu=True)
    try:
        session = runtime.open_session(graph, providers=[provider, CPU])
    except TickserveError as error:
        return Absent(name, str(error)[:200], served=True, gpu=True)
    if session.get_providers()[0] != provider:
        return Absent(name, f"{provider} did not start: no usable GPU", served=True, gpu=True)
    return session_contestant(name, session, manifest, served=True, gpu=True, threads=1, graph_level=ALL_OPTIMISATIONS)


def session_contestant(name: str, session: Any, manifest: Manifest, **options: Any) -> Contestant:
    """A session of ONNX Runtime as a contestant; `options` are its other fields."""

    def prepare(rows: Rows) -> Callable[[], object]:
        inputs = feed(rows, manifest)
        return lambda: session.run(None, inputs)

    return Contestant(name, lambda rows: runtime.run(session, feed(rows, manifest)), prepare, **options)


def _bound(graph: bytes, manifest: Manifest, threads: int) -> Found:
    """The call overhead without the arrays: inputs and outputs are bound once, and the buffers are used again."""
    name = f"{cpu_name(threads)}, io_binding"
    try:
        session = runtime.open_session(graph, threads=threads)
    except TickserveError as error:
        return Absent(name, str(error)[:200])

    def bind(rows: Rows) -> Any:
        binding = session.io_binding()
        for key, array in feed(rows, manifest).items():
            binding.bind_cpu_input(key, np.ascontiguousarray(array))
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        return binding

    def prepare(rows: Rows) -> Callable[[], object]:
        binding = bind(rows)
        return lambda: session.run_with_iobinding(binding)

    def answer(rows: Rows) -> Served:
        binding = bind(rows)
        session.run_with_iobinding(binding)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    return Contestant(name, answer, prepare, threads=threads, graph_level=ALL_OPTIMISATIONS)


def _forest(manifest: Manifest, research: Research | None) -> Iterator[Found]:
    engines = {
        "treelite GTIL, 1 thread": research.second if research else None,
        "xgboost inplace_predict, 1 thread": research.inplace if research else None,
    }
    for name, engine in engines.items():
        if engine is None:
            yield Absent(name, "a published version holds the graph, not the trees: measured at export")
            continue
        try:
            yield _plain(name, engine(), manifest)
        except TickserveError as error:
            yield Absent(name, str(error)[:200])
    if find_spec("tl2cgen") is None:
        yield Absent("treelite compiled (tl2cgen)", "'tl2cgen' is not installed; treelite itself compiles no more")
    else:
        yield Absent("treelite compiled (tl2cgen)", "compiled code is not served by this project")
    yield Absent("Triton FIL backend", "runs trees on a GPU server; not part of the embedded server", gpu=True)


def _plain(name: str, predict: Callable[[Rows], Rows], manifest: Manifest) -> Contestant:
    """An engine that gives probabilities alone; what follows from them is added, so that one gate judges all."""

    def answer(rows: Rows) -> Served:
        probabilities = predict(rows)
        ids = np.full((len(rows), 1), manifest.bundle_id(), np.int64)
        return {PROBABILITIES: probabilities, SCORE: score_of(probabilities), BUNDLE_ID: ids}

    return Contestant(name, answer, lambda rows: lambda: predict(rows), threads=1)
