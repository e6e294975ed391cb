"""Kernels whose expressions are deeper than Python's stack, or have more paths than there is time for."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty


@triton.jit
def deep_kernel(x_ptr, out_ptr, N: tl.constexpr, TIMES: tl.constexpr, KIND: tl.constexpr):
    i = tl.arange(0, N)
    x, total, index, pointers = tl.load(x_ptr + i), tl.load(x_ptr), i, x_ptr + i
    for k in tl.static_range(TIMES):
        if KIND == "sums":
            x = x + (k % 7)
        elif KIND == "scalars":
            total = total + (k % 7)
        elif KIND == "loads":
            x = x + tl.load(x_ptr + (i + k) % N)
        elif KIND == "indices":
            index = index ^ ((index << 1) + k)
        elif KIND == "pointers":
            pointers = x_ptr + tl.load(pointers)
        elif KIND == "reductions":
            x = x - tl.max(x, 0)
    tl.store(out_ptr + i, x + total + index % 1000 + tl.load(pointers))


def run(kind, x, times):
    n = len(x)
    i = np.arange(n)
    value, total, index, place = x.copy(), x[0], i, i
    for k in range(times):
        if kind == "sums":
            value = value + k % 7
        elif kind == "scalars":
            total = total + k % 7
        elif kind == "loads":
            value = value + x[(i + k) % n]
        elif kind == "indices":
            index = index ^ ((index << 1) + k).astype(np.int32)
        elif kind == "pointers":
            place = x[place]
        elif kind == "reductions":
            value = value - value.max()
    return value + total + np.fmod(index, 1000) + x[place]


@pytest.mark.parametrize(
    "kind, times",
    [("sums", 5000), ("scalars", 2000), ("loads", 300), ("indices", 500), ("pointers", 200), ("reductions", 60)],
)
def test_a_deep_expression(kind, times, rng):
    x = rng.integers(0, 32, 32).astype(np.int32)
    out = empty(32, "int32")
    deep_kernel[(1,)](Tensor(x), out, 32, times, kind)
    np.testing.assert_array_equal(out.stored, run(kind, x, times))
