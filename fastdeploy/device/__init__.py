"""Devices: allocation, copies, memory, recording, collectives. The only room that knows Paddle.

Everything above asks a `Device` for memory and gets tensors that Paddle owns; everything below (the kernels) sees them
through DLPack only. A step of the engine meets its device in four places:

    staging.host[...] = ...   the step's inputs, written by NumPy
    staging.upload()          one transfer to where kernels read them        (CPU: nothing to do, it is the same memory)
    plan.replay()             the recorded kernel launches of the step       (GPU: a CUDA graph; CPU: a list of calls)
    staging.fetch(name)       what kernels leave for the host                (GPU: on its way while the host goes on)

    cpu.py      the host's processors             cuda.py           an NVIDIA GPU
    group.py    ranks that share a model          host.py           free memory of the host
    driver.py   CUDA's driver, by ctypes: copies, events, memory
    paddle_core.py, quiet_paddle.py               Paddle's library alone, and all of Paddle
    root_logger.py                                what Paddle does to it, undone

This file is what they have in common; importing it imports nothing of Paddle.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from fastdeploy.kernels.launch import TensorView

GIB = 1 << 30
CACHE_LINE = 64
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Plan(Protocol):
    """A recorded sequence of kernel launches."""

    def replay(self) -> None:
        """Run the recorded launches, in their order, on the memory that they were recorded with."""


class Field(NamedTuple):
    """One named array of a staging area."""

    shape: tuple[int, ...]
    dtype: str  # "int32", "int64" or "float32"


class Staging(ABC):
    """What a step reads or leaves for the host: one flat area of memory, seen as named arrays on host and device.

    `host[name]` is a NumPy array to write; `device[name]` is the tensor that kernels read. Both keep their address for
    life, so that recorded launches can refer to them. One flat area, because a GPU then needs one copy a step, whatever
    the number of fields. All begin as zeros.
    """

    host: dict[str, np.ndarray]
    device: dict[str, Any]

    @abstractmethod
    def upload(self, rows: Iterable[int] | None = None) -> None:
        """Make what was written to `host` visible in `device`, for the launches that follow; `host` may be written
        again at once. rows: only these rows of every field have changed; None: anything may have."""

    @abstractmethod
    def fetch(self, name: str) -> Callable[[], np.ndarray]:
        """Have a field of `device` copied to the host as the launches so far leave it, whatever later ones do. Returns
        at once; what it returns, called, waits for the values."""


class Device(ABC):
    """Where tensors live and kernels run."""

    name: str
    step_tokens = 2048  # at most in a step, where the user does not say: requests that decode wait for all of it

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor with unspecified contents; `dtype` as Paddle names it ("float32", "bfloat16", "int32", ...)."""

    def empty_weights(self, shape: tuple[int, ...], dtype: str) -> Any:
        """The same for what lives as long as the model and is read in order, which a device may have a place for."""
        return self.empty(shape, dtype)

    @abstractmethod
    def from_numpy(self, array: np.ndarray) -> Any:
        """The array as a tensor on this device, without a copy where the device is the host.

        NumPy has no bfloat16: the bits of such numbers come as uint16, and it is for `kernels.launch.view` to be told.
        """

    @abstractmethod
    def write(self, tensor: Any, values: np.ndarray) -> None:
        """Copy `values`, of the same shape and dtype, to `tensor`."""

    @abstractmethod
    def to_numpy(self, tensor: Any) -> np.ndarray:
        """A copy of the tensor's present values on the host; bfloat16 numbers come as their bits, in uint16.

        Waits for the kernels that write them.
        """

    @abstractmethod
    def staging(self, fields: Mapping[str, Field]) -> Staging:
        """Memory for a step's inputs, see `Staging`."""

    @abstractmethod
    def activation_dtype(self, weight_dtype: str) -> str:
        """What activations are stored in when weights are stored in `weight_dtype`."""

    def linear_input_dtype(self, weight_dtype: str) -> str:
        """What those are stored in that linear layers of floats read."""
        return self.activation_dtype(weight_dtype)

    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that this process may still allocate on the device."""

    @abstractmethod
    def cache_budget(self, utilization: float) -> int:
        """Bytes that this process's KV cache may take at most, of what is free now. utilization: share of a GPU's
        memory that the process may use; a CPU has a rule of its own."""

    @abstractmethod
    def record(self, launches: Callable[[], None]) -> Plan:
        """Record the kernel launches that the function makes, as a plan to replay. They may run once meanwhile."""

    def run(self, launches: Callable[[], None]) -> None:
        """Make the kernel launches that the function makes. They may run while it makes the next ones; a CPU has run
        them all at the end."""
        launches()

    @abstractmethod
    def plan_sizes(self, most: int) -> Sequence[int]:
        """The batch sizes, up to `most`, that are worth a plan, ascending; a batch of another size is padded to the
        next one. The last is `most`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything launched so far has run."""

    def settle(self) -> None:  # noqa: B027 (a device need not)
        """A model has been loaded: give back what only that has needed."""

    @abstractmethod
    def describe(self) -> str:
        """The device in words, for the line logged at start."""


class PeerLost(RuntimeError):
    """Another rank did not take part: it has died, or has been silent for too long."""


def open_device(ranks: int = 1) -> Device:
    """The device that this process computes on, as one of `ranks` processes on this machine: the GPU, if Paddle was
    built for CUDA and sees one, else the CPU; $TRITON_DEFAULT_BACKEND=cpu asks for the CPU. Loads Paddle's library; for
    a GPU it imports Paddle."""
    from fastdeploy.device.host import release_pages_after

    release_pages_after("importing Triton")  # Paddle takes as much again
    from fastdeploy.device.paddle_core import sees_a_gpu

    if os.environ.get("TRITON_DEFAULT_BACKEND") != "cpu" and sees_a_gpu():
        from fastdeploy.device.cuda import CUDADevice

        return CUDADevice(ranks)
    from fastdeploy.device.cpu import CPUDevice

    return CPUDevice(ranks)


def field_offsets(fields: Mapping[str, Field]) -> tuple[dict[str, int], int]:
    """Where each field begins in a flat area, in bytes, each on its own cache line; and the area's size."""
    offsets: dict[str, int] = {}
    size = 0
    for name, field in fields.items():
        offsets[name] = size
        nbytes = int(np.prod(field.shape)) * np.dtype(field.dtype).itemsize
        size += -(-nbytes // CACHE_LINE) * CACHE_LINE
    return offsets, size


def host_fields(fields: Mapping[str, Field], flat: np.ndarray) -> dict[str, np.ndarray]:
    """The fields as named parts of `flat`, int64 of the size that `field_offsets` says."""
    offsets, _ = field_offsets(fields)
    found = {}
    for name, field in fields.items():
        dtype = np.dtype(field.dtype)
        start = offsets[name] // dtype.itemsize
        found[name] = flat.view(dtype)[start : start + int(np.prod(field.shape))].reshape(field.shape)
    return found


def device_fields(fields: Mapping[str, Field], area: TensorView) -> dict[str, TensorView]:
    """The fields as parts of `area`, the memory of the same layout that kernels read."""
    from fastdeploy.kernels.launch import TensorView

    found = {}
    for name, offset in field_offsets(fields)[0].items():
        shape, dtype = fields[name]
        flat = TensorView(area.pointer + offset, dtype, (int(np.prod(shape)),), (1,), area)
        found[name] = flat.reshape(*shape)
    return found
