"""Operations that only move elements."""

import numpy as np
import triton
import triton.language as tl

from .arrays import Tensor, empty


@triton.jit
def expand_kernel(row_ptr, column_ptr, cube_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    row, column = tl.load(row_ptr + j), tl.load(column_ptr + i)
    cube_places = i[:, None, None] * (N * K) + j[None, :, None] * K + k[None, None, :]
    cube = tl.load(cube_ptr + cube_places)
    wide = tl.broadcast_to(row[None, :, None], (M, N, K)) + tl.expand_dims(tl.expand_dims(column, 1), 2) * cube
    tl.store(out_ptr + cube_places, wide)


def test_expand_dims_and_broadcast(rng):
    row, column, cube = rng.standard_normal(8), rng.standard_normal(4), rng.standard_normal((4, 8, 16))
    row, column, cube = (v.astype(np.float32) for v in (row, column, cube))
    out = empty(cube.shape)
    expand_kernel[(1,)](Tensor(row), Tensor(column), Tensor(cube), out, 4, 8, 16)
    np.testing.assert_allclose(
        out.stored, row[:, None] + column[:, None, None] * cube.astype(float), rtol=1e-6, atol=1e-6
    )


@triton.jit
def permute_kernel(
    x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, ORDER: tl.constexpr, SHAPE: tl.constexpr
):
    a, b, c = tl.arange(0, A), tl.arange(0, B), tl.arange(0, C)
    x = tl.load(x_ptr + a[:, None, None] * (B * C) + b[None, :, None] * C + c[None, None, :])
    y = tl.permute(x, ORDER[0], ORDER[1], ORDER[2])
    p, q, r = tl.arange(0, SHAPE[0]), tl.arange(0, SHAPE[1]), tl.arange(0, SHAPE[2])
    places = p[:, None, None] * (SHAPE[1] * SHAPE[2]) + q[None, :, None] * SHAPE[2] + r[None, None, :]
    tl.store(out_ptr + places, y)


def test_every_permutation_of_three_dimensions(rng):
    x = rng.standard_normal((2, 4, 8), dtype=np.float32)
    for order in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        expected = x.transpose(order)
        out = empty(expected.shape)
        permute_kernel[(1,)](Tensor(x), out, 2, 4, 8, order, expected.shape)
        np.testing.assert_array_equal(out.stored, expected, str(order))


@triton.jit
def reshape_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    square = tl.reshape(x, (N // 8, 8))
    tl.store(out_ptr + 0 * N + i, tl.reshape(tl.trans(square), (N,)))
    tl.store(out_ptr + 1 * N + i, tl.ravel(tl.reshape(square, (2, N // 16, 8))))
    tl.store(out_ptr + 2 * N + i, tl.reshape(tl.reshape(x, (1, N, 1)), (N, 1)).reshape(N))
    low, high = tl.split(tl.reshape(x, (N // 2, 2)))
    tl.store(out_ptr + 3 * N + i, tl.interleave(high, low))
    tl.store(out_ptr + 4 * N + i, tl.reshape(tl.join(low, high), (N,)))
    tl.store(out_ptr + 5 * N + i, tl.cat(low, high, can_reorder=True))
    tl.store(
        out_ptr + 6 * N + i,
        tl.reshape(tl.sum(tl.reshape(x, (N // 4, 2, 2)), 1)[:, None, :] + tl.zeros((N // 4, 2, 2), tl.float32), (N,)),
    )


def test_reshape_split_join_interleave_and_cat(rng):
    x = rng.standard_normal(64, dtype=np.float32)
    out = empty((7, 64))
    reshape_kernel[(1,)](Tensor(x), out, 64)
    low, high = x[::2], x[1::2]
    swapped = np.stack([high, low], 1).ravel()
    sums = np.repeat(x.reshape(16, 2, 2).sum(1)[:, None], 2, 1).ravel()
    expected = [x.reshape(8, 8).T.ravel(), x, x, swapped, x, np.concatenate([low, high]), sums]
    np.testing.assert_array_equal(out.stored, expected)


@triton.jit
def gather_kernel(x_ptr, rows_ptr, columns_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    places = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + places)
    tl.store(out_ptr + places, tl.gather(x * 2, tl.load(rows_ptr + places), 0))
    tl.store(out_ptr + M * N + places, tl.gather(x * 2, tl.load(columns_ptr + places), 1))


def test_gather_along_either_axis(rng):
    x = rng.standard_normal((8, 32), dtype=np.float32)
    rows, columns = rng.integers(0, 8, (8, 32)).astype(np.int32), rng.integers(0, 32, (8, 32)).astype(np.int32)
    out = empty((2, 8, 32))
    gather_kernel[(1,)](Tensor(x), Tensor(rows), Tensor(columns), out, 8, 32)
    np.testing.assert_array_equal(
        out.stored, [np.take_along_axis(2 * x, rows, 0), np.take_along_axis(2 * x, columns, 1)]
    )


@triton.jit
def nibbles_kernel(x_ptr, out_ptr, N: tl.constexpr):
    packed = tl.load(x_ptr + tl.arange(0, N))
    values = tl.interleave((packed & 15).to(tl.int8) - 8, (packed >> 4).to(tl.int8) - 8)
    tl.store(out_ptr + tl.arange(0, 2 * N), values.to(tl.float32))


def test_unpacking_of_nibbles():
    x = np.arange(256, dtype=np.uint8)
    out = empty(512)
    nibbles_kernel[(1,)](Tensor(x), out, 256)
    np.testing.assert_array_equal(out.stored.reshape(-1, 2), np.stack([x & 15, x >> 4], 1).astype(int) - 8)
