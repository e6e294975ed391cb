"""Rows that no store takes are not computed; those that one takes are right, whatever the masks look like."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty

SENTINEL = 77.0


@triton.jit
def masked_kernel(
    a_ptr, b_ptr, out_ptr, whole_ptr, sums_ptr, flags_ptr, rows, columns, every,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr, LOOP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    sums = tl.zeros([M, N], tl.float32)
    if LOOP:
        for _ in range(2):
            sums = tl.dot(
                tl.load(a_ptr + m[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n[None, :]), sums
            )
    else:
        sums = tl.load(a_ptr + m * K)[:, None] * tl.load(b_ptr + n)[None, :]
    if MASK == "first":
        wanted = m < rows
    elif MASK == "every":
        wanted = (m % every == 1) & (m < rows)
    else:
        wanted = tl.load(flags_ptr + m) != 0
    halves = tl.exp(sums / 8) / 2  # two stores and a sum want it: an array
    tl.store(out_ptr + m[:, None] * N + n[None, :], halves, mask=wanted[:, None] & (n < columns)[None, :])
    tl.store(sums_ptr + m, tl.sum(halves, 1), mask=wanted)
    if WHOLE:
        tl.store(whole_ptr + m[:, None] * N + n[None, :], halves)


def run(rng, mask, loop, whole, shape, rows):
    m, n, k = shape
    a, b = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((k, n), dtype=np.float32)
    flags = rng.integers(0, 2, m, np.int32)
    out, everything, sums = empty((m, n)), empty((m, n)), empty((m,))
    for tensor in (out, everything, sums):
        tensor.stored[:] = SENTINEL
    columns, every = int(rng.integers(1, n + 1)), int(rng.integers(2, 5))
    compiled = masked_kernel[(1,)](
        Tensor(a), Tensor(b), out, everything, sums, Tensor(flags), rows, columns, every, m, n, k, mask, loop, whole
    )
    exact = np.exp((2 * (a.astype(float) @ b) if loop else np.outer(a[:, 0].astype(float), b[0])) / 8) / 2
    number = np.arange(m)
    wanted = {"first": number < rows, "every": (number % every == 1) & (number < rows), "loaded": flags != 0}[mask]
    inside = wanted[:, None] & (np.arange(n) < columns)[None]
    np.testing.assert_allclose(out.stored, np.where(inside, exact, SENTINEL), rtol=2e-5)
    np.testing.assert_allclose(sums.stored, np.where(wanted, exact.sum(1), SENTINEL), rtol=2e-5)
    np.testing.assert_allclose(everything.stored, exact if whole else np.full_like(exact, SENTINEL), rtol=2e-5)
    return "; live_" in compiled.asm["c"].split("run_programs")[0]


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("mask", ["first", "every", "loaded"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_stored_is_right_and_the_rest_untouched(mask, loop, whole, rng):
    for _ in range(6):
        m, n, k = (1 << int(rng.integers(low, high)) for low, high in ((1, 7), (4, 7), (0, 6)))
        counts = run(rng, mask, loop, whole, (m, n, k), int(rng.integers(0, m + 2)))
        if not whole:  # one store of everything, and all rows are of use
            assert counts == (mask != "loaded"), "rows behind the last are left out where a mask is no load"


def test_an_empty_and_a_full_tile(rng):
    for rows in (-1, 0, 1, 63, 64, 65):
        assert run(rng, "first", True, False, (64, 32, 16), rows)
