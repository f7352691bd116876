"""Finding the stage folders (`market`, `training`, ...) that stand beside this package in a checkout or an image.

The wheel holds `tickserve/` alone, and a desk may have its own `market` or `training` package, so a stage is only
ever loaded from the folder beside this package, never from wherever its name happens to be found.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from tickserve.errors import MissingExtraError, StageMissingError

STAGES = ("market", "models", "export", "training", "serving", "loadtest", "monitoring")
EXTRAS = {
    "tritonclient": "export",
    "numba": "stream",
    "onnxruntime": "inprocess",
    "pytriton": "triton",
    "accelerate": "train",
    "peft": "train",
    "polars": "train",
    "pyarrow": "train",
    "torch": "train",
    "xgboost": "train",
    "sklearn": "train",
    "scipy": "train",
    "safetensors": "train",
    "orjson": "train",
    "psutil": "train",
    "onnx": "export",
    "onnxmltools": "export",
    "onnxconverter_common": "export",
    "onnxscript": "export",
    "locust": "loadtest",
    "gevent": "loadtest",
    "matplotlib": "loadtest",
    "jinja2": "loadtest",
    "prometheus_client": "monitoring",
    "grafana_api": "monitoring",
    "yaml": "monitoring",
    "ray": "distributed",
    "exchange_calendars": "deploy",
    "kubernetes_validate": "deploy",
    "jsonschema": "deploy",
}


def checkout_root() -> Path:
    """The folder that holds `tickserve/` and, in a checkout or an image, the stages."""
    return Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    """Import a stage module by its dotted name, e.g. `market.readers`.

    Raises StageMissingError when the stage is not beside this package, and MissingExtraError naming the extra
    when a library it needs is not installed.
    """
    stage = name.partition(".")[0]
    root = checkout_root()
    if stage not in STAGES or not (root / stage / "__init__.py").is_file():
        raise StageMissingError(
            f"the stage {stage!r} is not beside the tickserve package",
            hint="run this command from a checkout (make install) or from the image",
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    _refuse_foreign(stage, root)
    return load_core(name)


def load_core(name: str) -> ModuleType:
    """Import a module that may need an extra. Raises MissingExtraError naming the extra that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in EXTRAS:
            raise MissingExtraError.of(missing, EXTRAS[missing]) from error
        raise


def _refuse_foreign(stage: str, root: Path) -> None:
    found = find_spec(stage)
    origin = Path(found.origin).resolve() if found and found.origin else None
    if origin != root / stage / "__init__.py":
        raise StageMissingError(
            f"another package named {stage!r} hides the stage of that name",
            hint="run from the checkout, in an environment of its own",
        )
