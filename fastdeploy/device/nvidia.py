"""An NVIDIA GPU, whoever owns its memory, its streams and its graphs: Paddle (cuda.py), or PyTorch in benchmarks.

What they don't have in common is three methods: allocate, name the stream, record. All else goes by addresses, in the
order of that one stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdeploy.device import GIB, Device, Field, Staging, device_fields, field_offsets, host_fields
from fastdeploy.device.driver import Driver, PinnedBuffer
from fastdeploy.kernels.launch import provide_scratch, view

NUMPY_DTYPES = {"bfloat16": "uint16", "bool": "uint8"}  # of those that NumPy lacks, or that have no fixed bits
SCRATCH = 64 << 20  # bytes for tensor descriptors, 256 a program of the prefill kernel: for 128 KV heads, 65536 rows
RESERVE = 1 << 30  # left of the share that may be used: kernels' code, CUDA graphs, what others allocate meanwhile


class PinnedStaging(Staging):
    """A staging area in the host's memory and its likeness on the device.

    The host writes ordinary memory, which keeps what was written; an upload copies it to one of two pinned buffers and
    from there to the device. So the host may fill in the next step while the device has yet to copy this one.
    """

    def __init__(self, device: NvidiaDevice, fields: Mapping[str, Field]) -> None:
        self._offsets, size = field_offsets(fields)
        flat = np.zeros(size // 8, np.int64)
        self._bytes = flat.view(np.uint8)
        self._area = view(device.empty((size // 8,), "int64"))
        self._driver, self._stream = device.driver, device.stream
        self.host = host_fields(fields, flat)
        self.device = device_fields(fields, self._area)
        self._uploads = [PinnedBuffer(self._driver, size) for _ in range(2)]
        self._fetches: dict[str, list[PinnedBuffer]] = {}
        self._driver.fill_with_zeros(self._area.pointer, size, self._stream())

    def upload(self, rows: Iterable[int] | None = None) -> None:
        buffer = self._uploads[0]
        self._uploads.reverse()
        buffer.wait()
        for start, nbytes in self._parts(rows):
            buffer.memory[start : start + nbytes] = self._bytes[start : start + nbytes]
            pointers = (self._area.pointer + start, buffer.address + start)
            self._driver.copy_to_device(*pointers, nbytes, self._stream())
        buffer.mark(self._stream())

    def _parts(self, rows: Iterable[int] | None) -> list[tuple[int, int]]:
        """First byte and length of what an upload copies."""
        if rows is None:
            return [(0, self._bytes.nbytes)]
        strides = {name: array.strides[0] for name, array in self.host.items()}
        return [(self._offsets[name] + row * strides[name], strides[name]) for row in rows for name in strides]

    def fetch(self, name: str) -> Callable[[], np.ndarray]:
        array = self.host[name]
        if name not in self._fetches:
            self._fetches[name] = [PinnedBuffer(self._driver, array.nbytes) for _ in range(2)]
        buffer = self._fetches[name][0]
        self._fetches[name].reverse()
        self._driver.copy_to_host(buffer.address, self.device[name].pointer, array.nbytes, self._stream())
        buffer.mark(self._stream())

        def values() -> np.ndarray:
            buffer.wait()
            return buffer.memory.view(array.dtype).reshape(array.shape).copy()

        return values


class NvidiaDevice(Device):
    """An NVIDIA GPU; launches and copies go to one stream, in order.

    number: of the device among those that the process sees. owner: of its memory, streams and graphs, in words.
    """

    name = "cuda"
    owner: str

    def __init__(self, driver: Driver, number: int = 0) -> None:
        self.driver = driver
        self.number = number

    @abstractmethod
    def stream(self) -> int:
        """The handle of the stream that kernels are launched on."""

    def provide_scratch(self) -> None:
        """Give kernels scratch memory, for as long as the process lives."""
        provide_scratch(self.empty((SCRATCH,), "uint8"))

    def write(self, tensor: Any, values: np.ndarray) -> None:
        there, values = view(tensor), np.ascontiguousarray(values)
        if values.nbytes != there.nbytes or not there.contiguous:
            raise ValueError(f"{values.dtype}{list(values.shape)} cannot be written to {there}")
        self.driver.copy_to_device(there.pointer, values.ctypes.data, values.nbytes, self.stream())
        self.synchronize()  # `values` may go now

    def to_numpy(self, tensor: Any) -> np.ndarray:
        there = view(tensor)
        if not there.contiguous:
            raise ValueError(f"{there} with strides {there.strides} cannot be copied to the host in one piece")
        values = np.empty(there.shape, NUMPY_DTYPES.get(there.dtype, there.dtype))
        self.driver.copy_to_host(values.ctypes.data, there.pointer, values.nbytes, self.stream())
        self.synchronize()
        return values

    def staging(self, fields: Mapping[str, Field]) -> Staging:
        return PinnedStaging(self, fields)

    def activation_dtype(self, weight_dtype: str) -> str:
        # Tensor cores multiply what has the type of the weights.
        return weight_dtype

    def free_memory(self) -> int:
        return self.driver.memory()[0]

    def cache_budget(self, utilization: float) -> int:
        free, total = self.driver.memory()
        return max(0, int(free - (1 - utilization) * total) - RESERVE)

    def plan_sizes(self, most: int) -> Sequence[int]:
        """Few, as a CUDA graph takes memory and a fraction of a second: the weights, which all rows share, are most of
        a small step's time, and tiles of 16 rows and more are padded anyway."""
        sizes = (1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, most, 32))
        return [*(size for size in sizes if size < most), most]

    def synchronize(self) -> None:
        self.driver.wait_for_stream(self.stream())

    def describe(self) -> str:
        return f"{self.driver.name()} under {self.owner}, {self.free_memory() / GIB:.1f} GiB free"
