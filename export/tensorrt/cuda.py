"""A little of the CUDA driver (libcuda.so.1, part of every driver): memory, copies and a stream, through ctypes.

Written to the documented C interface of the driver; no machine with a GPU has run it yet.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.errors import ComponentError

DRIVER = "libcuda.so.1"
NON_BLOCKING = 1


class Cuda:
    """The primary context of GPU 0 on this thread, one stream, and buffers by name that are freed at the end."""

    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL(DRIVER)
        except OSError as error:
            raise ComponentError(f"no NVIDIA driver: {DRIVER} is not here") from error
        self._buffers: dict[str, tuple[ctypes.c_uint64, int]] = {}
        self._device, self._stream = ctypes.c_int(), ctypes.c_void_p()
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(self._stream), NON_BLOCKING)

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream.value or 0)

    def buffer(self, name: str, size: int) -> int:
        """The address of a buffer of at least `size` bytes, grown where needed."""
        held = self._buffers.get(name)
        if held is None or held[1] < size:
            if held is not None:
                self._call("cuMemFree_v2", held[0])
            address = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
            held = self._buffers[name] = (address, size)
        return int(held[0].value)

    def send(self, name: str, array: npt.NDArray[Any]) -> int:
        """Copy an array, C order, into a buffer; its address. Done before any later work on the stream."""
        address = self.buffer(name, array.nbytes)
        pointer = array.ctypes.data_as(ctypes.c_void_p)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), pointer, ctypes.c_size_t(array.nbytes))
        self._call("cuCtxSynchronize")
        return address

    def fetch(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """What the stream has written into a buffer, once it is done."""
        self._call("cuStreamSynchronize", self._stream)
        array = np.empty(shape, dtype)
        pointer = array.ctypes.data_as(ctypes.c_void_p)
        address = ctypes.c_uint64(self.buffer(name, array.nbytes))
        self._call("cuMemcpyDtoH_v2", pointer, address, ctypes.c_size_t(array.nbytes))
        return array

    def close(self) -> None:
        """Free the buffers, the stream and the context."""
        for address, _ in self._buffers.values():
            self._driver.cuMemFree_v2(address)
        self._buffers.clear()
        self._driver.cuStreamDestroy_v2(self._stream)
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            raise ComponentError(f"the CUDA driver refuses {name}: error {code}", field="gpu")
