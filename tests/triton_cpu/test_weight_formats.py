"""Weights of a few bits in the loops of registers.py: tables, more high bits than a nibble has, factors, fp8.

data   [N/16, K/32, 4, 16, 4] uint8   byte (g, r, n, b) = q[32g + 4r + b, n] | q[32g + 16 + 4r + b, n] << 4
high   [N/16, K/32, P, 16, 4] uint8   further bits of 32 / P weights: byte (g, p, n, b) has those of all with k % 4 = b
"""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty, rounded, values_of_codes
from .test_registers import in_registers, tiled

TABLES = np.array([[-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], range(-8, 8)], np.int8)
ROWS = (1, 8, 17, 64)
R, HALF, B = (np.arange(64)[:, None] // step % count for step, count in ((4, 4), (16, 2), (1, 4)))  # of each k
# What half a group of `weights` is, from nibbles and the bytes of high bits, all [K, N].
FORMS = {
    "table": lambda nibbles, high: TABLES[0][nibbles],
    "second table": lambda nibbles, high: TABLES[1][nibbles],
    "5 bits": lambda nibbles, high: nibbles | (high >> (R + 4 * HALF) & 1) << 4,
    "6 bits": lambda nibbles, high: nibbles | (high >> 2 * R & 3) << 4,
    "6 bits, signed": lambda nibbles, high: (nibbles | (high >> 2 * R & 3) << 4) - 32,
}
LEFT_TO_THE_GENERAL_PATH = {
    "table of 17": lambda nibbles, high: TABLES.reshape(-1)[nibbles + 1],
    "shifts that differ": lambda nibbles, high: nibbles | (high >> B & 1) << 4,
    "signs shifted in": lambda nibbles, high: nibbles | (high.astype(np.int8).astype(int) >> 4 + R & 7) << 4,
}


@triton.jit
def weights(data, high, table, HALF: tl.constexpr, FORM: tl.constexpr):
    """Half a group of weights [16, N], the first or the second nibbles."""
    nibbles = (data >> 4) if HALF else (data & 15)
    k = tl.arange(0, 16)[:, None]
    if FORM == "table":
        found = tl.load(table + nibbles.to(tl.int32))
    elif FORM == "second table":
        found = tl.load(table + 16 + nibbles)
    elif FORM == "table of 17":
        found = tl.load(table + nibbles.to(tl.int32) + 1)
    elif FORM == "5 bits":
        found = nibbles | (((high >> (k // 4 + HALF * 4).to(tl.uint8)) & 1) << 4)
    elif FORM == "6 bits":
        found = nibbles | (((high >> (k // 4 * 2).to(tl.uint8)) & 3) << 4)
    elif FORM == "6 bits, signed":  # in 32 bits on the way
        found = (nibbles | (((high >> (k // 4 * 2)) & 3) << 4)) - 32
    elif FORM == "shifts that differ":
        found = nibbles | (((high >> (k % 4).to(tl.uint8)) & 1) << 4)
    else:
        found = nibbles | (((high.to(tl.int8, bitcast=True).to(tl.int32) >> (4 + k // 4)) & 7) << 4)
    return found.to(tl.int8)


@triton.jit
def integers_kernel(
    x_ptr, data_ptr, high_ptr, table_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLANES: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """out [M, N] int32 = x [M, K] int8 @ weights [K, N]; N are whole blocks."""
    row, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 16)
    x = x_ptr + tl.minimum(row, M - 1)[:, None] * K + k[None, :]
    data = data_ptr + (n // 16)[None, :] * (K * 8) + (n % 16)[None, :] * 4 + (k // 4 * 64 + k % 4)[:, None]
    high = high_ptr + (n // 16)[None, :] * (K * 2 * PLANES) + (n % 16)[None, :] * 4 + (k % 4)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(0, K // 32):
        pairs = tl.load(data)
        first = weights(pairs, tl.load(high), table_ptr, 0, FORM)
        second = weights(pairs, tl.load(high + (PLANES - 1) * 64), table_ptr, 1, FORM)
        sums = tl.dot(tl.load(x), first, sums, out_dtype=tl.int32)
        sums = tl.dot(tl.load(x + 16), second, sums, out_dtype=tl.int32)
        x += 32
        data += 256
        high += 64 * PLANES
    tl.store(out_ptr + row[:, None] * N + n[None, :], sums, (row < M)[:, None])


def by_k_and_n(parts):
    """[N/16, K/32, 2, 4, 16, 4] -> [K, N]"""
    tiles, groups = parts.shape[:2]
    return parts.transpose(1, 2, 3, 5, 0, 4).reshape(groups * 32, tiles * 16).astype(int)


def nibbles_of(data):
    return by_k_and_n(np.stack([data & 15, data >> 4], axis=2))


def bytes_of(high):
    """The byte that has the high bits of each weight."""
    return by_k_and_n(np.broadcast_to(high[:, :, :, None], (*high.shape[:2], 2, 4, 16, 4)))


def products_of_integers(rng, rows, form, reference):
    """Compares them with NumPy; are they computed in registers?"""
    planes = 1 if form == "5 bits" else 2
    x = rng.integers(-128, 128, (rows, 64), np.int8)
    data, high = (rng.integers(0, 256, (2, 2, count, 16, 4)).astype(np.uint8) for count in (4, planes))
    expected = x.astype(int) @ reference(nibbles_of(data), bytes_of(high))
    found = set()
    for block_m, block_n in ((min(rows, 16), 16), (64, 32)):
        out = empty((rows, 32), "int32")
        compiled = integers_kernel[-(-rows // block_m), 32 // block_n](
            Tensor(x), Tensor(data), Tensor(high), Tensor(TABLES), out, rows, 32, 64, block_m, block_n, planes, form
        )
        np.testing.assert_array_equal(out.stored, expected)
        found.add(in_registers(compiled))
    return found


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_products_of_integers_are_exact(form, rows, rng):
    assert products_of_integers(rng, rows, form, FORMS[form]) == {True}


@pytest.mark.parametrize("form", LEFT_TO_THE_GENERAL_PATH)
def test_what_bytes_cannot_say_is_left_to_the_general_path(form, rng):
    assert products_of_integers(rng, 8, form, LEFT_TO_THE_GENERAL_PATH[form]) == {False}


@triton.jit
def scaled_kernel(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, factor_ptr, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over halves h of groups g of  x_scale[g, m] scale[g // SPAN, n] factor[g, h, n] (x . q)_gh

    scale  [N/16, K/32/SPAN, 16] of any float type        factor  [N/16, K/32, 2, 16] int8 or uint8
    """
    row, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, m, tile, lane = tl.arange(0, 16), tl.minimum(row, M - 1), n // 16, n % 16
    x = x_ptr + m[:, None] * K + k[None, :]
    w = w_ptr + tile[None, :] * (K * 8) + lane[None, :] * 4 + (k // 4 * 64 + k % 4)[:, None]
    scale = scale_ptr + tile * (K // 32 // SPAN * 16) + lane
    factor = factor_ptr + tile * K + lane
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(0, K // 32):
        pairs = tl.load(w)
        first = tl.dot(tl.load(x), (pairs & 15).to(tl.int8), out_dtype=tl.int32)
        second = tl.dot(tl.load(x + 16), (pairs >> 4).to(tl.int8), out_dtype=tl.int32)
        x_scale = tl.load(x_scale_ptr + g * M + m)[:, None]
        span_scale = tl.load(scale + (g // SPAN) * 16).to(tl.float32)
        y += first.to(tl.float32) * (x_scale * (span_scale * tl.load(factor).to(tl.float32))[None, :])
        y += second.to(tl.float32) * (x_scale * (span_scale * tl.load(factor + 16).to(tl.float32))[None, :])
        x += 32
        w += 256
        factor += 32
    tl.store(y_ptr + row[:, None] * N + n[None, :], y, (row < M)[:, None])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "dtype, factor_dtype, span", [("float16", "uint8", 8), ("bfloat16", "int8", 2), ("float32", "int8", 1)]
)
def test_scales_of_spans_times_factors_of_half_groups(dtype, factor_dtype, span, rows, rng):
    n, k = 32, 512
    data = rng.integers(0, 256, (n // 16, k // 32, 4, 16, 4)).astype(np.uint8)
    q, x = nibbles_of(data), rng.integers(-128, 128, (rows, k), np.int8)
    x_scale = rng.uniform(0.01, 0.1, (k // 32, rows)).astype(np.float32)
    scale = rounded(rng.uniform(0.01, 0.1, (k // 32 // span, n)), dtype)
    low, high = np.iinfo(factor_dtype).min, np.iinfo(factor_dtype).max
    factor = rng.integers(low, high + 1, (k // 32, 2, n)).astype(factor_dtype)
    products = np.einsum("mghk,ghkn->ghmn", x.reshape(rows, -1, 2, 16).astype(float), q.reshape(-1, 2, 16, n))
    terms = products * x_scale[:, None, :, None] * (np.repeat(scale, span, 0)[:, None] * factor)[:, :, None]
    tensors = (Tensor(x), Tensor(x_scale), Tensor(data), Tensor(tiled(scale), dtype), Tensor(tiled(factor)))
    for block_m, block_n in ((min(rows, 16), 16), (64, 32)):
        found = []
        for register_tiles in (True, False):
            y = empty((rows, n))
            compiled = scaled_kernel[-(-rows // block_m), n // block_n](
                *tensors, y, rows, n, k, block_m, block_n, span, register_tiles=register_tiles
            )
            assert in_registers(compiled) == register_tiles
            found.append(y.stored)
        np.testing.assert_array_equal(*found)
        assert (np.abs(found[0] - terms.sum((0, 1))) <= 1e-6 * np.abs(terms).sum((0, 1))).all()


@triton.jit
def floats_kernel(
    x_ptr, w_ptr, high_ptr, table_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] float32 @ weights [K, N] / 2, which become floats on their way.

    w: fp8 [N/16, K, 16]; or words [N/16, K/32, WORDS, 16] of data, or of fp8: byte (g, r, n, b) is weight 32g + 4r + b.
    """
    row, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, tile, lane = tl.arange(0, 32), n // 16, n % 16
    WORDS: tl.constexpr = 32 if FORM == "fp8" else 8 if FORM == "fp8 in words" else 4
    x = x_ptr + tl.minimum(row, M - 1)[:, None] * K + k[None, :]
    w = (
        w_ptr
        + (tile * (K // 32 * WORDS * 16) + lane)[None, :]
        + ((k if FORM == "fp8" else k // 4 % WORDS) * 16)[:, None]
    )
    high = high_ptr + (tile * K + lane)[None, :] + (k // 16 * 16)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K // 32):
        words = tl.load(w)
        if FORM == "fp8":
            values = words.to(tl.float32)
        elif FORM == "fp8 in words":
            values = (words >> (k % 4 * 8)[:, None]).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            nibbles = (words >> (k % 4 * 8 + k // 16 * 4)[:, None]) & 15
            if FORM == "6 bits":
                bits = (tl.load(high) >> (k % 4 * 8 + k // 4 % 4 * 2)[:, None]) & 3
                values = ((nibbles | (bits << 4)) - 32).to(tl.float32)
            elif FORM == "nibbles":
                values = nibbles.to(tl.float32)
            else:
                values = tl.load(table_ptr + nibbles).to(tl.float32)
        sums = tl.dot(tl.load(x), values * 0.5, sums, input_precision="ieee")
        x += 32
        w += WORDS * 16
        high += 32
    tl.store(out_ptr + row[:, None] * N + n[None, :], sums, (row < M)[:, None])


FLOATS = {
    "nibbles": lambda nibbles, high: nibbles,
    "6 bits": FORMS["6 bits, signed"],
    **dict.fromkeys(("float32", "bfloat16", "int8", "uint8"), lambda nibbles, high: np.arange(3, 19)[nibbles]),
    **dict.fromkeys(("fp8", "fp8 in words"), None),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", FLOATS)
def test_weights_become_floats_exactly(form, rows, rng):
    n, k = 32, 64
    data, high = (rng.integers(0, 256, (2, 2, count, 16, 4)).astype(np.uint8) for count in (4, 2))
    table = Tensor(np.arange(3, 19), form if form in ("float32", "bfloat16", "int8", "uint8") else "int8")
    if FLOATS[form]:
        w = Tensor(data.view(np.uint32 if form in ("nibbles", "int8") else np.int32))
        values = FLOATS[form](nibbles_of(data), bytes_of(high))
    else:  # every code; NaN is in two columns
        codes = np.resize(np.delete(np.arange(256), [0x7F, 0xFF]), (k, n)).astype(np.uint8)
        codes[1, 2], codes[3, 4] = 0x7F, 0xFF
        values = values_of_codes("float8_e4m3fn")[codes]
        words = codes.reshape(2, 8, 4, 2, 16).transpose(3, 0, 1, 4, 2)  # [N/16, K/32, 8, 16, 4]
        w = Tensor(np.ascontiguousarray(words).view(np.int32))
        if form == "fp8":
            w = Tensor(tiled(values), "float8_e4m3fn")
    x = np.eye(rows, k, dtype=np.float32) * 4
    for block_m, block_n in ((min(rows, 16), 16), (64, 32)):
        out = empty((rows, n))
        compiled = floats_kernel[-(-rows // block_m), n // block_n](
            Tensor(x), w, Tensor(high.view(np.int32)), table, out, rows, n, k, block_m, block_n, form
        )
        assert in_registers(compiled)
        np.testing.assert_array_equal(out.stored, x @ values / 2)
