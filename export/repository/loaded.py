"""Which versions of a model Triton is to load: the one in force and older ones, never one it was rolled back from.

A request that names no version is answered by the newest that is loaded, so nothing newer than the version in force may
be. `config.pbtxt` says it as `latest` where that comes to the same versions, and otherwise by their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

from tickserve.current import Current


def versions_to_load(versions: Iterable[int], current: Current | None, keep: int) -> list[int]:
    """At most `keep` of `versions`, oldest first: the one in force, the one before it, then the next older ones.

    Without a choice, or when it names none of `versions`, the newest.
    """
    newest_first = sorted(versions, reverse=True)
    if current is None or current.version not in newest_first:
        return sorted(newest_first[:keep])
    older = [version for version in newest_first if version < current.version]
    older.sort(key=lambda version: version != current.previous)
    return sorted([current.version, *older][:keep])


def by_number(versions: Iterable[int], load: list[int], keep: int) -> list[int] | None:
    """`load`, or None where Triton's policy `latest` of `keep` versions loads the same."""
    return None if sorted(versions)[-keep:] == load else load
