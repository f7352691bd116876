"""helm and kubectl: where they are, whether they are new enough, and what they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tickserve.errors import ComponentError

# `kubectl apply -k` and `kubectl kustomize` of older ones carry a kustomize that does not read our overlays.
OLDEST_KUBECTL = (1, 27)
# Helm 3.6 is the oldest that the chart is tested with.
OLDEST_HELM = (3, 6)
LIMIT_S = 120.0
VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class Ended:
    """How a tool ended."""

    code: int
    out: str
    err: str


def run(command: Sequence[str], given: str | None = None, limit_s: float = LIMIT_S) -> Ended:
    """Run a tool with `given` on its standard input. Raises ComponentError when it cannot be run or does not end."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            list(command), input=given, capture_output=True, text=True, timeout=limit_s, errors="replace", check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ComponentError(f"did not end within {limit_s:.0f} s", field=name) from error
    except OSError as error:
        raise ComponentError(f"cannot be run: {error.strerror}", field=name) from error
    return Ended(done.returncode, done.stdout, done.stderr)


def find(name: str, given: Path | None, hint: str) -> str:
    """The tool's path: as given by its option, else from PATH. Raises ComponentError with what to do."""
    found = shutil.which(str(given)) if given is not None else shutil.which(name)
    if found is None:
        where = f"at {given}" if given is not None else "on PATH"
        raise ComponentError(f"{name}: not found {where}", hint=hint)
    return found


def helm(given: Path | None) -> str:
    """helm, new enough. Raises ComponentError."""
    path = find("helm", given, "install Helm 3.6 or newer, or name it with --helm")
    _check("helm", run([path, "version", "--template", "{{.Version}}"]).out, OLDEST_HELM)
    return path


def kubectl(given: Path | None) -> str:
    """kubectl, new enough. Raises ComponentError."""
    path = find("kubectl", given, "install kubectl 1.27 or newer, or name it with --kubectl")
    said = run([path, "version", "--client", "--output=json"]).out
    try:
        text = str(json.loads(said)["clientVersion"]["gitVersion"])
    except (ValueError, KeyError, TypeError):
        text = said
    _check("kubectl", text, OLDEST_KUBECTL)
    return path


def _check(name: str, said: str, oldest: tuple[int, int]) -> None:
    found = VERSION.search(said)
    expected = f"{oldest[0]}.{oldest[1]} or newer"
    if found is None:
        raise ComponentError(f"{name} does not say its version", field=name, expected=expected)
    if (int(found[1]), int(found[2])) < oldest:
        raise ComponentError(f"{name}: expected {expected}, was {found[0].removeprefix('v')}")
