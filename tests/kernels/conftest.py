"""Tests of kernels run on Triton's CPU backend, with tensors in NumPy's memory."""

from collections.abc import Callable

import numpy as np
import pytest

from fastdeploy import triton_cpu
from fastdeploy.kernels.launch import TensorView, view


@pytest.fixture(scope="session", autouse=True)
def cpu_backend() -> None:
    triton_cpu.activate()


class Stored:
    """An array in the memory and element type that a kernel sees; bfloat16 lies in uint16."""

    def __init__(self, values: np.ndarray, dtype: str) -> None:
        self.dtype = dtype
        self.memory = _to_bfloat16(values) if dtype == "bfloat16" else np.ascontiguousarray(values, dtype=dtype)
        self.view: TensorView = view(self.memory, dtype)

    @property
    def values(self) -> np.ndarray:
        """What the memory holds now; floats as float64."""
        if self.dtype == "bfloat16":
            return (self.memory.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return self.memory.astype(np.float64) if self.dtype.startswith("float") else self.memory

    @property
    def bits(self) -> bytes:
        return self.memory.tobytes()


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@pytest.fixture
def store() -> Callable[..., Stored]:
    """store(array, dtype): the array as kernels see it."""
    return lambda values, dtype="float32": Stored(np.asarray(values), dtype)


@pytest.fixture
def blank() -> Callable[..., Stored]:
    """blank(shape, dtype): memory that a kernel has to fill; NaN until then, or -77 for integers."""
    return lambda shape, dtype="float32": Stored(np.full(shape, -77 if dtype.startswith("int") else np.nan), dtype)


@pytest.fixture
def normal(rng: np.random.Generator) -> Callable[..., Stored]:
    """normal(*shape, dtype=): normally distributed numbers as kernels see them."""
    return lambda *shape, dtype="float32": Stored(rng.standard_normal(shape, dtype=np.float32), dtype)
