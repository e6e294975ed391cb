"""Where kernels are measured: memory, random numbers, clocks and peaks of a CPU or a GPU.

NumpyMachine   the host; tensors are NumPy's, bfloat16 lies in uint16; our launches are replayed as a plan
TorchMachine   an NVIDIA GPU; tensors are PyTorch's; whatever a provider launches is replayed as a CUDA graph.
               On "cpu" it has the host's clock: so the way to a GPU can be tested without one.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdeploy.kernels.launch import TensorView, provide_scratch, view

REPLAYS = 11  # of which the median is taken
GRAPH_SECONDS = 1e-3  # a graph lasts this long at least, so that starting it (about 5 us) does not show
RUN_SECONDS = 2e-3  # the same on a CPU, where the clock and the thread pool's waking cost about 5 us
POOL = (1 << 22) + 15  # random numbers that larger tensors repeat on a CPU, which draws 100 million a second
DISTRIBUTIONS = ("numpy", "triton", "torch", "paddlepaddle", "paddlepaddle-gpu", "liger-kernel", "flag-gems",
                 "flashinfer-python")  # fmt: skip
Call = Callable[[], Any]


class Unavailable(Exception):
    """A provider that this machine does not have, or an operation that a provider does not have."""


class Peaks(NamedTuple):
    """What this machine reaches: bytes per second (read and written), floating-point operations per second."""

    bandwidth: float
    arithmetic: float


class Machine(ABC):
    """A processor and its memory.

    kind: "cpu" or "cuda". activations: the dtype of what flows between kernels; weights and KV caches are bfloat16.
    rotation_bytes: inputs that are used in turn amount to this much together, so that no cache holds them.
    memory_bytes: most memory that they may take. most_sets: and most sets of them, as each is prepared from Python.
    """

    kind: str
    activations: str
    rotation_bytes: int
    memory_bytes: int
    most_sets: int

    @abstractmethod
    def normal(self, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Any:
        """Normally distributed numbers; the same ones after the same calls in every process."""

    @abstractmethod
    def from_numpy(self, array: np.ndarray) -> Any:
        """A copy of the array on this machine."""

    @abstractmethod
    def blank(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Memory for an output: NaN, or -77 in integers, so that what a kernel leaves out is seen."""

    @abstractmethod
    def cast(self, tensor: Any, dtype: str) -> Any:
        """The tensor's numbers in another float type."""

    @abstractmethod
    def clone(self, tensor: Any) -> Any:
        """The same numbers in other memory."""

    @abstractmethod
    def view(self, tensor: Any) -> TensorView:
        """As launchers take it."""

    @abstractmethod
    def float64(self, tensor: Any) -> np.ndarray:
        """The numbers as NumPy's float64."""

    @abstractmethod
    def wait(self) -> None:
        """Until everything launched has run. RuntimeError if it failed."""

    @abstractmethod
    def seconds(self, calls: Sequence[Call], estimate: float, replayable: bool) -> list[float]:
        """Seconds per call, a mean over all calls for each of REPLAYS replays.

        estimate: about how long a call takes. replayable: the calls are nothing but launches of our own kernels.
        """

    @abstractmethod
    def peaks(self) -> Peaks:
        """Measured now."""

    @abstractmethod
    def description(self) -> str:
        """The processor in words."""

    def once(self, call: Call) -> float:
        """Seconds of one call and of waiting for it."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def release(self) -> None:  # noqa: B027 (most have nothing to do)
        """Give back what was freed."""

    def facts(self) -> list[str]:
        """Device, clocks and versions, a line each."""
        versions = [f"{name} {version}" for name in DISTRIBUTIONS if (version := _version(name))]
        host = f"Python {platform.python_version()}, {platform.platform()}"
        return [self.description(), f"{', '.join(versions)}; {host}"]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


class NumpyMachine(Machine):
    """The host's processors; our kernels run through `fastdeploy.triton_cpu`."""

    kind = "cpu"
    activations = "float32"
    rotation_bytes = 512 << 20  # as in bench/backend.py
    memory_bytes = 1 << 30
    most_sets = 256

    def __init__(self) -> None:
        from fastdeploy import triton_cpu

        triton_cpu.activate()
        self.random = np.random.default_rng(0)

    def normal(self, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
        size = math.prod(shape)
        drawn = self.random.standard_normal(min(size, POOL), dtype=np.float32) * np.float32(scale)
        numbers = drawn if dtype == "float32" else _bfloat16(drawn)
        found = _aligned(shape, numbers.dtype)
        found[...] = np.resize(numbers, shape)
        return found

    def from_numpy(self, array: np.ndarray) -> np.ndarray:
        return self.clone(array)

    def blank(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        found = _aligned(shape, np.dtype("uint16" if dtype == "bfloat16" else dtype))
        found[...] = 0x7FC0 if dtype == "bfloat16" else np.nan if dtype.startswith("float") else -77
        return found

    def cast(self, tensor: np.ndarray, dtype: str) -> np.ndarray:
        numbers = _float32(tensor) if tensor.dtype == np.uint16 else tensor
        return _bfloat16(numbers) if dtype == "bfloat16" else numbers.astype(dtype)

    def clone(self, tensor: np.ndarray) -> np.ndarray:
        found = _aligned(tensor.shape, tensor.dtype)
        found[...] = tensor
        return found

    def view(self, tensor: np.ndarray) -> TensorView:
        return view(tensor, "bfloat16") if tensor.dtype == np.uint16 else view(tensor)

    def float64(self, tensor: np.ndarray) -> np.ndarray:
        tensor = np.asarray(tensor)  # one element of an array is no array
        return (_float32(tensor) if tensor.dtype == np.uint16 else tensor).astype(np.float64)

    def wait(self) -> None:
        pass  # a launch returns when it has run

    def seconds(self, calls: Sequence[Call], estimate: float, replayable: bool) -> list[float]:
        return _clocked(calls, estimate, replayable)

    def peaks(self) -> Peaks:
        return _host_peaks()

    def description(self) -> str:
        from fastdeploy.triton_cpu.runtime import thread_pool
        from fastdeploy.triton_cpu.toolchain import toolchain

        cpuinfo = Path("/proc/cpuinfo").read_text()
        name = cpuinfo.partition("model name")[2].partition(":")[2].partition("\n")[0].strip() or platform.machine()
        clock = cpuinfo.partition("cpu MHz")[2].partition(":")[2].partition("\n")[0].strip() or "?"
        cores = f"{os.cpu_count()} cores at {clock} MHz (now)"
        return f"{name}, {cores}, {thread_pool().threads} threads, {toolchain().instruction_set}"


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that begins on a cache line: a packed weight's panel is one, and Paddle's memory begins on one, too."""
    size = math.prod(shape) * dtype.itemsize
    area = np.empty(size + 64, np.uint8)
    start = -area.ctypes.data % 64
    return area[start : start + size].view(dtype).reshape(shape)


def _bfloat16(numbers: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _clocked(calls: Sequence[Call], estimate: float, replayable: bool) -> list[float]:
    """`Machine.seconds` by the host's clock."""
    run = _recorded(calls) if replayable else _in_turn(calls)
    repeats = max(1, math.ceil(RUN_SECONDS / (estimate * len(calls))))
    run()
    samples = []
    for _ in range(REPLAYS):
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        samples.append((time.perf_counter() - started) / (repeats * len(calls)))
    return samples


def _host_peaks() -> Peaks:
    """The two C loops of bench/backend.py: memory read, float32 multiply-add."""
    from bench import backend

    loops = backend.Peaks()
    bandwidth = statistics.median(loops.bandwidth() for _ in range(REPLAYS))
    return Peaks(bandwidth, statistics.median(loops.arithmetic() for _ in range(REPLAYS)))


def _recorded(calls: Sequence[Call]) -> Call:
    from fastdeploy.triton_cpu import runtime

    with runtime.record() as plan:
        for call in calls:
            call()
    return plan.replay


def _in_turn(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


class TorchMachine(Machine):
    """PyTorch's memory, of an NVIDIA GPU ("cuda") or, for tests, of the host ("cpu")."""

    rotation_bytes = 256 << 20  # an H200's L2 has 60 MB, an H100's 50
    memory_bytes = 16 << 30
    most_sets = 64

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self.torch = torch
        self.kind = device
        self.activations = "bfloat16" if device == "cuda" else "float32"
        self.device = torch.device(device)
        torch.set_grad_enabled(False)
        torch.zeros(1, device=self.device)  # makes the context that Triton's driver takes
        self.random = torch.Generator(device=self.device)
        self.random.manual_seed(0)
        if device == "cpu":
            from fastdeploy import triton_cpu

            triton_cpu.activate()
        else:
            from fastdeploy.device.nvidia import SCRATCH

            provide_scratch(torch.empty(SCRATCH, dtype=torch.uint8, device=self.device))

    def normal(self, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Any:
        numbers = self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=self.device)
        return numbers.normal_(0.0, scale, generator=self.random)

    def from_numpy(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(array)).to(self.device, copy=True)

    def blank(self, shape: tuple[int, ...], dtype: str) -> Any:
        value = math.nan if "float" in dtype else -77
        return self.torch.full(shape, value, dtype=getattr(self.torch, dtype), device=self.device)

    def cast(self, tensor: Any, dtype: str) -> Any:
        return tensor.to(getattr(self.torch, dtype))

    def clone(self, tensor: Any) -> Any:
        return tensor.clone()

    def view(self, tensor: Any) -> TensorView:
        return view(tensor)

    def float64(self, tensor: Any) -> np.ndarray:
        return tensor.to(self.torch.float64).cpu().numpy()

    def wait(self) -> None:
        if self.kind == "cuda":
            self.torch.cuda.synchronize()

    def release(self) -> None:
        if self.kind == "cuda":
            self.torch.cuda.empty_cache()

    def seconds(self, calls: Sequence[Call], estimate: float, replayable: bool) -> list[float]:
        if self.kind == "cpu":
            return _clocked(calls, estimate, replayable)
        passes = max(1, math.ceil(GRAPH_SECONDS / (estimate * len(calls))))
        graph, _outputs = self._captured(calls, passes)
        return [seconds / (passes * len(calls)) for seconds in self._replayed(graph)]

    def _captured(self, calls: Sequence[Call], passes: int) -> tuple[Any, list[Any]]:
        """A graph of all calls, `passes` times, and what they returned, which keeps their memory apart."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is compiled or loaded at a first call must not be captured
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = [call() for _ in range(passes) for call in calls]
        return graph, outputs

    def _replayed(self, graph: Any) -> list[float]:
        """Seconds of each of REPLAYS replays, after two that warm up."""
        torch = self.torch
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
        graph.replay()
        graph.replay()
        for start, end in events:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def peaks(self) -> Peaks:
        """A copy within the device, and a product of two bfloat16 matrices of 8192 x 8192 random numbers."""
        if self.kind == "cpu":
            return _host_peaks()
        copying, multiplying = self._copy(1 << 30), self._product(8192)
        self.release()
        return Peaks(2 * (1 << 30) / copying, 2 * 8192**3 / multiplying)

    def _copy(self, size: int) -> float:
        """Seconds to copy `size` bytes: by a kernel of PyTorch's, as `copy_` may go by a slower copy engine."""
        source = self.torch.ones(size // 4, dtype=self.torch.int32, device=self.device)
        target = self.torch.empty_like(source)
        ways = [lambda: target.copy_(source), lambda: self.torch.add(source, 1, out=target)]
        return min(statistics.median(self.seconds([way], 5e-4, replayable=False)) for way in ways)

    def _product(self, width: int) -> float:
        """Seconds to multiply two square matrices."""
        a, b = (self.normal((width, width), "bfloat16") for _ in range(2))
        out = self.torch.empty_like(a)
        return statistics.median(self.seconds([lambda: self.torch.matmul(a, b, out=out)], 1e-3, replayable=False))

    def description(self) -> str:
        if self.kind == "cpu":
            return f"PyTorch on {platform.processor() or platform.machine()}"
        properties = self.torch.cuda.get_device_properties(0)
        size = f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        return f"{properties.name}, {size}, CUDA {self.torch.version.cuda}; {_nvidia_smi()}"


def _nvidia_smi() -> str:
    """Driver, clocks and power limit at this moment, or why they are unknown."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi gave no answer ({error})"
    driver, sm, memory, most, power = (part.strip() for part in answer.split(","))
    return f"driver {driver}, clocks {sm} (SM, at most {most}) and {memory} (memory), power limit {power}"


def open_machine() -> Machine:
    """A GPU where PyTorch finds one, else the host."""
    try:
        import torch
    except ImportError:
        return NumpyMachine()
    return TorchMachine() if torch.cuda.is_available() else NumpyMachine()
