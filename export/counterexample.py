"""The smallest case that shows a refusal: fewest rows in the batch, fewest values changed in a row that passes.

Delta debugging (Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, IEEE TSE 28(2), 2002).
Letters: N rows, T steps of a window, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from export.onnx_graph import PROBABILITIES, SCORE
from export.parity import Difference, Recorded, Rows, Scorer, Served, drift, first_difference, refused
from tickserve.errors import GateRefusedError
from tickserve.manifest import Manifest

# Each is a call or two of the models: together a fraction of a second.
MAX_TRIALS = 400
BASES = 256
# More values than a person reads are left out of the report; what was changed is always in it.
MAX_VALUES = 512
SHOWN_CHANGES = 6


@dataclass(frozen=True)
class Candidate:
    """A graph (`score`) that is held against research (`predict`), with the real rows that both may score.

    `moved` is the rule for one row alone and in company: a Difference when it is broken.
    """

    score: Scorer
    predict: Callable[[Rows], Rows]
    recorded: Recorded
    manifest: Manifest
    moved: Callable[[Served, Served], Difference | None]

    def alone(self, row: Rows) -> Difference | None:
        """How the graph's answer for one row [1, ...] differs from research's."""
        return self._judged(lambda: first_difference(self.predict(row), self.score(row), self.manifest))

    def in_company(self, batch: Rows, place: int) -> Difference | None:
        """How the answer for `batch[place]` differs from research's, or from the same row's answer alone."""
        return self._judged(lambda: self._in_company(batch, place))

    def _in_company(self, batch: Rows, place: int) -> Difference | None:
        row = batch[place : place + 1]
        answer = {name: array[place : place + 1] for name, array in self.score(batch).items()}
        difference = first_difference(self.predict(row), answer, self.manifest)
        return difference or self.moved(self.score(row), answer)

    def _judged(self, judge: Callable[[], Difference | None]) -> Difference | None:
        """A batch that the graph does not score at all differs too."""
        try:
            return judge()
        except GateRefusedError as error:
            return Difference(0, "graph", "an answer", str(error))


@dataclass
class Trials:
    """Counts what minimising costs, and says when it has cost enough."""

    left: int = MAX_TRIALS
    used: int = field(default=0)

    def smallest(self, items: Sequence[int], fails: Callable[[list[int]], bool]) -> list[int]:
        """A subset of `items` that still fails and of which no single item can be left out (ddmin)."""
        kept, parts = list(items), 2
        while len(kept) >= 2:
            pieces = [piece.tolist() for piece in np.array_split(kept, parts)]
            reduced = self._reduced(kept, pieces, fails)
            if reduced is None:
                if parts >= len(kept):
                    break
                parts = min(len(kept), 2 * parts)
            else:
                kept, parts = reduced, 2 if reduced in pieces else max(2, parts - 1)
        return kept

    def _reduced(
        self, kept: list[int], pieces: list[list[int]], fails: Callable[[list[int]], bool]
    ) -> list[int] | None:
        complements = [[item for item in kept if item not in set(piece)] for piece in pieces] if len(pieces) > 2 else []
        for smaller in (*pieces, *complements):
            if self.left <= 0:
                return None
            self.left, self.used = self.left - 1, self.used + 1
            if fails(smaller):
                return smaller
        return None


@dataclass(frozen=True)
class Case:
    """A batch, the place of the row in it that goes wrong, and what kind of wrong that is.

    `changed` are the places (in the flattened row) where it differs from recorded row `base`, which is answered right.
    `minimal`: nothing can be left out; otherwise minimising stopped after `trials`.
    """

    kind: Literal["row", "every row", "recorded numbers", "batch size", "company", "not repeated"]
    batch: Rows
    place: int = 0
    base: int | None = None
    changed: tuple[int, ...] = ()
    trials: int = 0
    minimal: bool = True


def refusal(
    candidate: Candidate, gate: str, difference: Difference, batch: Rows, place: int, expected: Rows
) -> GateRefusedError:
    """The error of a gate that found `difference` at `batch[place]`; `expected` [1, 3] is what it was held against."""
    case = smallest_case(candidate, batch, place, expected)
    described = {"gate": gate, "field": difference.field} | _described(candidate, case, expected)
    return refused(gate, difference, _in_words(candidate, case, described), described)


def smallest_case(candidate: Candidate, batch: Rows, place: int, expected: Rows) -> Case:
    """Minimise `batch` around the row at `place`, which was seen to go wrong there."""
    row, trials = batch[place : place + 1], Trials()
    if candidate.alone(row) is not None:
        return _one_row(candidate, row, trials)
    if drift(PROBABILITIES, expected, candidate.predict(row), candidate.manifest.tolerance) is not None:
        return Case("recorded numbers", row)
    if candidate.in_company(batch, place) is None:
        return Case("not repeated", batch, place)
    return _fewest_rows(candidate, batch, place, trials)


def _one_row(candidate: Candidate, row: Rows, trials: Trials) -> Case:
    found = _passing(candidate, row)
    if found is None:
        return Case("every row", row)
    base = candidate.recorded.rows[found]

    def changed(places: Sequence[int]) -> Rows:
        spoiled: Rows = base.copy()
        spoiled.flat[list(places)] = row.flat[list(places)]
        return spoiled[np.newaxis]

    places = trials.smallest(
        np.flatnonzero(_other_bits(base, row[0])).tolist(), lambda some: candidate.alone(changed(some)) is not None
    )
    return Case("row", changed(places), 0, found, tuple(places), trials.used, trials.left > 0)


def _other_bits(one: Rows, other: Rows) -> Any:
    """Where two rows differ, flattened; a NaN equals itself."""
    return np.ascontiguousarray(one).view(np.uint32).ravel() != np.ascontiguousarray(other).view(np.uint32).ravel()


def _passing(candidate: Candidate, row: Rows) -> int | None:
    """The recorded row that is answered right and shares most values with `row`; None when there is none."""
    rows = candidate.recorded.rows[:BASES]
    distances = [int(_other_bits(base, row[0]).sum()) for base in rows]
    nearest = np.argsort(distances, kind="stable")
    return next((int(place) for place in nearest if candidate.alone(rows[place : place + 1]) is None), None)


def _fewest_rows(candidate: Candidate, batch: Rows, place: int, trials: Trials) -> Case:
    """The fewest neighbours with which the row goes wrong; copies of the row itself where they do as well."""

    def chosen(others: Sequence[int]) -> tuple[Rows, int]:
        places = sorted([*others, place])
        return batch[places], places.index(place)

    others = trials.smallest(
        [other for other in range(len(batch)) if other != place],
        lambda some: candidate.in_company(*chosen(some)) is not None,
    )
    small, at = chosen(others)
    copies = np.repeat(small[at : at + 1], len(small), axis=0)
    kind: Literal["batch size", "company"] = "batch size" if candidate.in_company(copies, at) else "company"
    return Case(kind, copies if kind == "batch size" else small, at, None, (), trials.used, trials.left > 0)


def _described(candidate: Candidate, case: Case, expected: Rows) -> dict[str, Any]:
    """The case as JSON values: numbers exactly, what is not finite as text."""
    row = case.batch[case.place : case.place + 1]
    research = expected if case.kind == "recorded numbers" else candidate.predict(row)
    described: dict[str, Any] = {
        "kind": case.kind,
        "batch": len(case.batch),
        "place": case.place,
        "base_row": case.base,
        "values": row.size,
        "changed": [_change(candidate, case, place) for place in case.changed],
        "row": _numbers(row),
        "company": None if case.kind != "company" else _numbers(np.delete(case.batch, case.place, axis=0)),
        "research": _numbers(research),
        "trials": case.trials,
        "minimal": case.minimal,
    }
    return described | {"graph": _answer(candidate, case), "graph_alone": _answer(candidate, Case("row", row))}


def _answer(candidate: Candidate, case: Case) -> Any:
    try:
        served = candidate.score(case.batch)
    except GateRefusedError as error:
        return str(error)
    return {name: _numbers(served[name][case.place]) for name in (PROBABILITIES, SCORE) if name in served}


def _numbers(values: Any) -> list[float | str] | None:
    flat = np.asarray(values).ravel()
    return None if flat.size > MAX_VALUES else [_number(value) for value in flat]


def _number(value: Any) -> float | str:
    return float(value) if np.isfinite(value) else str(value)


def _change(candidate: Candidate, case: Case, place: int) -> dict[str, Any]:
    """Which value: its column, its step in a window (the last is the newest), and what it was in the base row."""
    at = np.unravel_index(place, case.batch.shape[1:])
    base = candidate.recorded.rows[case.base or 0].ravel()[place]
    step = {"step": int(at[0])} if len(at) == 2 else {}
    columns = candidate.manifest.features.columns
    # Behind the features of a stateful model's row lies its state.
    column = columns[at[-1]] if at[-1] < len(columns) else f"state {int(at[-1]) - len(columns)}"
    named = {"column": column, **step}
    return named | {"base": _number(base), "value": _number(case.batch[0].ravel()[place])}


def _in_words(candidate: Candidate, case: Case, described: dict[str, Any]) -> str:
    if case.kind == "recorded numbers":
        return "the bundle's recorded numbers are not those of the model beside them, with which the graph agrees"
    if case.kind == "not repeated":
        return "none; the same batch was answered otherwise when asked again"
    graph = described["graph"]
    said = f"research {described['research']}, graph {graph[PROBABILITIES] if isinstance(graph, dict) else graph}"
    if case.kind == "every row":
        return f"1 row; no recorded row agrees either; {said}"
    if case.kind == "row":
        shown = ", ".join(_shown(change) for change in described["changed"][:SHOWN_CHANGES])
        more = ", ..." if len(case.changed) > SHOWN_CHANGES else ""
        counted = f"{len(case.changed)} of {described['values']} values changed in recorded row {case.base}"
        return f"1 row, {counted}: {shown}{more}; {said}"
    company = "copies of itself" if case.kind == "batch size" else "others"
    return f"place {case.place} in a batch of {len(case.batch)}, beside {company}; alone it agrees; {said}"


def _shown(change: dict[str, Any]) -> str:
    step = f"[{change['step']}]" if "step" in change else ""
    values = (
        value if isinstance(value, str) else str(np.float32(value)) for value in (change["base"], change["value"])
    )
    return f"{change['column']}{step} {' -> '.join(values)}"
