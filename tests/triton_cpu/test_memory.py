"""Loads and stores: masks, strides, gathers, aliasing, places past 2^31 elements, tables of pointers, descriptors."""

import mmap

import numpy as np
import pytest
import triton
import triton.language as tl

from fastdeploy.kernels.launch import TensorView

from .arrays import FLOATS, FP8, INTEGERS, Tensor, decode, empty, encode, numbers


@triton.jit
def masked_copy_kernel(x_ptr, out_ptr, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, OTHER)
    tl.store(out_ptr + i, x)
    tl.store(out_ptr + i + BLOCK * tl.num_programs(0), x, (i < n) & (i % 3 == 0))


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS, *FP8])
def test_masked_elements_are_neither_read_nor_written(dtype, rng):
    for n in (0, 1, 77, 128):
        x = encode(numbers(rng, n, dtype), dtype)
        out = empty((2, 128), dtype)
        untouched = out.stored[1].copy()
        # what follows the array in memory is NaN or junk, and would be seen
        source = Tensor(np.zeros(128), dtype)
        source.stored[:] = 0x7F
        source.stored[:n] = x
        masked_copy_kernel[(4,)](source, out, n, 3 if dtype in INTEGERS else 3.0, 32)
        np.testing.assert_array_equal(
            decode(out.stored[0], dtype), decode(np.append(x, np.full(128 - n, encode(3, dtype))), dtype)
        )
        i = np.arange(128)
        written = (i < n) & (i % 3 == 0)
        np.testing.assert_array_equal(out.stored[1][~written], untouched[~written])
        np.testing.assert_array_equal(decode(out.stored[1][written], dtype), decode(x[written[:n]], dtype))


@triton.jit
def masked_off_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i.to(tl.int64) * 1000000000000, i == 0, float("-inf"))
    tl.store(out_ptr + i, x + tl.load(x_ptr, tl.program_id(0) == 1, 2.0))
    tl.store(x_ptr + i.to(tl.int64) * 1000000000000, x, i == 0)
    tl.store(x_ptr + 1000000000000, 0.0, tl.program_id(0) == 1)


def test_a_masked_address_may_be_anything():
    x, out = Tensor(np.ones(1, np.float32)), empty(16)
    masked_off_kernel[(1,)](x, out, 16)
    np.testing.assert_array_equal(out.stored, [3.0] + 15 * [-np.inf])


@triton.jit
def transpose_kernel(x_ptr, out_ptr, m, n, sx_m, sx_n, so_m, so_n, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i * sx_m + j * sx_n, (i < m) & (j < n), 0)
    tl.store(out_ptr + i * so_m + j * so_n, x * 2, (i < m) & (j < n))


@pytest.mark.parametrize("order", ["rows", "columns", "every third", "backwards"])
def test_strided_and_transposed_tensors(order, rng):
    for m, n in ((16, 32), (1, 32), (16, 1), (13, 17)):
        store = rng.standard_normal((3 * m, 3 * n), dtype=np.float32)
        x = {
            "rows": store, "columns": store.reshape(3 * n, 3 * m).T, "every third": store[::3, ::3],
            "backwards": store[::-1, ::-1],
        }[order][:m, :n]  # fmt: skip
        out = np.zeros((n, m), np.float32)  # written transposed
        strides = [s // 4 for s in x.strides]
        source = TensorView(x.__array_interface__["data"][0], "float32", x.shape, tuple(strides), x)
        transpose_kernel[(1,)](source, _view(out), *x.shape, *strides, 1, m, 16, 32)
        np.testing.assert_array_equal(out.T, 2 * x)


def _view(array):
    return TensorView(array.ctypes.data, str(array.dtype), array.shape, array.shape, array)


@triton.jit
def gather_kernel(x_ptr, row_ptr, column_ptr, out_ptr, width, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    rows, columns = tl.load(row_ptr + i), tl.load(column_ptr + j)
    tl.store(out_ptr + i[:, None] * N + j[None, :], tl.load(x_ptr + rows[:, None] * width + columns[None, :]))
    tl.store(out_ptr + M * N + rows[:, None] * N + columns[None, :], (i[:, None] + j[None, :]).to(tl.float32))


def test_gathered_rows_and_scattered_stores(rng):
    x = rng.standard_normal((8, 16), dtype=np.float32)
    rows, columns = rng.permutation(8).astype(np.int64), rng.permutation(16).astype(np.int32)
    out = empty((2, 8, 16))
    gather_kernel[(1,)](Tensor(x), Tensor(rows), Tensor(columns), out, 16, 8, 16)
    scattered = np.empty((8, 16))
    scattered[np.ix_(rows, columns)] = np.add.outer(np.arange(8), np.arange(16))
    np.testing.assert_array_equal(out.stored, [x[np.ix_(rows, columns)], scattered])


@triton.jit
def narrow_index_kernel(x_ptr, out_ptr):
    i = tl.arange(0, 256)
    tl.store(out_ptr + i, tl.load(x_ptr + 128 + i.to(tl.int8)))


def test_an_index_that_wraps_in_a_narrow_type():
    x, out = Tensor(np.arange(256, dtype=np.int32)), empty(256, "int32")
    narrow_index_kernel[(1,)](x, out)
    np.testing.assert_array_equal(out.stored, 128 + np.arange(256).astype(np.int8).astype(int))


@triton.jit
def unsigned_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    row, column = (i - 3).to(tl.uint32), (j - 3).to(tl.uint32)  # one comparison bounds them at both ends
    x = tl.load(x_ptr + row * n + column, (row < n) & (column < n), 0)
    tl.store(out_ptr + i * BLOCK + j, x)


def test_an_unsigned_index_that_wraps(rng):
    x = rng.standard_normal((11, 11)).astype(np.float32)
    out = empty((16, 16))
    unsigned_kernel[(1,)](Tensor(x), out, 11, 16)
    np.testing.assert_array_equal(out.values, np.pad(x, ((3, 2), (3, 2))))


@triton.jit
def shift_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + 1 + i, tl.load(x_ptr + i))


@triton.jit
def shift_in_loop_kernel(x_ptr, n, N: tl.constexpr):
    source = x_ptr + tl.arange(0, N)
    target = x_ptr + 1 + tl.arange(0, N)
    for _ in range(n):
        tl.store(target, tl.load(source))
        source += N
        target += N


@triton.jit
def transpose_in_place_kernel(x_ptr, N: tl.constexpr):
    places = x_ptr + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(places)
    tl.store(places, tl.trans(x) + x)


@triton.jit
def load_before_store_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x * 0)
    tl.store(y_ptr + i, x)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)


def test_all_of_a_tile_is_read_before_any_of_it_is_written(rng):
    x = Tensor(np.arange(65, dtype=np.float32))
    shift_kernel[(1,)](x, 64)
    np.testing.assert_array_equal(x.stored, [0, *range(64)])
    x = Tensor(np.arange(65, dtype=np.float32))
    shift_in_loop_kernel[(1,)](x, 2, 32)
    np.testing.assert_array_equal(x.stored, _shifted_twice())
    square = rng.standard_normal((32, 32), dtype=np.float32)
    x = Tensor(square)
    transpose_in_place_kernel[(1,)](x, 32)
    np.testing.assert_array_equal(x.stored, square.T + square)
    x, y = Tensor(square[0]), empty(32)
    load_before_store_kernel[(1,)](x, y, 32)
    np.testing.assert_array_equal([x.stored, y.stored], [np.ones(32), square[0]])


def _shifted_twice():
    x = np.arange(65.0)
    x[1:33] = x[:32].copy()
    x[33:] = x[32:64].copy()
    return x


@triton.jit
def far_kernel(x_ptr, far, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + (far + i), i.to(tl.int8))
    rows = (i // 4).to(tl.int64)
    x = tl.load(x_ptr + far + rows * 0 + i)
    tl.store(out_ptr + i, x + 1)
    pointer = x_ptr + i
    for _ in range(3):
        pointer += far // 2
    tl.store(pointer, i.to(tl.int8))


def test_offsets_past_2_to_the_31_elements():
    far = 5 * 2**30
    memory = mmap.mmap(-1, 9 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    x = np.frombuffer(memory, np.int8)
    out = empty(16, "int8")
    far_kernel[(1,)](_view(x), far, out, 16)
    np.testing.assert_array_equal(x[far : far + 16], np.arange(16))
    np.testing.assert_array_equal(x[far // 2 * 3 :][:16], np.arange(16))
    np.testing.assert_array_equal(out.stored, np.arange(16) + 1)


@triton.jit
def pointer_table_kernel(table_ptr, out_ptr, count, N: tl.constexpr):
    i = tl.arange(0, N)
    for k in range(count):
        source = tl.load(table_ptr + k).to(tl.pointer_type(tl.float32))
        tl.store(out_ptr + k * N + i, tl.load(source + i))
    sources = tl.load(table_ptr + i % count).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + count * N + i, tl.load(sources + i))


def test_a_table_of_pointers(rng):
    tensors = [Tensor(rng.standard_normal(16, dtype=np.float32)) for _ in range(3)]
    table = Tensor(np.array([tensor.data_ptr() for tensor in tensors], np.int64))
    out = empty((4, 16))
    pointer_table_kernel[(1,)](table, out, 3, 16)
    mixed = [tensors[i % 3].stored[i] for i in range(16)]
    np.testing.assert_array_equal(out.stored, [*[tensor.stored for tensor in tensors], mixed])


@triton.jit
def select_pointer_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    pointer = tl.where(i % 3 == 0, x_ptr + i, y_ptr + (N - 1 - i))
    tl.store(out_ptr + i, tl.load(pointer))
    scalar = tl.where(tl.load(x_ptr) > 0, x_ptr, y_ptr)
    tl.store(out_ptr + N + i, tl.load(scalar + i))


def test_a_choice_between_pointers(rng):
    x, y = rng.standard_normal((2, 16), dtype=np.float32)
    out = empty((2, 16))
    select_pointer_kernel[(1,)](Tensor(x), Tensor(y), out, 16)
    np.testing.assert_array_equal(out.stored, [np.where(np.arange(16) % 3 == 0, x, y[::-1]), x if x[0] > 0 else y])


@triton.jit
def descriptor_kernel(x_ptr, out_ptr, m, n, M: tl.constexpr, N: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [m, n], [n, 1], [M, N])
    out = tl.make_tensor_descriptor(out_ptr, [m, n], [n, 1], [M, N])
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    out.store([row, column], x.load([row, column]) + 1)


def test_tensor_descriptors_keep_within_their_bounds(rng):
    x = rng.standard_normal((19, 44), dtype=np.float32)
    out = Tensor(np.full((20, 44), -1, np.float32))
    descriptor_kernel[(3, 2)](Tensor(x), out, 19, 44, 8, 32)
    np.testing.assert_array_equal(out.stored[:19], x + 1)
    assert (out.stored[19] == -1).all()


@triton.jit
def large_tile_kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i)
    x = x - tl.max(x, 1)[:, None]
    tl.store(out_ptr + i, x / tl.sum(x, 1)[:, None])


def test_a_tile_larger_than_a_stack(rng):
    x = rng.standard_normal((256, 4096), dtype=np.float32)
    out = empty(x.shape)
    large_tile_kernel[(1,)](Tensor(x), out, *x.shape)
    shifted = x.astype(float) - x.max(1, keepdims=True)
    np.testing.assert_allclose(out.stored, shifted / shifted.sum(1, keepdims=True), rtol=1e-5, atol=1e-12)


@triton.jit
def poll_kernel(flag_ptr, payload_ptr, out_ptr, timeout, N: tl.constexpr):
    i = tl.arange(0, N)
    if tl.program_id(0) == 0:
        for turn in range(1000):  # work, so that the other program waits
            tl.store(payload_ptr + i, i + turn)
        tl.atomic_xchg(flag_ptr, 1)
    else:
        tl.atomic_poll(flag_ptr, 1)
        tl.store(out_ptr + i, tl.load(payload_ptr + i))
        tl.store(
            out_ptr + N + i, tl.atomic_poll(payload_ptr + i, 1000, timeout_ns=timeout).to(payload_ptr.dtype.element_ty)
        )


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
def test_a_program_waits_for_another_or_for_a_time(dtype):
    flag, payload, out = Tensor(np.zeros(1, np.int32)), Tensor(np.zeros(4, dtype)), empty(8, dtype)
    poll_kernel[(2,)](flag, payload, out, 1000, 4)
    np.testing.assert_array_equal(out.stored, [999, 1000, 1001, 1002, 0, 1, 0, 0])
