"""Sums are stored from registers where nothing that is read can have been overwritten, and rightly everywhere."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty

SENTINEL = 77.0


@triton.jit
def linear_kernel(
    a_ptr, b_ptr, bias_ptr, out_ptr, copy_ptr, rows, columns, K,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    a_tile = a_ptr + m[:, None] * K + k[None, :]
    b_tile = b_ptr + k[:, None] * N + n[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    sums = tl.zeros([M, N], tl.float32)
    if FORM == "continued":
        sums = tl.load(out_ptr + m[:, None] * N + n[None, :], mask=inside, other=0.0)
    for _ in range(0, K, BLOCK_K):
        sums = tl.dot(tl.load(a_tile), tl.load(b_tile), sums)
        a_tile += BLOCK_K
        b_tile += BLOCK_K * N
    if FORM == "in place":  # b's first rows become the sums; other rows of sums still need them
        tl.store(b_ptr + m[:, None] * N + n[None, :], sums, mask=inside)
    elif FORM == "added":
        out_tile = out_ptr + m[:, None] * N + n[None, :]
        tl.store(out_tile, tl.load(out_tile, mask=inside, other=0.0) + sums, mask=inside)
    elif FORM == "by columns":
        tl.store(out_ptr + n[None, :] * M + m[:, None], sums, mask=inside)
    elif FORM == "whole":
        tl.store(out_ptr + m[:, None] * N + n[None, :], sums)
    elif FORM == "continued":
        tl.store(out_ptr + m[:, None] * N + n[None, :], sums, mask=inside)
    else:
        sums += tl.load(bias_ptr + n, mask=n < columns, other=0.0)[None, :]
        sums = sums / (1.0 + tl.exp(-sums))
        tl.store(out_ptr + m[:, None] * N + n[None, :], sums, mask=inside)
        if FORM == "twice":
            tl.store(copy_ptr + m[:, None] * N + n[None, :], sums, mask=inside)


@pytest.mark.parametrize("turn", range(6))
@pytest.mark.parametrize("form", ["biased", "whole", "twice", "added", "continued", "in place", "by columns"])
def test_sums_are_stored_where_they_belong(form, turn):
    rng = np.random.default_rng(turn)
    m, n, block_k = (1 << int(rng.integers(low, high)) for low, high in ((1, 7), (4, 7), (2, 6)))
    turns = max(int(rng.integers(1, 4)), -(-m // block_k))  # b has at least m rows
    k, rows, columns = block_k * turns, int(rng.integers(0, m + 2)), int(rng.integers(1, n + 1))
    a, b = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((k, n), dtype=np.float32)
    bias, right = rng.standard_normal(n, dtype=np.float32), Tensor(b.copy())
    out, copy = empty((n, m) if form == "by columns" else (m, n)), empty((m, n))
    out.stored[:] = copy.stored[:] = SENTINEL
    compiled = linear_kernel[(1,)](Tensor(a), right, Tensor(bias), out, copy, rows, columns, k, m, n, block_k, form)
    exact = a.astype(np.float64) @ b
    inside = (np.arange(m) < rows)[:, None] & (np.arange(n) < columns)[None]
    if form in ("biased", "twice"):
        exact = (exact + bias) / (1 + np.exp(-exact - bias))
    exact = exact + SENTINEL if form in ("added", "continued") else exact
    found = {"in place": right.stored[:m], "by columns": out.stored.T}.get(form, out.stored)
    expected = np.where(inside | (form == "whole"), exact, b[:m] if form == "in place" else SENTINEL)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    if form == "twice":
        np.testing.assert_array_equal(copy.stored, out.stored)
    has_array = f"[{m * n}]" in compiled.asm["c"].split("static void kernel_", 1)[1]
    assert has_array == (form not in ("biased", "whole"))


@triton.jit(noinline=True)
def store_product(a_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tile = n[:, None] * N + n[None, :]
    sums = tl.zeros([N, N], tl.float32)
    for _ in range(2):
        sums = tl.dot(tl.load(a_ptr + tile), tl.load(a_ptr + tile), sums)
    tl.store(out_ptr + tile, sums)


@triton.jit
def square_in_place_kernel(a_ptr, N: tl.constexpr):
    store_product(a_ptr, a_ptr, N)


def test_a_function_that_is_called_with_one_argument_as_two(rng):
    a = rng.standard_normal((32, 32), dtype=np.float32)
    squared = Tensor(a.copy())
    square_in_place_kernel[(1,)](squared, 32)
    np.testing.assert_allclose(squared.stored, 2 * (a.astype(np.float64) @ a), rtol=1e-4, atol=1e-4)


@triton.jit
def changing_source_kernel(a_ptr, b_ptr, out_ptr, turns, N: tl.constexpr):
    n = tl.arange(0, N)
    tile = n[:, None] * N + n[None, :]
    sums, source = tl.zeros([N, N], tl.float32), b_ptr
    for _ in range(turns):
        sums = tl.dot(tl.load(a_ptr + tile), tl.load(source + tile), sums)
        source = out_ptr
    tl.store(out_ptr + tile, sums)


def test_a_pointer_that_becomes_the_output_in_the_loop(rng):
    a, b, out = (rng.standard_normal((64, 64), dtype=np.float32) for _ in range(3))
    stored = Tensor(out.copy())
    changing_source_kernel[(1,)](Tensor(a), Tensor(b), stored, 2, 64)
    np.testing.assert_allclose(
        stored.stored, a.astype(np.float64) @ b + a.astype(np.float64) @ out, rtol=1e-4, atol=1e-4
    )
