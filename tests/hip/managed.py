"""A device whose operations take host arrays and see them in the device's own memory.

Under the shim host memory is the device's. A GPU may not read what NumPy allocated, so that on one every call copies
its arrays into managed buffers, and what it left there back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytrain import _native


class Managed:
    """`device` with operations on host arrays of any strides; arrays that share memory go on sharing it."""

    def __init__(self, device: _native.Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._device, name)
        if not callable(attribute):
            return attribute

        def call(*arguments: Any, **options: Any) -> Any:
            buffers: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
            moved = [self._moved(x, buffers) for x in arguments]
            result = attribute(*moved, **{key: self._moved(x, buffers) for key, x in options.items()})
            for host, copy in buffers.values():
                if host.flags.writeable:
                    host.view(np.uint8).reshape(-1)[:] = copy
            return result

        return call

    def _moved(self, x: Any, buffers: dict[int, tuple[NDArray[Any], NDArray[Any]]]) -> Any:
        if not isinstance(x, np.ndarray) or x.nbytes == 0:
            return x
        owner = x
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if not owner.flags.c_contiguous:
            raise ValueError(f"an array of shape {x.shape} lies in memory that is not contiguous")
        if id(owner) not in buffers:
            buffer = _native.Buffer(self._device, (owner.nbytes + 3) // 4, "fp32", "activations")
            copy = buffer.array.view(np.uint8)[: owner.nbytes]
            copy[:] = owner.view(np.uint8).reshape(-1)
            buffers[id(owner)] = (owner, copy)
        offset = x.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        return np.ndarray(x.shape, x.dtype, buffers[id(owner)][1], offset, x.strides)
