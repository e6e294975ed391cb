"""exp, log and their kind: accuracy in units in the last place over the whole range of float32, and special values."""

import math

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .arrays import Tensor, empty

NAMES = (
    "exp",
    "exp2",
    "log",
    "log2",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "erf",
    "floor",
    "ceil",
    "tanh",
    "sigmoid",
    "sqrt_rn",
)


@triton.jit
def function_kernel(x_ptr, out_ptr, total, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + 0 * total + i, tl.exp(x))
    tl.store(out_ptr + 1 * total + i, tl.exp2(x))
    tl.store(out_ptr + 2 * total + i, tl.log(x))
    tl.store(out_ptr + 3 * total + i, tl.log2(x))
    tl.store(out_ptr + 4 * total + i, tl.sqrt(x))
    tl.store(out_ptr + 5 * total + i, tl.rsqrt(x))
    tl.store(out_ptr + 6 * total + i, tl.sin(x))
    tl.store(out_ptr + 7 * total + i, tl.cos(x))
    tl.store(out_ptr + 8 * total + i, tl.erf(x))
    tl.store(out_ptr + 9 * total + i, tl.floor(x))
    tl.store(out_ptr + 10 * total + i, tl.ceil(x))
    tl.store(out_ptr + 11 * total + i, libdevice.tanh(x))
    tl.store(out_ptr + 12 * total + i, tl.sigmoid(x))
    tl.store(out_ptr + 13 * total + i, tl.sqrt_rn(x))


def reference(name, x):
    return {
        "rsqrt": lambda v: 1 / np.sqrt(v), "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "sqrt_rn": np.sqrt,
        "erf": np.vectorize(math.erf),
    }.get(name, getattr(np, name, None))(x)  # fmt: skip


def units(found, exact):
    """Distance in units in the last place of a float32 at `exact`; 0 where both are the same infinity or NaN."""
    with np.errstate(all="ignore"):
        nearest = exact.astype(np.float32)
        same = (found == nearest) | (np.isnan(found) & np.isnan(exact))
        spacing = np.spacing(np.minimum(np.abs(nearest), np.float32(3.4e38))).astype(float)
        return np.where(same, 0, np.abs(found.astype(float) - exact) / spacing)


@pytest.fixture(scope="module")
def evaluated():
    """(x, {function: results}) over all magnitudes and, more closely, where functions vary."""
    bits = np.arange(0, 2**32, 2**32 // 20000, dtype=np.uint64).astype(np.uint32)
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1.0,
        -1.0,
        1e-45,
        1.2e-38,
        88.72283,
        88.7229,
        -87.4,
        -103.9,
        -104,
        128,
        -149,
        -150,
    ]
    x = np.concatenate([bits.view(np.float32), np.linspace(-110, 110, 9000), np.linspace(-3, 3, 3000), special])
    x = np.resize(x.astype(np.float32), -(-x.size // 256) * 256)
    out = empty((len(NAMES), x.size))
    function_kernel[(x.size // 256,)](Tensor(x), out, x.size, 256)
    return x, dict(zip(NAMES, out.stored))


# exp of a subnormal result and the like keep the bound too. sigmoid adds a division and a sum to its exp.
BOUNDS = {"exp": 2, "exp2": 2, "log": 2, "log2": 3, "tanh": 3, "sigmoid": 4, "rsqrt": 1.5, "sin": 1, "cos": 1, "erf": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_accuracy_over_the_whole_range(name, evaluated):
    x, results = evaluated
    with np.errstate(all="ignore"):
        exact = reference(name, x.astype(float))
    error = units(results[name], exact)
    if name == "log2":  # near 1 the result is a small difference
        error = np.where(np.abs(x - 1) < 0.5, error / 2, error)
    if name == "sigmoid":  # 1 / (1 + exp(-x)): exp overflows where the result is below 1e-38
        error = np.where(x < -87, 0, error)
    worst = np.nanargmax(error)
    assert error[worst] <= BOUNDS.get(name, 0.5), (
        f"{name}({x[worst]!r}) = {results[name][worst]!r}, not {exact[worst]!r}"
    )
    assert (np.isnan(results[name]) == np.isnan(exact)).all()


@triton.jit
def double_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + 0 * N + i, tl.exp(x))
    tl.store(out_ptr + 1 * N + i, tl.log(x))
    tl.store(out_ptr + 2 * N + i, tl.sqrt(x))
    tl.store(out_ptr + 3 * N + i, tl.rsqrt(x))
    tl.store(out_ptr + 4 * N + i, tl.sin(x))
    tl.store(out_ptr + 5 * N + i, tl.floor(x))
    tl.store(out_ptr + 6 * N + i, tl.exp2(x))
    tl.store(out_ptr + 7 * N + i, tl.abs(-x))


def test_functions_of_float64(rng):
    x = rng.uniform(0.01, 50, 128)
    out = empty((8, 128), "float64")
    double_kernel[(1,)](Tensor(x), out, 128)
    expected = [np.exp(x), np.log(x), np.sqrt(x), 1 / np.sqrt(x), np.sin(x), np.floor(x), np.exp2(x), x]
    np.testing.assert_allclose(out.stored, expected, rtol=1e-14, atol=1e-15)


@triton.jit
def libdevice_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + 0 * N + i, libdevice.pow(x, 1.5))
    tl.store(out_ptr + 1 * N + i, libdevice.atan2(x, x + 1))
    tl.store(out_ptr + 2 * N + i, libdevice.rint(x))
    tl.store(out_ptr + 3 * N + i, libdevice.log1p(x))
    tl.store(out_ptr + 4 * N + i, libdevice.expm1(x))
    tl.store(out_ptr + 5 * N + i, libdevice.erfc(x))
    tl.store(out_ptr + 6 * N + i, libdevice.trunc(-x))
    tl.store(out_ptr + 7 * N + i, libdevice.isnan(tl.where(x > 1, float("nan"), x)).to(tl.float32))
    tl.store(out_ptr + 8 * N + i, libdevice.fast_expf(x))


def test_libdevice_names_mean_those_of_libm(rng):
    x = rng.uniform(0.01, 5, 64).astype(np.float32)
    out = empty((9, 64))
    libdevice_kernel[(1,)](Tensor(x), out, 64)
    x = x.astype(float)
    erfc = np.vectorize(math.erfc)(x)
    expected = [
        x**1.5,
        np.arctan2(x, x + 1),
        np.rint(x),
        np.log1p(x),
        np.expm1(x),
        erfc,
        -np.floor(x),
        x > 1,
        np.exp(x),
    ]
    np.testing.assert_allclose(out.stored, expected, rtol=1e-5)


@triton.jit
def high_product_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.umulhi(tl.load(x_ptr + i), tl.load(y_ptr + i)))


@pytest.mark.parametrize("dtype", ["uint32", "uint64", "int32"])
def test_the_high_half_of_a_product(dtype, rng):
    limits = np.iinfo(dtype)
    x, y = rng.integers(limits.min, limits.max, (2, 64), dtype, endpoint=True)
    out = empty(64, dtype)
    high_product_kernel[(1,)](Tensor(x), Tensor(y), out, 64)
    bits = x.itemsize * 8
    unsigned = f"uint{bits}"
    exact = [int(a) * int(b) >> bits for a, b in zip(x.view(unsigned), y.view(unsigned))]
    np.testing.assert_array_equal(out.stored.view(unsigned), np.array(exact, unsigned))
