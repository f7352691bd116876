"""Triton's `onnxruntime` backend as a process per instance: the same config.pbtxt, honoured or refused.

Triton starts one stub process per model instance and loads this file in it (the Python-based backend rule), so a model
that ends its process takes nothing else with it. At load the version is checked (served_version.py), and the golden
pairs are scored, so a model that does not give research's numbers never becomes ready. The requests Triton batched
together are scored in one run. Letters: R requests of one batch, B rows of all of them together.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np

if int(np.__version__.split(".")[0]) >= 2:
    # With numpy 2 the stub hands over wrong inputs and empty outputs without a word.
    raise ImportError(f"numpy: expected < 2 in the environment of the embedded Triton, was {np.__version__}")

import served_version
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of a served model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load, check and score the golden pairs; an exception leaves the model unready, with its message logged."""
        folder = Path(args["model_repository"]) / args["model_version"]
        served = served_version.check_version(json.loads(args["model_config"]), folder, args["model_instance_kind"])
        self._session = served.session
        self.inputs = [tensor.name for tensor in served.options.inputs]
        self.outputs = [tensor.name for tensor in served.options.outputs]
        # What is loaded stays: a garbage collection need not walk over it in the middle of a request.
        gc.collect()
        gc.freeze()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, in order; a request that cannot be scored gets an error of its own."""
        arrays = [[tensor.as_numpy() for tensor in _ordered(request, self.inputs)] for request in requests]
        try:
            if len(requests) == 1:
                return [self._response(self.run(arrays[0]))]
            outputs = self.run([np.concatenate(parts) for parts in zip(*arrays, strict=True)])
        except Exception:
            # One bad request must not take its batch with it: score each alone.
            return [self._alone(parts) for parts in arrays]
        responses, start = [], 0
        for parts in arrays:
            stop = start + len(parts[0])
            responses.append(self._response([values[start:stop] for values in outputs]))
            start = stop
        return responses

    def finalize(self) -> None:
        """Free the session."""
        del self._session

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Score inputs in the configuration's order; returns outputs in the configuration's order."""
        result: list[np.ndarray] = self._session.run(self.outputs, dict(zip(self.inputs, inputs, strict=True)))
        return result

    def _response(self, outputs: list[np.ndarray]) -> Any:
        return pb_utils.InferenceResponse(list(map(pb_utils.Tensor, self.outputs, outputs)))

    def _alone(self, parts: list[np.ndarray]) -> Any:
        try:
            return self._response(self.run(parts))
        except Exception as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"cannot score this request: {reason}"))


def _ordered(request: Any, names: list[str]) -> list[Any]:
    """The request's tensors in the configuration's order. Triton has checked that each is there once."""
    tensors = request.inputs()
    if len(names) == 1:
        return [tensors[0]]
    by_name = {tensor.name(): tensor for tensor in tensors}
    return [by_name[name] for name in names]
