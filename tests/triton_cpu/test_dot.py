"""tl.dot: right for every type, shape and kind of operand, and the same bits however it is tiled."""

import ctypes
import mmap

import numpy as np
import pytest
import triton
import triton.language as tl

from fastdeploy.kernels.launch import view

from .arrays import FP8, Tensor, empty, rounded


@triton.jit
def dot_kernel(
    a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr, COMPUTED: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    if COMPUTED:  # operands that must be evaluated into arrays
        a, b = a + a, b + b
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, out_dtype=OUT))


SHAPES = [
    (1, 1, 1),
    (1, 128, 64),
    (2, 16, 8),
    (4, 32, 1),
    (8, 8, 16),
    (16, 64, 32),
    (64, 128, 64),
    (64, 1, 16),
    (16, 4, 4),
]


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shapes_and_floating_types(dtype, m, n, k, rng):
    a, b = (rounded(rng.standard_normal(shape), dtype) for shape in ((m, k), (k, n)))
    out = empty((m, n))
    dot_kernel[(1,)](Tensor(a, dtype), Tensor(b, dtype), out, m, n, k, tl.float32, False)
    exact = a.astype(float) @ b.astype(float)
    assert (np.abs(out.stored - exact) <= 1e-6 * (np.abs(a).astype(float) @ np.abs(b)) + 1e-30).all()


@pytest.mark.parametrize(
    "dtype, out_dtype",
    [("float16", "float16"), ("float64", "float64"), ("int8", "int32"), *((t, "float32") for t in FP8)],
)
def test_other_types(dtype, out_dtype, rng):
    m, n, k = 16, 32, 64
    a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    if dtype == "int8":
        a, b = (rng.integers(-128, 128, v.shape, np.int8) for v in (a, b))
    a, b = rounded(a, dtype), rounded(b, dtype)
    out = empty((m, n), out_dtype)
    dot_kernel[(1,)](Tensor(a, dtype), Tensor(b, dtype), out, m, n, k, getattr(tl, out_dtype), False)
    if dtype == "int8":
        np.testing.assert_array_equal(out.stored, a.astype(int) @ b.astype(int))
    else:
        tolerance = {"float16": 4e-3, "float64": 1e-13}.get(dtype, 1e-5)
        np.testing.assert_allclose(out.values, a.astype(float) @ b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("m", [1, 4, 64])
def test_bits_do_not_depend_on_where_operands_lie(m, rng):
    a, b = rng.standard_normal((m, 64), dtype=np.float32), rng.standard_normal((64, 128), dtype=np.float32)
    direct, computed = empty((m, 128)), empty((m, 128))
    dot_kernel[(1,)](Tensor(a), Tensor(b), direct, m, 128, 64, tl.float32, False)
    dot_kernel[(1,)](Tensor(a), Tensor(b), computed, m, 128, 64, tl.float32, True)  # four times as much: exactly
    np.testing.assert_array_equal(computed.stored, 4 * direct.stored)


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, rows, K, sw_k, sw_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m[:, None] * K + k[None, :]
    w_ptrs = w_ptr + k[:, None] * sw_k + n[None, :] * sw_n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        if MASKED:
            x = tl.load(x_ptrs, m[:, None] < rows, 0.0)
        else:
            x = tl.load(x_ptrs)
        total = tl.dot(x, tl.load(w_ptrs).to(tl.float32), total)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * sw_k
    total += tl.load(bias_ptr + n)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], total, m[:, None] < rows)


def linear(x, w, bias, block_m, block_n, block_k, masked, dtype="bfloat16", transposed=False):
    rows, (k, n) = len(x), w.shape
    weight = Tensor(w.T if transposed else w, dtype)
    padded = np.zeros((-(-rows // block_m) * block_m, k), np.float32)
    padded[:rows] = x
    out = empty((rows, n))
    strides = (1, k) if transposed else (n, 1)
    grid = (-(-rows // block_m), n // block_n)
    linear_kernel[grid](
        Tensor(padded), weight, Tensor(bias), out, rows, k, *strides, block_m, block_n, block_k, masked, n
    )
    return out.stored


def chain(x, w, bias):
    """x @ w + bias with one rounding per multiply-add, in ascending k: what tl.dot promises."""
    total = np.zeros((len(x), w.shape[1]), np.float32)
    for k in range(w.shape[0]):  # a float64 product of floats is exact; its sum is rounded to 53 bits, then to 24
        total = (x[:, k : k + 1].astype(float) * w[k].astype(float) + total).astype(np.float32)
    return total + bias.astype(np.float32)


def test_a_row_has_the_same_bits_for_every_tile_and_kind_of_operand(rng):
    x, bias = rng.standard_normal((64, 128), dtype=np.float32), rng.standard_normal(64, dtype=np.float32)
    w = rounded(rng.standard_normal((128, 64)), "bfloat16")
    expected = linear(x, w, bias, 64, 64, 32, False)
    exact = x.astype(float) @ w + bias
    assert (np.abs(expected - exact) <= 1e-6 * (np.abs(x).astype(float) @ np.abs(w) + 1)).all()
    assert (expected == chain(x, w, bias)).mean() > 0.999  # the emulation rounds twice in rare cases
    for block_m in (1, 2, 4, 8, 16, 64):
        for rows in (1, 64):
            found = linear(x[:rows], w, bias, block_m, 32, 32, masked=False)
            np.testing.assert_array_equal(found, expected[:rows], f"BLOCK_M {block_m}, {rows} rows")
    variants = {
        "masked": linear(x, w, bias, 16, 32, 32, True),
        "masked, few rows": linear(x[:3], w, bias, 16, 32, 32, True),
        "narrow": linear(x, w, bias, 4, 8, 32, False),
        "long": linear(x, w, bias, 4, 64, 128, False),
        "short": linear(x, w, bias, 4, 64, 8, False),
        "fp32 weights": linear(x, w, bias, 4, 64, 32, False, "float32"),
        "transposed": linear(x, w, bias, 16, 64, 32, False, transposed=True),
        "one transposed row": linear(x[:1], w, bias, 1, 64, 32, False, transposed=True),
    }
    for name, found in variants.items():
        np.testing.assert_array_equal(found, expected[: len(found)], name)


@triton.jit
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, keys, M: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    m, d, t = tl.arange(0, M), tl.arange(0, D), tl.arange(0, TILE)
    q = tl.load(q_ptr + m[:, None] * D + d[None, :])
    total = tl.zeros((M, D), tl.float32)
    largest = tl.full((M,), float("-inf"), tl.float32)
    norm = tl.zeros((M,), tl.float32)
    for start in range(0, keys, TILE):
        seen = (start + t) < keys
        k = tl.load(k_ptr + (start + t)[None, :] * D + d[:, None], seen[None, :], 0.0)
        v = tl.load(v_ptr + (start + t)[:, None] * D + d[None, :], seen[:, None], 0.0)
        scores = tl.where(seen[None, :] & ((start + t)[None, :] <= m[:, None] * 8), tl.dot(q, k), float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        alpha = tl.exp(largest - larger)
        p = tl.exp(scores - larger[:, None])
        total = tl.dot(p, v, total * alpha[:, None])
        norm = norm * alpha + tl.sum(p, 1)
        largest = larger
    tl.store(out_ptr + m[:, None] * D + d[None, :], total / norm[:, None])


@pytest.mark.parametrize("m, d, tile, keys", [(1, 64, 16, 40), (8, 16, 32, 50), (16, 64, 64, 130)])
def test_a_scaled_accumulator_and_infinite_masks(m, d, tile, keys, rng):
    q, k, v = (rng.standard_normal((rows, d), dtype=np.float32) for rows in (m, keys, keys))
    out = empty((m, d))
    attention_kernel[(1,)](Tensor(q), Tensor(k), Tensor(v), out, keys, m, d, tile)
    scores = q.astype(float) @ k.T
    scores[np.arange(keys)[None] > np.arange(m)[:, None] * 8] = -np.inf
    p = np.exp(scores - scores.max(1, keepdims=True))
    np.testing.assert_allclose(out.stored, p / p.sum(1, keepdims=True) @ v, rtol=1e-4, atol=1e-5)


@triton.jit
def accumulator_kernel(a_ptr, b_ptr, out_ptr, n, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j)
    power, total, flipped = a, tl.zeros((N, N), tl.float32), tl.full((N, N), 1.0, tl.float32)
    for _ in range(n):
        total = tl.dot(power, b, total + 1.0)
        flipped = tl.dot(a, b, tl.trans(flipped))
        power = tl.dot(power, power * 0.1)
    tl.store(out_ptr + i * N + j, total)
    tl.store(out_ptr + N * N + i * N + j, flipped)
    tl.store(out_ptr + 2 * N * N + i * N + j, power)
    tl.store(out_ptr + 3 * N * N + i * N + j, tl.dot(tl.trans(a), tl.trans(b)) + tl.dot(a, tl.trans(b), tl.trans(a)))


@pytest.mark.parametrize("size", [4, 32])
def test_accumulators_that_are_shifted_transposed_or_operands_too(size, rng):
    a, b = rng.standard_normal((2, size, size), dtype=np.float32) / np.float32(size**0.5)
    out = empty((4, size, size))
    accumulator_kernel[(1,)](Tensor(a), Tensor(b), out, 3, size)
    a, b = a.astype(float), b.astype(float)
    power, total, flipped = a, np.zeros_like(a), np.ones_like(a)
    for _ in range(3):
        total, flipped, power = power @ b + total + 1, a @ b + flipped.T, power @ (power * 0.1)
    expected = [total, flipped, power, a.T @ b.T + a @ b.T + a.T]
    np.testing.assert_allclose(out.stored, expected, rtol=1e-4, atol=1e-5)


@triton.jit
def batched_kernel(a_ptr, b_ptr, out_ptr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    z, m, n, k = tl.arange(0, B), tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + z[:, None, None] * (M * K) + m[None, :, None] * K + k[None, None, :])
    b = tl.load(b_ptr + z[:, None, None] * (K * N) + k[None, :, None] * N + n[None, None, :])
    tl.store(out_ptr + z[:, None, None] * (M * N) + m[None, :, None] * N + n[None, None, :], tl.dot(a, b))


def test_batches_of_products(rng):
    for batch, m, n, k in ((4, 16, 32, 8), (2, 1, 16, 16)):
        a, b = (
            rng.standard_normal((batch, m, k), dtype=np.float32),
            rng.standard_normal((batch, k, n), dtype=np.float32),
        )
        out = empty((batch, m, n))
        batched_kernel[(1,)](Tensor(a), Tensor(b), out, batch, m, n, k)
        np.testing.assert_allclose(out.stored, a.astype(float) @ b.astype(float), rtol=1e-5, atol=1e-5)


@triton.jit
def narrowed_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, TYPE: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i * N + j).to(TYPE), tl.load(b_ptr + i * N + j).to(TYPE)
    tl.store(out_ptr + i * N + j, tl.dot(a, b))


@pytest.mark.parametrize(
    "dtype, triton_type", [("bfloat16", tl.bfloat16), ("float16", tl.float16), ("float8_e4m3fn", tl.float8e4nv)]
)
def test_operands_narrowed_in_the_kernel_are_rounded(dtype, triton_type, rng):
    a, b = rng.standard_normal((2, 16, 16), dtype=np.float32)
    out = empty((16, 16))
    narrowed_kernel[(1,)](Tensor(a), Tensor(b), out, 16, triton_type)
    np.testing.assert_allclose(out.stored, rounded(a, dtype) @ rounded(b, dtype), rtol=1e-5, atol=1e-5)


@triton.jit
def variant_kernel(a_ptr, b_ptr, out_ptr, B: tl.constexpr, N: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr):
    z, i, j = tl.arange(0, B)[:, None, None], tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]
    place = z * N * N + i * N + j
    if B == 1:
        place = tl.reshape(place, (N, N))
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    total = tl.full(place.shape, 2.0, OUT)
    for _ in range(2):
        total = tl.dot(a, b, total, input_precision=PRECISION, max_num_imprecise_acc=4, out_dtype=OUT)
    tl.store(out_ptr + place, total)


@pytest.mark.parametrize("batch, n", [(1, 4), (1, 32), (4, 16)])
@pytest.mark.parametrize(
    "source, target, triton_type, precision",
    [
        *[("float32", "float32", tl.float32, p) for p in ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")],
        ("float16", "float16", tl.float16, None),
        ("float16", "float32", tl.float32, None),
        ("float8_e5m2", "float16", tl.float16, None),
        ("float64", "float64", tl.float64, None),
    ],
)
def test_types_of_the_sum_and_precisions(source, target, triton_type, precision, batch, n, rng):
    """A precision is the least that is asked for: all are IEEE's here. A sum in float16 is rounded once a product."""
    a, b = (Tensor(rng.standard_normal((batch, n, n)) / 4, source) for _ in range(2))
    out = empty((batch, n, n), target)
    variant_kernel[(1,)](a, b, out, batch, n, triton_type, precision)
    expected = np.full((batch, n, n), 2.0)
    for _ in range(2):
        expected = rounded(expected + a.values.astype(float) @ b.values.astype(float), target)
    tolerance = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-12}[target]
    np.testing.assert_allclose(out.values, expected, rtol=tolerance, atol=tolerance)


@triton.jit
def int8_weight_kernel(x_ptr, w_ptr, scale_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    w = tl.load(w_ptr + k[:, None] * N + n[None, :]).to(tl.float32)
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(x, w) * tl.load(scale_ptr + n)[None, :])


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integer_weights_widened_in_the_kernel(dtype, rng):
    x, scale = rng.standard_normal((4, 32), dtype=np.float32), rng.standard_normal(64, dtype=np.float32)
    w = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (32, 64), dtype)
    out = empty((4, 64))
    int8_weight_kernel[(1,)](Tensor(x), Tensor(w), Tensor(scale), out, 4, 64, 32)
    np.testing.assert_allclose(out.stored, x.astype(float) @ w * scale, rtol=1e-4, atol=1e-3)


@triton.jit
def quads_kernel(a_ptr, x_ptr, b_ptr, out_ptr, rows, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Products with b [K/4, N, 4] of a, which is signed, and of x in bytes from 0 to 127, which is computed."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left, out = m[:, None] * K + k[None, :], out_ptr + m[:, None] * N + n[None, :]
    b = b_ptr + ((k >> 2) * (4 * N) + (k & 3))[:, None] + n[None, :] * 4
    exists = (m < rows)[:, None]
    tl.store(out, tl.dot(tl.load(a_ptr + left), tl.load(b), out_dtype=tl.int32), exists)
    positive = (tl.load(x_ptr + left) * 127.0 + 0.5).to(tl.int32) & 127
    sums = tl.full((M, N), -3, tl.int32)
    tl.store(out + M * N, tl.dot(positive.to(tl.int8), tl.load(b), sums, out_dtype=tl.int32), exists)


def quads_arguments(rng, m, n, k, rows):
    a, b = rng.integers(-128, 128, (m, k), np.int8), rng.integers(-128, 128, (k, n), np.int8)
    a[:, :4], b[:4], x = -128, -128, rng.random((m, k), dtype=np.float32)
    a[0, -4:], b[-4:, 0], x[:, -4:] = 127, 127, 1
    packed = b.reshape(k // 4, 4, n).swapaxes(1, 2)
    return (Tensor(a), Tensor(x), Tensor(packed), empty((2, m, n), "int32"), rows, m, n, k), b.astype(int)


@pytest.mark.parametrize("m, n, k, rows", [(1, 16, 4, 1), (4, 64, 64, 3), (32, 64, 128, 32), (8, 128, 16, 5)])
def test_products_of_packed_bytes(m, n, k, rows, rng):
    arguments, b = quads_arguments(rng, m, n, k, rows)
    code = quads_kernel[(1,)](*arguments).asm["c"]
    assert "not dot.quads" not in code.split("kernel_quads")[-1]
    a, x, _, out = (argument.stored for argument in arguments[:4])
    positive = (x * np.float32(127) + np.float32(0.5)).astype(int)
    np.testing.assert_array_equal(out[0, :rows], (a.astype(int) @ b)[:rows])
    np.testing.assert_array_equal(out[1, :rows], (positive @ b - 3)[:rows])


@triton.jit
def overwritten_operand_kernel(x_ptr, w_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    w = tl.load(w_ptr + i * N + j)
    x = tl.load(x_ptr + i * N + j)
    tl.store(w_ptr + i * N + j, x)
    tl.store(x_ptr + i * N + j, tl.dot(x, w))


def test_an_operand_whose_memory_is_overwritten_before_the_product(rng):
    a, b = rng.standard_normal((2, 32, 32), dtype=np.float32)
    x, w = Tensor(a), Tensor(b)
    overwritten_operand_kernel[(1,)](x, w, 32)
    np.testing.assert_array_equal(w.stored, a)
    np.testing.assert_allclose(x.stored, a.astype(float) @ b.astype(float), rtol=1e-5, atol=1e-5)


@triton.jit
def paged_kernel(
    a_ptr, b_ptr, table_ptr, out_ptr, count, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """PART: of a loop around, what a turn's loop goes over; 0: there is one loop only."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = b_ptr + k[:, None] * N + n[None, :]
    largest = tl.full((M,), float("-inf"), tl.float32)
    if PART:
        for start in range(0, count, PART):
            for i in range(start, tl.minimum(start + PART, count), 2):
                tile = tl.load(b + tl.load(table_ptr + i // 2).to(tl.int64) * K * N)
                largest = tl.maximum(largest, tl.max(tl.dot(a, tile), 1))
    else:
        for i in range(0, count, 2):
            tile = tl.load(b + tl.load(table_ptr + i // 2).to(tl.int64) * K * N)
            largest = tl.maximum(largest, tl.max(tl.dot(a, tile), 1))
    tl.store(out_ptr + m, largest)


@pytest.mark.parametrize("count, part", [(1, 0), (2, 0), (5, 0), (2, 4), (5, 4), (5, 3)])
def test_tiles_named_by_a_table_that_ends_where_memory_does(count, part, rng):
    """The next turn's tile is fetched ahead: in the last turn there is none, and the table must not be read."""
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    table = np.frombuffer(memory, np.int32, count, offset=mmap.PAGESIZE - 4 * count)
    table[:] = rng.permutation(count)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(table.ctypes.data + 4 * count, mmap.PAGESIZE, 0) == 0
    a, b = rng.standard_normal((4, 32), dtype=np.float32), rng.standard_normal((count, 32, 64), dtype=np.float32)
    out = empty((4,))
    paged_kernel[(1,)](Tensor(a), Tensor(b), view(table), out, 2 * count - 1, 4, 64, 32, part)
    np.testing.assert_allclose(out.stored, (a @ b).max((0, 2)), rtol=1e-5)


@triton.jit
def masked_operand_kernel(
    a_ptr, b_ptr, table_ptr, out_ptr, depth, width, every, count,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Tiles of b are [K, N], of which the last has `depth` rows and `width` columns; what lies behind is never read."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)[:, None]
    for i in range(count):
        rows = i * K + k < (count - 1) * K + depth
        columns = i * N + n < (count - 1) * N + width
        if MASK == "rows":
            mask = rows
        elif MASK == "columns":
            mask = columns
        elif MASK == "both":
            mask = rows & columns
        else:
            mask = (k % every != 1) & (n % every != 1) & columns
        tile = tl.load(table_ptr + i)
        b = tl.load(b_ptr + tile * K * N + k * N + n, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + m * K + tl.arange(0, K)[None, :])
        out = tl.dot(a, b, tl.full([M, N], 1.0, tl.float32), input_precision="ieee")
        tl.store(out_ptr + i * M * N + m * N + n, out)


@pytest.mark.parametrize("mask", ["rows", "columns", "both", "every"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_what_a_mask_excludes_is_neither_read_nor_multiplied(dtype, mask, rng):
    for turn in range(6):
        m, n, k, count = 1 << int(rng.integers(0, 6)), 1 << int(rng.integers(4, 7)), 1 << int(rng.integers(0, 7)), 3
        depth, width, every = int(rng.integers(0, k + 1)), int(rng.integers(0, n + 1)), int(rng.integers(2, 5))
        a = rng.standard_normal((m, k), dtype=np.float32)
        b = rng.integers(-8, 9, (count, k, n)).astype(np.float32)
        row, column = np.arange(k)[:, None], np.arange(n)[None]
        last = {
            "rows": np.broadcast_to(row < depth, (k, n)),
            "columns": np.broadcast_to(column < width, (k, n)),
            "both": (row < depth) & (column < width),
            "every": (row % every != 1) & (column % every != 1) & (column < width),
        }[mask]
        whole = (row % every != 1) & (column % every != 1) if mask == "every" else np.ones((k, n), bool)
        kept = np.stack([whole, whole, last])
        stored = np.where(kept, b, 100.0 if dtype == "int8" else np.nan)
        out = empty((count, m, n))
        table = rng.permutation(count).astype(np.int32)
        shuffled = np.empty_like(stored)
        shuffled[table] = stored
        masked_operand_kernel[(1,)](
            Tensor(a), Tensor(shuffled, dtype), Tensor(table), out, depth, width, every, count, m, n, k, mask,
            live_rows=turn % 3 > 0,
        )  # fmt: skip
        exact = 1 + a.astype(float) @ np.where(kept, b, 0.0)
        np.testing.assert_allclose(out.stored, exact, rtol=1e-5, atol=1e-4)


@triton.jit
def sloping_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    sums = tl.where(n[None, :] < m[:, None], n[None, :].to(tl.float32), 0.5)
    a, b = tl.load(a_ptr + m[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, sums))


@pytest.mark.parametrize("m, n, k", [(16, 64, 32), (2, 128, 8), (64, 32, 16)])
def test_sums_begin_with_what_is_computed_of_columns(m, n, k, rng):
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    out, rows, columns = empty((m, n)), np.arange(m)[:, None], np.arange(n)[None]
    sloping_kernel[(1,)](Tensor(a), Tensor(b), out, m, n, k)
    np.testing.assert_allclose(out.stored, np.where(columns < rows, columns, 0.5) + a.astype(float) @ b, atol=1e-4)
