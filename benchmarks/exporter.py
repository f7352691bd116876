"""What the metrics exporter costs a call: the same client with and without it, in turns, on one server.

    python -m benchmarks.exporter --repository model_repository

What is timed is the whole call as an engine sees it, in turns that pay for what the exporter puts off, while
something scrapes `/metrics` once a second (Prometheus does every 15). "risk actions" is a client that obeys an action
file. The bar is 2 % of the p50 over HTTP; in this process (local://), where a call takes a few microseconds, the cost
is told beside it.

Two equal clients may differ by more than that on a busy machine, so the two are compared round by round: each round
gives a ratio of their p50, and the bar is held against the interval of the median of these (95 %, by resampling). Exit
code 1 when all of the interval is above the bar.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import (
    PUBLISH_FIRST,
    Call,
    Times,
    as_command,
    hand_overs,
    joined,
    machine,
    options,
    quantiles,
    served,
    subject,
    sustained,
)
from tickserve.client import Client
from tickserve.journal import Journal
from tickserve.manifest import Manifest
from tickserve.metrics import MetricsExporter
from tickserve.risk import ModelAction, write_actions

OFF, ON, JOURNAL, BOTH, RISK = "nothing", "exporter", "journal", "journal and exporter", "risk actions"
BAR = 1.02
RESAMPLES = 2_000


@contextmanager
def scraped(url: str, every_s: float) -> Iterator[list[int]]:
    """Scrape from a thread while the block runs; yields the size of each answer."""
    sizes, ended = list[int](), threading.Event()

    def scrape() -> None:
        while not ended.wait(every_s):
            with urllib.request.urlopen(url, timeout=5) as answer:
                sizes.append(len(answer.read()))

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    yield sizes
    ended.set()
    thread.join()


def contestants(
    stack: ExitStack,
    url: str,
    manifest: Manifest,
    row: npt.NDArray[np.float32],
    exporter: MetricsExporter,
    folder: Path,
) -> dict[str, Call]:
    journal = stack.enter_context(Journal(folder / "journal"))
    actions = folder / "actions.json"
    write_actions(actions, time.time_ns(), {manifest.name: ModelAction()})
    given: dict[str, dict[str, Any]] = {
        OFF: {},
        ON: {"observer": exporter},
        JOURNAL: {"observer": journal},
        BOTH: {"observer": (journal, exporter)},
        RISK: {"risk_actions": actions},
    }

    def call_of(more: dict[str, Any]) -> Call:
        client = stack.enter_context(Client(url, manifest=manifest, deadline_ms=5_000, **more))
        return lambda: client.score(manifest.name, row).score

    return {name: call_of(more) for name, more in given.items()}


def rows_of(where: str, times: dict[str, Times]) -> list[dict[str, Any]]:
    """A row for each contestant: its quantiles, and those as ratios of the bare client's."""
    base = quantiles(times[OFF])
    made = []
    for name, taken in times.items():
        found = quantiles(taken)
        ratios = {f"{key}_ratio": found[f"{key}_us"] / base[f"{key}_us"] for key in ("p50", "p99")}
        made.append({"what": f"{where}, {name}", "calls": len(taken), **found, **ratios})
    return made


def interval(on: list[Times], off: list[Times]) -> tuple[float, float]:
    """Of the median ratio of their p50, round by round: the middle 95 % of resampled rounds."""
    ratios = np.array([np.median(one) / np.median(other) for one, other in zip(on, off, strict=True)])
    drawn = np.random.default_rng(7).choice(ratios, size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """What the interval says about the bar."""
    percent = f"{(BAR - 1) * 100:.0f} %"
    if low > BAR:
        return f"above {percent}"
    return f"within {percent}" if high <= BAR else "not resolved on this machine"


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    chosen_model = subject(chosen.repository, chosen.model)
    manifest, row = chosen_model.manifest, chosen_model.rows[:1]
    with ExitStack() as stack:
        server = stack.enter_context(served(chosen.repository, [manifest.name]))
        exporter = stack.enter_context(MetricsExporter(port=0))
        sizes = stack.enter_context(scraped(str(exporter.url), 1.0))
        rows, bounds = [], (0.0, 0.0)
        for where, url in (("http", server.http_url), ("local", f"local://{chosen.repository}")):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            calls = contestants(stack, url, manifest, row, exporter, folder)
            turns = sustained(calls, chosen.rounds, chosen.turn)
            rows += rows_of(where, joined(turns))
            if where == "http":
                bounds = interval(turns[ON], turns[OFF])
        alone, _ = hand_overs(server.http_url, manifest, row, exporter)
        lost = exporter.lost
    about = machine("prometheus_client")
    told = {"scrapes": len(sizes), "scrape_bytes": max(sizes, default=0), "lost": lost, "decided": quantiles(alone)}
    judged = {"bar": BAR, "low": bounds[0], "high": bounds[1], "verdict": verdict(*bounds)}
    about_model = {"machine": about, "model": manifest.name, "shape": list(row.shape)}
    return {**about_model, "rows": rows, "judged": judged, "exporter": told}


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}\nmodel {result['model']}, input {result['shape']}, concurrency 1\n")
    print(f"{'':<30}{'calls':>8}{'p50 us':>10}{'p99 us':>10}{'p99.9 us':>10}{'p50':>9}{'p99':>9}   bar")
    for row in result["rows"]:
        times = "".join(f"{row[f'{name}_us']:>10.1f}" for name in ("p50", "p99", "p99.9"))
        bar = f"   p50 <= {BAR:.2f}x" if row["what"] == f"http, {ON}" else ""
        print(f"{row['what']:<30}{row['calls']:>8}{times}{row['p50_ratio']:>8.3f}x{row['p99_ratio']:>8.3f}x{bar}")
    told, judged = result["exporter"], result["judged"]
    print(f"\np50 over HTTP with the exporter: {judged['low']:.3f}x to {judged['high']:.3f}x: {judged['verdict']}")
    print(f"decided() alone: p50 {told['decided']['p50_us']:.2f} us, p99 {told['decided']['p99_us']:.2f} us")
    print(f"{told['scrapes']} scrapes of up to {told['scrape_bytes']:,} bytes; {told['lost']} observations lost")


def main(arguments: list[str]) -> int:
    chosen = options(__doc__, rounds=10, turn_s=0.4).parse_args(arguments)
    result = run(chosen)
    if chosen.json:
        print(json.dumps(result))
    else:
        show(result)
    return 1 if result["judged"]["low"] > BAR else 0


if __name__ == "__main__":
    as_command(main, PUBLISH_FIRST)
