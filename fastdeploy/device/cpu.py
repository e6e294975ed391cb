"""The host's processors as a device; Triton kernels run by `fastdeploy.triton_cpu`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy import triton_cpu
from fastdeploy.device import (
    CACHE_LINE,
    GIB,
    Device,
    Field,
    Plan,
    Staging,
    device_fields,
    field_offsets,
    host_fields,
)
from fastdeploy.device.host import (
    ask_for_huge_pages,
    available_memory,
    has_huge_pages,
    release_free_memory,
    release_library_pages,
    release_pages_after,
)
from fastdeploy.device.paddle_core import HostTensor
from fastdeploy.kernels.launch import ITEM_SIZES, TensorView, cdiv, view
from fastdeploy.triton_cpu import runtime, toolchain
from fastdeploy.triton_cpu.compiler import CPUBackend, num_compiled


class SharedStaging(Staging):
    """On a CPU, host and device are the same memory."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        _, size = field_offsets(fields)
        area = HostTensor((size // 8,), "int64")
        flat = np.from_dlpack(area)  # which keeps the memory for as long as somebody has a part of it
        flat[:] = 0
        self.host = host_fields(fields, flat)
        self.device = device_fields(fields, view(area))

    def upload(self, rows: Iterable[int] | None = None) -> None:
        """Nothing to do."""

    def fetch(self, name: str) -> Callable[[], np.ndarray]:
        values = self.host[name].copy()
        return lambda: values


class HugePages:
    """Memory that is given out piece by piece, in pages of 2 MiB where the system has them.

    A core keeps the places of a few thousand pages. Weights in pages of 4 KiB are more, and looking a page up takes as
    long as reading a part of it. (A decode of Qwen3-0.6B's shapes, Q4_0, batch 1: 138 tok/s in small pages, 159.)

    Pieces follow each other in areas of AREA bytes, each on its own cache line; one that is larger has an area for
    itself. What was not written yet is not resident, but for the rest of a page.
    """

    PAGE, AREA = 2 << 20, 64 << 20

    def __init__(self) -> None:
        self._area: TensorView | None = None
        self._used = 0  # bytes of the area

    def piece(self, shape: tuple[int, ...], dtype: str) -> TensorView:
        """Memory for a tensor. Contents unspecified."""
        size = prod(shape) * ITEM_SIZES[dtype]
        if self._area is None or self._used + size > self._area.shape[0]:
            self._area, self._used = self._new_area(max(size, self.AREA)), 0
        area, start = self._area, self._used
        self._used += cdiv(size, CACHE_LINE) * CACHE_LINE
        return TensorView(area.pointer + start, dtype, (prod(shape),), (1,), area).reshape(*shape)

    def _new_area(self, size: int) -> TensorView:
        whole = view(HostTensor((cdiv(size, self.PAGE) * self.PAGE + self.PAGE,), "uint8"))
        start = -whole.pointer % self.PAGE
        area = TensorView(whole.pointer + start, "uint8", (whole.shape[0] - self.PAGE,), (1,), whole)
        ask_for_huge_pages(area.pointer, area.nbytes)
        return area


class CPUDevice(Device):
    """The host's processors, Triton kernels run by `fastdeploy.triton_cpu`.

    Paddle's memory begins on a page, which the packed weights rely on (a panel's row is one cache line), and
    is not resident before it is written: a large KV cache costs only what is used of it.
    """

    name = "cpu"
    # A layer's activations of more tokens leave the second-level caches (SmolLM2 in 4 bits, two threads, 32 requests of
    # 157 + 17 tokens: 1.47 s; in steps of 256, 1024, 2048: 1.49, 1.51, 1.55. Prompts of 4096: 2400, 2304 tok/s).
    step_tokens = 512

    def __init__(self, ranks: int = 1) -> None:
        triton_cpu.activate()
        runtime.share_cores(ranks)
        self._ranks = ranks
        self._weights = HugePages()
        release_pages_after("importing Paddle")
        # To compile a kernel takes 25 MB of Triton's library, 7 of them after the C compiler; `record` looks for those.
        toolchain.while_compiling(release_library_pages, release_free_memory)

    def empty(self, shape: tuple[int, ...], dtype: str) -> HostTensor:
        return HostTensor(shape, dtype)

    def empty_weights(self, shape: tuple[int, ...], dtype: str) -> TensorView:
        return self._weights.piece(shape, dtype)

    def from_numpy(self, array: np.ndarray) -> TensorView:
        return view(array)

    def write(self, tensor: Any, values: np.ndarray) -> None:
        _in_place(tensor)[...] = values

    def to_numpy(self, tensor: Any) -> np.ndarray:
        return _in_place(tensor).copy()

    def staging(self, fields: Mapping[str, Field]) -> Staging:
        return SharedStaging(fields)

    def activation_dtype(self, weight_dtype: str) -> str:
        # No CPU we target adds in half precision faster than in float32, and float32 keeps every digit.
        return "float32"

    def linear_input_dtype(self, weight_dtype: str) -> str:
        in_pairs = weight_dtype == "bfloat16" and CPUBackend.parse_options({}).bf16_products
        return "bfloat16" if in_pairs else self.activation_dtype(weight_dtype)

    def free_memory(self) -> int:
        return available_memory() // self._ranks

    def cache_budget(self, utilization: float) -> int:
        """A quarter of the free memory: the host is shared with everything else that its owner runs."""
        return self.free_memory() // 4

    def num_threads(self) -> int:
        """Threads that a kernel is spread over."""
        return runtime.thread_pool().threads

    def record(self, launches: Callable[[], None]) -> Plan:
        with runtime.record() as plan:
            launches()
        release_pages_after(f"compiling {num_compiled()} kernels")
        return plan

    def run(self, launches: Callable[[], None]) -> None:
        runtime.run_queued(launches)

    def plan_sizes(self, most: int) -> Sequence[int]:
        """Every one: a row of padding costs as much as any other, a plan a few milliseconds."""
        return range(1, most + 1)

    def synchronize(self) -> None:
        """Nothing to wait for: a launch on a CPU returns when it has run."""

    def settle(self) -> None:
        release_pages_after("loading")

    def describe(self) -> str:
        pages = "huge pages" if has_huge_pages() else "no huge pages"
        free = f"{self.free_memory() / GIB:.1f} GiB free"
        return f"CPU ({_processor_name()}), {self.num_threads()} threads, {free}, {pages}"


def _in_place(tensor: Any) -> np.ndarray:
    """A contiguous tensor's own memory as an array; bfloat16 numbers as their bits."""
    there = view(tensor)
    if not there.contiguous:
        raise ValueError(f"{there} with strides {there.strides} is no array in one piece")
    dtype = np.dtype({"bfloat16": "uint16"}.get(there.dtype, there.dtype))
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * there.nbytes).from_address(there.pointer))
    return memory.view(dtype).reshape(there.shape)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")
