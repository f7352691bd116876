"""An LSTM stepped once a row, its state carried by the caller, against the same LSTM replaying its whole window.

    python -m benchmarks.stepped_lstm [--shapes a b c] [--seconds 5] [--json]

The shapes are those of models/latency_shapes.py, with random weights: what is timed is arithmetic, not forecasts. Both
graphs are the ones export writes. ONNX Runtime, one thread, one row a call on buffers that are bound once, the two in
turns within one run, 20 calls each at least. Before timing, stepping through the window from zeros has to give the
windowed answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import cycle
from typing import Any

import numpy as np

from benchmarks.harness import Call, machine, quantiles
from export.onnx_graph import PROBABILITIES, net_to_onnx, stepped_to_onnx
from export.runtime import Arrays, open_session, run
from export.runtimes.measure import Effort, interleaved
from models.latency_shapes import SHAPES, UNTRAINED, LatencyShape
from models.stepped import CELL, HIDDEN, OUT, SteppedLstm, tensors
from tickserve.client._local import _runner
from tickserve.manifest import StateTensor, TensorSpec

WINDOWED, STEPPED = "window replayed", "stepped"
MIN_CALLS, MAX_CALLS = 20, 20_000
BAR = 10.0
# Both sum the same products, over up to 100 steps and 4 layers, in other orders.
TOLERANCE = 1e-5


def sessions(shape: LatencyShape) -> tuple[Any, Any]:
    """The windowed and the stepped graph of one net, loaded with one thread."""
    net = shape.net()
    window = TensorSpec(name="window", dtype="FP32", shape=(shape.window, shape.features))
    stepped = SteppedLstm(net).eval()
    state = [StateTensor.model_validate(tensor) for tensor in tensors(stepped)]
    graphs = net_to_onnx(net, window), stepped_to_onnx(stepped, shape.features, state)
    first, second = (open_session(graph.SerializeToString(), threads=1) for graph in graphs)
    return first, second


def step_inputs(shape: LatencyShape, row: Any, said: Arrays | None = None) -> Arrays:
    """A row [F] with the state that the step before answered, or zeros."""
    zeros = np.zeros((1, shape.layers, shape.hidden), np.float32)
    hidden, cell = (zeros, zeros) if said is None else (said[HIDDEN + OUT], said[CELL + OUT])
    return {"features": row[None], HIDDEN: hidden, CELL: cell}


def calls_of(shape: LatencyShape) -> dict[str, Call]:
    """Both contestants on the same window; raises SystemExit when their answers differ."""
    windowed, stepped = sessions(shape)
    rows = np.random.default_rng(7).normal(size=(shape.window, shape.features)).astype(np.float32)
    window = {"window": rows[None]}
    said = None
    for row in rows:
        before = step_inputs(shape, row, said)
        said = run(stepped, before)
    apart = float(np.abs(said[PROBABILITIES] - run(windowed, window)[PROBABILITIES]).max()) if said else 1.0
    if not apart <= TOLERANCE:
        raise SystemExit(f"error: shape {shape.name}: stepping gives another answer than the window, {apart:.1e} apart")
    return {WINDOWED: bound(windowed, window), STEPPED: bound(stepped, before)}


def bound(session: Any, inputs: Arrays) -> Call:
    """A call on buffers that are bound once, as the client scores in process; a state comes in where it went out.

    Two sets of buffers take turns: what one call answers as the next state, the other reads.
    """
    from onnxruntime import OrtValue

    outputs = run(session, inputs)
    states = {name.removesuffix(OUT): name for name in outputs if name.endswith(OUT)}
    given = {name: OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    taken = {name: OrtValue.ortvalue_from_numpy(array) for name, array in outputs.items()}
    turns = []
    for swapped in (False, True):
        binding = session.io_binding()
        for name, value in given.items():
            binding.bind_ortvalue_input(name, taken[states[name]] if swapped and name in states else value)
        for name, value in taken.items():
            stateful = swapped and name.endswith(OUT)
            binding.bind_ortvalue_output(name, given[name.removesuffix(OUT)] if stateful else value)
        turns.append(binding)
    following = cycle([_runner(session, binding) for binding in turns])

    def call() -> object:
        return next(following)(), given, taken  # a binding does not keep the arrays that its values share

    return call


def measured(shape: LatencyShape, seconds: float) -> dict[str, Any]:
    """Quantiles of both in microseconds, and how many times cheaper a step is at p50."""
    taken = interleaved(calls_of(shape), Effort(seconds, MIN_CALLS, MAX_CALLS))
    times = {name: quantiles(each / 1e3) | {"calls": len(each)} for name, each in taken.items()}
    ratio = times[WINDOWED]["p50_us"] / times[STEPPED]["p50_us"]
    return {"status": UNTRAINED, "times": times, "ratio": ratio}


def show(shape: LatencyShape, result: dict[str, Any]) -> None:
    size = f"{shape.window} x {shape.features}, {shape.layers} x {shape.hidden}"
    print(f"\nLSTM {shape.name.upper()} ({size}; {result['status']}): a step is {result['ratio']:.1f} times cheaper")
    for name, times in result["times"].items():
        cells = "".join(f"{times[key]:>14,.1f}" for key in ("p50_us", "p90_us", "p99_us"))
        print(f"  {name:<18}{cells}{times['calls']:>10}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each shape")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    results = {name: measured(SHAPES[name], chosen.seconds) for name in chosen.shapes}
    if chosen.json:
        print(json.dumps(results))
        return 0
    print(machine("onnxruntime", "torch"))
    print(f"{'microseconds a row':<20}{'p50':>14}{'p90':>14}{'p99':>14}{'calls':>10}")
    for name, result in results.items():
        show(SHAPES[name], result)
    lowest = min(result["ratio"] for result in results.values())
    print(f"\nlowest ratio {lowest:.1f}, bar {BAR:g}: {'reached' if lowest >= BAR else 'not reached'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
