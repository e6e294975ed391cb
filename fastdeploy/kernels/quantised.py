"""Linear layers of quantised weights, with int8 or with float activations.

Weights have 4 to 8 bits and come in groups of 32 along k, W[n, k] = scale value + minimum: formats.py has the formats
and how they are packed. Activations are quantised alike, to int8 with float32 scales, x[t, k] = x_scale[t, g] xq[t, k].
Then all products are of integers, which sum up exactly, and the scales are applied once per group:

    y[t, n] = sum_g  x_scale[t, g] (scale[n, g] (xq[t] . q[n])_g  +  minimum[n, g] x_sum[t, g]),  x_sum[t, g] = sum_g xq

Where the minimum is -offset scale, with one integer offset for all weights, (xq . q)_g starts from -offset x_sum: of
the 11 multiplications of vectors that a group takes, 8 of them of bytes, 10 are left.

Where int8 is too coarse, some groups take 16 bits: xq + low / 128, both int8, -64 <= low <= 64. These are the groups of
outliers. An error of 8 bits is 1/254 of a group's largest magnitude, and trained models have some features in which
that is tens of times the usual: of a row's error they make nearly all. So the low bytes of all groups are products of
their own, in which those without any are left out (triton_cpu/turns.py).

Activations that stay floats meet the weights as the floats that these formulas give: what a float32 `LinearWeight` of
the same numbers computes, bit by bit on a CPU, from a sixth or a quarter of the bytes.

    activations: values, low [T, K] int8, scales [T, K/32] float32, sums, low_sums [T, K/32] int32, row-major

Gate and up of an MLP may end in SwiGLU (`gated_quantised_linear`): a program computes the same 32 features of both, and
int8 is all that it stores. (A prompt of 512, SmolLM2: 3.3 ms a layer on two cores, as two kernels 3.5.)

One program computes BLOCK_M rows of x times BLOCK_N features and walks all groups: the order of the float sum is fixed,
so a row does not depend on the number of rows. Programs of the same rows follow each other: a core of a CPU, which runs
the same part of every grid, finds in its own cache what the kernel before made of them; a layer's packed weights fit
there beside. Cost: N*K weights of 4.3 to 8.5 bits a step (decode: bound by memory), 2*T*N*K operations on integers, of
which an AVX-512 VNNI core does four times as many as of floats.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.formats import (
    GROUP,
    TILE,
    QuantisedWeight,
    group_minimum,
    group_scale,
    groups,
    packed_tile,
    weight_values,
    words,
)
from fastdeploy.kernels.launch import (
    FLOATS,
    Target,
    TensorView,
    cdiv,
    expect,
    launch,
    next_power_of_2,
    operand_dtype,
    row_block,
    target,
    view,
)

LOW_BIAS: tl.constexpr = tl.constexpr(4096)  # more than a group's low bytes come to: a biased sum is never 0


@dataclass(frozen=True)
class QuantisedRows:
    """Activations in 8 bits, or some groups in 16: scale (values + low / 128).

    values, low: [T, K] int8.  scales: [T, K/32] float32.  sums: [T, K/32] int32, of a group's values.  low_sums: the
    same of low, plus LOW_BIAS, or 0 for groups without low bytes.  low, low_sums: None for 8 bits.
    """

    values: TensorView
    scales: TensorView
    sums: TensorView
    low: TensorView | None = None
    low_sums: TensorView | None = None

    def __post_init__(self) -> None:
        rows, width = self.values.shape
        expect("values", self.values, (rows, width), "int8")
        if self.low is not None:
            expect("low", self.low, (rows, width), "int8")
        if self.low_sums is not None:
            expect("low_sums", self.low_sums, (rows, groups(width)), "int32")
        expect("scales", self.scales, (rows, groups(width)), "float32")
        expect("sums", self.sums, (rows, groups(width)), "int32")

    @property
    def shape(self) -> tuple[int, ...]:
        """[T, K], as of the floats that these were."""
        return self.values.shape

    @property
    def tensors(self) -> tuple[TensorView | None, ...]:
        """As `store_quantised` takes them."""
        return self.values, self.scales, self.sums, self.low, self.low_sums

    def rows(self, count: int) -> "QuantisedRows":
        """The first `count` rows, no copy."""
        return QuantisedRows(*(tensor and tensor.rows(count) for tensor in self.tensors))  # type: ignore[arg-type]

    def in_8_bits(self) -> "QuantisedRows":
        """The same memory, without low bytes."""
        return QuantisedRows(self.values, self.scales, self.sums)


def rows_fields(rows: int, width: int, wide: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tensors of `QuantisedRows`, by name; `wide` for those with low bytes."""
    of_row, per_group = (rows, width), (rows, groups(width))
    fields: dict[str, tuple[tuple[int, ...], str]] = {
        "values": (of_row, "int8"),
        "scales": (per_group, "float32"),
        "sums": (per_group, "int32"),
    }
    return {**fields, "low": (of_row, "int8"), "low_sums": (per_group, "int32")} if wide else fields


# Activations to integers


@triton.jit
def quantised(values, MOST: tl.constexpr):
    """(integers, scales, sums) of float32 `values`, one group in each row of the tile [GROUPS, 32].

    The largest magnitude of a group becomes MOST. Rounding is to nearest, halves to even. A group with NaN or
    infinities has the scale NaN: integers have no way to say so.
    """
    # Positive floats compare as their bits do, in which NaN is above infinity; tl.max of floats looks past NaN.
    magnitudes = tl.abs(values).to(tl.int32, bitcast=True)
    largest = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    # Below 1e-30 the reciprocal nears float32's end, and to every weight that there is they are zeros.
    inverse = tl.where(largest > 1e-30, MOST / largest, 0.0)
    # Floats from 2^23 to 2^24 are whole numbers: the sum is rounded to one, which its lower bits hold.
    ANCHOR: tl.constexpr = 12582912.0  # 1.5 * 2^23
    anchor = tl.full(values.shape, ANCHOR, tl.float32)
    anchored = tl.fma(values, tl.broadcast_to(inverse[:, None], values.shape), anchor)
    integers = anchored.to(tl.int32, bitcast=True) - anchor.to(tl.int32, bitcast=True)
    scales = tl.where(largest < float("inf"), largest * (1.0 / MOST), float("nan"))
    return integers, scales, tl.sum(integers, axis=1)


@triton.jit
def store_quantised(written, x, limit, row, start, K: tl.constexpr, BLOCK: tl.constexpr):
    """Quantise float32 x [BLOCK], the elements of `row` from `start` on, and store what lies inside of the row."""
    column = start // 32 + tl.arange(0, BLOCK // 32)
    inside = column < K // 32 if K % BLOCK != 0 else tl.full([BLOCK // 32], True, tl.int1)
    store_groups(written, tl.reshape(x, [BLOCK // 32, 32]), limit, row * (K // 32) + column, inside)


@triton.jit
def store_groups(written, x, limit, group, inside):
    """Quantise float32 x [G, 32] and store it as the groups `group` [G], counted row after row, if `inside` [G].

    written: the tensors of `QuantisedRows`.  limit: groups with a larger magnitude have low bytes, see `low_limit`.
    """
    values, scales, sums, low, low_sums = written
    offsets = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    if low is None:
        integers, scale, total = quantised(x, 127.0)
    else:
        wide, scale, _ = quantised(x, 127.0 * 128.0)
        scale *= 128.0
        integers = (wide + 64) >> 7
        rest = wide - (integers << 7)
        total = tl.sum(integers, axis=1)
        low_total = tl.where(scale * 127.0 > limit, tl.sum(rest, axis=1) + LOW_BIAS, 0)
        tl.store(low + offsets, rest.to(tl.int8), mask=inside[:, None])
        tl.store(low_sums + group, low_total, mask=inside)
    tl.store(values + offsets, integers.to(tl.int8), mask=inside[:, None])
    tl.store(scales + group, scale, mask=inside)
    tl.store(sums + group, total, mask=inside)


@triton.jit
def low_limit(squares, K: tl.constexpr):
    """The limit for groups of a row whose squares sum up to `squares` [lanes]: 8 times the root of their mean.

    (SmolLM2 in Q4_0, inputs of q, k, v, gate, up and of the LM head: KL 0.0041 without low bytes, 0.0018 with those of
    the 7 % of groups that are above it, 0.0014 with those above 4 times, 20 %.)
    """
    return 8.0 * tl.sqrt(tl.sum(squares, axis=0) / K)


@triton.jit
def _quantise_kernel(values, scales, sums, low, low_sums, x, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    if low is not None:
        for start in range(0, K, BLOCK):
            x_chunk = tl.load(x + row * K + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
            squares += x_chunk * x_chunk
    limit = low_limit(squares, K)
    for start in range(0, K, BLOCK):
        x_chunk = tl.load(x + row * K + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        store_quantised((values, scales, sums, low, low_sums), x_chunk, limit, row, start, K, BLOCK)


def quantise(out: QuantisedRows, x: Any) -> None:
    """out = x in 8 bits or, where `out` has memory for low bytes, with those of groups of outliers.

    Args:
        out: [T, K].
        x: [T, K], any float type.
    """
    x = view(x)
    rows, width = out.shape
    expect("x", x, (rows, width), *FLOATS)
    block = row_block(target(), width, limit=512)
    launch(_quantise_kernel, (rows,), *out.tensors, x, K=width, BLOCK=block)


# Products


@triton.jit
def integer_sums(x, row, weight, place, lane, K, FORMAT: tl.constexpr, SHAPE: tl.constexpr):
    """x W.T of the rows [BLOCK_M] and the features [BLOCK_N] that are `lane` of the packed tiles `place`.

    x: the tensors of `QuantisedRows`.  weight: the planes, see `QuantisedWeight`.
    """
    values, scales, value_sums, low, low_sums = x
    sums = tl.zeros(SHAPE, tl.float32)
    sums = _add_products(sums, values, scales, value_sums, row, weight, place, lane, K, FORMAT, LOW=False)
    if low is not None:
        sums = _add_products(sums, low, scales, low_sums, row, weight, place, lane, K, FORMAT, LOW=True)
    return sums


@triton.jit
def _add_products(
    sums, x, x_scales, x_sums, row, weight, place, lane, K, FORMAT: tl.constexpr, LOW: tl.constexpr
):  # fmt: skip
    """sums + x W.T, of all bytes, or of the low ones in the groups that have them."""
    BITS: tl.constexpr = FORMAT[0]
    WIDTH: tl.constexpr = 32 if BITS == 8 else 16  # of a product: nibbles come in halves of a group, low and high ones
    data, high, scales, minimums, factors, table = weight
    k = tl.arange(0, WIDTH)
    x_tile = x + row[:, None] * K + k[None, :]  # [BLOCK_M, WIDTH]
    data_tile = data + place[None, :] * (K * (WIDTH // 2)) + (k // 4 * 64 + k % 4)[:, None] + (lane * 4)[None, :]
    high_tile = data_tile
    if high is not None:
        high_tile = high + place[None, :] * (K * 2 * (BITS - 4)) + (k % 4)[:, None] + (lane * 4)[None, :]
    row_scales = x_scales + row * (K // 32)  # [BLOCK_M]
    row_sums = x_sums + row * (K // 32)
    for group in range(0, K // 32):
        scale = group_scale(scales, factors, place, group, 0, K // 32, lane, FORMAT)
        row_sum = tl.load(row_sums)[:, None]
        if LOW:
            has_low = row_sum != 0
            row_sum -= LOW_BIAS
        bytes_ = tl.load(data_tile)  # [WIDTH, BLOCK_N]
        if BITS == 8:
            scaled = tl.dot(tl.load(x_tile), bytes_, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
        else:
            first = _integers(bytes_ & 15, high_tile, table, k, 0, FORMAT)
            second = _integers(bytes_ >> 4, high_tile, table, k, 1, FORMAT)
            if FORMAT[3]:  # a scale for each half
                scaled = tl.dot(tl.load(x_tile), first, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
                scale = group_scale(scales, factors, place, group, 1, K // 32, lane, FORMAT)
                dots = tl.dot(tl.load(x_tile + 16), second, out_dtype=tl.int32)
                scaled += dots.to(tl.float32) * scale[None, :]
            else:
                dots = tl.broadcast_to(row_sum * (-FORMAT[1] if minimums is None else 0), sums.shape)
                dots = tl.dot(tl.load(x_tile), first, dots, out_dtype=tl.int32)
                dots = tl.dot(tl.load(x_tile + 16), second, dots, out_dtype=tl.int32)
                scaled = dots.to(tl.float32) * scale[None, :]
        if minimums is not None:
            minimum = group_minimum(scale, minimums, factors, place, group, K // 32, lane, FORMAT)
            scaled += row_sum.to(tl.float32) * minimum[None, :]
        row_scale = tl.load(row_scales)[:, None]
        if LOW:
            sums = tl.where(has_low, sums + scaled * (row_scale * (1 / 128)), sums)
        else:
            sums += scaled * row_scale
        x_tile += 32
        data_tile += 16 * WIDTH
        high_tile += 64 * (BITS - 4)
        row_scales += 1
        row_sums += 1
    return sums


@triton.jit
def _integers(nibbles, high_tile, table, k, HALF: tl.constexpr, FORMAT: tl.constexpr):
    """The int8 that half a group of weights is multiplied as, [16, BLOCK_N]."""
    if FORMAT[0] == 5:
        shift = (k // 4 + HALF * 4).to(tl.uint8)[:, None]
        nibbles |= ((tl.load(high_tile) >> shift) & 1) << 4
    if FORMAT[0] == 6:
        shift = (k // 4 * 2).to(tl.uint8)[:, None]
        nibbles |= ((tl.load(high_tile + HALF * 64) >> shift) & 3) << 4
    if table is not None:
        return tl.load(table + nibbles.to(tl.int32))
    values = nibbles.to(tl.int8)
    return values - FORMAT[1] if FORMAT[3] else values


@triton.jit
def float_sums(x, row, weight, place, lane, K, OPERAND: tl.constexpr, FORMAT: tl.constexpr, SHAPE: tl.constexpr):
    """The same for floats: the weights become floats on their way to `tl.dot`. data and high come as 32-bit words."""
    k = tl.arange(0, 32)
    x_tile = x + row[:, None] * K + k[None, :]  # [BLOCK_M, 32]
    sums = tl.zeros(SHAPE, tl.float32)
    for group in range(0, K // 32):
        w = weight_values(weight, place[None, :], group, k[:, None], K // 32, lane[None, :], FORMAT)  # [32, BLOCK_N]
        sums = tl.dot(tl.load(x_tile).to(OPERAND), w.to(OPERAND), sums, input_precision="ieee")
        x_tile += 32
    return sums


@triton.jit(do_not_specialize=["rows", "step"])
def _int8_kernel(
    y, x, x_scales, x_sums, x_low, x_low_sums, data, high, scales, minimums, factors, table, bias,
    rows, step, N, K, STRIDE, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * step + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    end = tl.minimum(tl.program_id(1) * step + step, rows)
    row = tl.minimum(m, end - 1).to(tl.int64)  # rows past the end read the last one: cheaper than a mask in the loop
    weight = (data, high, scales, minimums, factors, table)
    x_rows = (x, x_scales, x_sums, x_low, x_low_sums)
    sums = integer_sums(x_rows, row, weight, packed_tile(n, N), n % 16, K, FORMAT, [BLOCK_M, BLOCK_N])
    _store(y, _with_bias(sums, bias, 0, n, N), m, n, end, N, STRIDE)


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up of float32 tiles, see activation.py."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["rows", "step"])
def _gated_kernel(
    out, out_scales, out_sums, x, x_scales, x_sums, x_low, x_low_sums, data, high, scales, minimums, factors, table,
    bias, rows, step, I, K, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """BLOCK_M rows of one group of 32 features of silu(gate) * up, each first as sums and then as int8.

    Programs of the same rows follow each other: they write to the same cache lines, a few bytes each.
    """
    m = tl.program_id(1) * step + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = tl.program_id(0) * 32 + tl.arange(0, 32)
    end = tl.minimum(tl.program_id(1) * step + step, rows)
    row = tl.minimum(m, end - 1).to(tl.int64)
    weight = (data, high, scales, minimums, factors, table)
    x_rows = (x, x_scales, x_sums, x_low, x_low_sums)
    place = packed_tile(n, I)
    gate = integer_sums(x_rows, row, weight, place, n % 16, K, FORMAT, [BLOCK_M, 32])
    up = integer_sums(x_rows, row, weight, I // 16 + place, n % 16, K, FORMAT, [BLOCK_M, 32])
    activated = swiglu(_with_bias(gate, bias, 0, n, I), _with_bias(up, bias, I, n, I))
    group = row * (I // 32) + tl.program_id(0)
    store_groups((out, out_scales, out_sums, None, None), activated, 0.0, group, m < end)


@triton.jit(do_not_specialize=["rows"])
def _float_kernel(
    y, x, data, high, scales, minimums, factors, table, bias, rows, N, K, STRIDE,
    OPERAND: tl.constexpr, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = tl.minimum(m, rows - 1).to(tl.int64)
    weight = (data, high, scales, minimums, factors, table)
    sums = float_sums(x, row, weight, packed_tile(n, N), n % 16, K, OPERAND, FORMAT, [BLOCK_M, BLOCK_N])
    _store(y, _with_bias(sums, bias, 0, n, N), m, n, rows, N, STRIDE)


@triton.jit
def _with_bias(sums, bias, first, n, N):
    """sums + bias of the features first + n, of which there are N."""
    if bias is not None:
        sums += tl.load(bias + first + n, mask=n < N, other=0.0)[None, :]
    return sums


@triton.jit
def _store(y, sums, m, n, rows, N, STRIDE):
    y_tile = y + m.to(tl.int64)[:, None] * STRIDE + n[None, :]
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < N)[None, :])


def tiles(target: Target, rows: int, int8_activations: bool) -> dict[str, int]:
    """Tile rule.

    On a CPU a program of a few rows has one tile of weights, which it reads as they lie in memory; of many rows two,
    which share what a program costs besides its products (512 rows, K = 576: 276 GOP/s, with 16 x 16 tiles 250). Of
    floats one row has two, as one sum would wait for itself (N = 8192, K = 2048: Q4_1 0.99 ms on a core, so 0.55). Rows
    that don't exist are not computed: registers.py has blocks of 5 or 6 rows by two tiles of weights, 8 or 11 by one.
    (24 rows, Q4_0, K = 576: 15.7 us a row for gate, up and down as a tile of 32 rows, which has blocks of 11, so 9.0.)
    """
    if target.is_cpu:
        if rows <= 8 or 11 < rows <= 16:
            block_m = next_power_of_2(rows)
        else:
            block_m = 32 if rows <= 11 else 128 if int8_activations else 64
        two = rows > 16 if int8_activations else block_m <= 2
        return {"BLOCK_M": block_m, "BLOCK_N": 2 * TILE if two else TILE}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}  # tensor cores: one shape for every batch, see linear.py


def _rows_of_a_program(rows: int, block_m: int) -> int:
    """How many rows of its tile a program takes: of more than 128 rows 120 each, which blocks of 5 and of 6 rows fill.
    (512 rows, K = 1024, on a core: Q8_0 670 GOP/s, with 60 of 64 rows 635; Q5_0 715, 685; Q4_0 730, 720.)"""
    return 120 if rows > block_m == 128 else block_m


def quantised_linear(out: Any, x: Any, weight: QuantisedWeight) -> None:
    """out = x @ W.T (+ bias).

    Args:
        out: [T, out_features], any float type; rows may have gaps between them.
        x: [T, in_features], `QuantisedRows` (where the weight's format takes integers) or any float type.
        weight: as packed by packing.py.
    """
    out, rows = view(out), x.shape[0]
    expect("out", out, (rows, weight.out_features), *FLOATS, row_gaps=True)
    if rows == 0:
        return
    here = target()
    rule = tiles(here, rows, isinstance(x, QuantisedRows))
    sizes = (weight.out_features, weight.in_features, out.strides[0])
    if not isinstance(x, QuantisedRows):
        x = view(x)
        expect("x", x, (rows, weight.in_features), *FLOATS)
        packed = (words(weight.data), words(weight.high), *weight.planes[2:], weight.bias)
        known = {"OPERAND": operand_dtype(here, x), "FORMAT": weight.format.constants}
        grid = (cdiv(rows, rule["BLOCK_M"]), cdiv(weight.out_features, rule["BLOCK_N"]))
        launch(_float_kernel, grid, out, x, *packed, rows, *sizes, **known, **rule)
        return
    expect("x", x.values, (rows, weight.in_features), "int8")
    _expect_integers(weight)
    step = _rows_of_a_program(rows, rule["BLOCK_M"])
    grid = (cdiv(weight.out_features, rule["BLOCK_N"]), cdiv(rows, step))
    packed = (*weight.planes, weight.bias)
    launch(_int8_kernel, grid, out, *x.tensors, *packed, rows, step, *sizes, FORMAT=weight.format.constants, **rule)


def gated_quantised_linear(out: QuantisedRows, x: QuantisedRows, weight: QuantisedWeight) -> None:
    """out = silu(x @ Wgate.T) * (x @ Wup.T), in one launch that leaves no floats in memory.

    Args:
        out: [T, I] in 8 bits.
        x: [T, in_features].
        weight: [2 I, in_features], the rows of gate, then up.
    """
    rows, width = out.shape
    expect("x", x.values, (rows, weight.in_features), "int8")
    if weight.out_features != 2 * width or out.low is not None:
        raise ValueError(f"gate and up of {weight.out_features} features don't fill rows of {width} in 8 bits")
    _expect_integers(weight)
    if rows == 0:
        return
    rule = tiles(target(), rows, int8_activations=True)
    step = _rows_of_a_program(rows, rule["BLOCK_M"])
    grid = (groups(width), cdiv(rows, step))
    sizes = (rows, step, width, weight.in_features)
    written = (out.values, out.scales, out.sums)
    packed = (*weight.planes, weight.bias)
    known = {"FORMAT": weight.format.constants, "BLOCK_M": rule["BLOCK_M"]}
    launch(_gated_kernel, grid, *written, *x.tensors, *packed, *sizes, **known)


def _expect_integers(weight: QuantisedWeight) -> None:
    if not weight.takes_integers:
        raise TypeError(f"weights in {weight.format.name} take activations in floats only")


# References


def quantise_reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The specification of `quantise` to 8 bits: integers up to 127 and float64 scales."""
    grouped = x.astype(np.float64).reshape(len(x), -1, GROUP)
    largest = np.abs(grouped).max(axis=2)
    factors = np.divide(127, largest, out=np.zeros_like(largest), where=largest > 1e-30)
    scaled = grouped * factors[..., None]
    return np.rint(scaled).astype(np.int16).reshape(x.shape), largest / 127


def activations_reference(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[T, K] integers with [T, K/32] scales, as float64."""
    return integers * np.repeat(scales.astype(np.float64), GROUP, axis=1)


def quantised_linear_reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The specification, in float64; x [T, K] and weight [N, K] are what they stand for."""
    y = x @ weight.T
    return y if bias is None else y + bias
