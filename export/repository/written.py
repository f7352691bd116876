"""A `config.pbtxt` as this project writes it, read without protobuf and cut down to one version.

The repository sync runs in NVIDIA's image, where a library more is one more to keep patched, so it does not bring
protobuf. It takes only the layout that protobuf prints: a field, an opening or a closing to the line, strings without
escapes. In that layout a line means one thing, so what is read here is what Triton reads; anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tickserve.errors import ArtifactError
from tickserve.model_config import CONFIG_NAME, MANIFEST_PARAMETER, BackendOptions, manifest_parameter, read_options

LINE = re.compile(r'( *)(?:(\}|[a-z_]+ \{)|([a-z_]+): ("[^"\\\n]*"|-?[0-9]{1,18}|true|false|[A-Z][A-Z0-9_]*))')
WORDS: dict[str, bool] = {"true": True, "false": False}
# Of the fields in use: lists, and maps, which are written as entries of a `key` and a `value`.
LISTS = frozenset(
    {
        "input",
        "output",
        "dims",
        "versions",
        "preferred_batch_size",
        "instance_group",
        "model_warmup",
        "gpu_execution_accelerator",
        "cpu_execution_accelerator",
    }
)
MAPS = frozenset({"parameters", "inputs", "priority_queue_policy"})
HEADER = "# Written by tickserve repo sync; a change here is overwritten by the next one.\n"
MAX_DEPTH = 8


@dataclass(frozen=True)
class Written:
    """A configuration: what it asks of a backend, and the lines of each top-level field, in order."""

    options: BackendOptions
    _fields: tuple[tuple[str, tuple[str, ...]], ...]

    def only(self, versions: Mapping[int, str], most_rows: int | None = None) -> str:
        """Its text with these versions, each with the digest of its manifest, to know and to load.

        With `most_rows` it serves no larger batch, prefers none and warms none up; else it is unchanged.
        """
        lines = [HEADER.rstrip("\n")]
        for name, text in self._fields:
            if name != "version_policy" and not _lists_manifest(name, text):
                lines += text if most_rows is None else _with_rows(name, text, most_rows)
        for version in sorted(versions):
            lines += ["parameters {", f'  key: "{manifest_parameter(version)}"', "  value {"]
            lines += [f'    string_value: "{versions[version]}"', "  }", "}"]
        numbers = [f"    versions: {version}" for version in sorted(versions)]
        return "\n".join([*lines, "version_policy {", "  specific {", *numbers, "  }", "}", ""])


def _lists_manifest(name: str, text: tuple[str, ...]) -> bool:
    """Whether these lines are a parameter that lists a version's manifest."""
    found = re.fullmatch(r'  key: "(.*)"', text[1]) if name == "parameters" else None
    return bool(found and MANIFEST_PARAMETER.fullmatch(found[1]))


def _with_rows(name: str, text: tuple[str, ...], most: int) -> tuple[str, ...]:
    """The lines of a top-level field, for at most `most` rows."""
    if name == "max_batch_size":
        return (f"{name}: {min(most, int(text[0].rpartition(' ')[2]))}",)
    sizes = {line: int(line.rpartition(" ")[2]) for line in text if re.match(r"  (preferred_)?batch_size: ", line)}
    over = {line for line, rows in sizes.items() if rows > most}
    if name == "model_warmup":
        return () if over else text
    return tuple(line for line in text if line not in over)


def read_written(data: bytes) -> Written:
    """The configuration in these bytes. Raises ArtifactError for another layout, and for what is not honoured."""
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise _unlike(0) from error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line and line[0] != "#"]
    lines = iter(numbered)
    value = _message(lines, 0)
    return Written(read_options(value), tuple(_top_level([line for _, line in numbered])))


def _top_level(lines: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    start = 0
    for index, line in enumerate(lines):
        if line == "}" or (not line.startswith(" ") and not line.endswith("{")):
            yield re.split("[ :]", lines[start])[0], tuple(lines[start : index + 1])
            start = index + 1


def _message(lines: Iterator[tuple[int, str]], depth: int) -> dict[str, Any]:
    """The fields of one message, up to its closing line or, at the top, the end."""
    found: dict[str, Any] = {}
    for number, line in lines:
        match = LINE.fullmatch(line)
        if match is None or depth > MAX_DEPTH:
            raise _unlike(number)
        if match[2] == "}":
            if not depth or len(match[1]) != 2 * (depth - 1):
                raise _unlike(number)
            return found
        if len(match[1]) != 2 * depth:
            raise _unlike(number)
        if match[2]:
            _add(found, match[2].removesuffix(" {"), _message(lines, depth + 1), number)
        else:
            _add(found, match[3], _scalar(match[4]), number)
    if depth:
        raise _unlike(0)
    return found


def _add(found: dict[str, Any], name: str, value: Any, number: int) -> None:
    if name in MAPS:
        entries, key = found.setdefault(name, {}), value.get("key") if isinstance(value, dict) else None
        if not isinstance(key, str | int) or set(value) - {"key", "value"} or key in entries:
            raise _unlike(number)
        entries[key] = value.get("value", {})
    elif name in LISTS:
        found.setdefault(name, []).append(value)
    elif name in found:
        raise _unlike(number)
    else:
        found[name] = value


def _scalar(text: str) -> Any:
    if text.startswith('"'):
        return text[1:-1]
    return WORDS[text] if text in WORDS else text if text[0].isalpha() else int(text)


def _unlike(number: int) -> ArtifactError:
    where = f"{CONFIG_NAME} line {number}" if number else CONFIG_NAME
    return ArtifactError("not written by this project", field=where, expected="what tickserve export writes")
