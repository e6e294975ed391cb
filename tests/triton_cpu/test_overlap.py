"""Arguments that overlap in memory: all that a program reads is read before it writes, as if both were one argument."""

import numpy as np
import pytest
import triton
import triton.language as tl

from fastdeploy.kernels import launch
from fastdeploy.kernels.launch import TensorView
from fastdeploy.triton_cpu import view
from fastdeploy.triton_cpu.runtime import record

from .arrays import Tensor

WIDTH = 32


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N * N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) * 2 + 1)


@triton.jit
def shifted_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N * N)
    before, after = tl.load(x_ptr + i, i >= 0), tl.load(x_ptr + i + 1)
    tl.store(y_ptr + i, before - after, i % 3 > 0)


@triton.jit
def row_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    scale, shift = tl.load(x_ptr + tl.arange(0, N)), tl.load(x_ptr + N * tl.arange(0, N))
    tl.store(y_ptr + i * N + j, scale[None, :] * i + shift[:, None])


@triton.jit
def transpose_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(y_ptr + i * N + j, tl.trans(tl.load(x_ptr + i * N + j)))


@triton.jit
def product_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i, j, k = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, N)
    sums = tl.zeros((N, N), tl.float32)
    for start in range(0, N, 8):
        part = start + tl.arange(0, 8)
        a, b = tl.load(x_ptr + i * N + part[None, :]), tl.load(x_ptr + part[:, None] * N + j)
        sums = tl.dot(a, b, sums)
    tl.store(y_ptr + i * N + j, sums + tl.load(x_ptr + k)[None, :])


@triton.jit
def sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i * N + j)
    tl.store(y_ptr + i * N + j, x - tl.sum(x, 1)[:, None] + tl.load(x_ptr + i + j))


@triton.jit
def loop_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    for _ in range(N):
        tl.store(y_ptr + i, tl.load(x_ptr + i) + 1)
        x_ptr += N
        y_ptr += N


@triton.jit
def atomic_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N * N)
    tl.atomic_add(y_ptr + i // 2, tl.load(x_ptr + i))


@triton.jit(noinline=True)
def _copy(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N * N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + 1)


@triton.jit
def call_kernel(x_ptr, y_ptr, N: tl.constexpr):
    _copy(x_ptr, y_ptr, N)


def _looped(x, y):
    for row in range(WIDTH):
        part = slice(row * WIDTH, (row + 1) * WIDTH)
        y[part] = x[part] + 1


def _shifted(x, y):
    i = np.arange(WIDTH**2)
    y[: WIDTH**2][i % 3 > 0] = (x[: WIDTH**2] - x[1 : WIDTH**2 + 1])[i % 3 > 0]


def _squares(x):
    return x[: WIDTH**2].reshape(WIDTH, WIDTH)


def _summed(x):
    i = np.arange(WIDTH)
    return _squares(x) - _squares(x).sum(1)[:, None] + x[i[:, None] + i]


def _written(values):
    """A reference that writes what `values` computes once all has been read."""

    def write(x, y):
        y[: WIDTH**2] = values(x).ravel()

    return write


def _added(x, y):
    np.add.at(y, np.arange(WIDTH**2) // 2, x[: WIDTH**2].copy())


PROGRAMS = {
    "elementwise": (elementwise_kernel, _written(lambda x: x[: WIDTH**2] * 2 + 1)),
    "shifted": (shifted_kernel, _shifted),
    "rows": (
        row_kernel,
        _written(lambda x: x[:WIDTH] * np.arange(WIDTH)[:, None] + x[: WIDTH**2 : WIDTH][:, None]),
    ),
    "transpose": (transpose_kernel, _written(lambda x: _squares(x).T.copy())),
    "product": (product_kernel, _written(lambda x: _squares(x) @ _squares(x) + x[:WIDTH])),
    "sum": (sum_kernel, _written(_summed)),
    "loop": (loop_kernel, _looped),
    "atomic": (atomic_kernel, _added),
    "call": (call_kernel, _written(lambda x: x[: WIDTH**2] + 1)),
}
SIZE = WIDTH**2 + 1


def _views(memory, first, second):
    return [TensorView(memory[at:].ctypes.data, "float32", (SIZE,), (1,), memory) for at in (first, second)]


def _shifts(rng):
    return [0, 1, -1, WIDTH, -WIDTH, *map(int, rng.integers(-SIZE, SIZE + 1, 6))]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_tensors_that_overlap_are_read_before_they_are_written(name, recorded, rng):
    kernel, reference = PROGRAMS[name]
    for shift in _shifts(rng):
        found = rng.integers(-4, 5, 4 * SIZE).astype(np.float32)
        expected = found.copy()
        start = 2 * SIZE
        reference(expected[start:], expected[start + shift :])
        with record() as plan:
            kernel[(1,)](*_views(found, start, start + shift), WIDTH)
        if recorded:
            plan.replay()
        else:
            kernel[(1,)](*_views(found, start, start + shift), WIDTH)
        np.testing.assert_array_equal(found, expected, f"shifted by {shift}")


@pytest.fixture
def compiled(monkeypatch):
    """A list that grows with every kernel that is compiled, or taken from the cache."""
    found = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **what: found.append(what["src"].name))
    return found


class TorchLike:
    """A tensor with its strides as PyTorch gives them."""

    dtype = "float32"

    def __init__(self, memory):
        self.memory, self.shape = memory, memory.shape

    def data_ptr(self):
        return self.memory.ctypes.data

    def stride(self):
        return tuple(step // 4 for step in self.memory.strides)


class PaddleLike(TorchLike):
    """The same as Paddle."""

    def __init__(self, memory):
        super().__init__(memory)
        self.strides, self.shape = list(self.stride()), list(memory.shape)


def _versions(compiled, x, y):
    """How many versions of a kernel a call needs besides the first."""
    triton.jit(shifted_kernel.fn)[(1,)](x, y, 4)
    return len(compiled) - 1


@pytest.mark.parametrize("kind", [TorchLike, PaddleLike, view, launch.view])
def test_only_what_overlaps_is_compiled_for_that(kind, compiled):
    memory = np.ones((64, 64), np.float32)

    def versions(x, y):
        compiled.clear()
        return _versions(compiled, kind(x), kind(y))

    assert versions(memory[:32], memory[32:]) == 0
    assert versions(memory[32:], memory[:32]) == 0
    assert versions(memory[:33], memory[32:]) == 1
    assert versions(memory[32:], memory[:33]) == 1
    assert versions(memory[31::-1], memory[32:]) == 0
    assert versions(memory[32::-1], memory[32:]) == 1
    assert versions(memory[:, :32], memory[:, 32:]) == 1  # rows of one between rows of the other
    assert versions(memory[:32], memory[:0]) == 0
    assert versions(memory, memory) == 1


class Address(TorchLike):
    """Memory that nothing else is known of."""

    def __init__(self, memory):
        super().__init__(memory)
        del self.shape


def test_of_memory_without_a_shape_the_address_is_compared(compiled):
    x, y = Address(np.ones(64, np.float32)), Address(np.ones(64, np.float32))
    assert _versions(compiled, x, y) == 0
    compiled.clear()
    assert _versions(compiled, x, x) == 1


def test_in_place_is_no_overlap_where_each_element_is_read_for_itself_only(compiled):
    x = view(np.arange(256, dtype=np.float32))
    kernel = triton.jit(elementwise_kernel.fn)
    kernel[(1,)](x, x, 16)
    assert len(compiled) == 1


@triton.jit
def double_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N) // 2
    tl.atomic_add(x_ptr + i, tl.load(x_ptr + i))


def test_an_atomic_does_not_change_what_its_own_operand_reads():
    x = Tensor(np.arange(32, dtype=np.int32))
    double_kernel[(1,)](x, 32)
    np.testing.assert_array_equal(x.stored, np.arange(32) * np.where(np.arange(32) < 16, 3, 1))


@triton.jit
def low_bits_kernel(x_ptr, N: tl.constexpr):
    pointers = x_ptr + (tl.arange(0, N) & 7)
    tl.store(pointers, tl.load(pointers) + 1)


@triton.jit
def repeated_rows_kernel(x_ptr, N: tl.constexpr):
    pointers = x_ptr + tl.arange(0, N)[None, :] + tl.zeros((N, N), tl.int32)
    tl.store(pointers, tl.load(pointers) + 1)


@triton.jit
def diagonals_kernel(x_ptr, N: tl.constexpr):
    pointers = x_ptr + tl.arange(0, N)[None, :] + tl.arange(0, N)[:, None]
    tl.store(pointers, tl.load(pointers) + 1)


@triton.jit
def indexed_kernel(x_ptr, N: tl.constexpr):
    i = tl.load(x_ptr + tl.arange(0, N)).to(tl.int32) // 4
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)


@triton.jit
def moved_kernel(x_ptr, N: tl.constexpr):
    pointers = x_ptr + tl.arange(0, N) % 4
    for _ in range(2):
        tl.store(pointers, tl.load(pointers) + 1)
        pointers += 4


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    "kernel, written",
    [(low_bits_kernel, 8), (repeated_rows_kernel, 16), (diagonals_kernel, 31), (indexed_kernel, 4), (moved_kernel, 8)],
)
def test_a_place_that_many_elements_write_is_read_before_by_each(kernel, written, check):
    x = Tensor(np.arange(64, dtype=np.float32))
    kernel[(1,)](x, 16, check=check)
    np.testing.assert_array_equal(x.stored, np.arange(64) + (np.arange(64) < written))


def test_elements_apart_are_updated_without_an_array():
    @triton.jit
    def rows_kernel(x_ptr, stride, N: tl.constexpr):
        pointers = x_ptr + tl.arange(0, N)[:, None] * stride + tl.arange(0, N)[None, :]
        tl.store(pointers, tl.load(pointers) + 1)

    x = Tensor(np.zeros((16, 16), np.float32))
    assert "[256]" not in rows_kernel[(1,)](x, 16, 16).asm["c"].split("kernel_rows_kernel")[-1]
    np.testing.assert_array_equal(x.stored, 1)
