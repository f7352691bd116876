"""The largest batch that config.pbtxt may serve: the smallest that the gates of a version it loads have judged.

One config.pbtxt serves several versions at once. A version may be served with fewer rows than its gates judged, never
with more. So the largest batch follows the versions that are loaded, whatever `export.max_batch` is by now: a version
that only waits takes no rows from the one in force, and none is loaded with more rows than it was gated for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.triton_config import HEADER, parse_config
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, TickserveError
from tickserve.manifest import MANIFEST_NAME, Manifest, load_manifest
from tickserve.model_config import CONFIG_NAME, BackendOptions

# `name:BxTxF` of each input, in TensorRT's parameters (export/tensorrt/accelerator.py).
BEST, MOST = "trt_profile_opt_shapes", "trt_profile_max_shapes"
ROWS_OF_SHAPE = re.compile(r"(?<=:)[0-9]+")


def largest_batch(folder: Path, versions: Iterable[int], coming: Manifest | None = None) -> int | None:
    """The rows that each of `versions` of the model in `folder` was gated for, at least; None where none says so.

    `coming` is the manifest of one that is not there yet. One whose manifest cannot be read is not served anyway.
    """
    gated = (_gated(folder / str(version), coming) for version in versions)
    return min((rows for rows in gated if rows is not None), default=None)


def _gated(path: Path, coming: Manifest | None) -> int | None:
    try:
        manifest = coming if coming is not None and not (path / MANIFEST_NAME).is_file() else load_manifest(path)
    except TickserveError:
        return None
    return manifest.export.max_batch if manifest.export else None


def fitted(settings: ExportSettings, rows: int | None) -> ExportSettings:
    """`settings` for a configuration that serves at most `rows`: what is preferred above that becomes that."""
    if rows is None:
        return settings
    preferred = tuple(sorted({min(size, rows) for size in settings.preferred_batch_rows}))
    return settings.model_copy(update={"max_batch": rows, "preferred_batch_rows": preferred})


def with_largest_batch(text: str, rows: int | None) -> str:
    """A published configuration that serves at most `rows`; else unchanged. Raises ArtifactError for none of ours."""
    if rows is None or parse_config(text).max_batch == rows:
        return text
    config = text_format.Parse(text, schema.ModelConfig())
    fit(config, rows)
    changed: str = HEADER + text_format.MessageToString(config)
    return changed


def fit(config: Any, rows: int) -> None:
    """Have `config`, a ModelConfig, serve at most `rows`: what it prefers and warms up above that becomes that.

    What was above stays lost when more rows are served again; the next export writes it from the settings.
    """
    config.max_batch_size = rows
    if config.HasField("dynamic_batching"):
        preferred = config.dynamic_batching.preferred_batch_size
        preferred[:] = sorted({min(size, rows) for size in preferred})
    seen: set[int] = set()
    for warmup in list(config.model_warmup):
        if warmup.batch_size > rows:
            warmup.batch_size, warmup.name = rows, f"rows_{rows}"
        if warmup.batch_size in seen:
            config.model_warmup.remove(warmup)
        seen.add(warmup.batch_size)
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        shapes = accelerator.parameters
        shapes[MOST] = ROWS_OF_SHAPE.sub(str(rows), shapes[MOST])
        shapes[BEST] = ROWS_OF_SHAPE.sub(lambda found: str(min(int(found[0]), rows)), shapes[BEST])


def fit_to(config: Any, folder: Path, versions: Iterable[int]) -> None:
    """Have `config`, of the model in `folder`, serve no more rows than each of `versions` was gated for."""
    rows = largest_batch(folder, versions)
    if rows is not None and rows < config.max_batch_size:
        fit(config, rows)


def over_gated(options: BackendOptions, manifest: Manifest) -> ArtifactError | None:
    """Why the version may not be served with this configuration: with more rows than its gates judged."""
    gated = manifest.export.max_batch if manifest.export else 0
    if options.max_batch <= gated:
        return None
    return ArtifactError(
        f"{CONFIG_NAME} serves a larger batch than was gated",
        field="max_batch_size",
        expected=f"at most {gated}",
        was=str(options.max_batch),
    )
