"""An NVIDIA GPU on which Paddle owns memory, streams and graphs, and Triton launches on Paddle's stream.

Triton's own driver asks PyTorch for device and stream, or else launches on CUDA's default stream, which is not
Paddle's: `PaddleDriver` asks Paddle. It works with PyTorch installed or not.

Written for Paddle 3.3. It also runs on 2.6 (marked below), whose GPU build is the newest that PyPI has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
from triton.backends.nvidia import driver as nvidia

from fastdeploy.device import Plan
from fastdeploy.device.driver import cuda_driver
from fastdeploy.device.nvidia import NvidiaDevice
from fastdeploy.device.quiet_paddle import compute_on_this_thread, paddle
from fastdeploy.kernels.launch import forbid_early_launches
from fastdeploy.triton_cpu.cache import use_checked_cache

core: Any = paddle.base.core


def raw_stream(number: int) -> int:
    """The handle of Paddle's current stream on a device."""
    if hasattr(core, "_get_current_raw_stream"):
        return core._get_current_raw_stream(number)
    return core._get_current_stream(number).cuda_stream  # Paddle 2.6


class PaddleDriver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA GPUs, with device and stream as Paddle has them.

    Its parent's constructor is not called: it would import PyTorch, or settle for the default stream. What the parent
    says of targets and types is inherited; what it has for autotuning needs PyTorch, and we don't autotune.
    """

    def __init__(self, number: int) -> None:
        use_checked_cache()
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_stream = raw_stream
        self.get_current_device = lambda: number
        self.set_current_device = lambda device: None
        self.get_device_capability = paddle.device.cuda.get_device_capability


class ExportedTensor:
    """A tensor of Paddle 2.6, whose DLPack export is a function beside it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self) -> Any:
        return paddle.utils.dlpack.to_dlpack(self.tensor)


def exporting(tensor: Any) -> Any:
    """The tensor as a DLPack producer."""
    return tensor if hasattr(tensor, "__dlpack__") else ExportedTensor(tensor)


class CUDADevice(NvidiaDevice):
    """The GPU that Paddle has chosen, or device 0. One rank per process; ranks can't share a model on GPUs yet."""

    owner = f"Paddle {paddle.__version__}"

    def __init__(self, ranks: int = 1) -> None:
        if ranks > 1:
            raise ValueError(
                f"tensor_parallel_size={ranks}: ranks can't share a model on GPUs yet; use one GPU, or the CPU with "
                "TRITON_DEFAULT_BACKEND=cpu"
            )
        number = int(os.environ.get("FLAGS_selected_gpus", "0").split(",")[0])  # noqa: SIM112 (Paddle's name for it)
        compute_on_this_thread()
        paddle.device.set_device(f"gpu:{number}")
        self._place = paddle.CUDAPlace(number)
        # The first tensor makes the device's context, which Triton would otherwise make, of device 0.
        self._first = paddle.to_tensor(np.zeros(1, np.float32), place=self._place)
        super().__init__(cuda_driver(number), number)
        if not hasattr(core, "_get_current_raw_stream"):
            forbid_early_launches()  # Paddle 2.6: to its CUDA 11.8 a graph has no such edges
        if not isinstance(triton.runtime.driver._active, PaddleDriver):
            triton.runtime.driver.set_active(PaddleDriver(number))
        self.provide_scratch()

    def stream(self) -> int:
        return raw_stream(self.number)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return exporting(paddle.empty(list(shape), dtype=getattr(paddle, dtype)))

    def from_numpy(self, array: np.ndarray) -> Any:
        return exporting(paddle.to_tensor(np.ascontiguousarray(array), place=self._place))

    def record(self, launches: Callable[[], None]) -> Plan:
        launches()  # compiles and loads what would otherwise be loaded in the middle of the capture
        self.synchronize()
        from paddle.device.cuda.graphs import CUDAGraph  # exists on a CPU, too, but can't be made there

        graph = CUDAGraph(self._place, mode="thread_local")
        graph.capture_begin()
        try:
            launches()
        finally:
            graph.capture_end()
        return graph
