"""Tests that need a GPU, under PyTorch or else under Paddle; skipped where neither has one."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastdeploy.device.nvidia import NvidiaDevice
from fastdeploy.kernels.launch import TensorView, view
from tests.kernels.conftest import Stored


def open_gpu() -> NvidiaDevice | None:
    """FASTDEPLOY_TESTS_ON=paddle passes PyTorch by."""
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available() and os.environ.get("FASTDEPLOY_TESTS_ON") != "paddle":
            from bench.torch_device import TorchDevice

            return TorchDevice()
    try:
        from fastdeploy.device.paddle_core import sees_a_gpu
    except ImportError:
        return None
    if not sees_a_gpu():
        return None
    from fastdeploy.device.cuda import CUDADevice

    return CUDADevice()


@pytest.fixture(scope="session")
def device() -> NvidiaDevice:
    found = open_gpu()
    if found is None:
        pytest.skip("no GPU")
    return found


class OnDevice:
    """An array in the element type and memory that a kernel on the GPU sees."""

    def __init__(self, device: NvidiaDevice, values: np.ndarray, dtype: str) -> None:
        self._device, self.dtype = device, dtype
        memory = Stored(values, dtype).memory
        self.view: TensorView = view(device.empty(memory.shape, dtype))
        device.write(self.view, memory)

    @property
    def bits(self) -> np.ndarray:
        """What the memory holds now, bfloat16 as uint16."""
        return self._device.to_numpy(self.view)

    @property
    def values(self) -> np.ndarray:
        """The same; floats as float64."""
        bits = self.bits
        if self.dtype == "bfloat16":
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return bits.astype(np.float64) if self.dtype.startswith("float") else bits


@pytest.fixture
def put(device: NvidiaDevice) -> Callable[..., OnDevice]:
    """put(array, dtype): the array on the GPU."""
    return lambda values, dtype="bfloat16": OnDevice(device, np.asarray(values), dtype)


@pytest.fixture
def blank(put: Callable[..., OnDevice]) -> Callable[..., OnDevice]:
    """blank(shape, dtype): memory that a kernel has to fill; NaN until then, or -77 for integers."""
    return lambda shape, dtype="bfloat16": put(np.full(shape, -77 if "int" in dtype else np.nan), dtype)


@pytest.fixture
def normal(rng: np.random.Generator, put: Callable[..., OnDevice]) -> Callable[..., OnDevice]:
    """normal(*shape, dtype=, scale=): normally distributed numbers on the GPU."""
    return lambda *shape, dtype="bfloat16", scale=1.0: put(rng.standard_normal(shape) * scale, dtype)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """The distance of two arrays by their norms; NaN is never close."""
    distance: Any = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert distance < tolerance, f"off by {distance:.2g}"
