"""kustomize overlays made from the chart, for teams without Helm: the same objects, without the two labels of Helm.

What all overlays have in common is in `base/`; the rest is in `overlays/<name>/`, beside the `values.yaml` that it is
made with. Whoever changes the chart writes them anew, and a test holds the two together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.deployment.chart import NAMESPACE, Chart, Object
from tickserve import stages
from tickserve.store import write_atomic

NAMES = ("cpu", "gpu", "gpu-mig", "dev")
# Helm's own, which would be untrue of an object that kubectl applies.
LABELS_OF_HELM = ("helm.sh/chart", "app.kubernetes.io/managed-by")
HOOK = "helm.sh/hook"
MARK = (
    "# Made from k8s/chart by `tickserve deploy overlays`: change the chart, or patch this from an overlay of your own."
)
KUSTOMIZATION = "kustomization.yaml"


def objects_of(chart: Chart, values: Path) -> list[Object]:
    """What the chart gives for the values of an overlay: no hooks, no labels of Helm. The namespace stays."""
    rendered = chart.render([values])
    return [without_helm(item) for item in rendered if HOOK not in (item["metadata"].get("annotations") or {})]


def without_helm(item: Object) -> Object:
    """A copy without the labels that say Helm manages it, wherever a label can be."""
    item = copy.deepcopy(item)
    for metadata in _metadata(item):
        for label in LABELS_OF_HELM:
            (metadata.get("labels") or {}).pop(label, None)
    return item


def _metadata(part: Any) -> list[dict[str, Any]]:
    """Every `metadata` inside an object: its own, and those of templates."""
    if isinstance(part, list):
        return [found for each in part for found in _metadata(each)]
    if not isinstance(part, dict):
        return []
    own = [part["metadata"]] if isinstance(part.get("metadata"), dict) else []
    return own + [found for each in part.values() for found in _metadata(each)]


def files(chart: Chart, folder: Path, names: Sequence[str] = NAMES) -> dict[str, bytes]:
    """Every file of `base/` and `overlays/` by its path under `folder`. The same chart gives the same bytes."""
    by_overlay = {}
    for name in names:
        found = objects_of(chart, folder / "overlays" / name / "values.yaml")
        by_overlay[name] = {_file_name(item): item for item in found}
    first = by_overlay[names[0]]
    shared = {
        file: item for file, item in first.items() if all(other.get(file) == item for other in by_overlay.values())
    }
    made = {f"base/{file}": _text(item) for file, item in shared.items()}
    made[f"base/{KUSTOMIZATION}"] = _kustomization(sorted(shared), [])
    for name, items in by_overlay.items():
        own = {file: item for file, item in items.items() if file not in shared}
        made |= {f"overlays/{name}/{file}": _text(item) for file, item in own.items()}
        listed = ["../../base", *sorted(own)]
        made[f"overlays/{name}/{KUSTOMIZATION}"] = _kustomization(listed, _images(items.values()), NAMESPACE)
    return made


def _file_name(item: Object) -> str:
    return f"{str(item['kind']).lower()}-{item['metadata']['name']}.yaml"


def _text(item: Object) -> bytes:
    item = copy.deepcopy(item)
    # The namespace is named once, in the kustomization.
    item["metadata"].pop("namespace", None)
    return f"{MARK}\n{_dump(item)}".encode()


def _kustomization(resources: Sequence[str], images: Sequence[dict[str, str]], namespace: str = "") -> bytes:
    tree: dict[str, Any] = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    if namespace:
        tree["namespace"] = namespace
    tree["resources"] = list(resources)
    if images:
        tree["images"] = list(images)
    return f"{MARK}\n{_dump(tree)}".encode()


def _images(items: Any) -> list[dict[str, str]]:
    """What to replace by the images of your registry, with its digest in place of the tag."""
    found = {}
    for text in sorted({image for item in items for image in _image_names(item)}):
        name, _, tag = text.partition("@")[0].rpartition(":")
        found[name] = {"name": name, "newName": name, "newTag": tag}
    return list(found.values())


def _image_names(part: Any) -> list[str]:
    if isinstance(part, list):
        return [found for each in part for found in _image_names(each)]
    if not isinstance(part, dict):
        return []
    own = [
        each["image"]
        for kind in ("containers", "initContainers")
        for each in part.get(kind) or ()
        if isinstance(each, dict) and isinstance(each.get("image"), str)
    ]
    return own + [found for each in part.values() for found in _image_names(each)]


def _dump(tree: Any) -> str:
    yaml = stages.load_core("yaml")

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        """Texts of several lines as blocks; no anchors, since a copy is easier to read than a reference."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    dumped: str = yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=1_000, allow_unicode=True)
    return dumped


def write(chart: Chart, folder: Path, *, dry_run: bool = False) -> list[str]:
    """Bring `base/` and `overlays/` under `folder` in line with the chart; gives the files that change.

    A file that was made earlier and is not any more is removed; files without the mark are left alone.
    """
    wanted = files(chart, folder)
    changed = [path for path, data in wanted.items() if not _holds(folder / path, data)]
    stale = [path for path in _made(folder) if path not in wanted]
    if not dry_run:
        for path in changed:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / path, wanted[path])
        for path in stale:
            (folder / path).unlink()
    return sorted(changed + stale)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _made(folder: Path) -> list[str]:
    found = [path for part in ("base", "overlays") for path in (folder / part).rglob("*.yaml")]
    return [str(path.relative_to(folder)) for path in found if path.read_bytes().startswith(MARK.encode())]
