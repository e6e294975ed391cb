"""Linear layers of 4- and 8-bit weights, with int8 or with float activations.

Weights come in groups of 32 along k, each with a scale d (q4: and a minimum m) of its own, in float16:

    q4:  W[n, k] = d[n, g] q[n, k] + m[n, g],  q = 0 ... 15         as GGUF's Q4_1, and Q4_0 with m = -8 d:  5 bits each
    q8:  W[n, k] = d[n, g] q[n, k],            q = -128 ... 127     as GGUF's Q8_0:  8.5 bits each        (g = k // 32)

Activations are quantised alike, to int8 with float32 scales, x[t, k] = x_scale[t, g] xq[t, k]. Then all products are
of integers, which sum up exactly, and the scales are applied once per group:

    y[t, n] = sum_g  x_scale[t, g] d[n, g] (xq[t] . q[n])_g  +  x_sum[t, g] m[n, g],       x_sum = x_scale * sum_g xq

Where int8 is too coarse, xq is an integer of 16 bits in two int8, 256 high + low. Both meet the same weights, which are
read once: as fast as int8 where memory is the bound, 1.6 times its time where arithmetic is.

Activations that stay floats meet the weights as the floats that these formulas give: what a float32 `LinearWeight` of
the same numbers computes, bit by bit on a CPU, from a sixth or a quarter of the bytes.

Packed weights: tiles of 16 output features, in which four values that follow each other along k are one 32-bit word,
because that is what a CPU multiplies and adds at once (x86: vpdpbusd). N is padded to full tiles, whatever they hold.

    q4 data  [N/16, K/32, 4, 16, 4] uint8      byte (g, r, n, b) = q[n, 32g + 4r + b]  |  q[n, 32g + 16 + 4r + b] << 4

        | r = 0: word of n = 0 | n = 1 | ... | n = 15 |  r = 1 ...          64 bytes, one vector, for each r
           |  b = 0: q[0,0] q[0,16]  |  b = 1: q[0,1] q[0,17]  | ...        the two nibbles of a byte: GGUF's own pairs

    q8 data  [N/16, K/32, 8, 16, 4] int8       byte (g, r, n, b) = q[n, 32g + 4r + b]
    scales, minimums  [N/16, K/32, 16] float16
    activations: values (and low) [T, K] int8, scales and sums [T, K/32] float32, row-major

Gate and up of an MLP may end in SwiGLU (`gated_quantised_linear`): a program computes the same 32 features of both, and
int8 is all that it stores. (A prompt of 512, SmolLM2: 3.3 ms a layer on two cores, as two kernels 3.5.)

One program computes BLOCK_M rows of x times BLOCK_N features and walks all groups: the order of the float sum is fixed,
so a row does not depend on the number of rows. Programs of the same rows follow each other: a core of a CPU, which runs
the same part of every grid, finds in its own cache what the kernel before made of them; a layer's packed weights fit
there beside. Cost: N*K weights of 5 or 8.5 bits per step (decode: bound by memory), 2*T*N*K operations on integers, of
which an AVX-512 VNNI core does four times as many as of floats.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl

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

GROUP = 32  # weights, or activations, that share a scale: what GGUF's formats have
TILE = 16  # output features side by side: a vector of 32-bit sums
KINDS = ("q4", "q8")
BLOCK_HALFWORDS = {"Q4_0": 9, "Q4_1": 10, "Q8_0": 17}  # a GGUF block of 32 weights in units of 16 bits


@dataclass(frozen=True)
class QuantisedWeight:
    """The weight of y = x @ W.T (+ bias), W being [out_features, in_features], in 4 or 8 bits.

    data, scales, minimums: see `packed_fields`; `minimums` is None for q8.  bias: [out_features] float32 or None.
    wide_inputs: activations that are quantised for this layer take 16 bits.
    """

    data: TensorView
    scales: TensorView
    minimums: TensorView | None
    out_features: int
    in_features: int
    bias: TensorView | None = None
    wide_inputs: bool = False

    def __post_init__(self) -> None:
        for name, (shape, dtype) in packed_fields(self.kind, self.out_features, self.in_features).items():
            expect(f"weight {name}", getattr(self, name), shape, dtype)
        if self.bias is not None:
            expect("bias", self.bias, (self.out_features,), "float32")

    @property
    def tensors(self) -> tuple[TensorView | None, ...]:
        """As kernels take them."""
        return self.data, self.scales, self.minimums, self.bias

    @property
    def kind(self) -> str:
        """ "q4" or "q8"."""
        return "q8" if self.minimums is None else "q4"


@dataclass(frozen=True)
class QuantisedRows:
    """Activations in 8 or 16 bits: the integers are `values`, or 256 values + low.

    values, low: [T, K] int8.  scales: [T, K/32] float32.  sums: [T, K/32] float32, of a group's integers, times its
    scale.  low: None for 8 bits.
    """

    values: TensorView
    scales: TensorView
    sums: TensorView
    low: TensorView | None = None

    def __post_init__(self) -> None:
        rows, width = self.values.shape
        expect("values", self.values, (rows, width), "int8")
        if self.low is not None:
            expect("low", self.low, (rows, width), "int8")
        expect("scales", self.scales, (rows, groups(width)), "float32")
        expect("sums", self.sums, (rows, groups(width)), "float32")

    @property
    def shape(self) -> tuple[int, ...]:
        """[T, K], as of the floats that these were."""
        return self.values.shape

    @property
    def tensors(self) -> tuple[TensorView | None, ...]:
        """As `store_quantised` takes them."""
        return self.values, self.scales, self.sums, self.low

    def rows(self, count: int) -> "QuantisedRows":
        """The first `count` rows, no copy."""
        low = None if self.low is None else self.low.rows(count)
        return QuantisedRows(self.values.rows(count), self.scales.rows(count), self.sums.rows(count), low)


def groups(width: int) -> int:
    """Groups in a row of `width` elements. ValueError if it is no whole number of them."""
    if width % GROUP:
        raise ValueError(f"rows of {width} elements cannot be quantised in groups of {GROUP}")
    return width // GROUP


def packed_fields(kind: str, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tensors of a `QuantisedWeight`, by name. ValueError if the width is no multiple of 32."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of quantised weight; there are {', '.join(KINDS)}")
    tiles, per_row = cdiv(out_features, TILE), groups(in_features)
    per_group = ((tiles, per_row, TILE), "float16")
    if kind == "q4":
        return {"data": ((tiles, per_row, 4, TILE, 4), "uint8"), "scales": per_group, "minimums": per_group}
    return {"data": ((tiles, per_row, 8, TILE, 4), "int8"), "scales": per_group}


def rows_fields(rows: int, width: int, wide: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tensors of `QuantisedRows`, by name; `wide` for 16 bits."""
    per_group = ((rows, groups(width)), "float32")
    bytes_ = dict.fromkeys(("values", "low") if wide else ("values",), ((rows, width), "int8"))
    return {**bytes_, "scales": per_group, "sums": per_group}


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
    return integers, scales, tl.sum(integers, axis=1).to(tl.float32) * scales


@triton.jit
def store_quantised(values, scales, sums, low, x, row, start, K: tl.constexpr, BLOCK: tl.constexpr):
    """Quantise float32 x [BLOCK], the elements of `row` from `start` on, and store what lies inside of the row."""
    column = start // 32 + tl.arange(0, BLOCK // 32)
    inside = column < K // 32 if K % BLOCK != 0 else tl.full([BLOCK // 32], True, tl.int1)
    store_groups(values, scales, sums, low, tl.reshape(x, [BLOCK // 32, 32]), row * (K // 32) + column, inside)


@triton.jit
def store_groups(values, scales, sums, low, x, group, inside):
    """Quantise float32 x [G, 32] and store it as the groups `group` [G], counted row after row, if `inside` [G]."""
    MOST: tl.constexpr = 127.0 if low is None else 127.0 * 256.0
    integers, scale, total = quantised(x, MOST)
    offsets = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    if low is not None:
        tl.store(low + offsets, integers.to(tl.int8), mask=inside[:, None])  # the low byte, as a signed number
        integers = (integers + 128) >> 8
    tl.store(values + offsets, integers.to(tl.int8), mask=inside[:, None])
    tl.store(scales + group, scale, mask=inside)
    tl.store(sums + group, total, mask=inside)


@triton.jit
def _quantise_kernel(values, scales, sums, low, x, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    inside = columns < K if K % BLOCK != 0 else tl.full([BLOCK], True, tl.int1)
    x_chunk = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    store_quantised(values, scales, sums, low, x_chunk, row, start, K, BLOCK)


def quantise(out: QuantisedRows, x: Any) -> None:
    """out = x in 8 or 16 bits, as `out` has memory for.

    Args:
        out: [T, K].
        x: [T, K], any float type.
    """
    x = view(x)
    rows, width = out.shape
    expect("x", x, (rows, width), *FLOATS)
    block = row_block(target(), width, limit=512)
    launch(_quantise_kernel, (rows, cdiv(width, block)), *out.tensors, x, K=width, BLOCK=block)


# Products


@triton.jit
def _q4_sums(x, x_scales, x_sums, x_low, weight, scales, minimums, row, tile, lane, K, SHAPE: tl.constexpr):
    """x W.T of the rows [BLOCK_M] and the features [BLOCK_N] that are `lane` of the packed tile `tile`."""
    k = tl.arange(0, 16)  # half a group: the low nibbles, then the high ones
    x_tile = x + row[:, None] * K + k[None, :]  # [BLOCK_M, 16]
    if x_low is not None:
        low_tile = x_low + row[:, None] * K + k[None, :]
    weight_tile = weight + tile[None, :] * (K * 8) + (k // 4 * 64 + k % 4)[:, None] + (lane * 4)[None, :]
    group_scales = scales + tile * (K // 2) + lane  # [BLOCK_N]
    group_minimums = minimums + tile * (K // 2) + lane
    row_scales = x_scales + row * (K // 32)  # [BLOCK_M]
    row_sums = x_sums + row * (K // 32)
    sums = tl.zeros(SHAPE, tl.float32)
    for _ in range(0, K // 32):
        pairs = tl.load(weight_tile)  # [16, BLOCK_N]
        first, second = (pairs & 15).to(tl.int8), (pairs >> 4).to(tl.int8)
        dots = tl.dot(tl.load(x_tile), first, out_dtype=tl.int32)
        dots = tl.dot(tl.load(x_tile + 16), second, dots, out_dtype=tl.int32)
        if x_low is not None:
            dots = tl.dot(tl.load(low_tile), first, dots << 8, out_dtype=tl.int32)
            dots = tl.dot(tl.load(low_tile + 16), second, dots, out_dtype=tl.int32)
            low_tile += 32
        sums += dots.to(tl.float32) * (tl.load(row_scales)[:, None] * tl.load(group_scales).to(tl.float32)[None, :])
        sums += tl.load(row_sums)[:, None] * tl.load(group_minimums).to(tl.float32)[None, :]
        x_tile += 32
        weight_tile += 256
        group_scales += 16
        group_minimums += 16
        row_scales += 1
        row_sums += 1
    return sums


@triton.jit
def _q8_sums(x, x_scales, x_low, weight, scales, row, tile, lane, K, SHAPE: tl.constexpr):
    """The same, of 8-bit weights."""
    k = tl.arange(0, 32)
    x_tile = x + row[:, None] * K + k[None, :]  # [BLOCK_M, 32]
    if x_low is not None:
        low_tile = x_low + row[:, None] * K + k[None, :]
    weight_tile = weight + tile[None, :] * (K * 16) + (k // 4 * 64 + k % 4)[:, None] + (lane * 4)[None, :]
    group_scales = scales + tile * (K // 2) + lane
    row_scales = x_scales + row * (K // 32)
    sums = tl.zeros(SHAPE, tl.float32)
    for _ in range(0, K // 32):
        values = tl.load(weight_tile)
        dots = tl.dot(tl.load(x_tile), values, out_dtype=tl.int32)
        if x_low is not None:
            dots = tl.dot(tl.load(low_tile), values, dots << 8, out_dtype=tl.int32)
            low_tile += 32
        sums += dots.to(tl.float32) * (tl.load(row_scales)[:, None] * tl.load(group_scales).to(tl.float32)[None, :])
        x_tile += 32
        weight_tile += 512
        group_scales += 16
        row_scales += 1
    return sums


@triton.jit
def _int8_products(
    x, x_scales, x_sums, x_low, weight, scales, minimums, bias, row, n, first, N, K, SHAPE: tl.constexpr
):  # fmt: skip
    """x W.T + bias of the rows `row` and the features first + n, of which there are N, `first` being a tile's first."""
    tile, lane = first // 16 + _tile(n, N), n % 16
    if minimums is None:
        sums = _q8_sums(x, x_scales, x_low, weight, scales, row, tile, lane, K, SHAPE)
    else:
        sums = _q4_sums(x, x_scales, x_sums, x_low, weight, scales, minimums, row, tile, lane, K, SHAPE)
    return _with_bias(sums, bias, first, n, N)


@triton.jit(do_not_specialize=["rows"])
def _int8_kernel(
    y, x, x_scales, x_sums, x_low, weight, scales, minimums, bias, rows, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = tl.minimum(m, rows - 1).to(tl.int64)  # rows past the end read the last one: cheaper than a mask in the loop
    sums = _int8_products(
        x, x_scales, x_sums, x_low, weight, scales, minimums, bias, row, n, 0, N, K, [BLOCK_M, BLOCK_N]
    )
    _store(y, sums, m, n, rows, N)


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up of float32 tiles, see activation.py."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["rows"])
def _gated_kernel(
    out, out_scales, out_sums, x, x_scales, x_sums, x_low, weight, scales, minimums, bias, rows, I, K,  # noqa: E741
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one group of 32 features of silu(gate) * up, each first as sums and then as int8.

    Programs of the same rows follow each other: they write to the same cache lines, a few bytes each.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = tl.program_id(0) * 32 + tl.arange(0, 32)
    row = tl.minimum(m, rows - 1).to(tl.int64)
    gate = _int8_products(x, x_scales, x_sums, x_low, weight, scales, minimums, bias, row, n, 0, I, K, [BLOCK_M, 32])
    up = _int8_products(x, x_scales, x_sums, x_low, weight, scales, minimums, bias, row, n, I, I, K, [BLOCK_M, 32])
    activated = swiglu(gate, up)
    store_groups(out, out_scales, out_sums, None, activated, row * (I // 32) + tl.program_id(0), m < rows)


@triton.jit(do_not_specialize=["rows"])
def _float_kernel(
    y, x, words, scales, minimums, bias, rows, N, K,
    OPERAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The weights become floats on their way to `tl.dot`; their bytes are read as 32-bit words of 4 or 2 * 4 values."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, 32)
    WORDS: tl.constexpr = 8 if minimums is None else 4  # of a feature in a group
    x_tile = x + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_M, 32]
    word_tile = words + _tile(n, N)[None, :] * (K // 2 * WORDS) + (n % 16)[None, :]
    word_tile += (k // 4 % WORDS * 16)[:, None]  # [32, BLOCK_N]
    group_scales = scales + _tile(n, N) * (K // 2) + n % 16
    if minimums is not None:
        group_minimums = minimums + _tile(n, N) * (K // 2) + n % 16
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K // 32):
        scale = tl.load(group_scales).to(tl.float32)[None, :]
        if minimums is None:  # shift the byte to the top, then down again with its sign
            w = ((tl.load(word_tile) << (24 - k % 4 * 8)[:, None]) >> 24).to(tl.float32) * scale
        else:
            nibbles = (tl.load(word_tile) >> (k % 4 * 8 + k // 16 * 4)[:, None]) & 15
            w = nibbles.to(tl.float32) * scale + tl.load(group_minimums).to(tl.float32)[None, :]
            group_minimums += 16
        sums = tl.dot(tl.load(x_tile).to(OPERAND), w.to(OPERAND), sums, input_precision="ieee")
        x_tile += 32
        word_tile += 16 * WORDS
        group_scales += 16
    _store(y, _with_bias(sums, bias, 0, n, N), m, n, rows, N)


@triton.jit
def _tile(n, N):
    """The packed tile of output features n; those past the end, which are not stored, are read from the last one."""
    return tl.minimum(n // 16, (N - 1) // 16).to(tl.int64)


@triton.jit
def _with_bias(sums, bias, first, n, N):
    """sums + bias of the features first + n, of which there are N."""
    if bias is not None:
        sums += tl.load(bias + first + n, mask=n < N, other=0.0)[None, :]
    return sums


@triton.jit
def _store(y, sums, m, n, rows, N):
    y_tile = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < N)[None, :])


def tiles(target: Target, rows: int, int8_activations: bool) -> dict[str, int]:
    """Tile rule.

    On a CPU a program of a few rows has one tile of weights, which it reads as they lie in memory; of many rows two,
    which share what a program costs besides its products (512 rows, K = 576: 276 GOP/s, with 16 x 16 tiles 250). Rows
    that don't exist are not computed: registers.py has blocks of 6 rows in tiles of 64, of 11 in those of 32, and of 8.
    """
    if target.is_cpu:
        if rows <= 8 or 11 < rows <= 16:
            block_m = next_power_of_2(rows)
        else:
            block_m = 32 if rows <= 32 else 64
        return {"BLOCK_M": block_m, "BLOCK_N": 2 * TILE if int8_activations and block_m > 16 else TILE}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}  # tensor cores: one shape for every batch, see linear.py


def quantised_linear(out: Any, x: Any, weight: QuantisedWeight) -> None:
    """out = x @ W.T (+ bias).

    Args:
        out: [T, out_features], any float type.
        x: [T, in_features], `QuantisedRows` or any float type.
        weight: as packed by `pack_blocks` or `pack_floats`.
    """
    out, rows = view(out), x.shape[0]
    expect("out", out, (rows, weight.out_features), *FLOATS)
    if rows == 0:
        return
    here = target()
    rule = tiles(here, rows, isinstance(x, QuantisedRows))
    grid = (cdiv(rows, rule["BLOCK_M"]), cdiv(weight.out_features, rule["BLOCK_N"]))
    sizes = (rows, weight.out_features, weight.in_features)
    if not isinstance(x, QuantisedRows):
        x = view(x)
        expect("x", x, (rows, weight.in_features), *FLOATS)
        packed = (_words(weight.data), *weight.tensors[1:])
        launch(_float_kernel, grid, out, x, *packed, *sizes, OPERAND=operand_dtype(here, x), **rule)
        return
    expect("x", x.values, (rows, weight.in_features), "int8")
    launch(_int8_kernel, grid[::-1], out, *x.tensors, *weight.tensors, *sizes, **rule)


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
    if rows == 0:
        return
    rule = tiles(target(), rows, int8_activations=True)
    grid = (groups(width), cdiv(rows, rule["BLOCK_M"]))
    sizes = (rows, width, weight.in_features)
    written = (out.values, out.scales, out.sums)
    launch(_gated_kernel, grid, *written, *x.tensors, *weight.tensors, *sizes, BLOCK_M=rule["BLOCK_M"])


def _words(data: TensorView) -> TensorView:
    """Packed bytes as 32-bit words: [N/16, K/32, 4 or 8, 16]."""
    shape = data.shape[:-1]
    strides = tuple(stride // 4 for stride in data.strides[:-1])
    return TensorView(data.pointer, "int32", shape, strides, data.owner)


# Packing


@triton.jit(do_not_specialize=["count", "row_offset"])
def _pack_kernel(
    data, scales, minimums, blocks, count, row_offset, GROUPS,
    BLOCK: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """One tile and group: `blocks` is [count, GROUPS, BLOCK] 16-bit words, of which HEAD hold scales and minimums."""
    n = (row_offset // 16 + tl.program_id(0)) * 16 + tl.arange(0, 16)  # [16] rows of W
    group = tl.program_id(1)
    inside = (n >= row_offset) & (n < row_offset + count)
    block = blocks + ((n - row_offset).to(tl.int64) * GROUPS + group) * BLOCK  # [16]
    tile = (n // 16).to(tl.int64) * GROUPS + group
    scale = tl.load(block, mask=inside, other=0).to(tl.float16, bitcast=True)
    tl.store(scales + tile * 16 + n % 16, scale, mask=inside)
    if minimums is not None:
        if HEAD == 2:
            minimum = tl.load(block + 1, mask=inside, other=0).to(tl.float16, bitcast=True)
        else:  # Q4_0: d (q - 8)
            minimum = (scale.to(tl.float32) * -8.0).to(tl.float16)
        tl.store(minimums + tile * 16 + n % 16, minimum, mask=inside)
    i = tl.arange(0, BLOCK - HEAD)  # [8 or 16] pairs of bytes: half i % 2 of word r = i // 2
    pairs = tl.load(block[:, None] + HEAD + i[None, :], mask=inside[:, None])
    place = tile[:, None] * (16 * (BLOCK - HEAD)) + (i // 2 * 32 + i % 2)[None, :] + (n % 16 * 2)[:, None]
    tl.store(data + place, pairs, mask=inside[:, None])


def pack_blocks(weight: QuantisedWeight, blocks: Any, storage: str, row_offset: int = 0) -> None:
    """Lay out rows [row_offset, row_offset + n) of a weight, given as blocks of a GGUF file, without changing a value.

    A fused weight (q, k and v, say) is packed by one call per part; other rows keep their values.

    Args:
        weight: q4 for blocks of Q4_0 or Q4_1, q8 for Q8_0.
        blocks: [n, K/32, halfwords of a block] uint16.
        storage: "Q4_0", "Q4_1" or "Q8_0".
    """
    blocks = view(blocks)
    count, size = blocks.shape[0], BLOCK_HALFWORDS[storage]
    expect(f"{storage} blocks", blocks, (count, groups(weight.in_features), size), "uint16")
    if (storage == "Q8_0") != (weight.kind == "q8"):
        raise ValueError(f"blocks of {storage} cannot be packed as {weight.kind}")
    packed = (_halfwords(weight.data), weight.scales, weight.minimums)
    sizes = (count, row_offset, groups(weight.in_features))
    head = 2 if storage == "Q4_1" else 1
    launch(_pack_kernel, _packing_grid(weight, count, row_offset), *packed, blocks, *sizes, BLOCK=size, HEAD=head)


@triton.jit(do_not_specialize=["count", "row_offset"])
def _pack_floats_kernel(data, scales, minimums, rows, count, row_offset, GROUPS):
    """One tile and group, its first and its second half side by side: the nibbles of a byte come from both."""
    n = (row_offset // 16 + tl.program_id(0)) * 16 + tl.arange(0, 16)  # [16] rows of W
    group = tl.program_id(1)
    inside = (n >= row_offset) & (n < row_offset + count)
    k = tl.arange(0, 16)
    elements = rows + ((n - row_offset).to(tl.int64) * GROUPS + group)[:, None] * 32 + k[None, :]  # [16, 16]
    first = tl.load(elements, mask=inside[:, None], other=0.0).to(tl.float32)
    second = tl.load(elements + 16, mask=inside[:, None], other=0.0).to(tl.float32)
    tile = (n // 16).to(tl.int64) * GROUPS + group
    place = data + tile[:, None] * (512 if minimums is None else 256) + (n % 16 * 4)[:, None]
    place += (k // 4 * 64 + k % 4)[None, :]
    if minimums is None:
        scale = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1)) / 127.0
        inverse = tl.where(scale == 0.0, 0.0, 1.0 / scale)[:, None]
        tl.store(place, (first * inverse + tl.where(first < 0, -0.5, 0.5)).to(tl.int8), mask=inside[:, None])
        tl.store(place + 256, (second * inverse + tl.where(second < 0, -0.5, 0.5)).to(tl.int8), mask=inside[:, None])
    else:
        least = tl.minimum(tl.min(first, axis=1), tl.min(second, axis=1))
        scale = (tl.maximum(tl.max(first, axis=1), tl.max(second, axis=1)) - least) / 15.0
        inverse = tl.where(scale == 0.0, 0.0, 1.0 / scale)[:, None]
        low = tl.minimum(((first - least[:, None]) * inverse + 0.5).to(tl.int32), 15)
        high = tl.minimum(((second - least[:, None]) * inverse + 0.5).to(tl.int32), 15)
        tl.store(place, (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
        tl.store(minimums + tile * 16 + n % 16, least.to(tl.float16), mask=inside)
    tl.store(scales + tile * 16 + n % 16, scale.to(tl.float16), mask=inside)


def pack_floats(weight: QuantisedWeight, rows: Any, row_offset: int = 0) -> None:
    """Quantise rows [row_offset, row_offset + n) of a weight and lay them out; other rows keep their values.

    Scales, minimums and rounding are those of GGUF's Q4_1 for q4, of Q8_0 for q8.

    Args:
        weight: q4 or q8.
        rows: [n, K], any float type.
    """
    rows = view(rows)
    count = rows.shape[0]
    expect("rows", rows, (count, weight.in_features), *FLOATS)
    packed, sizes = (weight.data, weight.scales, weight.minimums), (count, row_offset, groups(weight.in_features))
    launch(_pack_floats_kernel, _packing_grid(weight, count, row_offset), *packed, rows, *sizes)


def _packing_grid(weight: QuantisedWeight, count: int, row_offset: int) -> tuple[int, int]:
    """A program for each tile and group that rows [row_offset, row_offset + count) touch."""
    if not 0 <= row_offset <= weight.out_features - count:
        raise ValueError(f"rows {row_offset} to {row_offset + count} of a weight with {weight.out_features} rows")
    return (cdiv(row_offset % TILE + count, TILE) if count else 0, groups(weight.in_features))


def _halfwords(data: TensorView) -> TensorView:
    shape = (*data.shape[:-1], 2)
    strides = (*(stride // 2 for stride in data.strides[:-1]), 1)
    return TensorView(data.pointer, "uint16", shape, strides, data.owner)


# References


def pack_reference(q: np.ndarray) -> np.ndarray:
    """The layout's specification: q [N, K] -> data, q4 if it is uint8 and q8 if it is int8; zeros as padding."""
    rows, width = q.shape
    padded = np.zeros((cdiv(rows, TILE) * TILE, width), q.dtype)
    padded[:rows] = q
    words = padded.reshape(-1, TILE, width // GROUP, 8, 4).transpose(0, 2, 3, 1, 4)  # [N/16, K/32, 8, 16, 4]
    return words if q.dtype == np.int8 else words[:, :, :4] | words[:, :, 4:] << 4


def per_group_reference(values: np.ndarray) -> np.ndarray:
    """Scales or minimums [N, K/32] -> [N/16, K/32, 16], zeros as padding."""
    padded = np.zeros((cdiv(len(values), TILE) * TILE, values.shape[1]), values.dtype)
    padded[: len(values)] = values
    return padded.reshape(-1, TILE, values.shape[1]).transpose(0, 2, 1)


def dequantise_reference(q: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None = None) -> np.ndarray:
    """[N, K] integers with [N, K/32] scales and minimums, as float64: weights, or activations."""
    least = 0.0 if minimums is None else np.repeat(minimums.astype(np.float64), GROUP, axis=1)
    return q * np.repeat(scales.astype(np.float64), GROUP, axis=1) + least


def quantise_reference(x: np.ndarray, most: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """The specification of `quantise`: integers up to `most`, 127 * 256 for 16 bits, and float64 scales."""
    grouped = x.astype(np.float64).reshape(len(x), -1, GROUP)
    largest = np.abs(grouped).max(axis=2)
    factors = np.divide(most, largest, out=np.zeros_like(largest), where=largest > 1e-30)
    scaled = grouped * factors[..., None]
    return np.rint(scaled).astype(np.int16).reshape(x.shape), largest / most


def quantised_linear_reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The specification, in float64; x [T, K] and weight [N, K] are what `dequantise_reference` gives."""
    y = x @ weight.T
    return y if bias is None else y + bias
