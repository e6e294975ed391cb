"""Loops around tl.dot in registers: quantised linear layers against NumPy, and every loop against the general path."""

from typing import NamedTuple

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty, rounded

GROUP = 32  # values along k that share a scale


@triton.jit
def linear_q4_kernel(
    x_ptr, x_scale_ptr, x_sum_ptr, w_ptr, d_ptr, m_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """y[m, n] = sum over groups g of  x_scale[g, m] d[g, n] (x . q)_g  +  x_sum[g, m] m[g, n],   q in 0 ... 15

    q  [N/16, K/32, 4, 16, 4] bytes: byte (g, r, n, t) = q[32 g + 4 r + t, n] | q[32 g + 16 + 4 r + t, n] << 4
    d, m  [N/16, K/32, 16] float16        x  [M, K] int8        x_scale, x_sum  [K/32, M] float32
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 16)
    m = tl.minimum(row, M - 1)
    x = x_ptr + m[:, None] * K + k[None, :]
    w = w_ptr + (n // 16).to(tl.int64)[None, :] * (K * 8) + (n % 16)[None, :] * 4
    w = w + (k // 4)[:, None] * 64 + (k % 4)[:, None]
    d = d_ptr + n // 16 * (K // 2) + n % 16
    minimum = m_ptr + n // 16 * (K // 2) + n % 16
    scale, total = x_scale_ptr + m, x_sum_ptr + m
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K // 32):
        pairs = tl.load(w)
        products = tl.dot(tl.load(x), (pairs & 15).to(tl.int8), out_dtype=tl.int32)
        products = tl.dot(tl.load(x + 16), (pairs >> 4).to(tl.int8), products, out_dtype=tl.int32)
        y += products.to(tl.float32) * (tl.load(scale)[:, None] * tl.load(d).to(tl.float32)[None, :])
        y += tl.load(total)[:, None] * tl.load(minimum).to(tl.float32)[None, :]
        x += 32
        w += 256
        d += 16
        minimum += 16
        scale += M
        total += M
    tl.store(y_ptr + row[:, None] * N + n[None, :], y, (row < M)[:, None])


@triton.jit
def linear_q8_kernel(
    x_ptr, x_scale_ptr, w_ptr, d_ptr, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OFFSET_BINARY: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over groups g of  x_scale[g, m] d[g, n] (x . q)_g,   q in -128 ... 127

    q  [N/16, K/4, 16, 4] int8        d  [N/16, K/32, 16] float16        OFFSET_BINARY: x is stored as x ^ 128
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 32)
    m = tl.minimum(row, M - 1)
    x = x_ptr + m[:, None] * K + k[None, :]
    w = w_ptr + (n // 16).to(tl.int64)[None, :] * (K * 16) + (n % 16)[None, :] * 4
    w = w + (k // 4)[:, None] * 64 + (k % 4)[:, None]
    d = d_ptr + n // 16 * (K // 2) + n % 16
    scale = x_scale_ptr + m
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K // 32):
        values = tl.load(x)
        if OFFSET_BINARY:
            values = (values ^ 128).to(tl.int8)
        products = tl.dot(values, tl.load(w), out_dtype=tl.int32)
        y += products.to(tl.float32) * (tl.load(scale)[:, None] * tl.load(d).to(tl.float32)[None, :])
        x += 32
        w += 512
        d += 16
        scale += M
    tl.store(y_ptr + row[:, None] * N + n[None, :], y, (row < M)[:, None])


class Quantised(NamedTuple):
    """x [M, K] int8 with a scale per row and group; weights q [K, N] with d and m (float16) per group and column."""

    x: np.ndarray
    x_scale: np.ndarray  # [K/32, M]
    q: np.ndarray
    d: np.ndarray  # [K/32, N]
    m: np.ndarray

    @classmethod
    def random(cls, rng, rows, n, k, low, high):
        scales = [rounded(rng.uniform(0.01, 0.1, (k // GROUP, n)), "float16").astype(np.float32) for _ in range(2)]
        x = rng.integers(-128, 128, (rows, k), np.int8)
        x_scale = rng.uniform(0.01, 0.1, (k // GROUP, rows)).astype(np.float32)
        return cls(x, x_scale, rng.integers(low, high, (k, n)), *scales)

    def reference(self, with_minimum):
        """The sum in float64, and the sum of its terms' magnitudes."""
        groups = [slice(g * GROUP, (g + 1) * GROUP) for g in range(len(self.d))]
        y, size = 0.0, 0.0
        for g, part in enumerate(groups):
            x, q = self.x[:, part].astype(float), self.q[part].astype(float)
            term = self.x_scale[g][:, None].astype(float) * ((x @ q) * self.d[g])
            least = (self.x_scale[g].astype(float) * x.sum(1))[:, None] * self.m[g] * with_minimum
            y, size = y + term + least, size + np.abs(term) + np.abs(least)
        return y, size


def tiled(columns):
    """[..., N] -> [N/16, ..., 16]"""
    return np.moveaxis(columns.reshape(*columns.shape[:-1], -1, 16), -2, 0)


def quads(q):
    """[K, N] -> [N/16, K/4, 16, 4]"""
    k, n = q.shape
    return q.reshape(k // 4, 4, n // 16, 16).transpose(2, 0, 3, 1)


def q4_arguments(data, block_m, block_n):
    """(grid, arguments) of linear_q4_kernel; the last tensor is the output."""
    (rows, k), n = data.x.shape, data.q.shape[1]
    halves = quads(data.q).reshape(n // 16, k // 32, 2, 4, 16, 4)
    w = Tensor((halves[:, :, 0] | halves[:, :, 1] << 4).astype(np.uint8))
    sums = data.x.reshape(rows, -1, GROUP).astype(np.float32).sum(2).T * data.x_scale
    x, d, m = Tensor(data.x), Tensor(tiled(data.d), "float16"), Tensor(tiled(data.m), "float16")
    tensors = (x, Tensor(data.x_scale), Tensor(sums), w, d, m, empty((rows, n)))
    return (-(-rows // block_m), n // block_n), (*tensors, rows, n, k, block_m, block_n)


def q8_arguments(data, block_m, block_n, offset_binary=False):
    (rows, k), n = data.x.shape, data.q.shape[1]
    x = Tensor((data.x.view(np.uint8) ^ 128) if offset_binary else data.x)
    w, d = Tensor(quads(data.q).astype(np.int8)), Tensor(tiled(data.d), "float16")
    tensors = (x, Tensor(data.x_scale), w, d, empty((rows, n)))
    return (-(-rows // block_m), n // block_n), (*tensors, rows, n, k, block_m, block_n, offset_binary)


def linear_q4(*data_and_blocks, **options):
    grid, arguments = q4_arguments(*data_and_blocks)
    linear_q4_kernel[grid](*arguments, **options)
    return arguments[6].stored


def linear_q8(*data_and_blocks, **options):
    grid, arguments = q8_arguments(*data_and_blocks)
    linear_q8_kernel[grid](*arguments, **options)
    return arguments[4].stored


def in_registers(compiled):
    """Has the C a variable for the first vector of a tile?"""
    return "_0x0 = " in compiled.asm["c"]


SHAPES = [(1, 32, 32), (3, 64, 96), (8, 16, 160), (17, 128, 64), (64, 64, 608)]  # (M, N, K)


@pytest.mark.parametrize("rows, n, k", SHAPES)
def test_q4_against_numpy(rows, n, k, rng):
    data = Quantised.random(rng, rows, n, k, 0, 16)
    expected, size = data.reference(with_minimum=True)
    for block_m, block_n in ((1, 16), (4, 32), (16, 16), (64, 16), (64, 32)):
        if n % block_n == 0:
            assert (np.abs(linear_q4(data, block_m, block_n) - expected) <= 1e-6 * size).all()


@pytest.mark.parametrize("offset_binary", [False, True])
@pytest.mark.parametrize("rows, n, k", SHAPES)
def test_q8_against_numpy(rows, n, k, offset_binary, rng):
    data = Quantised.random(rng, rows, n, k, -128, 128)
    expected, size = data.reference(with_minimum=False)
    for block_m, block_n in ((1, 16), (4, 32), (16, 16), (64, 16), (64, 32)):
        if n % block_n == 0:
            assert (np.abs(linear_q8(data, block_m, block_n, offset_binary) - expected) <= 1e-6 * size).all()


def test_a_row_has_the_same_bits_for_every_number_of_rows(rng):
    for layer, low, high in ((linear_q4, 0, 16), (linear_q8, -128, 128)):
        data = Quantised.random(rng, 64, 64, 608, low, high)
        expected = layer(data, 64, 16)
        for rows in (1, 3, 8, 17, 64):
            for block_m, block_n in ((1, 16), (8, 16), (16, 64), (32, 32), (64, 32)):
                few = data._replace(x=data.x[:rows], x_scale=np.ascontiguousarray(data.x_scale[:, :rows]))
                np.testing.assert_array_equal(layer(few, block_m, block_n), expected[:rows])


@pytest.mark.parametrize("turn", range(5))
def test_quantised_layers_in_the_general_path(turn):
    rng = np.random.default_rng(turn)
    rows, n, k = int(rng.integers(1, 40)), 16 * int(rng.integers(1, 4)), 32 * int(rng.integers(1, 6))
    block_m = 1 << int(rng.integers(0, 6))
    for layer, low, high in ((linear_q4, 0, 16), (linear_q8, -128, 128)):
        data = Quantised.random(rng, rows, n, k, low, high)
        np.testing.assert_array_equal(
            layer(data, block_m, 16, register_tiles=True), layer(data, block_m, 16, register_tiles=False)
        )


@triton.jit
def float_kernel(
    a_ptr, b_ptr, scale_ptr, bias_ptr, out_ptr, K, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of products in the forms that kernels write them in, over columns that do or do not follow each other."""
    m, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = n
    if COLUMNS == "wrapped":
        column = n % N
    elif COLUMNS == "clamped":
        column = tl.minimum(n, N - 1)
    elif COLUMNS == "every second":
        column = n * 2
    a = a_ptr + m[:, None] * K + k[None, :]
    b = b_ptr + k[:, None] * (2 * N) + column[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(bias_ptr + m)[:, None]
    for step in range(0, K, BLOCK_K):
        scale = tl.load(scale_ptr + m)
        x = tl.load(a).to(tl.float32)
        w = tl.load(b).to(tl.float32)
        if FORM == "chained":
            sums = tl.dot(x, w, sums)
        elif FORM == "added":
            sums += tl.dot(x, w)
        elif FORM == "scaled":
            sums += tl.dot(x, w) * scale[:, None]
        elif FORM == "decayed":
            sums = tl.dot(x, w, sums * scale[:, None]) - w_of(bias_ptr, step, BLOCK_N)[None, :]
        else:
            sums = tl.dot(x * 0.5 + 1, w * w, sums)
        a += BLOCK_K
        b += BLOCK_K * 2 * N
    tl.store(out_ptr + m[:, None] * (N + BLOCK_N) + n[None, :], sums, n[None, :] < N + BLOCK_N)


@triton.jit
def w_of(bias_ptr, step, BLOCK_N: tl.constexpr):
    return tl.load(bias_ptr + step % 8 + tl.arange(0, BLOCK_N)) * 0.25


@triton.jit
def bytes_kernel(a_ptr, b_ptr, out_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr):
    """Sums of products of bytes, of weights packed as `quads`."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    a = a_ptr + m[:, None] * K + k[None, :]
    b = b_ptr + (n // 16)[None, :] * (K * 16) + (n % 16)[None, :] * 4 + (k // 4)[:, None] * 64 + (k % 4)[:, None]
    sums = tl.zeros((M, N), tl.int32)
    for _ in range(0, K, BLOCK_K):
        left, right = tl.load(a), tl.load(b)
        if FORM == "positive":
            right = right & 127
        elif FORM == "masked":
            left, right = left & 0x3C, (right | 64) ^ 3
        elif FORM == "few bits":
            sums = tl.dot(left, right & 15, sums, out_dtype=tl.int32)
            sums = tl.dot(left, (right & 63) - 32, sums, out_dtype=tl.int32)
            right = right & 31
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        a += BLOCK_K
        b += BLOCK_K * 16
    tl.store(out_ptr + m[:, None] * N + n[None, :], sums)


def bytes_of_all_sizes(rng, m, n, k):
    """(a [m, k], b [k, n]) int8, with the sums that are farthest from 0 however few of b's bits are taken."""
    a, b = rng.integers(-128, 128, (m, k), np.int8), rng.integers(-128, 128, (k, n), np.int8)
    a[-1], b[:, :3] = 127, (127, 64, -128)
    a[0] = -128
    return a, b


@pytest.mark.parametrize("form", ["signed", "positive", "masked", "few bits"])
@pytest.mark.parametrize("m, n, block_k", [(1, 16, 4), (2, 64, 128), (8, 32, 64), (32, 16, 256)])
def test_sums_of_products_of_bytes_are_exact(m, n, block_k, form, rng):
    k = 3 * block_k
    a, b = bytes_of_all_sizes(rng, m, n, k)
    out = empty((m, n), "int32")
    compiled = bytes_kernel[(1,)](Tensor(a), Tensor(quads(b)), out, k, m, n, block_k, form)
    assert in_registers(compiled)
    if form == "positive":
        b = b & 127
    elif form == "masked":
        a, b = a & 0x3C, (b | 64) ^ 3
    elif form == "few bits":
        b = (b & 15) + ((b & 63) - 32) + (b & 31)
    np.testing.assert_array_equal(out.stored, a.astype(int) @ b.astype(int))


@triton.jit
def two_tiles_kernel(a_ptr, b_ptr, out_ptr, turns, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    even, odd = tl.zeros((N, N), tl.float32), tl.full((N, N), 1.0, tl.float32)
    b = b_ptr + i * N + j
    for _ in range(turns):
        even, odd = odd, tl.dot(tl.load(a_ptr + i * N + j), tl.load(b), even) * 0.5
        b += N * N
    tl.store(out_ptr + i * N + j, even)
    tl.store(out_ptr + N * N + i * N + j, odd)


def test_two_tiles_that_change_places(rng):
    a, b = Tensor(rng.standard_normal((32, 32), np.float32)), Tensor(rng.standard_normal((5, 32, 32), np.float32))
    found = []
    for register_tiles in (True, False):
        out = empty((2, 32, 32))
        compiled = two_tiles_kernel[(1,)](a, b, out, 5, 32, register_tiles=register_tiles)
        assert in_registers(compiled) == register_tiles
        found.append(out.stored)
    np.testing.assert_array_equal(*found)


@triton.jit
def some_turns_kernel(
    a_ptr, b_ptr, taken_ptr, out_ptr, rows, K, first, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """a b, and b's products again with those rows of a that are taken, chunk by chunk of K, from the first on."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    row = tl.minimum(m, rows - 1)
    a = a_ptr + row[:, None] * K + k[None, :]
    b = b_ptr + k[:, None] * N + n[None, :]
    sums = tl.zeros((M, N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        sums = tl.dot(tl.load(a), tl.load(b), sums)
        a += BLOCK_K
        b += BLOCK_K * N
    again = a_ptr + (rows + row)[:, None] * K + first * BLOCK_K + k[None, :]
    b = b_ptr + (first * BLOCK_K + k)[:, None] * N + n[None, :]
    taken = taken_ptr + row * (K // BLOCK_K) + first
    for _ in range(first, K // BLOCK_K):
        sums = tl.where((tl.load(taken) != 0)[:, None], tl.dot(tl.load(again), tl.load(b), sums), sums)
        again += BLOCK_K
        b += BLOCK_K * N
        taken += 1
    tl.store(out_ptr + m[:, None] * N + n[None, :], sums, (m < rows)[:, None])


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    "rows, m, n, turns, first", [(1, 1, 16, 3, 0), (7, 16, 32, 5, 1), (40, 64, 64, 9, 3), (3, 4, 16, 300, 2)]
)
def test_turns_that_change_no_row_of_a_block_are_left_out(rows, m, n, turns, first, share, rng):
    """What is not taken is NaN in memory."""
    k = 8 * turns
    a, b = rng.integers(-9, 10, (2 * rows, k)).astype(np.float32), rng.integers(-9, 10, (k, n)).astype(np.float32)
    taken = (rng.random((rows, turns)) < share).astype(np.int8)
    chosen = np.repeat(taken, 8, axis=1) != 0
    expected = a[:rows] @ b + np.where(chosen, a[rows:], 0)[:, 8 * first :] @ b[8 * first :]
    a[rows:][~chosen] = np.nan
    for register_tiles in (True, False):
        out = empty((m, n))
        arguments = Tensor(a), Tensor(b), Tensor(taken), out, rows, k, first, m, n, 8
        compiled = some_turns_kernel[(1,)](*arguments, register_tiles=register_tiles)
        assert ("int64_t turns_" in compiled.asm["c"]) == register_tiles
        np.testing.assert_array_equal(out.stored[:rows], expected)


FORMS = ("chained", "added", "scaled", "decayed", "computed operands")


def sums_of_floats(rng, form, columns):
    """One random shape and type, in registers and in the general path."""
    block_m, block_n, block_k = (1 << int(rng.integers(low, high)) for low, high in ((0, 7), (4, 7), (1, 7)))
    n, k = int(rng.integers(block_n // 2, 3 * block_n)), block_k * int(rng.integers(1, 5))
    dtype = ["float32", "bfloat16", "float16"][int(rng.integers(3))]
    a, b = Tensor(rng.standard_normal((block_m, k)), dtype), Tensor(rng.standard_normal((k + 1, 2 * n + 128)), dtype)
    scale, bias = (Tensor(rng.standard_normal(128 + block_n, dtype=np.float32)) for _ in range(2))
    found = []
    for register_tiles in (True, False):
        out = empty((block_m, n + block_n))
        compiled = float_kernel[(1, -(-n // block_n))](
            a, b, scale, bias, out, k, n, block_m, block_n, block_k, form, columns, register_tiles=register_tiles
        )
        assert in_registers(compiled) == (register_tiles and columns == "in order")
        found.append(out.stored)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turn", range(3))
def test_sums_of_floats_in_the_general_path(form, turn):
    fast, general = sums_of_floats(np.random.default_rng(FORMS.index(form) * 100 + turn), form, "in order")
    np.testing.assert_array_equal(fast, general)


@pytest.mark.parametrize("columns", ["wrapped", "clamped", "every second"])
def test_columns_that_may_not_be_neighbours_are_left_to_the_general_path(columns, rng):
    np.testing.assert_array_equal(*sums_of_floats(rng, "chained", columns))


@pytest.mark.parametrize(
    "name, sign",
    [("live_rows", "int live_"), ("direct_stores", "  vec_store_some("), ("prefetch", "  __builtin_prefetch(")],
)
def test_an_optimisation_that_is_left_out_changes_no_bit(name, sign, rng):
    for rows, n, k in ((1, 32, 64), (40, 64, 160)):
        grid, arguments = q4_arguments(Quantised.random(rng, rows, n, k, 0, 16), 64, 32)
        found = []
        for wanted in (True, False):
            arguments[6].stored[:] = 0
            compiled = linear_q4_kernel[grid](*arguments, **{name: wanted})
            assert (sign in compiled.asm["c"].split("kernel_linear_q4_kernel", 1)[1]) == wanted
            found.append(arguments[6].stored.copy())
        np.testing.assert_array_equal(*found)
