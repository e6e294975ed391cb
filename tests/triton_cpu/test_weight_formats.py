"""Weights of a few bits in the loops of registers.py: tables, more high bits than a nibble has, factors, fp8."""

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor, empty, rounded, values_of_codes
from .test_registers import in_registers, quads, tiled

TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
ROWS = (1, 8, 17, 64)


@triton.jit
def weights(data, high, table, second: tl.constexpr, FORM: tl.constexpr):
    """Half a group of weights [16, N] from bytes of pairs, the first or the second nibbles."""
    nibbles = (data >> 4) if second else (data & 15)
    r = tl.arange(0, 16)[:, None] // 4
    if FORM == "table":
        return tl.load(table + nibbles.to(tl.int32))
    elif FORM == "table of bytes":  # an index of 8 bits, of a table that a program's number chooses
        return tl.load(table + (tl.num_programs(1) - 1) * 16 + nibbles).to(tl.int8)
    elif FORM == "5 bits":
        shift = (r + (4 if second else 0)).to(tl.uint8)
        return (nibbles | (((high >> shift) & 1) << 4)).to(tl.int8)
    elif FORM == "6 bits":
        return (nibbles | (((high >> (2 * r).to(tl.uint8)) & 3) << 4)).to(tl.int8)
    elif FORM == "6 bits, signed":  # in 32 bits on the way
        return ((nibbles | (((high >> (2 * r)) & 3) << 4)) - 32).to(tl.int8)
    else:
        return nibbles.to(tl.int8)


@triton.jit
def integers_kernel(
    x_ptr, w_ptr, high_ptr, table_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """out [M, N] int32 = x [M, K] int8 @ weights [K, N]; N are whole blocks."""
    row, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 16)
    HIGH: tl.constexpr = 64 if FORM == "5 bits" else 128  # bytes of a group
    x = x_ptr + tl.minimum(row, M - 1)[:, None] * K + k[None, :]
    w = w_ptr + (n // 16)[None, :] * (K * 8) + (n % 16)[None, :] * 4 + (k // 4 * 64 + k % 4)[:, None]
    high = high_ptr + (n // 16)[None, :] * (K // 32 * HIGH) + (n % 16)[None, :] * 4 + (k % 4)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(0, K // 32):
        data, bits = tl.load(w), tl.load(high)
        sums = tl.dot(tl.load(x), weights(data, bits, table_ptr, False, FORM), sums, out_dtype=tl.int32)
        if FORM == "6 bits" or FORM == "6 bits, signed":
            bits = tl.load(high + 64)
        sums = tl.dot(tl.load(x + 16), weights(data, bits, table_ptr, True, FORM), sums, out_dtype=tl.int32)
        x += 32
        w += 256
        high += HIGH
    tl.store(out_ptr + row[:, None] * N + n[None, :], sums, (row < M)[:, None])


def halves(q):
    """[K, N] -> [N/16, K/32, 2, 4, 16, 4]"""
    return quads(q).reshape(q.shape[1] // 16, q.shape[0] // 32, 2, 4, 16, 4)


def pairs_of(q):
    """The lower four bits of q [K, N] in bytes of two."""
    parts = halves(q & 15)
    return np.ascontiguousarray(parts[:, :, 0] | parts[:, :, 1] << 4, np.uint8)


def high_bits_of(q, bits):
    """What is above them: a byte has those of one column and k % 4. [N/16, K/32, 1 or 2, 16, 4]"""
    parts = np.moveaxis(halves(q >> 4 & (1 << bits) - 1), 3, -1)  # [N/16, K/32, 2, 16, 4, 4]
    if bits == 1:
        parts = np.concatenate([parts[:, :, :1], parts[:, :, 1:]], axis=-1)
    return np.ascontiguousarray((parts << (np.arange(parts.shape[-1]) * bits)).sum(-1), np.uint8)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", ["table", "table of bytes", "5 bits", "6 bits", "6 bits, signed"])
def test_products_of_integers_are_exact(form, rows, rng):
    n, k, bits = 32, 96, {"5": 5, "6": 6}.get(form[0], 4)
    q, x = rng.integers(0, 1 << bits, (k, n)), rng.integers(-128, 128, (rows, k), np.int8)
    high = high_bits_of(q, bits - 4) if bits > 4 else np.zeros((n // 16, k // 32, 2, 16, 4), np.uint8)
    tables = np.stack([np.zeros_like(TABLE), TABLE])
    table = Tensor(tables if form == "table of bytes" else TABLE)
    w = {"t": TABLE[q % 16].astype(int), "6 bits, signed": q - 32}.get(
        form if form in ("6 bits, signed",) else form[0], q
    )
    for block_m, block_n in ((min(rows, 16), 16), (64, 32)):
        out = empty((rows, n), "int32")
        grid = (-(-rows // block_m), n // block_n)
        arguments = (Tensor(x), Tensor(pairs_of(q)), Tensor(high), table, out, rows, n, k, block_m, block_n, form)
        if form == "table of bytes" and block_n == 32:
            continue
        compiled = integers_kernel[grid](*arguments)
        assert in_registers(compiled)
        np.testing.assert_array_equal(out.stored, x.astype(int) @ w)


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
    q, x = rng.integers(0, 16, (k, n)), rng.integers(-128, 128, (rows, k), np.int8)
    x_scale = rng.uniform(0.01, 0.1, (k // 32, rows)).astype(np.float32)
    scale = rounded(rng.uniform(0.01, 0.1, (k // 32 // span, n)), dtype)
    low, high = np.iinfo(factor_dtype).min, np.iinfo(factor_dtype).max
    factor = rng.integers(low, high + 1, (k // 32, 2, n)).astype(factor_dtype)
    products = np.einsum("mghk,ghkn->ghmn", x.reshape(rows, -1, 2, 16).astype(float), q.reshape(-1, 2, 16, n))
    terms = products * x_scale[:, None, :, None] * (np.repeat(scale, span, 0)[:, None] * factor)[:, :, None]
    tensors = (Tensor(x), Tensor(x_scale), Tensor(pairs_of(q)), Tensor(tiled(scale), dtype), Tensor(tiled(factor)))
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

    w: fp8 [N/16, K, 16]; or 32-bit words [N/16, K/32, WORDS, 16] of the bytes of fp8 or of pairs.
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


def float_weights(form, rng):
    """(w, table, weights [K, N]): arguments of floats_kernel and the numbers that they stand for."""
    q, n, k = rng.integers(0, 64, (64, 32)), 32, 64
    table = Tensor(rng.integers(0, 128, 16), form if form in ("float32", "bfloat16", "int8", "uint8") else "int8")
    words = Tensor(pairs_of(q).view(np.uint32 if form in ("nibbles", "int8") else np.int32))
    if not form.startswith("fp8"):
        return q, words, table, {"6 bits": q - 32, "nibbles": q % 16}.get(form, table.values[q % 16])
    q = np.resize(np.delete(np.arange(256), [0x7F, 0xFF]), (k, n))
    q[1, 2], q[3, 4] = 0x7F, 0xFF
    weights = values_of_codes("float8_e4m3fn")[q]
    if form == "fp8":
        return q, Tensor(tiled(weights), "float8_e4m3fn"), table, weights
    return q, Tensor(np.ascontiguousarray(quads(q), np.uint8).view(np.int32)), table, weights


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", ["nibbles", "6 bits", "float32", "bfloat16", "int8", "uint8", "fp8", "fp8 in words"])
def test_weights_become_floats_exactly(form, rows, rng):
    q, w, table, weights = float_weights(form, rng)
    k, n = weights.shape
    x = np.eye(rows, k, dtype=np.float32) * 4
    high = Tensor(high_bits_of(q % 64, 2).view(np.int32))
    for block_m, block_n in ((min(rows, 16), 16), (64, 32)):
        out = empty((rows, n))
        grid = (-(-rows // block_m), n // block_n)
        compiled = floats_kernel[grid](Tensor(x), w, high, table, out, rows, n, k, block_m, block_n, form)
        assert in_registers(compiled)
        np.testing.assert_array_equal(out.stored, x @ weights / 2)
