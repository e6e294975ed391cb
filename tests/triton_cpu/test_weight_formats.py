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
    return (parts[:, :, 0] | parts[:, :, 1] << 4).astype(np.uint8)


def high_bits_of(q, bits):
    """What is above them: a byte has those of one column and k % 4. [N/16, K/32, 1 or 2, 16, 4]"""
    parts = np.moveaxis(halves(q >> 4 & (1 << bits) - 1), 3, -1)  # [N/16, K/32, 2, 16, 4, 4]
    if bits == 1:
        parts = np.concatenate([parts[:, :, :1], parts[:, :, 1:]], axis=-1)
    return (parts << (np.arange(parts.shape[-1]) * bits)).sum(-1).astype(np.uint8)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", ["table", "table of bytes", "5 bits", "6 bits", "6 bits, signed"])
def test_products_of_integers_are_exact(form, rows, rng):
    n, k, bits = 32, 96, {"5": 5, "6": 6}.get(form[0], 4)
    q, x = rng.integers(0, 1 << bits, (k, n)), rng.integers(-128, 128, (rows, k), np.int8)
    high = high_bits_of(q, bits - 4) if bits > 4 else np.zeros((n // 16, k // 32, 2, 16, 4), np.uint8)
    tables = np.stack([np.zeros_like(TABLE), TABLE])
    table = Tensor(tables if form == "table of bytes" else TABLE)
    w = {"t": TABLE[q % 16].astype(int), "6 bits, signed": q - 32}.get(form if form in ("6 bits, signed",) else form[0], q)
    for block_m, block_n in ((min(rows, 16), 16), (64, 32)):
        out = empty((rows, n), "int32")
        grid = (-(-rows // block_m), n // block_n)
        arguments = (Tensor(x), Tensor(pairs_of(q)), Tensor(high), table, out, rows, n, k, block_m, block_n, form)
        if form == "table of bytes" and block_n == 32:
            continue
        compiled = integers_kernel[grid](*arguments)
        assert in_registers(compiled)
        np.testing.assert_array_equal(out.stored, x.astype(int) @ w)
