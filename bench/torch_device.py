"""The engine on PyTorch's tensors, for machines that have PyTorch but not Paddle's GPU build: a tool for measuring.

    from bench.torch_device import use_torch
    use_torch()             # before the first LLM or launch: open_device() gives a TorchDevice from now on
    llm = LLM(...)

It is fastdeploy/device/cuda.py on another framework, which shows that the kernels' door, DLPack, is a real one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import fastdeploy.device
from fastdeploy.device import Plan
from fastdeploy.device.driver import cuda_driver
from fastdeploy.device.nvidia import NvidiaDevice


class TorchDevice(NvidiaDevice):
    """An NVIDIA GPU on which PyTorch owns memory, streams and graphs. Triton's own driver launches on its stream."""

    owner = f"PyTorch {torch.__version__}"

    def __init__(self, ranks: int = 1) -> None:
        torch.cuda.set_device(0)
        torch.zeros(1, device="cuda")  # makes the device's context
        super().__init__(cuda_driver(0))
        self._stream = torch.cuda.Stream()  # the default one waits for all others, and can't be captured
        self.stream()
        self.provide_scratch()

    def stream(self) -> int:
        torch.cuda.set_stream(self._stream)  # PyTorch has a current one per thread, from which Triton takes it
        return self._stream.cuda_stream

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")

    def from_numpy(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).cuda()

    def record(self, launches: Callable[[], None]) -> Plan:
        self.stream()
        launches()  # compiles and loads what would otherwise be loaded in the middle of the capture
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launches()
        return graph


def use_torch() -> None:
    """Have `open_device` give a TorchDevice."""
    fastdeploy.device.open_device = TorchDevice
