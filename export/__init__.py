"""Bundle to ONNX to Triton model repository: parity gates and config.pbtxt.

`export_bundle` takes a bundle of `training` and publishes a version that Triton serves. What is heavy
(onnx, onnxruntime, torch, xgboost) is loaded by the first call, not by the import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.job import Published, export_bundle

__all__ = ["Published", "export_bundle"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from export import job

        return getattr(job, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
