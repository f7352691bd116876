"""What _warm.py and _keep_warm.py do in threads, on an event loop: a task."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any
from weakref import ref

from tickserve.client._core import Core
from tickserve.client._keep_warm import Schedule
from tickserve.client._transport import InferRequest, InferResponse
from tickserve.client._warm import Place, Turn, Warmed, deadline_of, places
from tickserve.errors import RequestError


async def warm(core: Core, carrier: Any, model: str | None, deadline_ms: float) -> tuple[Warmed, ...]:
    """Warm `model`, or every pinned one, on all replicas at once. Raises as `_warm.warm` does."""
    models, deadline_ns = core.to_rehearse(model), deadline_of(deadline_ms)

    async def one(place: Place[Any]) -> list[Warmed]:
        return [await _warm_one(Turn(core, place.name, each, deadline_ns), place.transport) for each in models]

    found = await asyncio.gather(*(one(place) for place in places(carrier)))
    return tuple(warmed for each in found for warmed in each)


async def _warm_one(turn: Turn, transport: Any) -> Warmed:
    try:
        while (request := turn.next()) is not None:
            turn.answered(await transport.infer(request, turn.deadline_ns))
    except RequestError as error:
        return turn.ended(error)
    return turn.ended(None)


class AsyncKeeper(Schedule[Any]):
    """Keeps an `AsyncClient` warm, by a task of the event loop it is called in."""

    def __init__(self, core: Core, carrier: Any, keep_warm_ms: float) -> None:
        super().__init__(core, places(carrier), keep_warm_ms)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def called(self, model: str, now_ns: int) -> None:
        """The engine calls `model`."""
        super().called(model, now_ns)
        self.start()

    def start(self) -> None:
        """Begin in the running loop; nothing where it has begun there."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop and not self._closed:
            self._loop, self._task = loop, loop.create_task(_keep(ref(self)), name="tickserve-keep-warm")

    def close(self) -> None:
        """Stop, and cancel the call that is under way. Idempotent."""
        self._closed = True
        if self._task is not None:
            with suppress(RuntimeError):  # its loop may be closed
                self._task.cancel()

    async def step(self) -> None:
        """Make a round if it is due."""
        if self.left_s():
            return
        model, began_ns = self.begin()
        if model is not None:
            for place in self.places:
                if self.wants(place, began_ns):
                    self.told(place, await self._ask(place, model))
        self.end(began_ns)

    async def _ask(self, place: Place[Any], model: str) -> bool:
        try:
            pinned, request, deadline_ns = self.prepare(model)
            self.core.rehearsed(pinned, request, await _sent(place.transport, request, deadline_ns))
        except Exception:  # whatever it is, the engine's own call will say so
            return False
        return True


async def _sent(transport: Any, request: InferRequest, deadline_ns: int) -> InferResponse:
    spare = getattr(transport, "spare", None)
    if spare is not None:
        await spare(deadline_ns)
    response: InferResponse = await transport.infer(request, deadline_ns)
    return response


async def _keep(keeper: ref[AsyncKeeper]) -> None:
    while (held := keeper()) is not None:
        await held.step()
        wait_s = held.left_s()
        del held
        await asyncio.sleep(wait_s)
