"""How quantised weights lie in memory: one layout, of which every format is a row in a table.

Weights come in groups of 32 along k. An integer of 4, 5, 6 or 8 bits stands for each, and for all formats

    W[n, k] = scale[n, g] * value(integer[n, k]) + minimum[n, g]                                  g = k // 32

What differs is in `Format`. As GGUF names them, and in bits a weight:

                 bits  value          scale                        minimum
    Q4_0   4.5   4     q              d                            -8 d
    Q4_1   5     4     q              d                            m
    Q5_0   5.5   5     q              d                            -16 d
    Q5_1   6     5     q              d                            m
    Q8_0   8.5   8     q, signed      d
    Q4_K   4.6   4     q              d / 256 weights * 8 bits     m / 256 weights * 8 bits
    Q5_K   5.6   5     q              the same                     the same
    Q6_K   6.6   6     q - 32         d / 256 weights * 8 bits, one for each half of a group
    IQ4_NL 4.5   4     table[q]       d
    IQ4_XS 4.3   4     table[q]       d / 256 weights * 8 bits
    MXFP4  4.5   4     table[q]       d, a power of two
    FP8    8.3   8     float8         d / 128 weights, float32     (e4m3)
    zero   4.2   4     q              d / 128 weights              -zero d, an integer zero point as GPTQ and AWQ have

d and m are floats of 16 bits unless said otherwise. A scale for several groups times a small integer for each
("factor") is exact in float32, so a weight is what its file says, rounded once.

Packed weights: tiles of 16 output features, in which four values that follow each other along k are one 32-bit word,
because that is what a CPU multiplies and adds at once (x86: vpdpbusd). N is padded to full tiles, whatever they hold.

    data      [N/16, K/32, 4, 16, 4] uint8   byte (g, r, n, b) = q[n, 32g + 4r + b]  |  q[n, 32g + 16 + 4r + b] << 4

        | r = 0: word of n = 0 | n = 1 | ... | n = 15 |  r = 1 ...          64 bytes, one vector, for each r
           |  b = 0: q[0,0] q[0,16]  |  b = 1: q[0,1] q[0,17]  | ...        the two nibbles of a byte: GGUF's own pairs

    data      [N/16, K/32, 8, 16, 4] int8    of 8 bits: byte (g, r, n, b) = q[n, 32g + 4r + b]
    high      [N/16, K/32, 1, 16, 4] uint8   the fifth bits: bit r of byte (g, n, b) is that of q[n, 32g + 4r + b],
                                             bit 4 + r that of q[n, 32g + 16 + 4r + b]
              [N/16, K/32, 2, 16, 4] uint8   or two: bits 2r, 2r + 1 of byte (g, h, n, b), of q[n, 32g + 16h + 4r + b]
    scales    [N/16, K/span, 16]             float16, bfloat16 or float32
    minimums  [N/16, K/span, 16]             of the same type, or integers: zero points
    factors   [N/16, K/32, 1 or 2, 16] int8 or uint8    of the scale, and of the minimum or of the second half's scale
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.launch import ITEM_SIZES, TensorView, cdiv, expect

GROUP = 32  # weights, or activations, that share a scale: what GGUF's formats have
TILE = 16  # output features side by side: a vector of 32-bit sums
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL and IQ4_XS
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice those of e2m1: whole numbers


@dataclass(frozen=True)
class Format:
    """How the weights of a matrix are stored, see above.

    name: for people.
    bits: of the integer that stands for a weight: 4, 5, 6 or 8.
    offset: zero of the integers. It makes the minimum -offset * scale or, with a scale for each half of a group, is
        subtracted at once.
    table: what the 16 integers stand for; () for themselves.
    span: weights along k that share an element of `scales` and `minimums`: a multiple of 32.
    scale, minimum, factor: dtypes; None where a format has no such thing.
    factors: how many a group has: 0, 1 or 2.
    floating: the integer is the bits of a float8 (e4m3).
    """

    name: str
    bits: int
    offset: int = 0
    table: tuple[int, ...] = ()
    span: int = GROUP
    scale: str = "float16"
    minimum: str | None = None
    factors: int = 0
    factor: str | None = None
    floating: bool = False

    @property
    def halves(self) -> bool:
        """Whether each half of a group has a scale of its own."""
        return self.factors == 2 and self.minimum is None

    @property
    def takes_integers(self) -> bool:
        """Whether activations may be integers: not where the weights are floats of their own."""
        return not self.floating

    @property
    def constants(self) -> Constants:
        """What kernels have to know at compile time: see `Constants`."""
        shifted = self.minimum is not None or (self.offset != 0 and not self.halves)
        span = self.span // GROUP
        return Constants(self.bits, self.offset, span, self.halves, self.floating, self.factors, shifted)

    def narrowed(self, start: int, stop: int) -> Format:
        """The same with spans short enough to begin at `start` and end at `stop`. ValueError if they cut groups."""
        span = gcd(self.span, start, stop)
        if span % GROUP:
            raise ValueError(f"{self.name}: parts from {start} to {stop} cut groups of {GROUP} weights")
        return replace(self, span=span)

    def fields(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of the tensors of a weight, by name. ValueError if the width is no multiple of the span."""
        if in_features % self.span:
            raise ValueError(f"rows of {in_features} elements cannot be quantised in groups of {self.span}")
        tiles, per_row = cdiv(out_features, TILE), in_features // GROUP
        per_span = (tiles, in_features // self.span, TILE)
        words = 8 if self.bits == 8 else 4
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        found["data"] = ((tiles, per_row, words, TILE, 4), "int8" if self.bits == 8 else "uint8")
        if 4 < self.bits < 8:
            found["high"] = ((tiles, per_row, self.bits - 4, TILE, 4), "uint8")
        found["scales"] = (per_span, self.scale)
        if self.minimum is not None:
            found["minimums"] = (per_span, self.minimum)
        if self.factor is not None:
            found["factors"] = ((tiles, per_row, self.factors, TILE), self.factor)
        return found

    @property
    def bits_per_weight(self) -> float:
        """In memory, all of its tensors counted, padding not."""
        fields = self.fields(TILE, self.span).values()
        return 8 * sum(float(np.prod(shape)) * ITEM_SIZES[dtype] for shape, dtype in fields) / (TILE * self.span)


class Constants(NamedTuple):
    """What kernels know of a format at compile time; the rest they see from the tensors that there are."""

    bits: int
    offset: int
    span: int  # in groups
    halves: bool  # each half of a group has a scale
    floating: bool
    factors: int
    shifted: bool  # there is a minimum to add


_Q4_K = Format("Q4_K", 4, span=256, minimum="float16", factors=2, factor="uint8")
FORMATS = {
    row.name: row
    for row in (
        Format("Q4_0", 4, offset=8),
        Format("Q4_1", 4, minimum="float16"),
        Format("Q5_0", 5, offset=16),
        Format("Q5_1", 5, minimum="float16"),
        Format("Q8_0", 8),
        _Q4_K,
        replace(_Q4_K, name="Q5_K", bits=5),
        Format("Q6_K", 6, offset=32, span=256, factors=2, factor="int8"),
        Format("IQ4_NL", 4, table=IQ4_VALUES),
        Format("IQ4_XS", 4, table=IQ4_VALUES, span=256, factors=1, factor="int8"),
        Format("MXFP4", 4, table=FP4_VALUES, scale="bfloat16"),
        Format("FP8", 8, span=128, scale="float32", floating=True),
    )
}


@dataclass(frozen=True)
class QuantisedWeight:
    """The weight of y = x @ W.T (+ bias), W being [out_features, in_features].

    data ... factors: see `Format.fields`, None for what the format lacks.  bias: [out_features] float32 or None.
    table: [16] int8, see `table_of`, or None.
    wide_inputs: activations that are quantised for this layer have low bytes, see `QuantisedRows`.
    order: [in_features] int32, of the activations, before they are quantised: the weight's column k is for element
        order[k] of x. None for as it is. Whoever launches brings x into this order.
    """

    format: Format
    out_features: int
    in_features: int
    data: TensorView
    scales: TensorView
    high: TensorView | None = None
    minimums: TensorView | None = None
    factors: TensorView | None = None
    table: TensorView | None = None
    bias: TensorView | None = None
    wide_inputs: bool = False
    order: TensorView | None = None

    def __post_init__(self) -> None:
        for name, (shape, dtype) in self.format.fields(self.out_features, self.in_features).items():
            expect(f"weight {name}", getattr(self, name), shape, dtype)
        if self.bias is not None:
            expect("bias", self.bias, (self.out_features,), "float32")
        if self.order is not None:
            expect("order", self.order, (self.in_features,), "int32")
        if (self.table is not None) != bool(self.format.table):
            raise ValueError(f"{self.format.name} has {'a' if self.format.table else 'no'} table of values")

    @property
    def planes(self) -> tuple[TensorView | None, ...]:
        """As kernels take them: data, high, scales, minimums, factors, table."""
        return self.data, self.high, self.scales, self.minimums, self.factors, self.table

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes if plane is not None)

    @property
    def takes_integers(self) -> bool:
        """Whether activations may be integers."""
        return self.format.takes_integers

    @property
    def ordered(self) -> bool:
        """Whether activations have to be brought into an order."""
        return self.order is not None


def groups(width: int) -> int:
    """Groups in a row of `width` elements. ValueError if it is no whole number of them."""
    if width % GROUP:
        raise ValueError(f"rows of {width} elements cannot be quantised in groups of {GROUP}")
    return width // GROUP


def words(data: TensorView | None) -> TensorView | None:
    """Packed bytes as 32-bit words: the last dimension goes."""
    if data is None:
        return None
    strides = tuple(stride // 4 for stride in data.strides[:-1])
    return TensorView(data.pointer, "int32", data.shape[:-1], strides, data.owner)


@triton.jit
def group_scale(scales, factors, place, group, half, groups, lane, FORMAT: tl.constexpr):
    """The scale of the groups `group` of features `lane` in the packed tiles `place`, in float32.

    half: 0 or 1, of the group, where each has a scale.  groups: of a row.
    """
    SPAN: tl.constexpr = FORMAT[2]
    scale = tl.load(scales + (place * (groups // SPAN) + group // SPAN) * 16 + lane).to(tl.float32)
    if factors is not None:
        row = place * groups + group
        COUNT: tl.constexpr = FORMAT[5]
        scale *= tl.load(factors + (row * COUNT + (half if FORMAT[3] else 0)) * 16 + lane).to(tl.float32)
    return scale


@triton.jit
def group_minimum(scale, minimums, factors, place, group, groups, lane, FORMAT: tl.constexpr):
    """The minimum that goes with this scale, where the format has one."""
    if minimums is None:
        minimum = scale * -FORMAT[1]
    else:
        SPAN: tl.constexpr = FORMAT[2]
        minimum = tl.load(minimums + (place * (groups // SPAN) + group // SPAN) * 16 + lane).to(tl.float32)
        if factors is not None:
            minimum *= tl.load(factors + ((place * groups + group) * 2 + 1) * 16 + lane).to(tl.float32)
        elif minimums.dtype.element_ty.is_int():
            minimum *= -scale
    return minimum


@triton.jit
def weight_values(planes, place, group, k, groups, lane, FORMAT: tl.constexpr):
    """W as float32: feature `lane` of the packed tile `place`, element `k`, 0 to 31, of `group`, all that broadcast.

    planes: see `QuantisedWeight`; data and high as 32-bit words.
    """
    BITS: tl.constexpr = FORMAT[0]
    OFFSET: tl.constexpr = FORMAT[1]
    HALVES: tl.constexpr = FORMAT[3]
    FLOATING: tl.constexpr = FORMAT[4]
    data, high, scales, minimums, factors, table = planes
    row = place * groups + group
    scale = group_scale(scales, factors, place, group, k // 16, groups, lane, FORMAT)
    if BITS == 8:
        word = tl.load(data + row * 128 + k // 4 * 16 + lane)
        if FLOATING:
            values = _from_e4m3((word >> (k % 4 * 8)) & 255)
        else:  # shift the byte to the top, then down again with its sign
            values = ((word << (24 - k % 4 * 8)) >> 24).to(tl.float32)
    else:
        word = tl.load(data + row * 64 + k // 4 % 4 * 16 + lane)
        integers = (word >> (k % 4 * 8 + k // 16 * 4)) & 15
        if BITS == 5:
            extra = tl.load(high + row * 16 + lane + k // 4 * 0)
            integers |= ((extra >> (k % 4 * 8 + k // 16 * 4 + k // 4 % 4)) & 1) << 4
        if BITS == 6:
            extra = tl.load(high + row * 32 + k // 16 * 16 + lane)
            integers |= ((extra >> (k % 4 * 8 + k // 4 % 4 * 2)) & 3) << 4
        if HALVES:
            integers -= OFFSET
        if table is not None:
            values = tl.load(table + integers).to(tl.float32)
        else:
            values = integers.to(tl.float32)
    values *= scale
    if FORMAT[6]:
        values += group_minimum(scale, minimums, factors, place, group, groups, lane, FORMAT)
    return values


@triton.jit
def _from_e4m3(byte):
    """The numbers of float8 codes in int32, none of them NaN: any processor can do it, subnormals included."""
    magnitude = byte & 127
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)  # a float32's exponent is 120 more
    values = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    return tl.where(byte > 127, -values, values)


@triton.jit
def packed_tile(n, N):
    """The packed tile of output features n; those past the end, which are not stored, are read from the last one."""
    return tl.minimum(n // 16, (N - 1) // 16).to(tl.int64)


def table_of(format: Format) -> np.ndarray | None:
    """The values of a format's table, [16] int8, or None."""
    return np.array(format.table, np.int8) if format.table else None


def e4m3_values() -> np.ndarray:
    """What the codes of float8 (e4m3) stand for, [256] float32; NaN, which no weight is, as 480."""
    codes = np.arange(256, dtype=np.uint16)  # in the place of a float16, whose exponents are less by 8
    return ((codes & 127) << 7 | (codes & 128) << 8).view(np.float16).astype(np.float32) * 256


# References


def pack_reference(format: Format, integers: np.ndarray) -> dict[str, np.ndarray]:
    """The layout's specification: integers [N, K], as unsigned as the format's, -> data and high; zeros as padding."""
    rows, width = integers.shape
    padded = np.zeros((cdiv(rows, TILE) * TILE, width), integers.dtype)
    padded[:rows] = integers
    words = padded.reshape(-1, TILE, width // GROUP, 8, 4).transpose(0, 2, 3, 1, 4)  # [N/16, K/32, 8, 16, 4]
    if format.bits == 8:
        return {"data": words.astype(np.uint8).view(np.int8)}
    low, found = words & 15, {}
    found["data"] = (low[:, :, :4] | low[:, :, 4:] << 4).astype(np.uint8)
    high = (words >> 4).astype(np.uint8)
    if format.bits == 5:
        bits = high << np.arange(8, dtype=np.uint8)[:, None, None]
        found["high"] = np.bitwise_or.reduce(bits, axis=2, keepdims=True)
    elif format.bits == 6:
        bits = high.reshape(*high.shape[:2], 2, 4, TILE, 4) << (2 * np.arange(4, dtype=np.uint8))[:, None, None]
        found["high"] = np.bitwise_or.reduce(bits, axis=3)
    return found


def per_group_reference(values: np.ndarray) -> np.ndarray:
    """Scales, minimums [N, G] or factors [N, G, F] -> [N/16, G, (F,) 16], zeros as padding."""
    padded = np.zeros((cdiv(len(values), TILE) * TILE, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return np.moveaxis(padded.reshape(-1, TILE, *values.shape[1:]), 1, -1)


def dequantise_reference(
    format: Format,
    integers: np.ndarray,
    scales: np.ndarray,
    minimums: np.ndarray | None = None,
    factors: np.ndarray | None = None,
) -> np.ndarray:
    """W as float64, from integers [N, K], scales and minimums [N, K/span], factors [N, K/32, F], all as numbers."""
    over_groups = lambda values: np.repeat(values.astype(np.float64), format.span // GROUP, axis=1)  # noqa: E731
    halves = np.repeat(over_groups(scales), 2, axis=1)  # of each half of a group, as is all that follows
    zeros = np.zeros_like(halves)
    if minimums is not None:
        zeros = np.repeat(over_groups(minimums), 2, axis=1)
        if np.issubdtype(minimums.dtype, np.integer):
            zeros *= -halves
    if factors is not None and format.halves:
        halves *= factors.reshape(halves.shape)
    elif factors is not None:
        halves *= np.repeat(factors[:, :, 0].astype(np.float64), 2, axis=1)
        zeros *= np.repeat(factors[:, :, -1].astype(np.float64), 2, axis=1)
    table = e4m3_values() if format.floating else np.array(format.table)
    values = (table[integers] if len(table) else integers).astype(np.float64)
    if minimums is None:
        values -= format.offset
    spread = lambda of_halves: np.repeat(of_halves, GROUP // 2, axis=1)  # noqa: E731
    return values * spread(halves) + spread(zeros)
