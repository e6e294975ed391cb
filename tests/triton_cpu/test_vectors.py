"""Expressions and reductions around tl.dot as C vectors: against the general path, bit by bit, and against NumPy."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty, rounded


@triton.jit
def attend_kernel(
    a_ptr, b_ptr, v_ptr, limit_ptr, peak_ptr, total_ptr, least_ptr, out_ptr, scale, keys,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    m, n, k, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, D)
    scores = tl.dot(tl.load(a_ptr + m[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n[None, :]))
    seen = (n[None, :] <= tl.load(limit_ptr + m)[:, None]) & (n[None, :] + 1 != 4)
    scores = tl.where(seen, scores, float("-inf"))
    peak = tl.max(scores, 1)
    weights = tl.exp2((scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None]) * scale)
    v = tl.load(v_ptr + n[:, None] * D + d[None, :], mask=(n < keys)[:, None], other=0.5)
    start = -peak[:, None] + tl.zeros((M, D), tl.float32)
    tl.store(peak_ptr + m, peak)
    tl.store(total_ptr + m, tl.sum(weights, 1))
    tl.store(least_ptr + m, tl.sum(tl.minimum(weights, 0.25), 1))
    tl.store(out_ptr + m[:, None] * D + d[None, :], tl.dot(weights, v.to(tl.float32), start))


def attend(rng, shape, dtype, keys, special=()):
    """peak, total, least and out, with vectors and without; and the inputs."""
    m, n, k, d = shape
    a, b = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((k, n), dtype=np.float32)
    b[0, : len(special)] = special
    v, limits = rng.standard_normal((n, d)), rng.integers(-1, n, m, np.int32)
    found = []
    for register_tiles in (True, False):
        outs = [empty((m,)), empty((m,)), empty((m,)), empty((m, d))]
        compiled = attend_kernel[(1,)](
            Tensor(a), Tensor(b), Tensor(v, dtype), Tensor(limits), *outs, 0.7, keys, m, n, k, d,
            register_tiles=register_tiles,
        )  # fmt: skip
        assert ("vec_exp2(" in compiled.asm["c"].split("run_programs")[0].split("kernel_attend")[-1]) == register_tiles
        found.append([out.stored for out in outs])
    return *found, (a, b, rounded(v, dtype), limits)


@pytest.mark.parametrize("seed", range(6))
def test_a_softmax_between_two_dots(seed):
    rng = np.random.default_rng(seed)
    m, n, k, d = (1 << int(rng.integers(low, high)) for low, high in ((0, 6), (4, 8), (0, 6), (4, 8)))
    dtype, keys = ("float32", "bfloat16", "float16")[seed % 3], int(rng.integers(0, n + 1))
    fast, general, (a, b, v, limits) = attend(rng, (m, n, k, d), dtype, keys)
    for one, other in zip(fast, general, strict=True):
        assert one.tobytes() == other.tobytes()
    columns = np.arange(n)[None]
    scores = np.where((columns <= limits[:, None]) & (columns != 3), a.astype(float) @ b, -np.inf)
    peak = scores.max(1)
    weights = 2.0 ** ((scores - np.where(np.isinf(peak), 0, peak)[:, None]) * 0.7)
    v = np.where(np.arange(n)[:, None] < keys, v, 0.5)
    expected = peak, weights.sum(1), np.minimum(weights, 0.25).sum(1), weights @ v - peak[:, None]
    for found, exact in zip(fast, expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=2e-5, atol=2e-5)


def test_infinities_nan_and_huge_exponents_are_those_of_the_general_path(rng):
    special = [np.inf, np.nan, -np.inf, 3e38, 0.0, -0.0, 1e-45, 300.0, -300.0, 214.3, -213.1]
    for _ in range(3):
        fast, general, _ = attend(rng, (16, 32, 1, 16), "float32", 20, rng.permutation(special))
        for one, other in zip(fast, general, strict=True):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(np.signbit(one[one == 0]), np.signbit(other[other == 0]))


@triton.jit
def gate_kernel(
    a_ptr, b_ptr, out_ptr, sums_ptr, largest_ptr, scale, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    gate = tl.dot(tl.load(a_ptr + m[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n[None, :]))
    activated = gate / (1.0 + tl.exp(-gate))
    integers = (activated * scale + tl.where(activated < 0, -0.5, 0.5)).to(tl.int32)
    tl.store(out_ptr + m[:, None] * N + n[None, :], integers)
    tl.store(sums_ptr + m, tl.sum(integers, 1))
    tl.store(largest_ptr + m, tl.max(tl.abs(activated), 1))


def gate(a, b, scale):
    """Integers, their sums and the largest magnitude, with vectors and without."""
    m, n, k = len(a), b.shape[1], len(b)
    for register_tiles in (True, False):
        outs = [empty((m, n), "int32"), empty((m,), "int32"), empty((m,))]
        compiled = gate_kernel[(1,)](Tensor(a), Tensor(b), *outs, scale, m, n, k, register_tiles=register_tiles)
        assert ("vec_exp(" in compiled.asm["c"].split("run_programs")[0].split("kernel_gate")[-1]) == register_tiles
        yield [out.stored for out in outs]


@pytest.mark.parametrize("seed", range(4))
def test_a_gate_rounded_to_integers_behind_a_dot(seed):
    rng = np.random.default_rng(seed)
    m, n, k = (1 << int(rng.integers(low, high)) for low, high in ((0, 6), (4, 8), (0, 6)))
    a, b = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((k, n), dtype=np.float32)
    fast, general = gate(a, b, 100.0)
    for one, other in zip(fast, general, strict=True):
        assert one.tobytes() == other.tobytes()
    product = a.astype(float) @ b
    activated = product / (1 + np.exp(-product))
    integers, sums, largest = fast
    assert np.abs(integers - activated * 100).max() <= 0.501
    np.testing.assert_array_equal(sums, integers.sum(1))
    np.testing.assert_allclose(largest, np.abs(activated).max(1), rtol=1e-5, atol=1e-5)


def test_exponentials_at_the_ends_of_their_range_are_those_of_the_general_path():
    b = np.array([[0.0, -0.0, 87, 88.7, 88.8, 103, 103.9, 104, 104.1, 1e30, np.inf, -87.5, -89, -1e30, -np.inf, 1e-40]])
    fast, general = gate(np.ones((16, 1), np.float32), b.astype(np.float32), 1e-3)
    for one, other in zip(fast, general, strict=True):
        assert one.tobytes() == other.tobytes()


@triton.jit
def shifted_bytes_kernel(
    x_ptr, bytes_ptr, shifts_ptr, out_ptr, sums_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    values = tl.load(bytes_ptr + k[:, None] * N + n[None, :]) >> tl.load(shifts_ptr + k)[:, None]
    signed = values.to(tl.int8, bitcast=True).to(tl.float32)
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(tl.load(x_ptr + m[:, None] * K + k[None, :]), signed))
    tl.store(sums_ptr + k, tl.sum(signed, 1))


def test_unsigned_bytes_shifted_by_nothing_keep_their_sign_bit(rng):
    m, n, k = 8, 32, 16
    x, values = rng.standard_normal((m, k), dtype=np.float32), rng.integers(0, 256, (k, n), np.uint8)
    shifts = (np.arange(k) % 4 * 2).astype(np.uint8)
    signed = (values >> shifts[:, None]).view(np.int8).astype(float)
    for register_tiles in (True, False):
        out, sums = empty((m, n)), empty((k,))
        arguments = (Tensor(x), Tensor(values), Tensor(shifts), out, sums, m, n, k)
        shifted_bytes_kernel[(1,)](*arguments, register_tiles=register_tiles)
        np.testing.assert_allclose(out.stored, x @ signed, rtol=1e-4, atol=1e-2)
        np.testing.assert_array_equal(sums.stored, signed.sum(1))


@triton.jit
def iterated_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, TIMES: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    d = tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place))
    for _ in tl.static_range(TIMES):
        d = d * (1.5 - 0.5 * d * d)
    tl.store(out_ptr + place, d)


def test_an_expression_that_uses_its_values_many_times_compiles(rng):
    """3^24 paths lead through it: whoever walks them all does not come to an end."""
    a, b = (rng.standard_normal((16, 16), dtype=np.float32) * 0.2 for _ in "ab")
    out = empty((16, 16))
    iterated_kernel[(1,)](Tensor(a), Tensor(b), out, 16, 24)
    expected = a.astype(float) @ b
    for _ in range(24):
        expected = expected * (1.5 - 0.5 * expected * expected)
    np.testing.assert_allclose(out.stored, expected, rtol=1e-3, atol=1e-3)


@triton.jit
def limits_kernel(a_ptr, b_ptr, floats_ptr, integers_ptr, sums_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    place = m * N + n
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    product = tl.dot(a, tl.load(b_ptr + tl.arange(0, N)[:, None] * N + n))
    NAN: tl.constexpr = tl.PropagateNan.ALL
    results = (
        tl.clamp(a, b, 1.0),
        tl.clamp(a, b, 1.0, propagate_nan=NAN),
        tl.maximum(a, b, propagate_nan=NAN),
        tl.minimum(a, b, propagate_nan=NAN),
    )
    for number in tl.static_range(4):
        tl.store(sums_ptr + number * M + tl.arange(0, M), tl.max(tl.where(product == product, results[number], 0.0), 1))
        tl.store(floats_ptr + number * M * N + place, results[number])
    i, j = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
    u, v = a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)
    smallest = tl.minimum(i, j)
    largest, least = tl.maximum(u, v).to(tl.int32, bitcast=True), tl.minimum(u, v).to(tl.int32, bitcast=True)
    tl.store(integers_ptr + tl.arange(0, M), tl.sum(smallest, 1))
    tl.store(integers_ptr + M + tl.arange(0, M), tl.sum(largest, 1))
    tl.store(integers_ptr + 2 * M + tl.arange(0, M), tl.sum(least, 1))
    tl.store(integers_ptr + 3 * M + tl.arange(0, M), tl.min(i, 1))


SPECIAL = [np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, 1.0, -1.0, 3e38, 1e-45, -1e-45, 2.0]


def limits_arguments(rng):
    a, b = np.array(np.meshgrid(SPECIAL + [0.5] * 4, SPECIAL + [0.25] * 4), np.float32)
    return (
        Tensor(rng.permuted(a, axis=1)),
        Tensor(b),
        empty((4, 16, 16)),
        empty((4, 16), "int32"),
        empty((4, 16)),
        16,
        16,
    )


def test_limits_of_all_special_numbers_are_vectors_and_those_of_the_general_path(rng):
    a, b, *_ = limits_arguments(rng)
    found = []
    for register_tiles in (True, False):
        outs = [empty((4, 16, 16)), empty((4, 16), "int32"), empty((4, 16))]
        compiled = limits_kernel[(1,)](a, b, *outs, 16, 16, register_tiles=register_tiles)
        c = compiled.asm["c"].split("run_programs")[0].split("kernel_limits")[-1]
        for name in ("clamp_num", "clamp_nan", "max_nan", "min_nan"):
            assert (f"vec_{name}(" in c) == register_tiles
        for name in ("min", "max_unsigned", "min_unsigned"):
            assert (f"ivec_{name}(" in c) == register_tiles
        found.append([out.stored.tobytes() for out in outs])
    assert found[0] == found[1]
    a, b = a.stored, b.stored
    floats, integers = outs[0].stored, outs[1].stored
    clamped = np.fmin(np.fmax(a, b), 1)
    expected = clamped, np.where(np.isnan(a), a, clamped), np.maximum(a, b), np.minimum(a, b)
    np.testing.assert_array_equal(floats, expected)
    i, j, u, v = a.view(np.int32), b.view(np.int32), a.view(np.uint32), b.view(np.uint32)
    columns = np.minimum(i, j), np.maximum(u, v).view(np.int32), np.minimum(u, v).view(np.int32)
    np.testing.assert_array_equal(integers[:3], [x.sum(1, dtype=np.int32) for x in columns])
    np.testing.assert_array_equal(integers[3], i.min(1))
