"""Members of an ensemble scored at once by torch.vmap, against one after the other, in torch and as ONNX graphs.

    python -m benchmarks.vmap_members [--members 8] [--seconds 3] [--json]

MLPs of the default sizes over the default book's columns, with random weights (what is timed is arithmetic). Their mean
is the answer of both. One thread; all contestants in turns within one run; ratios above 1 say that vmap is faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from benchmarks.harness import Call, machine
from export.onnx_graph import net_to_onnx
from export.runtime import open_session
from export.runtimes.measure import Effort, interleaved
from models.mlp import MlpClassifier
from tickserve.config import MlpSettings
from tickserve.features.spec import default_spec
from tickserve.manifest import TensorSpec

BATCHES = (1, 32, 512)
MIN_CALLS, MAX_CALLS = 50, 5_000


class OneByOne(nn.Module):
    """The mean of the members' probabilities, each member called in turn."""

    def __init__(self, members: list[MlpClassifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[B, F]` to `[B, 3]`."""
        return torch.stack([member(rows) for member in self.members]).mean(dim=0)


class AtOnce(nn.Module):
    """The same, with the members' weights stacked and one call mapped over them."""

    def __init__(self, members: list[MlpClassifier]) -> None:
        super().__init__()
        self.state = stack_module_state(list(members))
        self.shape = [copy.deepcopy(members[0]).to("meta")]  # a list, so that it is no part of this module's state

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[B, F]` to `[B, 3]`."""

        def call(weights: Any, buffers: Any) -> Any:
            return functional_call(self.shape[0], (weights, buffers), (rows,))

        answer: torch.Tensor = torch.vmap(call)(*self.state).mean(dim=0)
        return answer


def members_of(count: int) -> list[MlpClassifier]:
    columns = default_spec("book", 5).columns
    torch.manual_seed(7)
    declared = MlpClassifier.declared(MlpSettings(), columns)
    return [MlpClassifier.from_architecture(declared).eval() for _ in range(count)]


def contestants(count: int, rows: torch.Tensor) -> tuple[dict[str, Call], str]:
    """The calls by name, and why vmap has no graph where it has none."""
    ensembles = {"one by one": OneByOne(members_of(count)).eval(), "vmap": AtOnce(members_of(count)).eval()}
    one, other = (ensemble(rows) for ensemble in ensembles.values())
    if not torch.allclose(one, other, atol=1e-6):
        raise SystemExit("error: the two ensembles differ")
    calls: dict[str, Call] = {f"torch, {name}": lambda each=each: each(rows) for name, each in ensembles.items()}  # type: ignore[misc]
    tensor, reason = TensorSpec(name="features", dtype="FP32", shape=tuple(rows.shape[1:])), ""
    for name, ensemble in ensembles.items():
        try:
            session = open_session(net_to_onnx(ensemble, tensor).SerializeToString(), threads=1)
        except Exception as error:  # the exporter raises a type of its own for each stage that fails
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            continue
        given = {"features": rows.numpy()}
        calls[f"onnxruntime, {name}"] = lambda session=session, given=given: session.run(None, given)  # type: ignore[misc]
    return calls, reason


def measured(count: int, batch: int, seconds: float) -> dict[str, Any]:
    rows = torch.from_numpy(
        np.random.default_rng(7).normal(size=(batch, len(default_spec("book", 5).columns))).astype(np.float32)
    )
    with torch.inference_mode():
        calls, reason = contestants(count, rows)
        taken = interleaved(calls, Effort(seconds, MIN_CALLS, MAX_CALLS))
    p50 = {name: float(np.median(each)) / 1e3 for name, each in taken.items()}
    pairs = {name.split(",")[0] for name in p50 if name.endswith("vmap")}
    return {
        "p50_us": p50,
        "ratio": {name: p50[f"{name}, one by one"] / p50[f"{name}, vmap"] for name in sorted(pairs)},
        "no_graph": reason,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each batch size")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {batch: measured(chosen.members, batch, chosen.seconds) for batch in BATCHES}
    if chosen.json:
        print(json.dumps(results))
        return 0
    print(machine("onnxruntime", "torch"))
    for batch, result in results.items():
        print(f"\n{chosen.members} MLPs, {batch} rows: p50 in microseconds")
        for name, value in result["p50_us"].items():
            print(f"  {name:<26}{value:>10.1f}")
        print(
            "  " + ", ".join(f"vmap is {ratio:.2f} times as fast in {name}" for name, ratio in result["ratio"].items())
        )
        if result["no_graph"]:
            print(f"  no graph of vmap: {result['no_graph']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
