"""What tests do to a bundle, and what must be left of a refused one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tickserve.manifest import Manifest

Rewrite = Callable[..., Manifest]


def nothing_published(repository: Path) -> bool:
    return not repository.exists() or not [path for path in repository.rglob("*") if path.name != ".publish.lock"]


def change_pairs(bundle: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    with np.load(bundle / name) as file:
        arrays = dict(file)
    np.savez(bundle / name, **change(arrays))


def spoil_weights(original: Callable[..., onnx.ModelProto], change: float) -> Callable[..., onnx.ModelProto]:
    """A converter that is wrong by `change` in the weights of its leaves."""

    def convert(booster: Any, features: int) -> onnx.ModelProto:
        model = original(booster, features)
        for attribute in model.graph.node[0].attribute:
            if attribute.name == "class_weights":
                weights = [
                    weight + (change if index % 7 == 0 else 0.0) for index, weight in enumerate(attribute.floats)
                ]
                del attribute.floats[:]
                attribute.floats.extend(weights)
        return model

    return convert
