"""Paths that hold many symbols, told apart: files of one symbol, venue and format are a group, and become one source.

A file that cannot be told is a group of its own that carries the reason, so that one broken file costs one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from market.readers.opening import Found, check_regular, listed, open_found, sniff
from market.readers.source import Source, safe_name
from tickserve.errors import TickserveError, UsageError


@dataclass(frozen=True)
class Group:
    """One symbol's files under a `name` that no other group has; `error` says why they cannot be read."""

    name: str
    found: tuple[Found, ...]
    ignored_files: int = 0
    error: TickserveError | None = None

    def open(self, levels: int) -> Source:
        """The source, as `open_source` gives it for this symbol. Raises DataError and UsageError."""
        if self.error is not None:
            raise self.error
        return open_found(self.found, levels, self.ignored_files)


def group_sources(paths: Sequence[Path]) -> list[Group]:
    """Every group in `paths` (files, folders, or both), by name; what cannot be read is among them.

    A symbol is named as it is; where venues share one it is `venue-symbol`, where formats do too, with the format.
    Raises UsageError for no path or one that is not there, EmptyDataError for a folder without market data.
    """
    if not paths:
        raise UsageError("no data", field="--data", expected="at least one file or folder", was="none")
    files, ignored = listed(paths)
    told: dict[tuple[str, str, str], list[Found]] = {}
    broken: dict[Path, TickserveError] = {}
    for file in files:
        try:
            check_regular(file)
            found = sniff(file)
        except TickserveError as error:
            broken[file] = error
        else:
            told.setdefault(found.group, []).append(found)
    groups = [Group(name, tuple(told[key]), ignored) for key, name in _names(list(told)).items()]
    return sorted(groups + list(_broken(broken, {group.name for group in groups})), key=lambda group: group.name)


def _names(keys: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], str]:
    """A name for each (symbol, venue, format): the shortest that none shares."""
    forms: tuple[Callable[[tuple[str, str, str]], str], ...] = (
        lambda key: key[0],
        lambda key: f"{key[1]}-{key[0]}",
        lambda key: f"{key[1]}-{key[0]}-{key[2]}",
    )
    named = {}
    for key in keys:
        names = (form(key) for form in forms if [form(other) for other in keys].count(form(key)) == 1)
        named[key] = next(names, "-".join(key))
    return named


def _broken(errors: dict[Path, TickserveError], taken: set[str]) -> Iterator[Group]:
    """A group for each file that cannot be told, named by its file."""
    for path, error in errors.items():
        base = safe_name(path.name.split(".")[0])
        name = next(name for name in (base, *(f"{base}-{n}" for n in range(2, len(errors) + 3))) if name not in taken)
        taken.add(name)
        yield Group(name, (), error=error)
