"""The values as a file for helm: every value with its reason and source above it; and a record of what was measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.deployment.sizing import Value
from tickserve import stages
from tickserve.errors import ArtifactError, ConfigError
from tickserve.store import write_atomic, write_json_atomic

WIDTH = 110
RECORD_ENDING = ".measured.json"


def to_yaml(values: Sequence[Value], head: Sequence[str]) -> str:
    """The text of the file. The same values give the same bytes."""
    tree: dict[str, Any] = {}
    for value in values:
        section = tree
        *parents, leaf = value.path.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    lines = [f"# {line}".rstrip() for line in head]
    for key, part in tree.items():
        lines += ["", *_lines(key, part, 0)]
    return "\n".join(lines) + "\n"


def _lines(key: str, part: Any, depth: int) -> list[str]:
    indent = "  " * depth
    if isinstance(part, Value):
        return _leaf(key, part, indent)
    if not _written(part):  # a section of nothing but comments would be null
        return [line for name, each in part.items() for line in _lines(f"{key}.{name}", each, depth)]
    inner = [line for name, each in part.items() for line in _lines(name, each, depth + 1)]
    return [f"{indent}{key}:", *inner]


def _written(part: Any) -> bool:
    return not part.left if isinstance(part, Value) else any(_written(each) for each in part.values())


def _leaf(key: str, value: Value, indent: str) -> list[str]:
    source = f" [{value.source}]" if value.source else ""
    text = f"{key}: {value.reason}" if value.left else f"{value.reason}{source}".strip()
    comment = [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False)]
    if value.left:
        return comment
    return [*comment, *_assigned(key, value.value, indent)]


def _assigned(key: str, value: Any, indent: str) -> list[str]:
    """JSON is YAML, so no value can break out of its place."""
    if isinstance(value, list) and value:
        return [f"{indent}{key}:", *(f"{indent}  - {json.dumps(item)}" for item in value)]
    return [f"{indent}{key}: {json.dumps(value)}"]


def record_path(out: Path) -> Path:
    """Where the record of a values file is: beside it."""
    return out.with_name(out.stem + RECORD_ENDING)


def write(out: Path, text: str, record: dict[str, Any]) -> Path:
    """Write the values and their record; gives the record's path. Raises ComponentError."""
    write_atomic(out, text.encode())
    write_json_atomic(record_path(out), record)
    return record_path(out)


def read_record(out: Path) -> dict[str, Any] | None:
    """The record beside a values file; None where there is none. Raises ArtifactError for what is not one."""
    path = record_path(out)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict) or not {"values", "models", "memory"} <= record.keys():
            raise ValueError
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError("not a record that deploy render writes", field=path.name) from error
    return record


def read_values(path: Path) -> dict[str, Any]:
    """The tree in a values file. Raises ConfigError: unreadable, not YAML, not a mapping."""
    yaml = stages.load_core("yaml")
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror}", field=path.name) from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"not YAML: {reason}", field=path.name) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("wrong type", field=path.name, expected="a mapping of values", was=type(tree).__name__)
    return tree


def merged(trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Values over values, as helm lays files over one another: mappings are joined, everything else is replaced."""
    result: dict[str, Any] = {}
    for tree in trees:
        result = _over(result, tree)
    return result


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _over(result[key], value) if both else value
    return result
