"""Mixtures of experts: of E feed-forward networks each token passes through k, whose outputs are added with weights.

    p = softmax(logits[t])                                       logits = x Wrouter, [T, E]
    experts[t] = the k largest of p + correction, largest first;  the lower number where two are equal
    w[t, r] = p[experts[t, r]]  (/ max(sum_r w[t, r], floor))
    y[t] = sum_r w[t, r] FFN_experts[t, r](x[t])  (+ shared[t])

(Shazeer et al., "Outrageously Large Neural Networks", 2017; `correction` balances load, see Wang et al., "Auxiliary-
Loss-Free Load Balancing", 2024: it chooses, but does not weigh.)

The T k pairs of token and rank are sorted by expert, and each expert's rows are cut into tiles of BLOCK_M:

    rank        r = 0  1        pair  0 1 2 3 4 5                        rows    tokens 1 2 | 0 1 2 | 0
    experts  t=0    1  3   ->   expert 1 3 1 0 0 1   sorted by expert:           expert 0   | 1     | 3
             t=1    1  0        places  the row of each pair             tiles   |  ..  | ..|.|   .| 0 rows ...
             t=2    0  1

A grouped linear layer runs one program for each tile of rows and each block of output features. How many tiles there
are is known on the device only; the grid has as many as there can be, and those without rows return at once. So
nothing waits for the device, and a step can be recorded. Experts without tokens cost nothing.

The expert weights of a layer lie one below the other in one packed matrix, each from a full panel on: in floats
(linear.py), or quantised in any format (formats.py), which meet int8 or floats with the sums of quantised.py.

A row's sums run over its own elements in a fixed order, and a token's experts are added by rank: its bits do not depend
on the other tokens. Cost: the weights of the experts that are hit once per tile, 2 T k N K FLOPs.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.formats import TILE, QuantisedWeight, groups, packed_tile, words
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
from fastdeploy.kernels.linear import LinearWeight, sum_of_products
from fastdeploy.kernels.quantised import QuantisedRows, float_sums, integer_sums, store_groups, swiglu
from fastdeploy.kernels.quantised import tiles as quantised_tiles

PADDING = 32  # an expert's weights begin on a row that is a multiple of it: a full panel, or two packed tiles
CHUNK = 256  # pairs that the sort looks at together


class OfExperts:
    """What holds of the weights of all experts."""

    wide_inputs = False  # activations that are quantised take 8 bits
    ordered = False  # they need not be brought into an order


@dataclass(frozen=True)
class ExpertWeights(OfExperts):
    """The weights [out_features, in_features] of `count` experts, one below the other, each padded to full panels."""

    packed: LinearWeight | QuantisedWeight
    count: int
    out_features: int

    def __post_init__(self) -> None:
        if self.packed.out_features != self.count * self.padded_features:
            raise ValueError(
                f"{self.count} experts of {self.out_features} features take {self.count * self.padded_features} rows, "
                f"not {self.packed.out_features}"
            )

    @property
    def padded_features(self) -> int:
        """Rows from one expert's first to the next one's."""
        return padded(self.out_features)

    @property
    def takes_integers(self) -> bool:
        """Whether activations may be integers, of 8 bits."""
        return self.packed.takes_integers


@dataclass(frozen=True)
class FusedExperts(OfExperts):
    """Weights that read the same input, side by side, where no single format holds them all: see `FusedWeight`."""

    parts: tuple[ExpertWeights, ...]

    @property
    def takes_integers(self) -> bool:
        """Whether activations may be integers, of 8 bits: floats serve every part."""
        return all(part.takes_integers for part in self.parts)


Experts: TypeAlias = ExpertWeights | FusedExperts  # what grouped linear layers take


def padded(out_features: int) -> int:
    """Rows that an expert with this many output features takes in a packed matrix."""
    return cdiv(out_features, PADDING) * PADDING


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a step go; the memory that `route` fills.

    experts, weights, places: [T, k] int32, float32, int32: the experts of a token, by rank; the row of each pair.
    rows: [T k] int32, the token of each row.
    counts: [E] int32, the rows of each expert.
    tile_experts, tile_starts, tile_rows: [T k] int32 each: a tile's expert, first row and number of rows, which is 0
        after the last tile; as many of them as a step's tiles can be.
    """

    experts: TensorView
    weights: TensorView
    places: TensorView
    rows: TensorView
    counts: TensorView
    tile_experts: TensorView
    tile_starts: TensorView
    tile_rows: TensorView

    def of(self, tokens: int) -> "Routing":
        """The same memory, cut to a step of `tokens` tokens."""
        by_token = {name: getattr(self, name).rows(tokens) for name in ("experts", "weights", "places")}
        pairs = tokens * self.experts.shape[1]
        by_row = ("rows", "tile_experts", "tile_starts", "tile_rows")
        return replace(self, **by_token, **{name: getattr(self, name).rows(pairs) for name in by_row})


def routing_fields(tokens: int, top_k: int, experts: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tensors of a `Routing`, by name."""
    by_token, by_row = (tokens, top_k), (tokens * top_k,)
    return {
        "experts": (by_token, "int32"),
        "weights": (by_token, "float32"),
        "places": (by_token, "int32"),
        "rows": (by_row, "int32"),
        "counts": ((experts,), "int32"),
        "tile_experts": (by_row, "int32"),
        "tile_starts": (by_row, "int32"),
        "tile_rows": (by_row, "int32"),
    }


# Routing


@triton.jit
def _choose_kernel(
    experts, weights, logits, correction, floor,
    E: tl.constexpr, TOP_K: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    inside = expert < E
    x = tl.load(logits + token * E + expert, mask=inside, other=float("-inf"))
    powers = tl.exp(x - tl.max(x, axis=0))
    probabilities = powers / tl.sum(powers, axis=0)
    keys = probabilities
    if correction is not None:
        keys += tl.load(correction + expert, mask=inside, other=0.0)
    keys = tl.where(inside, keys, float("-inf"))
    chosen = tl.zeros([BLOCK_R], tl.int32)
    chosen_weights = tl.zeros([BLOCK_R], tl.float32)
    for r in range(TOP_K):
        first = tl.min(tl.where(keys == tl.max(keys, axis=0), expert, E - 1), axis=0)  # among NaN: the last
        chosen = tl.where(rank == r, first, chosen)
        chosen_weights = tl.where(rank == r, tl.sum(tl.where(expert == first, probabilities, 0.0)), chosen_weights)
        keys = tl.where(expert == first, float("-inf"), keys)
    if NORMALISE:
        chosen_weights /= tl.maximum(tl.sum(chosen_weights, axis=0), floor)
    tl.store(experts + token * TOP_K + rank, chosen, mask=rank < TOP_K)
    tl.store(weights + token * TOP_K + rank, chosen_weights, mask=rank < TOP_K)


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(counts, experts, pairs, CHUNK: tl.constexpr):
    expert = tl.program_id(0)
    count = tl.full([], 0, tl.int32)
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        count += tl.sum((tl.load(experts + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32), axis=0)
    tl.store(counts + expert, count)


@triton.jit(do_not_specialize=["pairs", "most_tiles"])
def _sort_kernel(
    rows, places, tile_experts, tile_starts, tile_rows, experts, counts, pairs, most_tiles,
    E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program places the pairs of one expert, in their order, behind those of the experts before it."""
    this = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    before = tl.load(counts + expert, mask=expert < tl.minimum(this, E), other=0)
    row = tl.sum(before, axis=0)
    tile = tl.sum((before + BLOCK_M - 1) // BLOCK_M, axis=0)
    count = tl.load(counts + this)
    for start in range(0, count, BLOCK_M):
        tl.store(tile_experts + tile, this)
        tl.store(tile_starts + tile, row + start)
        tl.store(tile_rows + tile, tl.minimum(count - start, BLOCK_M))
        tile += 1
    if this == E - 1:
        for unused in range(tile, most_tiles):
            tl.store(tile_rows + unused, 0)
    if count > 0:
        for start in range(0, pairs, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            mine = tl.load(experts + pair, mask=pair < pairs, other=-1) == this
            place = row + tl.cumsum(mine.to(tl.int32), axis=0) - 1
            tl.store(rows + place, pair // TOP_K, mask=mine)
            tl.store(places + pair, place, mask=mine)
            row += tl.sum(mine.to(tl.int32), axis=0)


def tile_rows(target: Target, pairs: int, experts: int) -> int:
    """Tile rule: about as many rows as an expert has on average; 32 are slower than 64 of which half don't exist, see
    quantised.py. Tensor cores: one shape always, see linear.py."""
    rows = next_power_of_2(cdiv(pairs, experts))
    return rows if target.is_cpu and rows <= 16 else 64


def most_tiles(pairs: int, experts: int, block_m: int) -> int:
    """The most tiles that `pairs` rows can make: every expert that has rows has a last tile, which may be short."""
    return (pairs + min(pairs, experts) * (block_m - 1)) // block_m


def route(out: Routing, logits: Any, correction: Any = None, floor: float | None = None) -> None:
    """Choose k experts for each token, and sort the pairs by expert.

    Args:
        out: for T tokens of k experts each.
        logits: [T, E] float32, k <= E.
        correction: [E] float32, added to the probabilities for the choice; None for nothing.
        floor: divide the weights of a token by their sum, or by this if that is less; None: leave them as they are.
    """
    logits = view(logits)
    tokens, experts = logits.shape
    top_k = out.experts.shape[1]
    for name, (shape, dtype) in routing_fields(tokens, top_k, experts).items():
        expect(name, getattr(out, name), shape, dtype)
    expect("logits", logits, (tokens, experts), "float32")
    if correction is not None:
        expect("correction", view(correction), (experts,), "float32")
    if top_k > experts:
        raise ValueError(f"a token cannot go to {top_k} of {experts} experts")
    if tokens == 0:
        return
    sizes = {"E": experts, "TOP_K": top_k, "BLOCK_E": next_power_of_2(experts)}
    normalise = {"NORMALISE": floor is not None, "BLOCK_R": next_power_of_2(top_k)}
    launch(_choose_kernel, (tokens,), out.experts, out.weights, logits, correction, floor or 0.0, **sizes, **normalise)
    pairs = tokens * top_k
    block_m = tile_rows(target(), pairs, experts)
    launch(_count_kernel, (experts,), out.counts, out.experts, pairs, CHUNK=CHUNK)
    tiles = (out.tile_experts, out.tile_starts, out.tile_rows)
    inputs = (out.experts, out.counts, pairs, most_tiles(pairs, experts, block_m))
    launch(_sort_kernel, (experts,), out.rows, out.places, *tiles, *inputs, BLOCK_M=block_m, CHUNK=CHUNK, **sizes)


# The experts


@triton.jit
def _rows_of_tile(rows, tile_starts, tile, m, count):
    """The rows of y of a tile, and those of x; past the tile's end the first one of x, cheaper than masks in a loop."""
    row = (tl.load(tile_starts + tile) + m).to(tl.int64)
    source = tl.where(m < count, row, 0)
    if rows is not None:
        source = tl.load(rows + row, mask=m < count, other=0).to(tl.int64)
    return row, source


@triton.jit
def _store_rows(y, sums, row, m, count, n, N, STRIDE):
    y_tile = y + row[:, None] * STRIDE + n[None, :]
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=(m < count)[:, None] & (n < N)[None, :])


@triton.jit
def _grouped_linear_kernel(
    y, x, rows, tile_experts, tile_starts, tile_rows, weight, N, K, STRIDE, EXPERT_ROWS,
    PANEL: tl.constexpr, OPERAND: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    count = tl.load(tile_rows + tile)
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row, source = _rows_of_tile(rows, tile_starts, tile, m, count)
    if count == 0:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    x_tile = x + source[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK_K]
    weight += tl.load(tile_experts + tile).to(tl.int64) * EXPERT_ROWS * K
    if PANEL == 1:
        weight_tile = weight + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_N]
    else:  # a tile is as wide as a panel, which is padded
        panel = weight + tl.program_id(1).to(tl.int64) * K * PANEL
        weight_tile = panel + k[:, None] * PANEL + tl.arange(0, BLOCK_N)[None, :]
    sums = sum_of_products(x_tile, weight_tile, K, PANEL, OPERAND, EVEN_K)
    _store_rows(y, sums, row, m, count, n, N, STRIDE)


@triton.jit
def _grouped_quantised_kernel(
    y, x, x_scales, x_sums, rows, tile_experts, tile_starts, tile_rows,
    data, high, scales, minimums, factors, table, N, K, STRIDE, EXPERT_TILES,
    OPERAND: tl.constexpr, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Without x_scales x are floats, and data and high come as 32-bit words."""
    tile = tl.program_id(0)
    count = tl.load(tile_rows + tile)
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row, source = _rows_of_tile(rows, tile_starts, tile, m, count)
    if count == 0:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    place = tl.load(tile_experts + tile).to(tl.int64) * EXPERT_TILES + packed_tile(n, N)
    weight = (data, high, scales, minimums, factors, table)
    if x_scales is None:
        sums = float_sums(x, source, weight, place, n % 16, K, OPERAND, FORMAT, [BLOCK_M, BLOCK_N])
    else:
        sums = integer_sums(
            (x, x_scales, x_sums, None, None), source, weight, place, n % 16, K, FORMAT, [BLOCK_M, BLOCK_N]
        )
    _store_rows(y, sums, row, m, count, n, N, STRIDE)


@triton.jit
def _grouped_gated_kernel(
    out, out_scales, out_sums, x, x_scales, x_sums, rows, tile_experts, tile_starts, tile_rows,
    data, high, scales, minimums, factors, table, I, K, EXPERT_TILES,  # noqa: E741
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile's rows of one group of 32 features of silu(gate) * up, see `gated_quantised_linear`."""
    tile = tl.program_id(0)
    count = tl.load(tile_rows + tile)
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row, source = _rows_of_tile(rows, tile_starts, tile, m, count)
    n = tl.program_id(1) * 32 + tl.arange(0, 32)
    if count > 0:  # no return: the CPU's compiler would put x's addresses, which both sums use, into memory
        weight = (data, high, scales, minimums, factors, table)
        place = tl.load(tile_experts + tile).to(tl.int64) * EXPERT_TILES + packed_tile(n, I)
        gate = integer_sums((x, x_scales, x_sums, None, None), source, weight, place, n % 16, K, FORMAT, [BLOCK_M, 32])
        up = integer_sums(
            (x, x_scales, x_sums, None, None), source, weight, I // 16 + place, n % 16, K, FORMAT, [BLOCK_M, 32]
        )
        group = row * (I // 32) + tl.program_id(1)
        store_groups((out, out_scales, out_sums, None, None), swiglu(gate, up), 0.0, group, m < count)


XTensors: TypeAlias = tuple[TensorView, TensorView | None, TensorView | None]  # values, scales and sums, or floats
Routes: TypeAlias = tuple[TensorView | None, TensorView, TensorView, TensorView]  # rows, and what there is of tiles


def tiles(target: Target, block_m: int, weight: LinearWeight) -> dict[str, Any]:
    """Tile rule, as that of linear.py."""
    even = min(weight.in_features & -weight.in_features, 64)  # the largest power of two that divides K
    if target.is_cpu:
        return {"BLOCK_M": block_m, "BLOCK_N": weight.panel, "BLOCK_K": even, "EVEN_K": True}
    block_k = even if even >= 16 else 32  # 64 with masks would spill
    shape = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": block_k, "EVEN_K": even >= 16}
    return {**shape, "num_warps": 4, "num_stages": 3 if target.kind == "cuda" else 2}


def grouped_linear(out: Any, x: Any, weights: Experts, routing: Routing, by_token: bool) -> None:
    """Each row of `out` is a row of `x` times the weight of the row's expert, transposed.

    Args:
        out: [T k, out_features], any float type: the rows sorted by expert, perhaps with gaps between them.
        x: any float type, or `QuantisedRows` in 8 bits if the weights take integers: [T, in_features], a row for each
            token, if `by_token`; else [T k, in_features], sorted, too.
        routing: as `route` filled it.
    """
    out = view(out)
    if isinstance(weights, FusedExperts):
        start = 0
        for part in weights.parts:
            grouped_linear(out.columns(start, start + part.out_features), x, part, routing, by_token)
            start += part.out_features
        return
    x_tensors, routes = _expect_rows(x, weights, routing, by_token), _routes(routing, by_token)
    expect("out", out, (routing.rows.shape[0], weights.out_features), *FLOATS, row_gaps=True)
    if routing.rows.shape[0]:
        run = _launch_floats if isinstance(weights.packed, LinearWeight) else _launch_quantised
        run(out, x_tensors, weights, routes)


def _launch_floats(out: TensorView, x: XTensors, weights: ExpertWeights, routes: Routes) -> None:
    here, packed, pairs = target(), weights.packed, out.shape[0]
    assert isinstance(packed, LinearWeight)
    block_m = tile_rows(here, pairs, weights.count)
    rule = tiles(here, block_m, packed)
    grid = (most_tiles(pairs, weights.count, block_m), cdiv(weights.out_features, rule["BLOCK_N"]))
    sizes = (weights.out_features, packed.in_features, out.strides[0], weights.padded_features)
    constants = {"PANEL": packed.panel, "OPERAND": operand_dtype(here, x[0], packed.data)}
    launch(_grouped_linear_kernel, grid, out, x[0], *routes, packed.data, *sizes, **constants, **rule)


def _launch_quantised(out: TensorView, x: XTensors, weights: ExpertWeights, routes: Routes) -> None:
    here, packed, pairs, in_floats = target(), weights.packed, out.shape[0], x[1] is None
    assert isinstance(packed, QuantisedWeight)
    block_m = tile_rows(here, pairs, weights.count)
    rule = quantised_tiles(here, block_m, not in_floats) | {"BLOCK_M": block_m}
    grid = (most_tiles(pairs, weights.count, block_m), cdiv(weights.out_features, rule["BLOCK_N"]))
    integers = (words(packed.data), words(packed.high)) if in_floats else (packed.data, packed.high)
    sizes = (weights.out_features, packed.in_features, out.strides[0], weights.padded_features // TILE)
    known = {"OPERAND": operand_dtype(here, x[0]) if in_floats else None, "FORMAT": packed.format.constants}
    arguments = (out, *x, *routes, *integers, *packed.planes[2:], *sizes)
    launch(_grouped_quantised_kernel, grid, *arguments, **known, **rule)


def gated_grouped_linear(out: Any, x: Any, weights: Experts, routing: Routing) -> bool:
    """`grouped_linear` of each token's row, ending in silu(gate) * up; or False, and nothing done, where no kernel does
    that: it takes integers and gives integers.

    Args:
        out: [T k, I], in 8 bits: the rows sorted by expert.
        x: [T, in_features], in 8 bits.
        weights: [2 I, in_features] for each expert, the rows of gate, then up.
    """
    if not (isinstance(out, QuantisedRows) and isinstance(x, QuantisedRows) and isinstance(weights, ExpertWeights)):
        return False
    pairs, width = out.shape
    x_tensors = _expect_rows(x, weights, routing, by_token=True)
    if weights.out_features != 2 * width or pairs != routing.rows.shape[0] or out.low is not None:
        shape = f"{routing.rows.shape[0]} rows of gate and up of {weights.out_features} features"
        raise ValueError(f"{shape} don't fill {pairs} rows of {width} in 8 bits")
    if pairs == 0:
        return True
    packed = weights.packed
    assert isinstance(packed, QuantisedWeight)  # as it takes integers
    block_m = tile_rows(target(), pairs, weights.count)
    grid = (most_tiles(pairs, weights.count, block_m), groups(width))
    written, routes = (out.values, out.scales, out.sums), _routes(routing, by_token=True)
    sizes = (width, packed.in_features, weights.padded_features // TILE)
    arguments = (*written, *x_tensors, *routes, *packed.planes, *sizes)
    launch(_grouped_gated_kernel, grid, *arguments, FORMAT=packed.format.constants, BLOCK_M=block_m)
    return True


def _routes(routing: Routing, by_token: bool) -> Routes:
    return routing.rows if by_token else None, routing.tile_experts, routing.tile_starts, routing.tile_rows


def _expect_rows(x: Any, weights: ExpertWeights, routing: Routing, by_token: bool) -> XTensors:
    """Raises where x doesn't fit."""
    shape = (routing.experts.shape[0] if by_token else routing.rows.shape[0], weights.packed.in_features)
    if not isinstance(x, QuantisedRows):
        x = view(x)
        expect("x", x, shape, *FLOATS)
        return x, None, None
    expect("x", x.values, shape, "int8")
    if x.low is not None or not weights.takes_integers:
        takes = "8 bits or floats, not 16 bits" if weights.takes_integers else "floats only"
        raise TypeError(f"these experts take activations in {takes}")
    return x.values, x.scales, x.sums


@triton.jit
def _combine_kernel(out, x, places, weights, shared, K: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < K if K % BLOCK != 0 else tl.full([BLOCK], True, tl.int1)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in range(TOP_K):
        row = tl.load(places + token * TOP_K + rank).to(tl.int64)
        values = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights + token * TOP_K + rank) * values
    if shared is not None:
        total += tl.load(shared + token * K + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * K + columns, total.to(out.dtype.element_ty), mask=inside)


def combine(out: Any, x: Any, routing: Routing, shared: Any = None) -> None:
    """out[t] = sum_r weights[t, r] x[places[t, r]] (+ shared[t]).

    Args:
        out: [T, K], any float type.
        x: [T k, K], any float type, sorted by expert.
        shared: [T, K], any float type, or None.
    """
    out, x = view(out), view(x)
    tokens, width = out.shape
    top_k = routing.experts.shape[1]
    expect("out", out, (tokens, width), *FLOATS)
    expect("x", x, (tokens * top_k, width), *FLOATS)
    expect("places", routing.places, (tokens, top_k), "int32")
    if shared is not None:
        expect("shared", view(shared), (tokens, width), *FLOATS)
    block = row_block(target(), width, limit=512)
    arguments = (out, x, routing.places, routing.weights, shared)
    launch(_combine_kernel, (tokens, cdiv(width, block)), *arguments, K=width, TOP_K=top_k, BLOCK=block)


# References


def route_reference(
    logits: np.ndarray, top_k: int, correction: np.ndarray | None = None, floor: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The specification of the choice, in float64: experts and weights, [T, k] each."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    keys = probabilities if correction is None else probabilities + correction
    experts = np.argsort(-keys, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(probabilities, experts, axis=1)
    return experts, weights if floor is None else weights / np.maximum(weights.sum(axis=1, keepdims=True), floor)


def mixture_reference(
    x: np.ndarray, gate_up: np.ndarray, down: np.ndarray, experts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The specification of the mixture, in float64: x [T, H], gate_up [E, 2I, H], down [E, H, I] -> [T, H]."""
    out = np.zeros(x.shape, np.float64)
    for token, row in enumerate(x.astype(np.float64)):
        for expert, weight in zip(experts[token], weights[token], strict=True):
            gate, up = np.split(gate_up[expert].astype(np.float64) @ row, 2)
            out[token] += weight * (down[expert].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up))
    return out
