"""The chart, rendered: values in, objects out, by helm itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from export.deployment import tools
from export.deployment.values_file import merged, read_values
from tickserve import stages
from tickserve.errors import ComponentError, ConfigError, GateRefusedError, TickserveError

# Selectors never change, and the overlays are made with this name; `deploy diff` takes that of the installed release.
RELEASE, NAMESPACE = "tickserve", "scoring"
# What a cluster of our users has beside Kubernetes' own; helm asks nobody when it only renders.
API_VERSIONS = (
    "autoscaling/v2",
    "policy/v1",
    "keda.sh/v1alpha1",
    "monitoring.coreos.com/v1",
    "ray.io/v1",
)
# A rendering is no change: inside a freeze it is let through under this reason, which no installed object ever gets.
LOOKING = "tickserve deploy: rendered to be looked at"

Object = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart's folder and the helm that renders it."""

    folder: Path
    helm: str

    def values(self, files: Sequence[Path]) -> dict[str, Any]:
        """The chart's own values with `files` over them. Raises ConfigError."""
        own = self.folder / "values.yaml"
        if not own.is_file():
            raise ConfigError("expected a chart with values.yaml", field="--chart", was=str(self.folder))
        return merged([read_values(own), *(read_values(path) for path in files)])

    def render(
        self,
        files: Sequence[Path],
        kube_version: str | None = None,
        release: str = RELEASE,
        namespace: str = NAMESPACE,
        hooks: bool = True,
    ) -> list[Object]:
        """The objects for a version of Kubernetes (else the newest that is known), in helm's order.

        Raises GateRefusedError with what the chart says against the values.
        """
        command = [self.helm, "template", release, str(self.folder), "--namespace", namespace]
        command += [part for path in files for part in ("--values", str(path))]
        command += [part for each in API_VERSIONS for part in ("--api-versions", each)]
        command += ["--kube-version", kube_version or newest_known()]
        if not hooks:
            command.append("--no-hooks")
        if self._frozen(files):
            command += ["--set-string", f"changeFreeze.override={LOOKING}"]
        done = tools.run(command)
        if done.code:
            raise _refusal(done.err)
        return objects(done.out)

    def _frozen(self, files: Sequence[Path]) -> bool:
        """Whether the chart would refuse to render now, and nobody has given a reason yet."""
        freeze = self.values(files).get("changeFreeze")
        if not isinstance(freeze, dict) or not freeze.get("enabled") or freeze.get("override"):
            return False
        now = datetime.now(UTC)
        return any(_holds(window, now) for window in freeze.get("windows") or () if isinstance(window, dict))


def newest_known() -> str:
    """The newest version of Kubernetes whose schemas are known here."""
    return str(stages.load_core("kubernetes_validate").latest_version())


def _holds(window: dict[str, Any], now: datetime) -> bool:
    try:
        return datetime.fromisoformat(str(window["start"])) <= now < datetime.fromisoformat(str(window["end"]))
    except (KeyError, ValueError, TypeError):  # the schema says what is wrong with it
        return False


def _refusal(said: str) -> TickserveError:
    """Helm's error without its call stack."""
    lines = [
        line.strip() for line in said.splitlines() if line.strip() and not line.startswith(("coalesce", "WARNING"))
    ]
    text = " ".join(lines).removeprefix("Error: ")
    if "not found" in text and "no such file" in text:
        return ConfigError(text[:300], field="--chart")
    text = re.sub(r"^execution error at \(([^)]*)\): |^template: .*: error calling fail: ", "", text)
    text = text.removesuffix(" Use --debug flag to render out invalid YAML")
    if not text:
        return ComponentError("ended without a word", field="helm")
    return GateRefusedError(f"the chart refuses these values: {text[:600]}", field="values")


def objects(text: str) -> list[Object]:
    """The objects in a stream of YAML documents. Raises ConfigError for what is not one."""
    yaml = stages.load_core("yaml")
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        found = [document for document in yaml.load_all(text, Loader=loader) if document]
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())[:150]}", field="objects") from error
    for document in found:
        if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
            raise ConfigError("expected objects of Kubernetes", field="objects", was=str(document)[:60])
    return found


def key_of(item: Object) -> str:
    """What makes an object that object: group and kind, namespace where it has one, name."""
    group = str(item["apiVersion"]).rpartition("/")[0]
    metadata = item["metadata"]
    kind = f"{item['kind']}.{group}" if group else str(item["kind"])
    namespace = f"{metadata['namespace']}/" if metadata.get("namespace") else ""
    return f"{kind}/{namespace}{metadata.get('name', '')}"
