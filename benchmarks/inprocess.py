"""One lone call in this process: the client over `local://` beside a bare ONNX Runtime `run` of the same graph.

    python -m benchmarks.inprocess --repository model_repository

The two take turns in short blocks, so that a slow spell of the machine meets both. The client's call goes from the
array to checked numbers; the bare one hands ONNX Runtime the array and checks nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import as_inputs, machine, measure, one_row, options
from tickserve.client import Client, newest_versions
from tickserve.client._local import open_session
from tickserve.errors import TickserveError
from tickserve.model_config import MODEL_FILE

BARE, OURS = "bare ONNX Runtime", "tickserve local://"
BAR = 2.0  # the design's bar, as a ratio of the p50 of BARE


def compare(client: Client, model: str, folder: Path, rounds: int, block: int) -> dict[str, Any]:
    """p50 and p99 of both, in microseconds, for one row of `model`."""
    feed = one_row(folder, client.manifests[model])
    inputs = as_inputs(feed)
    session = open_session((folder / MODEL_FILE).read_bytes())
    times = measure({BARE: lambda: session.run(None, feed), OURS: lambda: client.score(model, inputs)}, rounds, block)
    figures = {name: [float(np.percentile(taken, q)) for q in (50, 99)] for name, taken in times.items()}
    return {
        "model": model,
        "calls": rounds * block,
        "bare_p50_us": figures[BARE][0],
        "bare_p99_us": figures[BARE][1],
        "p50_us": figures[OURS][0],
        "p99_us": figures[OURS][1],
        "p50_ratio": figures[OURS][0] / figures[BARE][0],
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'model':<32}{'bare p50 us':>13}{'local p50 us':>14}{'local p99 us':>14}{'p50 ratio':>11}   bar")
    for row in rows:
        print(
            f"{row['model']:<32}{row['bare_p50_us']:>13.1f}{row['p50_us']:>14.1f}{row['p99_us']:>14.1f}"
            f"{row['p50_ratio']:>10.2f}x   <= {BAR:.1f}x"
        )


def main(arguments: list[str]) -> int:
    parser = options(__doc__, rounds=40, model="every model of the repository")
    chosen = parser.parse_args(arguments)
    folders = newest_versions(chosen.repository)
    with Client(f"local://{chosen.repository}", deadline_ms=5_000) as client:
        models = [chosen.model] if chosen.model else list(folders)
        rows = [compare(client, model, folders[model], chosen.rounds, chosen.block) for model in models]
    if chosen.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return 0
    print(f"{machine()}\none row, one thread\n")
    show(rows)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TickserveError as error:
        sys.exit(f"error: {error} (publish a model first: make demo)")
