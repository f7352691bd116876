"""Running a plan: what the gate and the measurement need of it. Letters: B rows.

No machine with a GPU has run this module: it is written to TensorRT's documented Python interface, and its tests record
the calls it makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from export.tensorrt.build import load_tensorrt
from export.tensorrt.profiles import Profile, profile_for
from tickserve.errors import ArtifactError, ComponentError
from tickserve.manifest import Manifest

Arrays = dict[str, npt.NDArray[Any]]
DTYPES = {"FP32": np.float32, "INT64": np.int64}


class Device(Protocol):
    """Memory and a stream of one GPU: `export.tensorrt.cuda.Cuda`."""

    @property
    def stream(self) -> int:
        """The stream's handle."""

    def buffer(self, name: str, size: int) -> int:
        """The address of a buffer of at least `size` bytes."""

    def send(self, name: str, array: npt.NDArray[Any]) -> int:
        """Copy an array into a buffer; its address."""

    def fetch(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A buffer's content, once the stream is done."""


class Engine:
    """A deserialized plan. Raises ArtifactError for one that TensorRT does not take or of another signature."""

    def __init__(
        self, plan: bytes, manifest: Manifest, profiles: Sequence[Profile], device: Device, trt: Any = None
    ) -> None:
        trt = trt or load_tensorrt()
        self._manifest, self._profiles, self._device = manifest, profiles, device
        # Held as long as the engine: TensorRT keeps pointers to both.
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        # A version-compatible plan carries a runtime of its own, as code; it is ours, checked by its digest.
        self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ArtifactError("TensorRT does not load this plan", field="model.plan")
        self._check_names()
        self._context = self._engine.create_execution_context()
        self._profile = 0

    def _check_names(self) -> None:
        wanted = {tensor.name for tensor in (*self._manifest.inputs, *self._manifest.outputs)}
        found = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        if found != wanted:
            raise ArtifactError(
                "a plan with other tensors", field="model.plan", expected=str(sorted(wanted)), was=str(sorted(found))
            )

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Every output of one batch, by name. Raises UsageError for more rows than a profile takes."""
        rows = len(next(iter(inputs.values())))
        self._choose(profile_for(rows, self._profiles))
        for tensor in self._manifest.inputs:
            array = np.ascontiguousarray(inputs[tensor.name], DTYPES[tensor.dtype])
            self._context.set_input_shape(tensor.name, array.shape)
            self._context.set_tensor_address(tensor.name, self._device.send(tensor.name, array))
        shapes = {tensor.name: (rows, *tensor.shape) for tensor in self._manifest.outputs}
        for tensor in self._manifest.outputs:
            size = int(np.prod(shapes[tensor.name])) * np.dtype(DTYPES[tensor.dtype]).itemsize
            self._context.set_tensor_address(tensor.name, self._device.buffer(tensor.name, size))
        if not self._context.execute_async_v3(self._device.stream):
            raise ComponentError("TensorRT did not run the engine", field="model.plan")
        return {
            tensor.name: self._device.fetch(tensor.name, shapes[tensor.name], DTYPES[tensor.dtype])
            for tensor in self._manifest.outputs
        }

    def _choose(self, profile: int) -> None:
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, self._device.stream)
            self._profile = profile
