"""Loops, branches, early returns and calls: what they carry, in what order it changes, and what is in scope."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty

N = 32


@triton.jit
def early_return_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    if pid >= n:
        return
    i = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if tl.sum(x) > 0:
        x = x * 2
        if pid == 1:
            return
    tl.store(out_ptr + i, x + pid)


def test_early_returns(rng):
    x = rng.integers(-9, 9, (6, 16)).astype(np.int32)
    x[:3] = np.abs(x[:3]) + 1
    out = Tensor(np.full_like(x, -1))
    early_return_kernel[(6,)](Tensor(x), out, 5, 16)
    expected = np.where(x.sum(1, keepdims=True) > 0, x * 2, x) + np.arange(6)[:, None]
    expected[[1, 5]] = -1
    np.testing.assert_array_equal(out.stored, expected)


@triton.jit
def _first_even(x):
    if x % 2 == 0:
        return x
    return x + 1


@triton.jit
def inlined_return_kernel(out_ptr, n):
    for i in range(n):
        tl.store(out_ptr + i, _first_even(i))


def test_a_function_with_early_returns_inside_a_loop():
    out = empty(9, "int32")
    inlined_return_kernel[(1,)](out, 9)
    np.testing.assert_array_equal(out.stored, [0, 2, 2, 4, 4, 6, 6, 8, 8])


@triton.jit
def fibonacci_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x_ptr + i), tl.load(y_ptr + i)
    for _ in range(n):
        a, b = b, a + b
    tl.store(x_ptr + i, a)
    tl.store(y_ptr + i, b)


def test_a_loop_swaps_carried_tensors(rng):
    a, b = rng.integers(0, 100, (2, N))
    x, y = Tensor(a), Tensor(b)
    fibonacci_kernel[(1,)](x, y, 7, N)
    for _ in range(7):
        a, b = b, a + b
    np.testing.assert_array_equal([x.stored, y.stored], [a, b])


@triton.jit
def rearranged_kernel(x_ptr, index_ptr, square_ptr, row_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    places = x_ptr + i[:, None] * N + i[None, :]
    square, row, index = tl.load(places), tl.load(row_ptr + i), tl.load(index_ptr + i)
    for _ in range(n):
        square = tl.trans(square) + 1
        row = tl.gather(row, index, 0)
    tl.store(square_ptr + i[:, None] * N + i[None, :], square)
    tl.store(row_ptr + i, row)


def test_a_carried_tensor_becomes_itself_rearranged(rng):
    x, row = rng.standard_normal((N, N), dtype=np.float32), rng.standard_normal(N, dtype=np.float32)
    index = rng.permutation(N).astype(np.int32)
    square, rows = empty((N, N)), Tensor(row)
    rearranged_kernel[(1,)](Tensor(x), Tensor(index), square, rows, 3, N)
    np.testing.assert_allclose(square.stored, x.T + 3, rtol=1e-6)
    np.testing.assert_array_equal(rows.stored, row[index][index][index])


@triton.jit
def moving_pointer_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    step = 1
    pointers = x_ptr + i
    total = tl.zeros((N,), tl.float32)
    for _ in range(n):
        total += tl.load(pointers)
        pointers += step
        step *= 2
    total += tl.load(pointers)
    tl.store(out_ptr + i, total)


@triton.jit
def scattered_pointer_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    pointers = x_ptr + i
    other = x_ptr + 2 * i
    total = tl.zeros((N,), tl.float32)
    for _ in range(n):
        total += tl.load(pointers) - 2 * tl.load(other)
        pointers += i % 3
        pointers, other = other, pointers
    tl.store(out_ptr + i, total)


def test_pointers_that_move_by_a_changing_step(rng):
    x = rng.standard_normal(4 * N, dtype=np.float32)
    out = empty(N)
    moving_pointer_kernel[(1,)](Tensor(x), out, 4, N)
    expected = sum(x[start : start + N].astype(float) for start in (0, 1, 3, 7, 15))
    np.testing.assert_allclose(out.stored, expected, rtol=1e-5, atol=1e-6)


def test_pointers_that_move_apart_and_are_swapped(rng):
    x = rng.standard_normal(8 * N, dtype=np.float32)
    out = empty(N)
    scattered_pointer_kernel[(1,)](Tensor(x), out, 5, N)
    i = np.arange(N)
    p, q, total = i, 2 * i, np.zeros(N)
    for _ in range(5):
        total += x[p] - 2.0 * x[q]
        p, q = q, p + i % 3
    np.testing.assert_allclose(out.stored, total, rtol=1e-5, atol=1e-5)


@triton.jit
def nested_kernel(x_ptr, out_ptr, n, m, N: tl.constexpr):
    i = tl.arange(0, N)
    row = x_ptr + i
    best = tl.full((N,), float("-inf"), tl.float32)
    total = tl.zeros((N,), tl.float32)
    for outer in range(n):
        part = tl.zeros((N,), tl.float32)
        for inner in range(outer, m, 2):
            x = tl.load(row + inner * N)
            part, best = x - part, tl.maximum(best, x)
        total = total * 0.5 + part
        row += m * N
    tl.store(out_ptr + i, total)
    tl.store(out_ptr + N + i, best)


def test_nested_loops(rng):
    x = rng.standard_normal((5, 6, N), dtype=np.float32)
    out = empty((2, N))
    nested_kernel[(1,)](Tensor(x), out, 5, 6, N)
    total, best = np.zeros(N), np.full(N, -np.inf)
    for outer in range(5):
        part = np.zeros(N)
        for inner in range(outer, 6, 2):
            part, best = x[outer, inner] - part, np.maximum(best, x[outer, inner])
        total = total * 0.5 + part
    np.testing.assert_allclose(out.stored, [total, best], rtol=1e-5, atol=1e-6)


@triton.jit
def collatz_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    steps = tl.zeros((N,), tl.int32)
    while tl.max(x) > 1:
        steps += (x > 1).to(tl.int32)
        x = tl.where(x > 1, tl.where(x % 2 == 0, x // 2, 3 * x + 1), x)
    tl.store(out_ptr + i, steps)


def test_a_while_loop_over_a_tensor():
    x = np.arange(1, N + 1, dtype=np.int32)
    out = empty(N, "int32")
    collatz_kernel[(1,)](Tensor(x), out, N)

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    np.testing.assert_array_equal(out.stored, [steps(int(n)) for n in x])


@triton.jit
def while_swap_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, k = tl.load(x_ptr + i), tl.load(x_ptr + N + i), 0
    while (k < n) & (tl.sum(a) < 1000):
        a, b, k = b, a + 2 * b, k + 1
    tl.store(out_ptr + i, a)
    tl.store(out_ptr + N + i, b)
    tl.store(out_ptr + 2 * N, k)


def test_a_while_loop_swaps_carried_tensors_and_may_not_run_at_all():
    x = np.arange(2 * N, dtype=np.int32).reshape(2, N)
    for limit in (0, 3, 100):
        out = empty(2 * N + 1, "int32")
        while_swap_kernel[(1,)](Tensor(x), out, limit, N)
        (a, b), k = x, 0
        while k < limit and a.sum() < 1000:
            a, b, k = b, a + 2 * b, k + 1
        np.testing.assert_array_equal(out.stored, [*a, *b, k])


@triton.jit
def branch_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    pid = tl.program_id(0)
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    scale = 1.0
    p = x_ptr + i
    if pid == 0:
        y = tl.load(y_ptr + i) + x
    elif pid == 1:
        y = x * x
        scale = 3.0
        p = y_ptr + i
    else:
        y = tl.full((N,), pid, tl.float32)
        p = p + N - 1 - 2 * i
    tl.store(out_ptr + pid * N + i, y * scale + tl.load(p))


def test_branches_yield_tensors_scalars_and_pointers(rng):
    x, y = rng.standard_normal((2, N), dtype=np.float32)
    out = empty((3, N))
    branch_kernel[(3,)](Tensor(x), Tensor(y), out, N)
    np.testing.assert_allclose(out.stored, [y + x + x, 3 * x * x + y, 2 + x[::-1]], rtol=1e-6, atol=1e-6)


@triton.jit
def shared_operand_kernel(w_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    distance = (i[:, None] - i[None, :]).to(tl.float32)  # cheap: no array of its own until an operation needs one
    w = tl.load(w_ptr + i[:, None] * N + i[None, :])
    out = out_ptr + i[:, None] * N + i[None, :]
    if n > 0:
        tl.store(out, tl.dot(distance, w))
    else:
        tl.store(out, tl.dot(w, distance))
    for k in range(n):
        tl.store(out + (k + 1) * N * N, tl.dot(distance, w) + k)
    tl.store(out + (n + 1) * N * N, tl.dot(distance, distance))


def test_an_array_made_inside_a_branch_or_loop_is_not_taken_for_one_outside(rng):
    w = rng.standard_normal((N, N), dtype=np.float32)
    distance = np.subtract.outer(np.arange(N), np.arange(N)).astype(float)
    for n in (0, 2):
        out = empty((n + 2, N, N))
        shared_operand_kernel[(1,)](Tensor(w), out, n, N)
        first = distance @ w if n else w @ distance
        expected = [first, *[distance @ w + k for k in range(n)], distance @ distance]
        np.testing.assert_allclose(out.stored, expected, rtol=1e-4, atol=1e-3)


@triton.jit
def early_shared_operand_kernel(w_ptr, out_ptr, N: tl.constexpr):
    pid = tl.program_id(0)
    i = tl.arange(0, N)
    distance = (i[:, None] - i[None, :]).to(tl.float32)
    w = tl.load(w_ptr + i[:, None] * N + i[None, :])
    if pid == 0:
        tl.store(out_ptr + i[:, None] * N + i[None, :], tl.dot(distance, w))
        return
    tl.store(out_ptr + N * N + i[:, None] * N + i[None, :], tl.dot(w, distance))


def test_an_array_made_before_an_early_return_is_made_again_behind_it(rng):
    w = rng.standard_normal((N, N), dtype=np.float32)
    distance = np.subtract.outer(np.arange(N), np.arange(N)).astype(float)
    out = empty((2, N, N))
    early_shared_operand_kernel[(2,)](Tensor(w), out, N)
    np.testing.assert_allclose(out.stored, [distance @ w, w @ distance], rtol=1e-4, atol=1e-3)


@triton.jit(noinline=True)
def _divide(x, y):
    return x // y, x % y, x.to(tl.float32) / y


@triton.jit(noinline=True)
def _store_if_positive(pointer, value):
    if value <= 0:
        return
    tl.store(pointer, value)


@triton.jit(noinline=True)
def _row_sum(pointer, N: tl.constexpr):
    return tl.sum(tl.load(pointer + tl.arange(0, N)))


@triton.jit
def call_kernel(x_ptr, out_ptr, ratio_ptr, N: tl.constexpr):
    pid = tl.program_id(0)
    total = _row_sum(x_ptr + pid * N, N)
    quotient, remainder, ratio = _divide(total, pid + 2)
    tl.store(out_ptr + pid * 3, quotient)
    tl.store(out_ptr + pid * 3 + 1, remainder)
    _store_if_positive(out_ptr + pid * 3 + 2, total)
    tl.store(ratio_ptr + pid, ratio)


def test_calls_of_functions_that_are_not_inlined(rng):
    x = rng.integers(-5, 9, (7, N)).astype(np.int32)
    x[3] = -1
    out, ratio = Tensor(np.zeros((7, 3), np.int32)), empty(7)
    call_kernel[(7,)](Tensor(x), out, ratio, N)
    total, divisor = x.sum(1), np.arange(7) + 2
    quotient = np.trunc(total / divisor)
    np.testing.assert_array_equal(out.stored, np.stack([quotient, total - quotient * divisor, np.maximum(total, 0)], 1))
    np.testing.assert_allclose(ratio.stored, total / divisor, rtol=1e-6)


@triton.jit(noinline=True)
def _scaled(pair, scale, N: tl.constexpr):
    x, pointers = pair
    if scale > 1:
        return x + tl.load(pointers), scale + 1, pointers + scale, x > 0, scale * 2.0
    return x * tl.arange(0, N), scale, pointers, x < 0, scale * 3.0


@triton.jit
def tensor_call_kernel(x_ptr, out_ptr, N: tl.constexpr):
    pid, i = tl.program_id(0), tl.arange(0, N)
    value, scale, pointers, chosen, factor = _scaled((tl.load(x_ptr + i), x_ptr + i), pid, N)
    for _ in range(2):
        value, scale, pointers, more, factor = _scaled((value, pointers), scale, N)
        chosen = chosen ^ more
    tl.store(out_ptr + pid * N + i, tl.where(chosen, value, -value) * scale + tl.load(pointers) * factor)


@pytest.mark.parametrize("n", [8, 16384], ids=["on the stack", "beyond it"])
def test_calls_with_tensors_and_tuples_of_them(n, rng):
    x = rng.integers(-5, 6, n + 16).astype(np.float32)
    out = empty((4, n))
    tensor_call_kernel[(4,)](Tensor(x), out, n)

    def scaled(value, at, scale):
        if scale > 1:
            return value + x[at], scale + 1, at + scale, value > 0, scale * 2.0
        return value * np.arange(n), scale, at, value < 0, scale * 3.0

    for pid in range(4):
        value, scale, at, chosen, factor = scaled(x[:n], np.arange(n), pid)
        for _ in range(2):
            value, scale, at, more, factor = scaled(value, at, scale)
            chosen = chosen ^ more
        expected = np.where(chosen, value, -value) * scale + x[at] * factor
        np.testing.assert_allclose(out.stored[pid], expected, rtol=1e-6)


@triton.jit
def range_kernel(out_ptr, start, stop, STEP: tl.constexpr):
    count = 0
    for k in range(start, stop, STEP):
        tl.store(out_ptr + count, k)
        count += 1
    for k in tl.static_range(3):
        tl.store(out_ptr + count + k, 100 + k)


@pytest.mark.parametrize("start, stop, step", [(0, 7, 2), (5, 5, 2), (7, 2, 2), (9, -3, -4)])
def test_ranges(start, stop, step):
    expected = [*range(start, stop, step), 100, 101, 102]
    out = empty(len(expected), "int32")
    range_kernel[(1,)](out, start, stop, step)
    np.testing.assert_array_equal(out.stored, expected)


@triton.jit
def grid_kernel(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(out_ptr + place, x + 100 * y + 10000 * z)
    tl.store(out_ptr + place + tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2), place)


def test_program_ids_on_a_grid_of_three_dimensions():
    out = empty((2, 5, 3, 7), "int32")
    grid_kernel[(7, 3, 5)](out)
    z, y, x = np.indices((5, 3, 7))
    np.testing.assert_array_equal(out.stored[0], x + 100 * y + 10000 * z)
    np.testing.assert_array_equal(out.stored[1].ravel(), np.arange(105))


@triton.jit
def _sign_of_difference(x, y):
    if x < y:
        return -1
    elif x == y:
        return 0
    else:
        return 1


@triton.jit
def _collatz_steps(n):
    steps = n * 0
    while n > 1:
        n = tl.where(n % 2 == 0, n // 2, 3 * n + 1)
        steps += 1
    return steps


@triton.jit
def _two_quotients(a0, a1, b0, b1):
    return a0 // b0, a1 // b1, (a0 % b1) > 3, (a1 % b0) > 3


@triton.jit
def mapped_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    tl.store(out_ptr + place, tl.map_elementwise(_sign_of_difference, a, b))
    tl.store(out_ptr + M * N + place, tl.map_elementwise(_sign_of_difference, b % 7, 3 + 0 * b))
    tl.store(out_ptr + 2 * M * N + place, tl.map_elementwise(_collatz_steps, b))
    quotient, above = tl.map_elementwise(_two_quotients, a + 1, b, pack=2)
    tl.store(out_ptr + 3 * M * N + place, tl.where(above, quotient, -quotient))


@pytest.mark.skipif(not hasattr(tl, "map_elementwise"), reason="this Triton has no tl.map_elementwise")
def test_a_function_of_scalars_mapped_over_tensors(rng):
    a, b = rng.integers(0, 99, (4, 16), np.int32), rng.integers(1, 60, (4, 16), np.int32)
    out = empty((4, 4, 16), "int32")
    mapped_kernel[(1,)](Tensor(a), Tensor(b), out, 4, 16)

    def steps(n):
        return 0 if n <= 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    other = b.reshape(-1, 2)[:, ::-1].reshape(b.shape)  # the neighbour in its pack
    quotients = np.where((a + 1) % other > 3, (a + 1) // b, -((a + 1) // b))
    np.testing.assert_array_equal(out.stored[0], np.sign(a - b))
    np.testing.assert_array_equal(out.stored[1], np.sign(b % 7 - 3))
    np.testing.assert_array_equal(out.stored[2], np.vectorize(steps)(b))
    np.testing.assert_array_equal(out.stored[3], quotients)
