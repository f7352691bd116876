"""The stream: market events in, signals out, one event at a time.

What the model gets is what training took: the same engine, sessions, warm-up and pace, and for a stateful model the
state its own last answer left. Letters: C columns of an event, F features.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tickserve.client._arguments import MAX_INT64, positive_ms, shown
from tickserve.client._async import AsyncClient
from tickserve.client._client import Client
from tickserve.errors import ArtifactError, DeadlineExceededError, InputRejectedError, UsageError
from tickserve.events import PRICES
from tickserve.features.jit import source_fingerprint
from tickserve.features.spec import FeatureSpec
from tickserve.manifest import Manifest
from tickserve.signal import Signal
from tickserve.stream._definition import Definition, define, history_ns
from tickserve.stream._inputs import Inputs, feeder
from tickserve.stream._rows import RowMaker, Singles
from tickserve.stream._snapshot import pack, unpack

STATE_RESET = "state_reset"
# The features look back further in time than the session is old; training saw next to no such rows.
SHORT_HISTORY = "short_history"
# The event has no price to compute with: every feature that needs one goes on from the last event that had.
NO_PRICE = "no_price"
FEATURES = "features"  # the stage of an observer that counts them
NOTHING_YET = "nothing was scored yet"
NS_PER_S = 1_000_000_000


class Step(NamedTuple):
    """What one event led to: a signal, or the reason why there is none.

    `features` float32 [F] are the event's, whether it was scored or not, for an engine that wants them.
    """

    signal: Signal | None
    reason: str
    features: Singles | None = None


class _Scorer(Protocol):
    @property
    def manifests(self) -> dict[str, Manifest]: ...
    @property
    def observe_stage(self) -> Callable[[str, str, float], None] | None: ...


class _Core:
    """All of a stream but its calls."""

    def __init__(
        self,
        client: _Scorer,
        model: str,
        *,
        spec: FeatureSpec | None = None,
        stride: int | None = None,
        deadline_ms: float = 100,
        max_ahead_s: float | None = 60,
    ) -> None:
        manifest = client.manifests.get(model)
        if manifest is None:
            known = ", ".join(sorted(client.manifests)[:8]) or "none"
            raise UsageError("no manifest is pinned for this model", field="model", expected=known, was=shown(model))
        self.model = model
        self.definition: Definition = define(manifest, spec, stride)
        self._deadline_ms = positive_ms("deadline_ms", deadline_ms, UsageError)
        self._ahead_ns = None if max_ahead_s is None else int(max_ahead_s * NS_PER_S)
        self._digest, self._kernels = self.definition.spec.digest, f"{source_fingerprint():016x}"
        self._rows, self._feeder = RowMaker(self.definition), feeder(self.definition)
        self._last_ns, self._sequence, self._session = 0, -1, -1
        self._observe_stage = client.observe_stage
        self._history_ns, self._opened_ns = history_ns(self.definition.spec), 0
        self._prices, self._priced = PRICES[self.definition.spec.kind], True

    def reset(self) -> None:
        """Start anew: the next event opens a session, and a numbered feed may begin at any number."""
        self._rows.restart()
        self._sequence = -1

    def snapshot(self) -> bytes:
        """Everything the next signal depends on; another process goes on from it, bit for bit."""
        arrays = {f"rows.{name}": array for name, array in self._rows.state().items()}
        arrays |= {f"inputs.{name}": array for name, array in self._feeder.state().items()}
        facts = {"last_ns": self._last_ns, "sequence": self._sequence, "session": self._session}
        facts["opened_ns"] = self._opened_ns
        return pack(facts | self._identity(), arrays)

    def restore(self, data: bytes) -> None:
        """Go on where `snapshot` was taken. Nothing has changed when this raises.

        Raises DigestMismatchError for changed bytes, ArtifactError for a snapshot of another model's stream or of a
        build that computes features otherwise: then the stream has to start anew.
        """
        facts, arrays = unpack(data)
        for name, expected in self._identity().items():
            if facts.get(name) != expected:
                raise ArtifactError(
                    "a snapshot of another stream", field=name, expected=str(expected), was=shown(facts.get(name), 100)
                )
        rows, inputs = RowMaker(self.definition), feeder(self.definition)
        try:
            rows.restore({name[5:]: array for name, array in arrays.items() if name.startswith("rows.")})
            inputs.restore({name[7:]: array for name, array in arrays.items() if name.startswith("inputs.")})
            numbers = [int(facts[name]) for name in ("last_ns", "sequence", "session")]
            opened_ns = int(facts.get("opened_ns", 0))  # not in snapshots of before the flag
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError("not a snapshot of this stream", field="snapshot", hint=str(error)[:100]) from error
        self._rows, self._feeder = rows, inputs
        self._last_ns, self._sequence, self._session = numbers
        self._opened_ns = opened_ns

    def _identity(self) -> dict[str, Any]:
        definition = self.definition
        return {
            "model": self.model,
            "features": self._digest,
            # The state's layout, and what the kernels make of it.
            "kernels": self._kernels,
            "stride": definition.stride,
            "jump_factor": definition.jump_factor,
            "window": definition.window,
            "state": [[tensor.input, list(tensor.shape)] for tensor in definition.state],
        }

    def _take(self, ts_ns: int, row: npt.NDArray[np.float64], sequence: int | None) -> Step:
        """Advance by one event. Raises InputRejectedError and SchemaError for one that is refused: nothing moves."""
        now = self._checked_time(ts_ns)
        number = self._checked_sequence(sequence)
        if number >= 0 and self._sequence >= 0 and number != self._sequence + 1:
            self._rows.restart()
        watch = self._observe_stage
        started = 0 if watch is None else time.perf_counter_ns()
        made = self._rows.step(now, row)
        if watch is not None:
            watch(self.model, FEATURES, (time.perf_counter_ns() - started) / NS_PER_S)
        self._last_ns, self._sequence = now, number
        self._priced = all(0.0 < row[column] < math.inf for column in self._prices)
        if made.place == 0:
            self._opened_ns = now
        if not made.kept:
            return Step(None, self._why(made.place), made.features)
        opens, self._session = made.session != self._session, made.session
        return Step(None, self._feeder.push(made.features, opens=opens), made.features)

    def _why(self, place: int) -> str:
        warmup = self.definition.spec.warmup_events
        if place < warmup:
            return f"warming up: {place + 1} of {warmup} events of the session"
        return f"between steps: {self._rows.until_kept} events to the next"

    def _checked_time(self, ts_ns: object) -> int:
        now = _whole(ts_ns)
        if now < 1:
            raise InputRejectedError("not a time", field="ts_ns", expected="nanoseconds since 1970", was=shown(ts_ns))
        if now < self._last_ns:
            raise InputRejectedError(
                "time runs backwards", field="ts_ns", expected=f"{self._last_ns} or later", was=str(now)
            )
        if self._ahead_ns is not None and now > (limit := time.time_ns() + self._ahead_ns):
            # One such event would make every honest one after it run backwards.
            raise InputRejectedError("in the future", field="ts_ns", expected=f"{limit} at most", was=str(now))
        return now

    def _checked_sequence(self, sequence: object) -> int:
        if sequence is None:
            return -1
        number = _whole(sequence)
        if number < 0:
            raise InputRejectedError(
                "not a number of a message", field="sequence", expected="0 or more", was=shown(sequence)
            )
        if number <= self._sequence:
            raise InputRejectedError(
                "a message again, or late", field="sequence", expected=f"{self._sequence + 1}", was=str(number)
            )
        return number

    def _remaining_ms(self, started_ns: int) -> float:
        """What is left of the deadline, for the next call. Raises DeadlineExceededError."""
        remaining = self._deadline_ms - (time.monotonic_ns() - started_ns) / 1e6
        if remaining <= 0:
            raise DeadlineExceededError("the deadline passed while the stream caught up", model=self.model)
        return remaining

    def _end(self, step: Step, signal: Signal) -> Step:
        flags = [STATE_RESET] if signal.ok and self._feeder.take_reset() else []
        if signal.ok and self._last_ns - self._opened_ns < self._history_ns:
            flags.append(SHORT_HISTORY)
        if signal.ok and not self._priced:
            flags.append(NO_PRICE)
        return step._replace(signal=replace(signal, flags=(*signal.flags, *flags)) if flags else signal)


def _whole(value: object) -> int:
    """A whole number from 0 that fits 64 bits, -1 for anything else."""
    if not isinstance(value, bool):
        with suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]
            return number if 0 <= number <= MAX_INT64 else -1
    return -1


class Stream(_Core):
    """Events of one market to the signals of one model, over any `Client`.

    >>> stream = Stream(client, "btcusdt-l5-gbdt")                    # doctest: +SKIP
    >>> signal, reason, _ = stream.feed(ts_ns, row)                   # row: float64 [C]    # doctest: +SKIP

    - `spec`, `stride`: for manifests that do not hold them; a model of single rows may be fed at any `stride`.
    - `deadline_ms`: for one `feed`, however many steps a stateful model has to catch up with.
    - `max_ahead_s`: events later than this machine's clock by more are refused (None: none are).

    One stream belongs to one thread. Raises UsageError, ArtifactError, MissingExtraError.
    """

    def __init__(self, client: Client, model: str, **options: Any) -> None:
        super().__init__(client, model, **options)
        self._client = client

    def feed(self, ts_ns: int, row: npt.NDArray[np.float64], *, sequence: int | None = None) -> Step:
        """Take the next event and, where it makes an input of the model, its signal.

        `ts_ns` is when the event could first be known here, `row` float64 [C] with columns as
        `tickserve.events.columns_of`; nothing is cast. An event without a positive, finite best bid and ask (bars: open
        to close) is told by the flag `no_price`. `sequence` numbers the messages of a feed: after a gap everything
        starts anew, since features over lost events are not what the model was trained on.

        Raises what `Client.score` raises; a stateful model's row then waits for the next event or `poll`. An event
        that is itself refused (InputRejectedError, SchemaError) leaves the stream as it was.
        """
        step = self._take(ts_ns, row, sequence)
        return self._ask(step)

    def poll(self) -> Step:
        """Ask again without an event: for what is still unanswered, else for the last input once more.

        Where the client has an age limit, a feed that froze gives a `STALE` signal. Raises what `feed` raises.
        """
        if self._feeder.ask() is not None:
            return self._ask(Step(None, ""))
        inputs = self._feeder.repeat()
        if inputs is None:
            return Step(None, NOTHING_YET)
        return self._end(Step(None, ""), self._score(inputs, self._deadline_ms))

    def _ask(self, step: Step) -> Step:
        started_ns = time.monotonic_ns()
        signal: Signal | None = None
        while not step.reason and (inputs := self._feeder.ask()) is not None:
            signal = self._score(inputs, self._remaining_ms(started_ns))
            if not self._feeder.answered(signal):
                break
        return step if signal is None else self._end(step, signal)

    def _score(self, inputs: Inputs, deadline_ms: float) -> Signal:
        return self._client.score(
            self.model, inputs, deadline_ms=deadline_ms, newest_event_ns=self._last_ns, feature_digest=self._digest
        )


class AsyncStream(_Core):
    """`Stream` over an `AsyncClient`: `feed` and `poll` are awaited, one at a time."""

    def __init__(self, client: AsyncClient, model: str, **options: Any) -> None:
        super().__init__(client, model, **options)
        self._client = client

    async def feed(self, ts_ns: int, row: npt.NDArray[np.float64], *, sequence: int | None = None) -> Step:
        """As `Stream.feed`."""
        return await self._ask(self._take(ts_ns, row, sequence))

    async def poll(self) -> Step:
        """As `Stream.poll`."""
        if self._feeder.ask() is not None:
            return await self._ask(Step(None, ""))
        inputs = self._feeder.repeat()
        if inputs is None:
            return Step(None, NOTHING_YET)
        return self._end(Step(None, ""), await self._score(inputs, self._deadline_ms))

    async def _ask(self, step: Step) -> Step:
        started_ns = time.monotonic_ns()
        signal: Signal | None = None
        while not step.reason and (inputs := self._feeder.ask()) is not None:
            signal = await self._score(inputs, self._remaining_ms(started_ns))
            if not self._feeder.answered(signal):
                break
        return step if signal is None else self._end(step, signal)

    async def _score(self, inputs: Inputs, deadline_ms: float) -> Signal:
        return await self._client.score(
            self.model, inputs, deadline_ms=deadline_ms, newest_event_ns=self._last_ns, feature_digest=self._digest
        )
