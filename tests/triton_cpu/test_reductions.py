"""Reductions and scans of every kind over every axis."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty

SHAPES = [((16,), 0), ((1,), 0), ((256,), 0), ((8, 32), 0), ((32, 8), 1), ((1, 64), 1), ((64, 1), 0), ((2, 1), 1),
          ((4, 8, 16), 0), ((4, 8, 16), 1), ((4, 8, 16), 2), ((2, 2, 2), 1)]  # fmt: skip


@triton.jit
def offsets(SHAPE: tl.constexpr):
    if len(SHAPE) == 1:
        return tl.arange(0, SHAPE[0])
    elif len(SHAPE) == 2:
        return tl.arange(0, SHAPE[0])[:, None] * SHAPE[1] + tl.arange(0, SHAPE[1])[None, :]
    else:
        return (
            tl.arange(0, SHAPE[0])[:, None, None] * (SHAPE[1] * SHAPE[2])
            + tl.arange(0, SHAPE[1])[None, :, None] * SHAPE[2]
            + tl.arange(0, SHAPE[2])[None, None, :]
        )


@triton.jit
def _position(SHAPE: tl.constexpr, AXIS: tl.constexpr):
    """Where the results of a reduction over AXIS go in a contiguous array."""
    if len(SHAPE) == 1:
        return 0
    elif len(SHAPE) == 2:
        return tl.arange(0, SHAPE[1 - AXIS])
    else:
        rows: tl.constexpr = SHAPE[1] if AXIS == 0 else SHAPE[0]
        columns: tl.constexpr = SHAPE[1] if AXIS == 2 else SHAPE[2]
        return tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def first_and_last_of_larger(a_value, a_tag, b_value, b_tag):
    take = (b_value > a_value) | ((b_value == a_value) & (b_tag < a_tag))
    return tl.where(take, b_value, a_value), tl.where(take, b_tag, a_tag)


@triton.jit
def float_kernel(x_ptr, out_ptr, index_ptr, SHAPE: tl.constexpr, AXIS: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + offsets(SHAPE))
    i = _position(SHAPE, AXIS)
    tl.store(out_ptr + 0 * SIZE + i, tl.sum(x, AXIS))
    tl.store(out_ptr + 1 * SIZE + i, tl.max(x, AXIS))
    tl.store(out_ptr + 2 * SIZE + i, tl.min(x, AXIS))
    tl.store(out_ptr + 3 * SIZE + i, tl.reduce(x * 0.5, AXIS, multiply))
    value, place = tl.max(x, AXIS, return_indices=True)
    tl.store(out_ptr + 4 * SIZE + i, value)
    tl.store(index_ptr + 0 * SIZE + i, place)
    tl.store(index_ptr + 1 * SIZE + i, tl.argmin(x, AXIS))
    tl.store(index_ptr + 2 * SIZE + i, tl.argmax(x, AXIS))


@pytest.mark.parametrize("shape, axis", SHAPES)
def test_reductions_of_floats(shape, axis, rng):
    x = rng.integers(-4, 5, shape) / 2 + (rng.integers(0, 2, shape) * rng.standard_normal(shape))  # with ties
    x = x.astype(np.float32)
    kept = np.delete(shape, axis)
    size = int(np.prod(kept))
    out, index = empty((5, *kept)), empty((3, *kept), "int32")
    float_kernel[(1,)](Tensor(x), out, index, shape, axis, size)
    double = x.astype(float)
    scale = np.abs(double).sum(axis) + 1e-30
    assert (np.abs(out.stored[0] - double.sum(axis)) / scale).max() < 1e-6
    np.testing.assert_array_equal(out.stored[[1, 2, 4]], [x.max(axis), x.min(axis), x.max(axis)])
    np.testing.assert_allclose(out.stored[3], (double / 2).prod(axis), rtol=1e-4, atol=1e-37)
    np.testing.assert_array_equal(index.stored, [x.argmax(axis), x.argmin(axis), x.argmax(axis)])


@triton.jit
def integer_kernel(x_ptr, out_ptr, SHAPE: tl.constexpr, AXIS: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + offsets(SHAPE))
    i = _position(SHAPE, AXIS)
    tl.store(out_ptr + 0 * SIZE + i, tl.sum(x, AXIS))
    tl.store(out_ptr + 1 * SIZE + i, tl.max(x, AXIS))
    tl.store(out_ptr + 2 * SIZE + i, tl.min(x, AXIS))
    tl.store(out_ptr + 3 * SIZE + i, tl.xor_sum(x, AXIS))
    tl.store(out_ptr + 4 * SIZE + i, tl.argmax(x, AXIS))
    tl.store(out_ptr + 5 * SIZE + i, tl.reduce_or(x, AXIS))
    tl.store(out_ptr + 6 * SIZE + i, tl.sum((x > 0).to(tl.int32), AXIS))


@pytest.mark.parametrize("shape, axis", SHAPES)
def test_reductions_of_integers(shape, axis, rng):
    dtype = ["int32", "int64", "uint32", "int8"][rng.integers(4)]
    limits = np.iinfo(dtype)
    x = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    kept = np.delete(shape, axis)
    out = empty((7, *kept), "int64")
    integer_kernel[(1,)](Tensor(x), out, shape, axis, int(np.prod(kept)))
    wide = dtype if x.itemsize >= 4 else "int32"  # tl.sum's type
    expected = [
        x.astype(wide).sum(axis, dtype=wide), x.max(axis), x.min(axis), np.bitwise_xor.reduce(x, axis), x.argmax(axis),
        np.bitwise_or.reduce(x, axis), (x > 0).sum(axis),
    ]  # fmt: skip
    for operation, (found, values) in enumerate(zip(out.stored, expected)):
        np.testing.assert_array_equal(found, values.astype(np.int64), f"operation {operation} of {dtype}")


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def special_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * N + tl.arange(0, N))
    out_ptr += tl.program_id(0) * 4
    tl.store(out_ptr, tl.max(x))
    tl.store(out_ptr + 1, tl.min(x))
    tl.store(out_ptr + 2, tl.sum(x))
    tl.store(out_ptr + 3, tl.reduce(x, 0, nan_max))


@pytest.mark.filterwarnings("ignore")
def test_infinities_nan_and_the_sign_of_zero_in_reductions():
    x = np.ones((7, 64), np.float32)
    x[0, 33] = np.nan
    x[1] = -np.inf
    x[2] = np.nan
    x[3, 5], x[3, 60] = np.inf, -np.inf
    x[4, 0] = np.inf
    x[5] = -0.0
    x[6] = 3e38
    out = empty((7, 4))
    special_kernel[(7,)](Tensor(x), out, 64)
    with np.errstate(all="ignore"):
        expected = np.stack([np.fmax.reduce(x, 1), np.fmin.reduce(x, 1), x.sum(1), x.max(1)], 1)
    np.testing.assert_array_equal(out.stored, expected)
    assert np.signbit(out.stored[5]).all()


@triton.jit
def pair_kernel(x_ptr, out_ptr, SHAPE: tl.constexpr, AXIS: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + offsets(SHAPE))
    value, tag = tl.reduce((x, offsets(SHAPE).to(tl.float32)), AXIS, first_and_last_of_larger)
    i = _position(SHAPE, AXIS)
    tl.store(out_ptr + i, value)
    tl.store(out_ptr + SIZE + i, tag)


@pytest.mark.parametrize("shape, axis", [((64,), 0), ((4, 32), 0), ((4, 32), 1), ((2, 4, 8), 1)])
def test_a_combiner_of_several_values(shape, axis, rng):
    x = rng.integers(0, 5, shape).astype(np.float32)
    kept = np.delete(shape, axis)
    out = empty((2, *kept))
    pair_kernel[(1,)](Tensor(x), out, shape, axis, int(np.prod(kept)))
    place = np.expand_dims(x.argmax(axis), axis)
    tags = np.arange(x.size).reshape(shape)
    np.testing.assert_array_equal(out.stored, [x.max(axis), np.take_along_axis(tags, place, axis).squeeze(axis)])


@triton.jit
def affine(a_scale, a_shift, b_scale, b_shift):
    return a_scale * b_scale, a_shift * b_scale + b_shift


@triton.jit
def scan_kernel(x_ptr, out_ptr, SHAPE: tl.constexpr, AXIS: tl.constexpr, SIZE: tl.constexpr, REVERSE: tl.constexpr):
    x = tl.load(x_ptr + offsets(SHAPE))
    i = offsets(SHAPE)
    tl.store(out_ptr + 0 * SIZE + i, tl.cumsum(x, AXIS, reverse=REVERSE))
    tl.store(out_ptr + 1 * SIZE + i, tl.cumprod(x, AXIS, reverse=REVERSE))
    scale, shift = tl.associative_scan((x, x * 0 + 1), AXIS, affine, reverse=REVERSE)  # order matters
    tl.store(out_ptr + 2 * SIZE + i, scale)
    tl.store(out_ptr + 3 * SIZE + i, shift)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape, axis", [((64,), 0), ((1,), 0), ((8, 16), 0), ((8, 16), 1), ((16, 1), 1), ((2, 4, 8), 1)]
)
def test_scans(shape, axis, reverse, rng):
    x = rng.uniform(0.8, 1.2, shape).astype(np.float32)
    out = empty((4, *shape))
    scan_kernel[(1,)](Tensor(x), out, shape, axis, x.size, reverse)
    ordered = np.moveaxis(x.astype(float), axis, 0)[:: -1 if reverse else 1]
    shift = np.ones_like(ordered)
    for k in range(1, len(ordered)):
        shift[k] = shift[k - 1] * ordered[k] + 1
    expected = [np.cumsum(ordered, 0), np.cumprod(ordered, 0), np.cumprod(ordered, 0), shift]
    expected = [np.moveaxis(e[:: -1 if reverse else 1], 0, axis) for e in expected]
    np.testing.assert_allclose(out.stored, expected, rtol=2e-5)


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def running_kernel(
    x_ptr, out_ptr, sums_ptr, ROWS: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    place = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + place)
    tl.store(out_ptr + place, tl.cumsum(x, AXIS, reverse=REVERSE))
    tl.store(out_ptr + ROWS * N + place, tl.associative_scan(x, AXIS, add, reverse=REVERSE))
    scale, shift = tl.associative_scan((x * 0 + 0.5, x), AXIS, affine, reverse=REVERSE)
    tl.store(out_ptr + 2 * ROWS * N + place, scale)
    tl.store(out_ptr + 3 * ROWS * N + place, shift)
    kept = tl.arange(0, ROWS if AXIS == 1 else N)
    tl.store(sums_ptr + kept, tl.reduce(x, AXIS, add))
    total, _count = tl.reduce((x, x * 0 + 1), AXIS, add_pairs)
    tl.store(sums_ptr + (ROWS if AXIS == 1 else N) + kept, total)


@triton.jit
def add_pairs(a, m, b, n):
    return a + b, m + n


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis, shape", [(0, (2048, 2)), (1, (2, 2048))])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_small_floats_are_rounded_once(dtype, axis, shape, reverse, rng):
    """A sum kept in bf16 would stagnate at 256 times its terms."""
    x = Tensor(rng.uniform(0.5, 1.5, shape), dtype)
    out, sums = empty((4, *shape), dtype), empty((2, max(2, shape[1 - axis])), dtype)
    running_kernel[(1,)](x, out, sums, *shape, axis, reverse)
    ordered = np.moveaxis(x.values, axis, 0)[:: -1 if reverse else 1]
    shift = np.zeros_like(ordered)
    for k in range(len(ordered)):
        shift[k] = shift[k - 1] * 0.5 + ordered[k] if k else ordered[k]
    scale = 0.5 ** np.arange(1, len(ordered) + 1)[:, None] + 0 * ordered
    running = np.cumsum(ordered, 0)
    expected = [np.moveaxis(e[:: -1 if reverse else 1], 0, axis) for e in (running, running, scale, shift)]
    rounding = 2.0 ** (-8 if dtype == "bfloat16" else -11) * 1.01  # half a unit in the last place, and f32's own
    np.testing.assert_allclose(out.values, expected, rtol=rounding, atol=1e-7)
    np.testing.assert_allclose(sums.values, [running[-1]] * 2, rtol=rounding)


@triton.jit
def long_sort_kernel(x_ptr, sorted_ptr, top_ptr, N: tl.constexpr, K: tl.constexpr, DESCENDING: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(sorted_ptr + i, tl.sort(x, descending=DESCENDING))
    tl.store(top_ptr + tl.program_id(0) * K + tl.arange(0, K), tl.topk(x, K, descending=not DESCENDING))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("n, dtype", [(256, "float32"), (2, "bfloat16"), (64, "int64"), (32, "uint8")])
def test_sort_and_topk_of_any_length(n, dtype, descending, rng):
    x = Tensor(rng.integers(0, 200, (2, n)), dtype)
    ordered, top = empty((2, n), dtype), empty((2, 2), dtype)
    long_sort_kernel[(2,)](x, ordered, top, n, 2, descending)
    expected = np.sort(x.values, 1)[:, :: -1 if descending else 1]
    np.testing.assert_array_equal(ordered.values, expected)
    np.testing.assert_array_equal(top.values, expected[:, ::-1][:, :2])


@triton.jit
def order_kernel(x_ptr, sorted_ptr, top_ptr, flip_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(sorted_ptr + i, tl.sort(x))
    tl.store(top_ptr + tl.program_id(0) * 4 + tl.arange(0, 4), tl.topk(x, 4))
    tl.store(flip_ptr + i, tl.flip(x, 0))


@pytest.mark.parametrize("dtype", ["float32", "int32", "float16"])
def test_sort_topk_and_flip(dtype, rng):
    x = rng.integers(-20, 20, (5, 16)).astype(np.float32)
    ordered, top, flipped = empty((5, 16), dtype), empty((5, 4), dtype), empty((5, 16), dtype)
    order_kernel[(5,)](Tensor(x, dtype), ordered, top, flipped, 16)
    np.testing.assert_array_equal(ordered.values, np.sort(x, 1))
    np.testing.assert_array_equal(top.values, -np.sort(-x, 1)[:, :4])
    np.testing.assert_array_equal(flipped.values, x[:, ::-1])


@triton.jit
def histogram_kernel(x_ptr, mask_ptr, out_ptr, masked_ptr, N: tl.constexpr, BINS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, BINS), tl.histogram(x, BINS))
    mask = tl.load(mask_ptr + tl.arange(0, N)) != 0
    tl.store(masked_ptr + tl.arange(0, BINS), tl.histogram(x, BINS, mask))


@pytest.mark.parametrize("bins", [1, 16, 64])
def test_histograms_ignore_what_is_in_no_bin(bins, rng):
    x, mask = rng.integers(-3, bins + 3, 256).astype(np.int32), rng.integers(0, 2, 256).astype(np.int8)
    x[:2] = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    out, masked = empty(bins, "int32"), empty(bins, "int32")
    histogram_kernel[(1,)](Tensor(x), Tensor(mask), out, masked, 256, bins)
    inside = (x >= 0) & (x < bins)
    np.testing.assert_array_equal(out.stored, np.bincount(x[inside], minlength=bins))
    np.testing.assert_array_equal(masked.stored, np.bincount(x[inside & (mask != 0)], minlength=bins))


@triton.jit
def sum_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(x_ptr + rows[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out_ptr + rows, tl.sum(x * x, 1) * tl.max(x, 1))  # x, of two users, is at hand: 16 rows at once


def test_a_sum_depends_on_its_length_and_not_on_the_rows_beside_it(rng):
    x = rng.standard_normal((64, 256), dtype=np.float32)
    found = []
    for rows in (1, 2, 16, 64):
        out = empty(64)
        sum_kernel[(64 // rows,)](Tensor(x), out, rows, 256)
        found.append(out.stored.tobytes())
    assert len(set(found)) == 1
