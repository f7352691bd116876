"""The libraries of the extra `compress`, imported when a step needs one and not before."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

from tickserve.errors import MissingExtraError

EXTRA = "compress"


def library(module: str) -> Any:
    """An optional library's module. Raises MissingExtraError when it is not installed."""
    with warnings.catch_warnings():
        # modelopt decorates functions with torch.jit.script, which torch deprecates, and names untested companions.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r"`torch\.jit\.script")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"modelopt(\..*)?")
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            missing = module.partition(".")[0]
            if (error.name or "").partition(".")[0] != missing:
                raise
            raise MissingExtraError.of(missing, EXTRA) from error
