"""A trading engine in one loop: market events in, decisions out, everything in the journal.

    tickserve serve &                                            # after `make demo DATA=recording`
    python examples/plain_loop.py --data recording --model btcusdt-l5-gbdt

The feed is a recording, read as fast as it goes; a live engine feeds the same `Stream` from its own connection. Its
rule is the simplest there is: long while the model says up, short while it says down, flat without a signal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from market.readers import open_source
from tickserve import Client
from tickserve.errors import RequestError, TickserveError
from tickserve.journal import Journal
from tickserve.signal import Signal
from tickserve.stream import Stream

POSITION = {"down": -1, "flat": 0, "up": 1}


def events_of(data: Path, levels: int) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Time (nanoseconds) and row (float64 [C]) of every event of a recording."""
    for chunk in open_source([data], levels=levels).chunks(65_536):
        yield from zip(chunk.ts_ns.tolist(), chunk.values, strict=True)


class Engine:
    """What it holds, and what it does about a signal."""

    def __init__(self, journal: Journal) -> None:
        self.position, self.trades, self.signals, self.failures = 0.0, 0, 0, 0
        self._journal = journal

    def on_signal(self, signal: Signal, ts_ns: int) -> None:
        """Take the position the model asks for, less where drift asks for less; no number, no position."""
        self.signals += 1
        wanted = POSITION[signal.decision[0]] * signal.size_factor if signal.ok and signal.decision is not None else 0
        change = wanted - self.position
        if change:
            self.trades += 1
            action = f"{'buy' if change > 0 else 'sell'} {abs(change):g}"
            self._journal.action(signal.request_id, action, position=f"{wanted:g}", event_ns=ts_ns)
            score = "none" if signal.score is None else f"{signal.score[0]:+.4f}"
            print(f"{ts_ns} {signal.status} score {score} -> {action}")
        self.position = wanted

    def on_failure(self, error: RequestError) -> None:
        """The call failed inside its deadline; it is in the journal already."""
        self.failures += 1
        self.position = 0.0
        print(f"no signal: {error}", file=sys.stderr)


def run(chosen: argparse.Namespace) -> Engine:
    """Feed the recording to its end, or until `--signals` were had."""
    with (
        Journal(chosen.journal, label="plain_loop") as journal,
        Client(chosen.url, manifest=chosen.repository, observer=journal) as client,
    ):
        stream, engine = Stream(client, chosen.model, deadline_ms=chosen.deadline_ms), Engine(journal)
        for ts_ns, row in events_of(chosen.data, stream.definition.spec.levels):
            try:
                signal = stream.feed(ts_ns, row).signal
            except RequestError as error:
                engine.on_failure(error)
                continue
            if signal is not None:
                engine.on_signal(signal, ts_ns)
            if engine.signals == chosen.signals:
                break
    return engine


def main(arguments: Sequence[str]) -> None:
    """Read the options, run, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a recording")
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", default="127.0.0.1:8000")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="what the engine pins")
    parser.add_argument("--journal", type=Path, default=Path("journal"))
    parser.add_argument("--deadline-ms", type=float, default=50.0)
    parser.add_argument("--signals", type=int, default=0, help="end after so many; 0: at the end of the recording")
    chosen = parser.parse_args(arguments)
    engine = run(chosen)
    print(f"{engine.signals} signals, {engine.trades} trades, {engine.failures} failures; journal: {chosen.journal}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TickserveError as error:
        sys.exit(f"error: {error}")
