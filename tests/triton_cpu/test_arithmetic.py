"""Elementwise arithmetic of every type against NumPy: exact for integers, correctly rounded for floats."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import FLOATS, FP8, INTEGERS, Tensor, empty, encode, numbers, rounded, values_of_codes

N = 512


@triton.jit
def integer_kernel(x_ptr, y_ptr, out_ptr, flags_ptr, N: tl.constexpr, BITS: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    shift = (y & (BITS - 1)).to(y.dtype)
    tl.store(out_ptr + 0 * N + i, x + y)
    tl.store(out_ptr + 1 * N + i, x - y)
    tl.store(out_ptr + 2 * N + i, x * y)
    tl.store(out_ptr + 3 * N + i, x // y)
    tl.store(out_ptr + 4 * N + i, x % y)
    tl.store(out_ptr + 5 * N + i, x & y)
    tl.store(out_ptr + 6 * N + i, x | y)
    tl.store(out_ptr + 7 * N + i, x ^ y)
    tl.store(out_ptr + 8 * N + i, x << shift)
    tl.store(out_ptr + 9 * N + i, x >> shift)
    tl.store(out_ptr + 10 * N + i, tl.minimum(x, y))
    tl.store(out_ptr + 11 * N + i, tl.maximum(x, y))
    tl.store(out_ptr + 12 * N + i, ~x)
    tl.store(out_ptr + 13 * N + i, -x)
    tl.store(out_ptr + 14 * N + i, tl.where(x < y, x, y))
    tl.store(flags_ptr + 0 * N + i, x == y)
    tl.store(flags_ptr + 1 * N + i, x != y)
    tl.store(flags_ptr + 2 * N + i, x < y)
    tl.store(flags_ptr + 3 * N + i, x <= y)
    tl.store(flags_ptr + 4 * N + i, x > y)
    tl.store(flags_ptr + 5 * N + i, x >= y)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_wrap_divide_toward_zero_and_compare_by_sign(dtype, rng):
    x, y = numbers(rng, N, dtype), numbers(rng, N, dtype)
    small = rng.random(N) < 0.5  # quotients other than 0 and -1
    y[small] = rng.integers(1, 20, N).astype(dtype)[small]
    x[:8] = y[:8]
    y[y == 0] = 3
    out, flags = empty((15, N), dtype), empty((6, N), "int8")
    integer_kernel[(1,)](Tensor(x), Tensor(y), out, flags, N, BITS=x.itemsize * 8)
    exact_x, exact_y = x.astype(object), y.astype(object)
    quotient = np.array(
        [abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) for a, b in zip(exact_x, exact_y)], object
    )
    bits = x.itemsize * 8
    shift = exact_y % bits

    def wrapped(values):
        return np.array([int(v) % 2**bits for v in values], f"uint{bits}").view(dtype)

    expected = [
        exact_x + exact_y, exact_x - exact_y, exact_x * exact_y, quotient, exact_x - quotient * exact_y,
        x & y, x | y, x ^ y, exact_x * 2**shift, exact_x >> shift, np.minimum(x, y), np.maximum(x, y), ~x, -exact_x,
        np.minimum(x, y),
    ]  # fmt: skip
    for operation, (found, values) in enumerate(zip(out.stored, expected)):
        np.testing.assert_array_equal(found, wrapped(values), f"operation {operation} of integer_kernel")
    np.testing.assert_array_equal(flags.stored, [x == y, x != y, x < y, x <= y, x > y, x >= y])


@triton.jit
def division_kernel(x_ptr, y_ptr, quotient_ptr, remainder_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(quotient_ptr + i, x // y, y > 0)
    tl.store(remainder_ptr + i, x % y, y > 0)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint32"])
def test_a_masked_lane_may_divide_by_zero(dtype):
    smallest = np.iinfo(dtype).min
    x = np.array([7, 7, smallest, smallest, 9, 1, 0, 5], dtype)
    y = np.array([2, 0, np.array(-1).astype(dtype), 0, 4, 0, 0, 5], dtype)
    quotient, remainder = Tensor(np.zeros_like(x)), Tensor(np.zeros_like(x))
    division_kernel[(1,)](Tensor(x), Tensor(y), quotient, remainder, 8)
    used = (y > 0) & (x > 0)
    np.testing.assert_array_equal(quotient.stored[used], x[used] // y[used])
    np.testing.assert_array_equal(remainder.stored[used], x[used] % y[used])


@triton.jit
def float_kernel(x_ptr, y_ptr, z_ptr, out_ptr, flags_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)
    tl.store(out_ptr + 0 * N + i, x + y)
    tl.store(out_ptr + 1 * N + i, x - y)
    tl.store(out_ptr + 2 * N + i, x * y)
    tl.store(out_ptr + 3 * N + i, x / y)
    tl.store(out_ptr + 4 * N + i, -x)
    tl.store(out_ptr + 5 * N + i, tl.abs(x))
    tl.store(out_ptr + 6 * N + i, tl.minimum(x, y))
    tl.store(out_ptr + 7 * N + i, tl.maximum(x, y))
    tl.store(out_ptr + 8 * N + i, tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 9 * N + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 10 * N + i, tl.where(x > y, x, z))
    tl.store(out_ptr + 11 * N + i, tl.clamp(x, tl.minimum(y, z), tl.maximum(y, z)))
    tl.store(out_ptr + 12 * N + i, tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(flags_ptr + 0 * N + i, x == y)
    tl.store(flags_ptr + 1 * N + i, x != y)
    tl.store(flags_ptr + 2 * N + i, x < y)
    tl.store(flags_ptr + 3 * N + i, x <= y)
    tl.store(flags_ptr + 4 * N + i, x > y)
    tl.store(flags_ptr + 5 * N + i, x >= y)
    tl.store(flags_ptr + 6 * N + i, (x < y) | (x == y) | (x > y))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.filterwarnings("ignore")
def test_floats_round_once_and_keep_infinities_and_nan(dtype, rng):
    x, y, z = (rounded(numbers(rng, N, dtype), dtype) for _ in range(3))
    x[:16], y[:16] = np.repeat([0.0, -0.0, np.inf, np.nan], 4), np.tile([1.0, -np.inf, np.nan, 0.0], 4)
    y[16:32] = x[16:32]
    out, flags = empty((13, N), dtype), empty((7, N), "int8")
    float_kernel[(1,)](Tensor(x, dtype), Tensor(y, dtype), Tensor(z, dtype), out, flags, N)
    low, high = np.fmin(y, z), np.fmax(y, z)
    expected = [
        x + y, x - y, x * y, x / y, -x, np.abs(x), np.fmin(x, y), np.fmax(x, y), np.minimum(x, y), np.maximum(x, y),
        np.where(x > y, x, z), np.fmin(np.fmax(x, low), high), np.clip(x, -1, 1),
    ]  # fmt: skip
    for operation, (found, values) in enumerate(zip(out.values, expected)):
        np.testing.assert_array_equal(found, rounded(values, dtype), f"operation {operation} of float_kernel")
    both = ~(np.isnan(x) | np.isnan(y))
    np.testing.assert_array_equal(flags.stored, [x == y, x != y, x < y, x <= y, x > y, x >= y, both])


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)
    tl.store(out_ptr + i, tl.fma(x, y, z))
    tl.store(out_ptr + N + i, x * y + z)
    tl.store(out_ptr + 2 * N + i, x * z - y)
    tl.store(out_ptr + 3 * N + i, x - y * z)


def test_a_product_and_a_sum_round_once(rng):
    x, y, z = (rng.standard_normal(N).astype(np.float32) for _ in range(3))
    z[: N // 2] = -(x * y)[: N // 2]  # what remains is the rounding error of the product
    out = empty((4, N))
    fma_kernel[(1,)](Tensor(x), Tensor(y), Tensor(z), out, N)
    a, b, c = (v.astype(np.float64) for v in (x, y, z))  # products are exact; sums round to 53 bits first
    expected = [a * b + c, a * b + c, a * c - b, a - b * c]
    np.testing.assert_allclose(out.stored, np.array(expected).astype(np.float32), rtol=1.2e-7, atol=0)


@triton.jit
def cast_kernel(x_ptr, i8, i16, i32, i64, u8, u16, u32, u64, f32, f64, f16, bf16, b, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(i8 + i, x.to(tl.int8))
    tl.store(i16 + i, x.to(tl.int16))
    tl.store(i32 + i, x.to(tl.int32))
    tl.store(i64 + i, x.to(tl.int64))
    tl.store(u8 + i, x.to(tl.uint8))
    tl.store(u16 + i, x.to(tl.uint16))
    tl.store(u32 + i, x.to(tl.uint32))
    tl.store(u64 + i, x.to(tl.uint64))
    tl.store(f32 + i, x.to(tl.float32))
    tl.store(f64 + i, x.to(tl.float64))
    tl.store(f16 + i, x.to(tl.float16))
    tl.store(bf16 + i, x.to(tl.bfloat16))
    tl.store(b + i, x.to(tl.int1))


@pytest.mark.parametrize("source", INTEGERS + FLOATS)
@pytest.mark.filterwarnings("ignore")
def test_casts_between_all_types(source, rng):
    x = numbers(rng, N, source)
    if source in FLOATS:  # in the range of every integer, since what lies outside is undefined
        x = rounded(np.where(np.isfinite(x), np.abs(x) % 127, 1), source)
    targets = [*INTEGERS, "float32", "float64", "float16", "bfloat16"]
    outs = [empty(N, target) for target in targets]
    truth = empty(N, "int8")
    cast_kernel[(1,)](Tensor(x, source), *outs, truth, N)
    for target, out in zip(targets, outs):
        # integers reach small floats through float32, here as on a GPU
        values = x.astype(np.float32) if source in INTEGERS and target in ("float16", "bfloat16") else x
        expected = rounded(values, target) if target in FLOATS else x.astype(target)
        np.testing.assert_array_equal(out.values, expected, f"{source} to {target}")
    np.testing.assert_array_equal(truth.stored, x != 0)


@triton.jit
def to_small_floats_kernel(x_ptr, f16, bf16, e4m3, e5m2, f16_rtz, bf16_rtz, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(f16 + i, x.to(tl.float16))
    tl.store(bf16 + i, x.to(tl.bfloat16))
    tl.store(e4m3 + i, x.to(tl.float8e4nv))
    tl.store(e5m2 + i, x.to(tl.float8e5))
    tl.store(f16_rtz + i, x.to(tl.float16, fp_downcast_rounding="rtz"))
    tl.store(bf16_rtz + i, x.to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_rounding_to_small_floats_over_the_whole_range_of_float32():
    bits = np.arange(0, 2**32, 65521, dtype=np.uint64).astype(np.uint32)
    ties = np.concatenate([(v[:-1] + v[1:]) / 2 for v in map(np.sort, map(_finite, ("float16", *FP8)))])
    x = np.concatenate([bits.view(np.float32), ties.astype(np.float32), -ties.astype(np.float32)])
    x = np.resize(x, -(-x.size // 1024) * 1024)
    types = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    outs = [empty(x.size, dtype) for dtype in [*types, "float16", "bfloat16"]]
    to_small_floats_kernel[(x.size // 1024,)](Tensor(x), *outs, 1024)
    for dtype, out in zip(types, outs):
        expected = encode(x, dtype)
        wrong = np.flatnonzero((out.stored != expected) & ~np.isnan(x))
        assert not wrong.size, f"{dtype}: {x[wrong[0]]!r} became {out.stored[wrong[0]]:#x}, not {expected[wrong[0]]:#x}"
        assert np.isnan(out.values[np.isnan(x)]).all()
    for out in outs[4:]:
        truncated = np.nextafter(np.abs(out.values), 0)
        assert (np.abs(out.values) <= np.abs(x))[~np.isnan(x)].all()
        exact = ~np.isnan(x) & np.isfinite(x)
        nearest = rounded(x, out.dtype)
        assert ((out.values == nearest) | (np.abs(nearest) > np.abs(x)))[exact].all()
        assert (truncated < np.abs(x))[exact & (x != 0) & (out.values != 0)].all()


def _finite(dtype):
    values = values_of_codes(dtype)
    return values[np.isfinite(values) & (values >= 0)]


@triton.jit
def copy_kernel(x_ptr, out_ptr, wide_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i))
    tl.store(wide_ptr + i, tl.load(x_ptr + i).to(tl.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *FP8])
def test_every_code_of_a_small_float_survives_a_copy_and_widens_exactly(dtype):
    values = values_of_codes(dtype)
    x = empty(values.size, dtype)
    x.stored[:] = np.arange(values.size)
    out, wide = empty(values.size, dtype), empty(values.size)
    copy_kernel[(1,)](x, out, wide, values.size)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(out.stored[number], x.stored[number])
    np.testing.assert_array_equal(np.isnan(out.values), ~number)
    np.testing.assert_array_equal(wide.stored, values)
    np.testing.assert_array_equal(np.signbit(wide.stored[number]), np.signbit(values[number]))


@triton.jit
def bitcast_kernel(f32, i32, f16, i16, bf16, u16, e5m2, u8, f64, i64, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(i32 + i, tl.load(f32 + i).to(tl.int32, bitcast=True))
    tl.store(f32 + i, tl.load(i32 + i).to(tl.float32, bitcast=True) * 2)
    tl.store(i16 + i, tl.load(f16 + i).to(tl.int16, bitcast=True))
    tl.store(u16 + i, tl.load(bf16 + i).to(tl.uint16, bitcast=True))
    tl.store(u8 + i, tl.load(e5m2 + i).to(tl.uint8, bitcast=True))
    tl.store(i64 + i, tl.load(f64 + i).to(tl.int64, bitcast=True))


def test_bitcasts_keep_the_bits(rng):
    types = ["float32", "int32", "float16", "int16", "bfloat16", "uint16", "float8_e5m2", "uint8", "float64", "int64"]
    tensors = [
        Tensor(np.nan_to_num(numbers(rng, N, dtype)), dtype) if "float" in dtype else empty(N, dtype) for dtype in types
    ]
    before = [tensor.stored.copy() for tensor in tensors]
    bitcast_kernel[(1,)](*tensors, N)
    for number in range(0, 10, 2):
        as_bits = before[number].view(tensors[number + 1].stored.dtype)
        np.testing.assert_array_equal(tensors[number + 1].stored, as_bits, types[number])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(tensors[0].stored, before[0] * 2)


@triton.jit
def constant_kernel(out_ptr, C: tl.constexpr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.full((N,), C, out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_constants_are_rounded_to_their_type(dtype):
    for constant in (1 / 3, -0.1, float("-inf")):
        out = empty(4, dtype)
        constant_kernel[(1,)](out, constant, 4)
        np.testing.assert_array_equal(out.values, rounded(np.full(4, constant), dtype), str(constant))


@triton.jit
def logic_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i) != 0, tl.load(y_ptr + i) != 0
    tl.store(out_ptr + 0 * N + i, x & y)
    tl.store(out_ptr + 1 * N + i, x | y)
    tl.store(out_ptr + 2 * N + i, x ^ y)
    tl.store(out_ptr + 3 * N + i, ~x)
    tl.store(out_ptr + 4 * N + i, x == y)
    tl.store(out_ptr + 5 * N + i, tl.where(x, y, ~y))
    tl.store(out_ptr + 6 * N + i, x.to(tl.int32) + y.to(tl.int32))
    tl.store(out_ptr + 7 * N + i, x.to(tl.float32) - y.to(tl.float32))


def test_truth_values():
    x, y = np.array([0, 0, 1, 1], np.int8), np.array([0, 1, 0, 1], np.int8)
    out = empty((8, 4), "int32")
    logic_kernel[(1,)](Tensor(x), Tensor(y), out, 4)
    expected = [x & y, x | y, x ^ y, 1 - x, x == y, np.where(x, y, 1 - y), x + y, x - y]
    np.testing.assert_array_equal(out.stored, expected)
