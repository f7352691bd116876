"""Values against the chart's schema, objects against Kubernetes': each problem as a field and "expected X, was Y"."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from export.deployment.chart import Object, key_of
from export.deployment.finding import Finding, refused
from tickserve import stages
from tickserve.errors import ConfigError

SCHEMA = "values.schema.json"


def check_values(chart: Path, values: dict[str, Any]) -> list[Finding]:
    """What the schema has against the merged values. Raises ConfigError where the chart has no schema."""
    try:
        schema = json.loads((chart / SCHEMA).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected a chart with {SCHEMA}", field="--chart", was=str(chart)) from error
    library = stages.load_core("jsonschema")
    kind = library.validators.validator_for(schema)
    found = [finding for error in kind(schema).iter_errors(values) for finding in _told(error)]
    return sorted(found, key=lambda each: each.field)


def _told(error: Any) -> Iterator[Finding]:
    """The innermost problems: of alternatives, those of the one that came nearest."""
    if error.context:
        nearest = min(error.context, key=lambda each: -len(each.absolute_path))
        yield from _told(nearest)
        return
    path = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for name in sorted(set(error.instance) - set(known)):
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f" (the nearest is {near[0]})" if near else ""
            yield refused(f"{path}.{name}".lstrip("."), f"unknown key{hint}")
        return
    yield refused(path or "values", f"{_expected(error)}, was {json.dumps(error.instance, default=str)[:80]}")


def _expected(error: Any) -> str:
    limit = error.validator_value
    words = {
        "type": f"expected {limit if isinstance(limit, str) else ' or '.join(map(str, limit))}"
        if error.validator == "type"
        else "",
        "minimum": f"expected at least {limit}",
        "exclusiveMinimum": f"expected more than {limit}",
        "maximum": f"expected at most {limit}",
        "exclusiveMaximum": f"expected less than {limit}",
        "minLength": f"expected {limit} characters or more",
        "maxLength": f"expected {limit} characters at most",
        "minItems": f"expected {limit} or more",
        "pattern": f"expected {error.schema.get('description') or f'a match of {limit}'}",
        "enum": f"expected one of {limit}",
        "const": f"expected {limit}",
        "required": f"expected {', '.join(set(limit) - set(error.instance)) if error.validator == 'required' else ''}",
        "not": f"expected {error.schema.get('description', 'something else')}",
    }
    return words.get(error.validator) or f"{error.message[:120]}: expected another value"


def check_objects(objects: Sequence[Object], version: str) -> tuple[list[Finding], list[str]]:
    """What Kubernetes of a version has against the objects, strictly; and the kinds without a schema here."""
    library = stages.load_core("kubernetes_validate")
    found: list[Finding] = []
    unknown: list[str] = []
    for item in objects:
        try:
            library.validate(item, version, strict=True)
        except library.SchemaNotFoundError:
            unknown.append(f"{item['kind']} ({item['apiVersion']})")
        except library.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            reason = str(error.message)[:200]
            found.append(refused(f"{key_of(item)}: {path}".rstrip(": "), f"{reason} (Kubernetes {version})"))
    return found, sorted(set(unknown))
