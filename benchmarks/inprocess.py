"""One lone call in this process: the client over `local://` beside a bare ONNX Runtime `run` of the same graph.

    python -m benchmarks.inprocess --repository model_repository

Without the journal and with it; back to back, and at an engine's pace (`--rate`). They take turns, so that a slow spell
of the machine meets all, each long enough to pay for what the journal puts off. The client's call goes from the
array to checked numbers; the bare one hands ONNX Runtime the array and checks nothing. Back to back a journaled call
also encodes what the journal's thread is given no time for.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import (
    PUBLISH_FIRST,
    Call,
    Times,
    as_command,
    as_inputs,
    joined,
    machine,
    one_row,
    options,
    sustained,
)
from tickserve.client import Client, newest_versions
from tickserve.client._local import open_session
from tickserve.journal import Journal
from tickserve.model_config import MODEL_FILE

BARE, OURS, JOURNALED = "bare ONNX Runtime", "tickserve local://", "journal on"
BAR = 2.0  # the design's bar, as a ratio of the p50 of BARE


def row_of(model: str, pace: str, times: dict[str, Times]) -> dict[str, Any]:
    """p50 and p99 of each contestant, in microseconds, and the ratios of the p50 to that of BARE."""
    found: dict[str, Any] = {"model": model, "pace": pace, "calls": len(times[BARE])}
    base = float(np.median(times[BARE]))
    for key, name in (("bare", BARE), ("local", OURS), ("journal", JOURNALED)):
        median, tail = (float(np.percentile(times[name], quantile)) for quantile in (50, 99))
        found |= {f"{key}_p50_us": median, f"{key}_p99_us": tail, f"{key}_p50_ratio": median / base}
    return found


def compare(
    clients: tuple[Client, Client], model: str, folder: Path, rounds: int, turn_s: float, rate: float
) -> list[dict[str, Any]]:
    """One row of `model` in each pace."""
    plain, journaled = clients
    feed = one_row(folder, plain.manifests[model])
    inputs = as_inputs(feed)
    session = open_session((folder / MODEL_FILE).read_bytes())
    calls: dict[str, Call] = {
        BARE: lambda: session.run(None, feed),
        OURS: lambda: plain.score(model, inputs),
        JOURNALED: lambda: journaled.score(model, inputs),
    }
    paces = {"back to back": None, f"{rate:g}/s": rate}
    return [row_of(model, name, joined(sustained(calls, rounds, turn_s, pace))) for name, pace in paces.items()]


def show(rows: list[dict[str, Any]]) -> None:
    heads = ("bare p50 us", "local p50 us", "ratio", "journal on", "ratio", "p99 us")
    print(f"{'model':<26}{'pace':<14}" + "".join(f"{head:>13}" for head in heads) + f"   bar <= {BAR:.1f}x")
    for row in rows:
        print(
            f"{row['model']:<26}{row['pace']:<14}{row['bare_p50_us']:>13.1f}{row['local_p50_us']:>13.1f}"
            f"{row['local_p50_ratio']:>12.2f}x{row['journal_p50_us']:>13.1f}{row['journal_p50_ratio']:>12.2f}x"
            f"{row['journal_p99_us']:>13.1f}"
        )


def main(arguments: list[str]) -> int:
    parser = options(__doc__, rounds=6, turn_s=0.4, model="every model of the repository")
    parser.add_argument("--rate", type=float, default=500, help="calls a second of the second pace")
    chosen = parser.parse_args(arguments)
    folders = newest_versions(chosen.repository)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "journal"))
        clients = [
            stack.enter_context(Client(f"local://{chosen.repository}", deadline_ms=5_000, observer=observer))
            for observer in (None, journal)
        ]
        rows = []
        for model in [chosen.model] if chosen.model else list(folders):
            rows += compare((clients[0], clients[1]), model, folders[model], chosen.rounds, chosen.turn, chosen.rate)
    if chosen.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return 0
    print(f"{machine()}\none row, one thread\n")
    show(rows)
    return 0


if __name__ == "__main__":
    as_command(main, PUBLISH_FIRST)
