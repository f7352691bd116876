"""Which job trains a family, and which data fit it: an order-book net has nothing to read in bars, and says so first.

    family        reads        book of 2+ levels   quotes (1 level)   bars
    gbdt, mlp     a row        yes                 yes                yes
    lstm, tcn     a window     yes                 yes                yes
    tlob          a window     yes                 yes                no
    deeplob       a window     yes                 no                 no

A family that only the profile enabled is left out with one line, since a profile is written for every kind of data; one
that was enabled by name is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast, get_args

from tickserve.config import Config
from tickserve.errors import ConfigError, UsageError
from tickserve.manifest import TREES, Family
from tickserve.settings import PROFILES
from training.examples import DataMeta, Examples
from training.job import Job

BOOKS_ONLY = frozenset({"deeplob", "tlob"})
SEVERAL_LEVELS = frozenset({"deeplob"})


class Misfit(NamedTuple):
    """What a family reads, and what the data are instead."""

    expected: str
    was: str


def misfit(family: str, meta: DataMeta) -> Misfit | None:
    """Why `family` cannot be trained on this data; None when it can."""
    if family in BOOKS_ONLY and meta.kind != "book":
        return Misfit("an order book", meta.kind)
    if family in SEVERAL_LEVELS and meta.levels < 2:
        return Misfit("a book of at least 2 levels", "a quote feed, which has 1")
    return None


def check_fit(family: str, meta: DataMeta) -> None:
    """Raise ConfigError when `family` cannot be trained on this data."""
    found = misfit(family, meta)
    if found is not None:
        hint = f"train {family} on other data, or another family on this"
        raise ConfigError("wrong kind of data", field=family, expected=found.expected, was=found.was, hint=hint)


def fitting(families: Sequence[str], meta: DataMeta, config: Config, say: Callable[[str], None]) -> tuple[str, ...]:
    """Those of `families` that fit the data; `say` is told of each that only the profile had asked for.

    Raises ConfigError for one that does not fit and was enabled by name, or when none is left.
    """
    kept = []
    for family in families:
        found = misfit(family, meta)
        if found is None:
            kept.append(family)
            continue
        if not PROFILES[config.profile].get(family, {}).get("enabled"):
            check_fit(family, meta)
        say(f"{family}: left out, it reads {found.expected} and this is {found.was}")
    if not kept:
        check_fit(families[0], meta)
    return tuple(kept)


def job_of(family: str, examples: Examples, config: Config) -> Job:
    """The family's job; another kind's library is never imported."""
    if family == "gbdt":
        from training.gbdt import GbdtJob

        return GbdtJob(examples, config.gbdt, config.seed)
    if family in set(get_args(Family)) - TREES:
        from training.nets import NetJob

        return NetJob(cast(Family, family), examples, getattr(config, family), config.seed, config.trainer)
    raise UsageError("unknown family", field="families", expected=", ".join(get_args(Family)), was=family[:40])
