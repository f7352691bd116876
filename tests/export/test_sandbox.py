"""Hostile model files against the real process that checks them: it may die, this one says what happened."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export import sandbox, trees
from export.check_model import read_model
from export.sandbox import FOREST, Limits, inspect
from tickserve.errors import ArtifactError, ComponentError, UnsafeModelError

# What a stranger's file may add to this process, whatever it asks for.
MAX_GROWTH_KB = 300 * 1024


def graph_of(nodes: list[onnx.NodeProto], *constants: onnx.TensorProto, serial: int = 0) -> bytes:
    """`features` [batch, 4] to `out` [batch, ?] by `nodes`; another `serial` makes other bytes of the same graph."""
    drawn = helper.make_graph(
        nodes,
        f"hostile {serial}",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", None])],
        list(constants),
    )
    model: ModelProto = helper.make_model(drawn, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def unfolding() -> bytes:
    """A few bytes that become 64 GB when ONNX Runtime folds the constant."""
    filled = helper.make_node("ConstantOfShape", ["shape"], ["filled"])
    nodes = [filled, helper.make_node("ReduceSum", ["filled"], ["sum"], keepdims=0)]
    return graph_of([*nodes, helper.make_node("Add", ["features", "sum"], ["out"])], ints("shape", 2**17, 2**17))


def tiling() -> bytes:
    """A graph that is small until it scores: every row becomes 2^33 numbers."""
    return graph_of([helper.make_node("Tile", ["features", "repeats"], ["out"])], ints("repeats", 1, 2**31))


def burning(serial: int) -> bytes:
    """Minutes of matrix products that only depend on constants."""
    size, steps = 2_500, 400
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["m0"])]
    nodes += [helper.make_node("MatMul", [f"m{i}", "m0"], [f"m{i + 1}"]) for i in range(steps)]
    nodes += [helper.make_node("ReduceSum", [f"m{steps}"], ["sum"], keepdims=0)]
    return graph_of(
        [*nodes, helper.make_node("Add", ["features", "sum"], ["out"])], ints("shape", size, size), serial=serial
    )


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def many_nodes() -> bytes:
    """Twelve megabytes that parse to six million empty nodes."""
    return b"\x08\x09" + field(7, b"\x0a\x00" * 6_000_000) + field(8, b"\x10\x12")


def deep_graphs() -> bytes:
    """Graphs inside attributes of nodes of graphs, two thousand deep."""
    graph = b""
    for _ in range(2_000):
        graph = field(1, field(5, field(6, graph)))
    return b"\x08\x09" + field(7, graph) + field(8, b"\x10\x12")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process that checks outlives its check."""
    yield
    assert checkers() == []


def checkers() -> list[int]:
    """The children of this process that check models."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"inspection.main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("hostile", [unfolding, tiling, many_nodes, deep_graphs])
def test_a_file_that_unfolds_is_refused_and_costs_this_process_nothing(hostile: Callable[[], bytes]) -> None:
    data = hostile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnsafeModelError) as refused:
        read_model(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KB
    assert "/" not in str(refused.value)


def test_a_graph_that_burns_cpu_time_is_refused() -> None:
    with pytest.raises(UnsafeModelError, match="out of CPU time"):
        inspect(burning(1), limits=Limits(cpu_s=1))


def test_a_check_that_takes_too_long_on_the_clock_is_refused() -> None:
    with pytest.raises(UnsafeModelError, match=r"more than 0\.5 s"):
        inspect(burning(2), limits=Limits(wall_s=0.5))


def test_less_memory_than_a_check_needs_is_refused() -> None:
    big = graph_of([helper.make_node("Identity", ["features"], ["out"])], ints("shape", 7))
    inspect(big)
    assert inspect(big, limits=Limits(memory_bytes=1)) is None, "the same bytes are judged once"
    other = graph_of([helper.make_node("Identity", ["features"], ["out"])], ints("shape", 8))
    with pytest.raises((UnsafeModelError, ComponentError)):
        inspect(other, limits=Limits(memory_bytes=1))


def test_the_same_bytes_are_judged_once_and_refused_ones_again(monkeypatch: pytest.MonkeyPatch) -> None:
    good = graph_of([helper.make_node("Identity", ["features"], ["out"])], ints("shape", 9))
    bad = graph_of([helper.make_node("Identity", ["nowhere"], ["out"])])
    started = []
    real = subprocess.Popen

    def counted(*args: Any, **options: Any) -> Any:
        started.append(args)
        return real(*args, **options)

    monkeypatch.setattr(sandbox.subprocess, "Popen", counted)
    for _ in range(2):
        read_model(good)
    assert len(started) == 1
    for _ in range(2):
        with pytest.raises(UnsafeModelError, match="not a valid graph"):
            read_model(bad)
    assert len(started) == 3


@pytest.mark.parametrize(
    ("worker", "error", "message"),
    [
        ("os.kill(os.getpid(), 11)", UnsafeModelError, "died of it: SIGSEGV"),
        ("os.kill(os.getpid(), 9)", UnsafeModelError, "died of it: SIGKILL"),
        ("os._exit(3)", UnsafeModelError, "died of it: exit status 3"),
        ("print('no json', flush=True)", UnsafeModelError, "died of it"),
        ("print('[1]', flush=True)", UnsafeModelError, "gave no reason"),
        ("print('{\"ok\": 1}', flush=True)", UnsafeModelError, "gave no reason"),
        ("print('x' * 1_000_000, flush=True)", UnsafeModelError, "died of it"),
        ("time.sleep(60)", UnsafeModelError, "took more than 1 s"),
    ],
)
def test_whatever_the_checking_process_does_is_a_typed_error(
    worker: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "1_000_000" in worker:  # more than the pipe takes: it does not end by itself
        monkeypatch.setattr(sandbox, "ENDING_S", 0.5)
    monkeypatch.setattr(sandbox, "WORKER", f"import os, time; print('ready', flush=True); {worker}")
    with pytest.raises(error, match=message):
        inspect(b"a model of " + worker.encode(), limits=Limits(wall_s=1.0) if "sleep" in worker else Limits())


def test_a_checking_process_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WORKER", "raise SystemExit(1)")
    with pytest.raises(ComponentError, match="did not start"):
        inspect(b"a model that nobody saw")


def test_under_its_limits_a_process_writes_no_byte_and_gets_no_more_memory(tmp_path: Path) -> None:
    script = (
        "from export import inspection; inspection.limit(2 * 1024**3, 5)\n"
        "try:\n    bytearray(4 * 1024**3)\nexcept MemoryError:\n    print('no memory')\n"
        f"file = open({str(tmp_path / 'written')!r}, 'wb', buffering=0)\n"
        "try:\n    file.write(b'x')\nexcept OSError as error:\n    print('not written', error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.split("\n")[:2] == ["no memory", "not written 27"]
    assert (tmp_path / "written").stat().st_size == 0


def crashing_forests(forest: bytes) -> Iterator[bytes]:
    """Damaged boosters; XGBoost ends its process over some of them."""
    generator = np.random.default_rng(1)
    for share in (0.2, 0.9):
        yield forest[: int(len(forest) * share)]
    for _ in range(2):
        damaged = bytearray(forest)
        for place in generator.integers(3, len(forest), size=20):
            damaged[place] = int(generator.integers(256))
        yield bytes(damaged)


def test_damaged_forests_are_refused_or_still_checked_ones(booster: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.ubj"
    refused = 0
    for data in crashing_forests(bytes(booster.save_raw("ubj"))):
        path.write_bytes(data)
        try:
            trees.check_forest(trees.load_booster(path))
        except ArtifactError:
            refused += 1
    assert refused >= 2


def change_tree(booster: Any, name: str, change: Callable[[list[Any]], None]) -> Any:
    """The trees of a booster with one array of the first tree changed, as `trees_of` gives them."""
    changed = trees.trees_of(booster)
    change(changed[0][name])
    return changed


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("left_children", 0, 0, "no tree"),
        ("left_children", 0, 10_000, "no tree"),
        ("left_children", 1, 1, "no tree"),
        ("left_children", 0, -1, "one child"),
        ("right_children", 0, 1, "no tree"),
        ("split_indices", 0, 6, "below 6"),
        ("split_indices", 0, -1, "below 6"),
        ("split_conditions", 0, float("nan"), "NaN or infinite"),
        ("split_conditions", -1, float("inf"), "NaN or infinite"),
    ],
)
def test_a_forest_whose_nodes_are_no_tree_is_refused(
    name: str, place: int, value: float, message: str, booster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.check_forest(booster)
    forged = change_tree(booster, name, lambda values: values.__setitem__(place, value))
    monkeypatch.setattr(trees, "trees_of", lambda _: forged)
    with pytest.raises(UnsafeModelError, match=message):
        trees.check_forest(booster)


def test_a_forest_is_no_graph_and_the_reverse(booster: Any) -> None:
    with pytest.raises(ArtifactError):
        inspect(bytes(booster.save_raw("ubj")))
    with pytest.raises(ArtifactError):
        inspect(unfolding(), FOREST)


def test_a_terminal_that_interrupts_this_process_does_not_end_a_check() -> None:
    source = os.memfd_create("model")
    with sandbox._worker(source, FOREST, 0, Limits()) as worker:
        assert os.getpgid(worker.pid) != os.getpgrp()
    os.close(source)


CHECKING = """
import sys, time
from export import sandbox
with sandbox._worker(int(sys.argv[1]), sandbox.FOREST, 0, sandbox.LIMITS) as worker:
    assert sandbox._read(worker, len(sandbox.READY), time.monotonic() + 60) == sandbox.READY
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_a_check_does_not_outlive_the_process_that_asked_for_it(root: Path) -> None:
    never_written, held = os.pipe()
    command = [sys.executable, "-c", CHECKING, str(never_written)]
    with subprocess.Popen(command, cwd=root, pass_fds=[never_written], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        worker = psutil.Process(int(asking.stdout.readline()))
        asking.kill()
    _, alive = psutil.wait_procs([worker], timeout=5)
    os.close(never_written)
    os.close(held)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
