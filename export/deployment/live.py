"""The objects of a cluster that have the names of those that were rendered, by kubectl."""

from __future__ import annotations

import json
from collections.abc import Sequence

from export.deployment import tools
from export.deployment.chart import Object
from tickserve.errors import ComponentError

# No cluster, no network or no rights is said within this time.
LIMIT_S = 30.0


def objects(kubectl: str, rendered: Sequence[Object], context: str | None = None) -> list[Object]:
    """What the cluster holds of `rendered`; what it does not hold is left out. Raises ComponentError."""
    command = [kubectl, *(["--context", context] if context else []), "--request-timeout=10s"]
    command += ["get", "--ignore-not-found", "--output=json", "--filename=-"]
    given = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(rendered)})
    done = tools.run(command, given, LIMIT_S)
    if done.code:
        lines = [line for line in done.err.splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"exit code {done.code}"
        raise ComponentError(
            f"the cluster does not answer: {reason}",
            field="--live",
            hint="kubectl needs a cluster, a context and the right to get these objects",
        )
    if not done.out.strip():
        return []
    found = json.loads(done.out)
    items: list[Object] = found["items"] if found["kind"] == "List" else [found]
    return items
