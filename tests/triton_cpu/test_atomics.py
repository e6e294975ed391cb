"""Atomic updates, contended by many programs."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty


@triton.jit
def integer_kernel(x_ptr, out_ptr, N: tl.constexpr, MASKED: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * N + i)
    mask = (x & 1) == 0 if MASKED else i >= 0
    tl.atomic_add(out_ptr + i, x, mask)
    tl.atomic_max(out_ptr + N + i, x, mask)
    tl.atomic_min(out_ptr + 2 * N + i, x, mask)
    tl.atomic_and(out_ptr + 3 * N + i, x, mask)
    tl.atomic_or(out_ptr + 4 * N + i, x, mask)
    tl.atomic_xor(out_ptr + 5 * N + i, x, mask)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_integer_updates_from_all_programs(dtype, rng):
    limits = np.iinfo(dtype)
    x = rng.integers(limits.min, limits.max, (100, 8), dtype, endpoint=True)
    for masked in (False, True):
        out = Tensor(
            np.array([0, limits.min, limits.max, -1 if limits.min else limits.max, 0, 0], dtype)[:, None].repeat(8, 1)
        )
        integer_kernel[(100,)](Tensor(x), out, 8, masked)
        used = (x & 1 == 0) | (not masked)
        operations = (np.add, np.maximum, np.minimum, np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        idle = (0, limits.min, limits.max, ~np.zeros((), dtype), 0, 0)
        expected = [
            operation.reduce(np.where(used, x, np.array(nothing, dtype)), dtype=dtype)
            for operation, nothing in zip(operations, idle)
        ]
        np.testing.assert_array_equal(out.stored, expected)


@triton.jit
def float_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * N + i)
    tl.atomic_add(out_ptr + i, x)
    if out_ptr.dtype.element_ty.primitive_bitwidth >= 32:
        tl.atomic_max(out_ptr + N + i, x)
        tl.atomic_min(out_ptr + 2 * N + i, x)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_float_updates_from_all_programs(dtype, rng):
    x = rng.integers(-8, 8, (64, 16)).astype(np.float32)  # sums that every order gives exactly
    start = np.array([0.0, -np.inf, np.inf])[:, None].repeat(16, 1)
    out = Tensor(start, dtype)
    float_kernel[(64,)](Tensor(x, dtype), out, 16)
    expected = [x.sum(0), x.max(0), x.min(0)] if "64" in dtype or "32" in dtype else [x.sum(0), start[1], start[2]]
    np.testing.assert_array_equal(out.values, expected)


@triton.jit
def ticket_kernel(counter_ptr, out_ptr):
    ticket = tl.atomic_add(counter_ptr, 1)
    tl.store(out_ptr + ticket, tl.program_id(0))
    many = tl.atomic_add(counter_ptr + 1 + tl.zeros((4,), tl.int32), 1)
    tl.store(out_ptr + 1000 + many, 1)


def test_old_values_are_returned_and_none_twice():
    counter, out = Tensor(np.zeros(2, np.int32)), empty(5000, "int32")
    ticket_kernel[(1000,)](counter, out)
    np.testing.assert_array_equal(counter.stored, [1000, 4000])
    np.testing.assert_array_equal(np.sort(out.stored[:1000]), np.arange(1000))
    assert (out.stored[1000:] == 1).all()


@triton.jit
def lock_kernel(lock_ptr, total_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(total_ptr, tl.load(total_ptr) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


def test_a_lock_made_of_compare_and_swap():
    lock, total = Tensor(np.zeros(1, np.int32)), Tensor(np.zeros(1, np.int32))
    lock_kernel[(500,)](lock, total)
    assert total.stored[0] == 500 and lock.stored[0] == 0


@triton.jit
def swap_kernel(x_ptr, expected_ptr, desired_ptr, index_ptr, old_ptr, lone_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    expected, desired = tl.load(expected_ptr + i), tl.load(desired_ptr + i)
    tl.store(old_ptr + i, tl.atomic_cas(x_ptr + tl.load(index_ptr + i), expected, desired, sem="acquire", scope="cta"))
    first = tl.atomic_cas(lone_ptr, tl.load(expected_ptr), tl.load(desired_ptr))
    tl.store(lone_ptr + 1, first)


@pytest.mark.parametrize("dtype", ["int16", "uint64", "int32", "int64", "float16", "bfloat16", "float32", "float64"])
def test_compare_and_swap_of_a_tensor_goes_lane_by_lane(dtype, rng):
    few = rng.integers(0, 3, (4, 64)) - (0 if dtype.startswith("u") else 1)
    x, expected, desired = few[0, :16], few[1], few[2]
    index = rng.integers(0, 16, 64).astype(np.int32)
    memory, old, lone = Tensor(x, dtype), empty(64, dtype), Tensor(np.array([expected[0], 0]), dtype)
    swap_kernel[(1,)](memory, Tensor(expected, dtype), Tensor(desired, dtype), Tensor(index), old, lone, 64)
    after, seen = x.copy(), []
    for place, wanted, new in zip(index, expected, desired):
        seen.append(after[place])
        after[place] = new if after[place] == wanted else after[place]
    np.testing.assert_array_equal(memory.values, after)
    np.testing.assert_array_equal(old.values, seen)
    np.testing.assert_array_equal(lone.values, [desired[0], expected[0]])


def test_compare_and_swap_compares_the_bits_of_floats():
    x = Tensor(np.array([0.0, -0.0, np.nan, np.nan], np.float32))
    expected, desired = Tensor(np.array([-0.0, -0.0, np.nan, 1], np.float32)), Tensor(np.arange(5, 9, dtype=np.float32))
    old, index = empty(4), Tensor(np.arange(4, dtype=np.int32))
    swap_kernel[(1,)](x, expected, desired, index, old, empty(2), 4)
    np.testing.assert_array_equal(x.stored, np.array([0.0, 6, 7, np.nan], np.float32))


@triton.jit
def claim_kernel(owner_ptr, won_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    me = tl.zeros((N,), tl.int32) + tl.program_id(0) + 1
    old = tl.atomic_cas(owner_ptr + i, tl.zeros((N,), tl.int32), me)
    tl.atomic_add(won_ptr + tl.program_id(0), tl.sum((old == 0).to(tl.int32)))


def test_of_all_programs_one_wins_each_place():
    owner, won = Tensor(np.zeros(64, np.int32)), Tensor(np.zeros(500, np.int32))
    claim_kernel[(500,)](owner, won, 64)
    np.testing.assert_array_equal(np.bincount(owner.stored, minlength=501)[1:], won.stored)
    assert won.stored.sum() == 64


@triton.jit
def shifted_swap_kernel(x_ptr, old_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(old_ptr + i, tl.atomic_cas(x_ptr + i + 1, x + 1, x))


def test_what_is_compared_is_read_before_the_first_swap():
    x, old = Tensor(np.arange(65, dtype=np.int32)), empty(64, "int32")
    shifted_swap_kernel[(1,)](x, old, 64)
    np.testing.assert_array_equal(x.stored, [0, *range(64)])
    np.testing.assert_array_equal(old.stored, np.arange(1, 65))
