"""NumPy arrays as kernels see them.

Floats smaller than NumPy's lie in unsigned integers; their values are exact in float64.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from fastdeploy.triton_cpu.views import ArrayView

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float32", "float64", "float16", "bfloat16")
FP8 = ("float8_e4m3fn", "float8_e5m2")
_STORAGE = {"float16": np.uint16, "bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}
# (exponent bits, mantissa bits)
_FORMATS = {"float16": (5, 10), "bfloat16": (8, 7), "float8_e4m3fn": (4, 3), "float8_e5m2": (5, 2)}


def storage(dtype: str) -> np.dtype:
    """NumPy's type of an element in memory."""
    return np.dtype(_STORAGE.get(dtype, dtype))


@functools.lru_cache(None)
def values_of_codes(dtype: str) -> np.ndarray:
    """The value of every code of a small float type, as float64, from the definition of the format."""
    exponent_bits, mantissa_bits = _FORMATS[dtype]
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << mantissa_bits) - 1)) / 2.0**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    with np.errstate(over="ignore"):
        values = sign * np.where(
            exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - float(bias))
        )
    if dtype == "float8_e4m3fn":  # no infinities: only the last code of each sign is no number
        return np.where((codes & 0x7F) == 0x7F, np.nan, values)
    top = exponent == (1 << exponent_bits) - 1
    return np.where(top, np.where(fraction == 0, sign * np.inf, np.nan), values)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as stored: rounded to nearest, ties to even; fp8 saturates, the others overflow to infinity."""
    values = np.asarray(values)
    if dtype not in _FORMATS:
        return np.array(values, dtype, order="C")
    table = values_of_codes(dtype)
    half = len(table) // 2
    finite = np.flatnonzero(np.isfinite(table[:half]))
    magnitudes = table[finite]
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = np.abs(values.astype(np.float64))
    above = np.searchsorted(magnitudes, np.where(np.isnan(x), 0, x))
    below = np.maximum(above - 1, 0)
    overflow = magnitudes[-1] * 2 - magnitudes[-2]  # where the next number would be
    upper = np.append(magnitudes, overflow)[np.minimum(above, len(magnitudes))]
    middle = (magnitudes[below] + upper) / 2
    code = np.where((x > middle) | ((x == middle) & (above % 2 == 0)) | (x == upper), above, below)
    if dtype in FP8:
        code = np.minimum(code, len(magnitudes) - 1)
    quiet_nan = {"float16": 0x7E00, "bfloat16": 0x7FC0}.get(dtype, 0x7F)
    code = np.where(np.isnan(x), quiet_nan, code)
    return (code + np.where(np.signbit(values), half, 0)).astype(_STORAGE[dtype])


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored elements as numbers: float64 for small floats."""
    return values_of_codes(dtype)[stored] if dtype in _FORMATS else stored


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return decode(encode(values, dtype), dtype)


class Tensor(ArrayView):
    """A tensor argument: `stored` is the memory, `values` what it means now."""

    def __init__(self, values: np.ndarray, dtype: str | None = None) -> None:
        values = np.asarray(values)
        dtype = dtype or str(values.dtype)
        super().__init__(encode(values, dtype), dtype)

    @property
    def stored(self) -> np.ndarray:
        return self.array

    @property
    def values(self) -> np.ndarray:
        return decode(self.stored, self.dtype)


def empty(shape, dtype: str = "float32") -> Tensor:  # type: ignore[no-untyped-def]
    """Memory that a kernel has to fill: bytes of 0xA5 until then."""
    tensor = Tensor(np.zeros(shape), dtype)
    tensor.stored.view(np.uint8)[...] = 0xA5
    return tensor


def numbers(rng: np.random.Generator, shape, dtype: str) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Random values of a type, with its extremes among them where there is room."""
    if dtype in INTEGERS:
        limits = np.iinfo(dtype)
        found = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
        special = [limits.min, limits.max, 0, 1, limits.max - 1, limits.min + 1]
    else:
        found = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)).astype(
            "float64" if dtype == "float64" else "float32"
        )
        special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0]
    flat = found.reshape(-1)
    if flat.size > 64:
        flat[rng.choice(flat.size, len(special), replace=False)] = special
    return found


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a Python program in a process of its own, with `environment` added to ours."""
    return _run(["-c", code], environment)


def run_module(name: str, *arguments: str, **environment: str) -> None:
    """`python -m name arguments` in a process of its own; an AssertionError with its last words if it fails."""
    done = _run(["-m", name, *arguments], environment)
    assert done.returncode == 0, done.stderr[-4000:]


def _run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": path} | environment,
        timeout=300,
    )
