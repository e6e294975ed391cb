"""The fp8 formats that NumPy's and PyTorch's users seldom see: fp8e4b8, fp8e5b16 (no infinities, no -0), fp8e4b15.

Kernels get bytes and reinterpret them, so that no framework need know the types. Expected values follow from each
format's definition, in float64.
"""

import itertools

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty, values_of_codes

E4B8, E5B16, E4B15 = tl.float8e4b8, tl.float8e5b16, tl.float8e4b15
# (mantissa bits, exponent bias, the largest code that rounding gives)
FORMATS = {E4B8: (3, 8, 0x7F), E5B16: (2, 16, 0x7F), E4B15: (3, 15, 0x7E)}
FNUZ = [E4B8, E5B16]


def values(kind: tl.dtype) -> np.ndarray:
    """Of all 256 codes."""
    mantissa, bias, _ = FORMATS[kind]
    codes = np.arange(128)
    exponent, fraction = codes >> mantissa, (codes & ((1 << mantissa) - 1)) / 2.0**mantissa
    half = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - float(bias)))
    found = np.concatenate([half, -half])
    if kind in FNUZ:
        found[0x80] = np.nan
    return found


def codes_of(x: np.ndarray, kind: tl.dtype, rounding: str) -> np.ndarray:
    """Encoded by definition: to nearest (ties to even, or away from zero), or toward zero; saturating."""
    magnitudes = values(kind)[: FORMATS[kind][2] + 1]
    size = np.where(np.isnan(x), 0, np.minimum(np.abs(x), magnitudes[-1]))
    above = np.searchsorted(magnitudes, size)
    below = np.where(magnitudes[above] == size, above, above - 1)
    middle = (magnitudes[above] + magnitudes[below]) / 2
    up = {"rtz": size < 0, "away": size >= middle, "rtne": (size > middle) | ((size == middle) & (above % 2 == 0))}
    code = np.where(up[rounding], above, below) | np.where(np.signbit(x), 0x80, 0)
    if kind in FNUZ:
        return np.where(np.isnan(x), 0x80, np.where(code == 0x80, 0, code))
    return np.where(np.isnan(x), FORMATS[kind][2] | np.where(np.signbit(x), 0x80, 0), code)


@triton.jit
def widen_kernel(codes_ptr, f32, f64, f16, bf16, again_ptr, KIND: tl.constexpr):
    i = tl.arange(0, 256)
    x = tl.load(codes_ptr.to(tl.pointer_type(KIND), bitcast=True) + i)
    tl.store(f32 + i, x.to(tl.float32))
    tl.store(f64 + i, x.to(tl.float64))
    tl.store(f16 + i, x.to(tl.float16))
    tl.store(bf16 + i, x.to(tl.bfloat16))
    tl.store(again_ptr + i, x.to(tl.uint8, bitcast=True))


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_every_code_widens_exactly_and_survives_a_copy(kind):
    codes = np.arange(256, dtype=np.uint8)
    wide = [empty(256, dtype) for dtype in ("float32", "float64", "float16", "bfloat16")]
    again = empty(256, "uint8")
    widen_kernel[(1,)](Tensor(codes), *wide, again, kind)
    for out in wide:
        np.testing.assert_array_equal(out.values, values(kind), out.dtype)
    np.testing.assert_array_equal(again.stored, codes)


@triton.jit
def narrow_kernel(x_ptr, out_ptr, KIND: tl.constexpr, ROUNDING: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    y = tl.load(x_ptr + i).to(KIND, fp_downcast_rounding=ROUNDING)
    tl.store(out_ptr + i, y.to(tl.uint8, bitcast=True))


def inputs(kind: tl.dtype, dtype: str) -> np.ndarray:
    """All magnitudes, ties between codes and their neighbours."""
    exact = np.sort(values(kind)[:0x80])
    ties = (exact[1:] + exact[:-1]) / 2
    near = np.concatenate([ties, exact, np.nextafter(ties, 0), np.nextafter(ties, np.inf)])
    bits = np.arange(0, 2**32, 1000003, dtype=np.uint64).astype(np.uint32).view(np.float32).astype(float)
    x = np.concatenate([near, -near, bits, [0.0, -0.0, np.inf, -np.inf, np.nan]])
    with np.errstate(all="ignore"):
        return Tensor(np.resize(x, -(-x.size // 256) * 256), dtype).values


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("kind, rounding", [*itertools.product(FNUZ, ("rtne", "rtz")), (E4B15, "away")])
def test_narrowing_rounds_once_and_saturates(kind, rounding, dtype):
    x = inputs(kind, dtype)
    out = empty(x.size, "uint8")
    narrow_kernel[(x.size // 256,)](Tensor(x, dtype), out, kind, None if rounding == "away" else rounding, 256)
    expected = codes_of(x, kind, rounding)
    number = ~np.isnan(x) | (kind != E4B15)
    wrong = np.flatnonzero((out.stored != expected) & number)
    assert not wrong.size, f"{x[wrong[0]]!r} became {out.stored[wrong[0]]:#x}, not {expected[wrong[0]]:#x}"


@triton.jit
def between_kernel(codes_ptr, out_ptr, SOURCE: tl.constexpr, TARGET: tl.constexpr):
    i = tl.arange(0, 256)
    x = tl.load(codes_ptr + i).to(SOURCE, bitcast=True)
    tl.store(out_ptr + i, x.to(tl.float32).to(TARGET).to(tl.uint8, bitcast=True))


@pytest.mark.parametrize("target, rounding", [(E4B8, "rtne"), (E5B16, "rtne"), (E4B15, "away")])
def test_one_format_becomes_another(target, rounding):
    source = values_of_codes("float8_e4m3fn")
    out = empty(256, "uint8")
    between_kernel[(1,)](Tensor(np.arange(256, dtype=np.uint8)), out, tl.float8e4nv, target)
    expected = codes_of(source, target, rounding)
    number = ~np.isnan(source)
    np.testing.assert_array_equal(out.stored[number], expected[number])


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, sum_ptr, product_ptr, constant_ptr, KIND: tl.constexpr):
    i = tl.arange(0, 256)
    x, y = tl.load(x_ptr + i).to(KIND, bitcast=True), tl.load(y_ptr + i).to(KIND, bitcast=True)
    tl.store(sum_ptr + i, (x + y).to(tl.uint8, bitcast=True))
    tl.store(product_ptr + i, (x * y).to(tl.uint8, bitcast=True))
    tl.store(constant_ptr + i, tl.full((256,), 0.3, KIND).to(tl.uint8, bitcast=True))


@pytest.mark.parametrize("kind", FNUZ, ids=str)
def test_arithmetic_rounds_to_the_format(kind, rng):
    x, y = rng.integers(0, 256, (2, 256)).astype(np.uint8)
    outs = [empty(256, "uint8") for _ in range(3)]
    arithmetic_kernel[(1,)](Tensor(x), Tensor(y), *outs, kind)
    a, b = values(kind)[x], values(kind)[y]
    for out, exact in zip(outs, (a + b, a * b, np.full(256, 0.3))):
        np.testing.assert_array_equal(out.stored, codes_of(exact, kind, "rtne"))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i).to(A, bitcast=True), tl.load(b_ptr + i).to(B, bitcast=True)
    tl.store(out_ptr + i, tl.dot(a, b))


@pytest.mark.parametrize("a, b", [(E4B8, E4B8), (E5B16, E5B16), (E4B15, E4B15), (E4B8, E5B16)], ids=str)
@pytest.mark.parametrize("n", [4, 32])
def test_products_of_matrices(a, b, n, rng):
    x, y = rng.integers(0, 120, (2, n, n)).astype(np.uint8)
    out = empty((n, n))
    dot_kernel[(1,)](Tensor(x), Tensor(y), out, a, b, n)
    np.testing.assert_allclose(out.stored, values(a)[x] @ values(b)[y], rtol=1e-5)


@triton.jit
def from_doubles_kernel(x_ptr, f32, f16, bf16, e4m3, f32_rtz, f16_rtz, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(f32 + i, x.to(tl.float32))
    tl.store(f16 + i, x.to(tl.float16))
    tl.store(bf16 + i, x.to(tl.bfloat16))
    tl.store(e4m3 + i, x.to(tl.float8e4nv))
    tl.store(f32_rtz + i, x.to(tl.float32, fp_downcast_rounding="rtz"))
    tl.store(f16_rtz + i, x.to(tl.float16, fp_downcast_rounding="rtz"))


def test_doubles_are_rounded_once():
    """Each lies so near a tie of the target that rounding to float32 first would make it the tie."""
    tie = 1 + np.array([2.0**-24, 2.0**-11, 2.0**-8, 2.0**-4, 2.0**-24, 2.0**-11])
    x = np.concatenate([tie + 2.0**-40, tie - 2.0**-40, [1e300, -1e300, 3e-45, np.inf]])
    types = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float32", "float16"]
    outs = [empty(16, dtype) for dtype in types]
    from_doubles_kernel[(1,)](Tensor(x), *outs, 16)
    for out in outs[:4]:
        np.testing.assert_array_equal(out.stored, Tensor(x, out.dtype).stored, out.dtype)
    for out, largest in zip(outs[4:], (np.finfo(np.float32).max, 65504)):
        finite = np.isfinite(x)
        assert (np.abs(out.values) <= np.abs(x)).all() and (np.abs(out.values) <= largest)[finite].all()
        nearest = Tensor(x, out.dtype).values
        assert ((out.values == nearest) | (np.abs(nearest) > np.abs(x))).all()
