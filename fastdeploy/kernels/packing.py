"""From rows of a file to packed weights, without changing a value; or from floats, quantised to Q4_1 or Q8_0.

A file has the bits of a row's integers somewhere in its blocks. `Layout` says where, for all formats in the same way:
`Bits` of so many weights in a run lie in as many bytes, side by side, and some runs share these bytes:

    Bits(offset 4, run 16, share 2, width 4)       Q4_1: a block of 32 weights, its integers from byte 4 on

        byte       4      5      ...   19          the low nibbles are weights 0 ... 15, the high ones 16 ... 31
        weights    0, 16  1, 17  ...   15, 31

    Bits(offset 16, run 32, share 8, width 1)      Q5_K: the fifth bits, in 32 bytes for 256 weights
    Bits(offset 0, run 1, share 2, width 4)        two weights that follow each other in a byte, as in AutoGPTQ's words

One program packs one group of 16 rows. Cost: the bytes are read and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.formats import FORMATS, GROUP, TILE, QuantisedWeight, groups
from fastdeploy.kernels.launch import FLOATS, ITEM_SIZES, TensorView, cdiv, expect, launch, next_power_of_2, view


class Bits(NamedTuple):
    """Where some bits of all weights of a block lie: in its bytes from `offset` on. See above."""

    offset: int
    run: int
    share: int
    width: int


@dataclass(frozen=True)
class Layout:
    """How a file stores the integers of a row.

    weights, size: of a block, its size in bytes, scales and all.
    low, high: the lower four bits (or all eight), and the others.
    flipped: integers of 8 bits are stored with 128 added.
    """

    weights: int
    size: int
    low: Bits
    high: Bits | None = None
    flipped: bool = False

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights. ValueError if they are no whole number of blocks."""
        if width % self.weights:
            raise ValueError(f"rows of {width} weights are no whole blocks of {self.weights}")
        return width // self.weights * self.size


BYTES = Layout(1, 1, Bits(0, 1, 1, 8))  # a byte for each integer
NIBBLES = Layout(1, 1, Bits(0, 1, 1, 4))  # the same for integers of 4 bits
PAIRS = Layout(2, 1, Bits(0, 1, 2, 4))  # two integers in a byte, the first in its lower half


class Codes(NamedTuple):
    """Some rows of a quantised matrix, as arrays.

    blocks: [n, bytes of a row] uint8, rows perhaps with gaps between them.
    scales, minimums: [n, K/span]; as `QuantisedWeight` has them, bfloat16 as uint16.  factors: [n, K/32, 1 or 2].
    """

    blocks: Any
    scales: Any
    minimums: Any = None
    factors: Any = None

    def finite(self) -> bool:
        """Whether all scales and minimums are numbers that make weights finite: integers and floats of 8 bits, zeros
        taken off, are less than 2^9, and so the others have to be less than 2^118."""
        return all(values is None or _finite(values) for values in (self.scales, self.minimums))

    def cut(self, columns: range, span: int, narrower: int) -> Codes:
        """Scales and what else there is of these weights alone, for spans of `narrower` instead of `span` weights."""

        def cut(values: np.ndarray | None, span: int, narrower: int) -> np.ndarray | None:
            if values is None:
                return None
            repeated = values if span == narrower else np.repeat(values, span // narrower, axis=1)
            return np.ascontiguousarray(repeated[:, columns.start // narrower : columns.stop // narrower])

        scales, minimums = (cut(values, span, narrower) for values in (self.scales, self.minimums))
        return Codes(self.blocks, scales, minimums, cut(self.factors, GROUP, GROUP))

    def moved(self, move: Callable[[np.ndarray], Any]) -> Codes:
        """The same on a device to which `move` brings an array."""
        return Codes(*(None if array is None else move(array) for array in self))


def _finite(values: np.ndarray) -> bool:
    if values.dtype == np.uint16:  # the bits of bfloat16
        return bool(((values & 0x7FFF) < (118 + 127) << 7).all())
    if values.dtype == np.float32:
        return bool((np.abs(values) < 2.0**118).all())  # not so for NaN
    return bool(np.isfinite(values).all())


@triton.jit
def _stored(blocks, i, inside, BLOCK: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr):
    """The bits of the weights i ... i + 15 of rows, as int32 [rows, 16]: `blocks` points to the rows' first bytes."""
    OFFSET: tl.constexpr = BITS[0]
    RUN: tl.constexpr = BITS[1]
    SHARE: tl.constexpr = BITS[2]
    WIDTH: tl.constexpr = BITS[3]
    j = tl.arange(0, 16)[None, :]
    if RUN % 16 == 0 or SHARE == 1:  # bytes side by side, their bits in the same place
        together, each = i, j
    else:
        together, each = i + j, j * 0
    within = together % BLOCK
    byte = together // BLOCK * SIZE + OFFSET + within // (RUN * SHARE) * RUN + within % RUN + each
    values = tl.load(blocks + byte, mask=inside, other=0).to(tl.int32)
    return (values >> (within // RUN % SHARE * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit(do_not_specialize=["count", "row_offset", "first"])
def _pack_kernel(
    data, high, blocks, count, row_offset, first, row_stride, GROUPS,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """The packed tile and group of a program; `first` is the first weight taken of each row."""
    n = (row_offset // 16 + tl.program_id(0)) * 16 + tl.arange(0, 16)  # [16] rows of W
    group = tl.program_id(1)
    inside = ((n >= row_offset) & (n < row_offset + count))[:, None]
    row = blocks + (n - row_offset).to(tl.int64)[:, None] * row_stride
    j = tl.arange(0, 16)  # [16] k within half a group
    i = first + group * 32
    tile = (n // 16).to(tl.int64) * GROUPS + group
    left = _stored(row, i, inside, BLOCK, SIZE, LOW)
    right = _stored(row, i + 16, inside, BLOCK, SIZE, LOW)
    in_tile = (j // 4 * 64 + j % 4)[None, :] + (n % 16 * 4)[:, None]
    if LOW[3] == 8:
        if FLIPPED:
            left, right = left ^ 128, right ^ 128
        place = data + tile[:, None] * 512 + in_tile
        tl.store(place, left.to(tl.int8), mask=inside)
        tl.store(place + 256, right.to(tl.int8), mask=inside)
    else:
        tl.store(data + tile[:, None] * 256 + in_tile, (left | (right << 4)).to(tl.uint8), mask=inside)
    if HIGH is not None:
        left = _stored(row, i, inside, BLOCK, SIZE, HIGH)
        right = _stored(row, i + 16, inside, BLOCK, SIZE, HIGH)
        byte = (n % 16 * 4)[:, None] + tl.arange(0, 4)[None, :]
        if HIGH[3] == 1:
            together = (left | (right << 4)) << (j // 4)[None, :]
            bits = tl.sum(tl.reshape(together, [16, 4, 4]), axis=1)
            tl.store(high + tile[:, None] * 64 + byte, bits.to(tl.uint8), mask=inside)
        else:
            shift = (j // 4 * 2)[None, :]
            bits = tl.sum(tl.reshape(left << shift, [16, 4, 4]), axis=1)
            tl.store(high + tile[:, None] * 128 + byte, bits.to(tl.uint8), mask=inside)
            bits = tl.sum(tl.reshape(right << shift, [16, 4, 4]), axis=1)
            tl.store(high + tile[:, None] * 128 + 64 + byte, bits.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["count", "row_offset"])
def _spread_kernel(out, values, count, row_offset, row_stride, WIDTH, BLOCK: tl.constexpr):
    """out[n // 16, i, n % 16] = values[n - row_offset, i]: of 16 rows."""
    n = (row_offset // 16 + tl.program_id(0)) * 16 + tl.arange(0, 16)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ((n >= row_offset) & (n < row_offset + count))[:, None] & (i < WIDTH)[None, :]
    taken = tl.load(values + (n - row_offset).to(tl.int64)[:, None] * row_stride + i[None, :], mask=inside, other=0)
    tl.store(out + ((n // 16).to(tl.int64)[:, None] * WIDTH + i[None, :]) * 16 + (n % 16)[:, None], taken, mask=inside)


def pack_codes(weight: QuantisedWeight, codes: Codes, layout: Layout, row_offset: int = 0, first: int = 0) -> None:
    """Lay out rows [row_offset, row_offset + n) of a weight; other rows keep their values.

    A fused weight (q, k and v, say) is packed by one call per part.

    Args:
        weight: receives `in_features` weights of each row.
        codes: n rows, DLPack tensors on the device. The scales and what else there is for these weights alone.
        layout: of the blocks.
        first: the first weight to take of each row of the blocks, a multiple of 32.
    """
    blocks, per_row = view(codes.blocks), groups(weight.in_features)
    count = blocks.shape[0]
    width = first + weight.in_features
    needed = layout.row_bytes(cdiv(width, layout.weights) * layout.weights)
    if first % GROUP or blocks.shape[1] < needed:
        raise ValueError(f"weights {first} to {width} of rows of {blocks.shape[1]} bytes, which take {needed}")
    expect("blocks", blocks, blocks.shape, "uint8", row_gaps=True)
    grid = _packing_grid(weight, count, row_offset)
    sizes = (count, row_offset, first, blocks.strides[0], per_row)
    known = {"BLOCK": layout.weights, "SIZE": layout.size, "LOW": tuple(layout.low)}
    known |= {"HIGH": layout.high and tuple(layout.high), "FLIPPED": layout.flipped}
    launch(_pack_kernel, grid, weight.data, weight.high, blocks, *sizes, **known)
    for plane, values in ((weight.scales, codes.scales), (weight.minimums, codes.minimums)):
        _spread(plane, values, count, row_offset)
    _spread(weight.factors, codes.factors, count, row_offset)


def _spread(plane: TensorView | None, values: Any, count: int, row_offset: int) -> None:
    """Lay out what `n` rows have for each span, [n, ...], in a plane of the weight, [N/16, ..., 16]."""
    if plane is None:
        return
    bits = f"uint{8 * ITEM_SIZES[plane.dtype]}"
    values, plane = view(values), view(plane, bits)
    values = view(values, bits)
    expect("scales, minimums or factors", values, (count, *plane.shape[1:-1]))
    width = int(np.prod(plane.shape[1:-1]))
    block = min(next_power_of_2(width), 64)
    grid = (cdiv(row_offset % TILE + count, TILE) if count else 0, cdiv(width, block))
    launch(_spread_kernel, grid, plane, values, count, row_offset, width, width, BLOCK=block)


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

    Scales, minimums and rounding are those of GGUF.

    Args:
        weight: in Q4_1 or Q8_0.
        rows: [n, K], any float type.
    """
    rows = view(rows)
    count = rows.shape[0]
    expect("rows", rows, (count, weight.in_features), *FLOATS)
    if weight.format not in (FORMATS["Q4_1"], FORMATS["Q8_0"]):
        raise ValueError(f"floats become Q4_1 or Q8_0, not {weight.format.name}")
    packed, sizes = (weight.data, weight.scales, weight.minimums), (count, row_offset, groups(weight.in_features))
    launch(_pack_floats_kernel, _packing_grid(weight, count, row_offset), *packed, rows, *sizes)


def _packing_grid(weight: QuantisedWeight, count: int, row_offset: int) -> tuple[int, int]:
    """A program for each tile and group that rows [row_offset, row_offset + count) touch."""
    if not 0 <= row_offset <= weight.out_features - count:
        raise ValueError(f"rows {row_offset} to {row_offset + count} of a weight with {weight.out_features} rows")
    return (cdiv(row_offset % TILE + count, TILE) if count else 0, groups(weight.in_features))
