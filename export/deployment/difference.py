"""What differs between two sets of objects: object by object, field by field.

Items of a list are matched by what names them (containers, ports, variables, volumes, mounts), where every item has
such a name and no two have the same; other lists are matched by position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from export.deployment import quantity
from export.deployment.chart import Object, key_of

MISSING = None
NAMES = ("name", "mountPath", "port", "containerPort", "key", "topologyKey", "ip", "uid")


@dataclass(frozen=True)
class Change:
    """One field of one object; a whole object that came or went has the path ''."""

    object: str
    path: str
    what: Literal["added", "removed", "changed"]
    before: Any
    after: Any

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return {
            "object": self.object,
            "path": self.path,
            "what": self.what,
            "before": self.before,
            "after": self.after,
        }


def differences(before: Sequence[Object], after: Sequence[Object], *, only_named: bool = False) -> list[Change]:
    """Every change from `before` to `after`, objects in order of their keys.

    `only_named`: what `after` does not name is not compared, since a cluster fills fields in by itself.
    """
    old, new = _by_key(before), _by_key(after)
    found: list[Change] = []
    for key in sorted(old | new):
        if key not in new:
            found.append(Change(key, "", "removed", old[key]["kind"], MISSING))
        elif key not in old:
            found.append(Change(key, "", "added", MISSING, new[key]["kind"]))
        else:
            found += _fields(key, "", old[key], new[key], only_named)
    return found


def _by_key(items: Sequence[Object]) -> dict[str, Object]:
    return {key_of(item): item for item in items}


def _fields(key: str, path: str, before: Any, after: Any, only_named: bool) -> Iterator[Change]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        yield from _members(key, path, before, after, only_named, ".")
    elif isinstance(before, list) and isinstance(after, list):
        one, other = _as_members(before, after)
        yield from _members(key, path, one, other, only_named, "")
    elif not _same(before, after, only_named):
        yield Change(key, path, "changed", before, after)


def _same(before: Any, after: Any, quantities: bool) -> bool:
    """Equal, and of one type; a cluster writes quantities its own way (1024Mi as 1Gi)."""
    if before == after and isinstance(before, bool) == isinstance(after, bool):
        return True
    one, other = quantity.parse(before), quantity.parse(after)
    return quantities and one is not None and one == other


def _members(
    key: str, path: str, before: Mapping[str, Any], after: Mapping[str, Any], only_named: bool, dot: str
) -> Iterator[Change]:
    for name in dict.fromkeys([*before, *after]):
        where = f"{path}{dot if path else ''}{name}"
        if name not in after:
            if not only_named:
                yield Change(key, where, "removed", before[name], MISSING)
        elif name not in before:
            yield Change(key, where, "added", MISSING, after[name])
        else:
            yield from _fields(key, where, before[name], after[name], only_named)


def _as_members(before: list[Any], after: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    for name in NAMES:
        if _names(before, name) and _names(after, name):
            return ({f"[{item[name]}]": item for item in items} for items in (before, after))  # type: ignore[return-value]
    return {f"[{place}]": item for place, item in enumerate(before)}, {
        f"[{place}]": item for place, item in enumerate(after)
    }


def _names(items: list[Any], name: str) -> bool:
    named = [item.get(name) for item in items if isinstance(item, Mapping)]
    return len(named) == len(items) and None not in named and len({str(each) for each in named}) == len(named)
