"""CUDA's driver API through ctypes: asynchronous copies, events, pinned memory, how much memory is free.

Paddle owns a GPU's tensors and streams, but its Python interface copies whole tensors only and waits for them. A step
wants a part copied, in the order of the stream, while the host goes on. Addresses and streams are ints, as Paddle's
`data_ptr()` and raw streams are. (CUDA driver API reference, sections "Memory Management" and "Event Management".)
"""

from __future__ import annotations

import ctypes
import functools
import threading

import numpy as np

PORTABLE, NO_TIMING = 1, 2  # CU_MEMHOSTALLOC_PORTABLE, CU_EVENT_DISABLE_TIMING


class CudaError(RuntimeError):
    """A call of CUDA's driver has failed."""


class Driver:
    """The driver's calls for one device, by its number. Raises CudaError, or OSError where there is no driver."""

    def __init__(self, number: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._thread = threading.local()
        self._context = ctypes.c_void_p()
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), number)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)  # the one that frameworks use

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown').decode()} (CUDA error {status})")

    def _enter(self) -> None:
        """Each thread has a current context of its own, and begins without one."""
        if not getattr(self._thread, "ready", False):
            self._call("cuCtxSetCurrent", self._context)
            self._thread.ready = True

    def copy_to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        """In the order of the stream. Pinned memory has to stay as it is until then; other may change at once."""
        self._enter()
        sizes = (ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(device), ctypes.c_void_p(host), *sizes)

    def copy_to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        """In the order of the stream; wait for it by an event or for the stream."""
        self._enter()
        sizes = (ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))
        self._call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(host), ctypes.c_uint64(device), *sizes)

    def fill_with_zeros(self, device: int, nbytes: int, stream: int) -> None:
        """Set bytes to 0, in the order of the stream."""
        self._enter()
        sizes = (ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))
        self._call("cuMemsetD8Async", ctypes.c_uint64(device), ctypes.c_ubyte(0), *sizes)

    def wait_for_stream(self, stream: int) -> None:
        """Until all that was launched on it has run. Errors of kernels come out here."""
        self._enter()
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def memory(self) -> tuple[int, int]:
        """Bytes of the device's memory: free, and in all."""
        self._enter()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def name(self) -> str:
        """What the vendor calls the device."""
        self._enter()
        device, text = ctypes.c_int(), ctypes.create_string_buffer(100)
        self._call("cuCtxGetDevice", ctypes.byref(device))
        self._call("cuDeviceGetName", text, len(text), device)
        return text.value.decode()


class PinnedBuffer:
    """Host memory that the device can copy from and to by itself, and an event that tells when it has."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver = driver
        address, self._event = ctypes.c_void_p(), ctypes.c_void_p()
        driver._enter()
        driver._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)), PORTABLE)
        driver._call("cuEventCreate", ctypes.byref(self._event), NO_TIMING)
        self.address = address.value or 0
        self.memory = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))  # [nbytes] uint8

    def mark(self, stream: int) -> None:
        """What `wait` waits for is all that is on the stream by now."""
        self._driver._call("cuEventRecord", self._event, ctypes.c_void_p(stream))

    def wait(self) -> None:
        """Until the device has come to the latest mark; at once if there was none."""
        self._driver._enter()
        self._driver._call("cuEventSynchronize", self._event)

    def __del__(self) -> None:
        try:
            self.wait()
            self._driver._call("cuEventDestroy_v2", self._event)
            self._driver._call("cuMemFreeHost", ctypes.c_void_p(self.address))
        except (AttributeError, TypeError, CudaError):  # half made, or the process is ending
            pass


@functools.cache
def cuda_driver(number: int) -> Driver:
    """The driver of a device; one a process, since a context is."""
    return Driver(number)
