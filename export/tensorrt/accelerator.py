"""ONNX Runtime's TensorRT provider, asked for in config.pbtxt: the one way in which TensorRT serves a model.

A plan that `tickserve tensorrt build` made is not used for it, nor by anything else that serves. The provider builds
its own engines when the model loads on a GPU and keeps them in a folder of the server. One profile from 1 row to the
largest batch: the provider parses several, but runs only the first (microsoft/onnxruntime, pull request 31624), so
other batch sizes would fail. A server on the CPU ignores all of it, by the rule in `tickserve/model_config.py`.
"""

from __future__ import annotations

from tickserve.config import ExportSettings
from tickserve.manifest import TREES, Manifest

PRECISION_MODES = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


def runs_on_tensorrt(manifest: Manifest) -> bool:
    """Whether TensorRT has the operators of this family of models.

    It has none for a forest: ONNX Runtime would run all of it on the CPU behind an empty engine.
    """
    return manifest.family not in TREES


def accelerator_parameters(manifest: Manifest, settings: ExportSettings) -> dict[str, str]:
    """The provider's parameters; `tickserve.model_config.ACCELERATOR_PARAMETERS` names the same ones."""
    best = max(settings.preferred_batch_rows, default=1)
    return {
        "precision_mode": PRECISION_MODES[manifest.precision],
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": settings.tensorrt_cache,
        "trt_engine_cache_prefix": manifest.name,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": settings.tensorrt_cache,
        "trt_profile_min_shapes": _shapes(manifest, 1),
        "trt_profile_opt_shapes": _shapes(manifest, best),
        "trt_profile_max_shapes": _shapes(manifest, settings.max_batch),
    }


def _shapes(manifest: Manifest, rows: int) -> str:
    """`name:BxTxF` of every input, as the provider reads them."""
    return ",".join(f"{tensor.name}:{'x'.join(map(str, (rows, *tensor.shape)))}" for tensor in manifest.inputs)
