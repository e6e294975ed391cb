"""Linear layers: y[t, n] = sum_k x[t, k] * W[n, k] + bias[n].

Weights are stored in panels of `panel` output features, features next to each other, because a CPU multiplies along n:

    data [ceil(N / panel), K, panel]          address of W[n, k] = (n // panel) * K * panel + k * panel + n % panel

           k = 0 | W[0,0] W[1,0] ... W[31,0] |     panel 32 in bf16: one cache line per k, read in address order,
           k = 1 | W[0,1] W[1,1] ... W[31,1] |     so that a matrix-vector product runs at the speed of memory
             :   |            :              |
           next panel: W[32..63, :]                (row-major [N, K] breaks down when rows lie a page apart)

`panel == 1` is plain row-major [N, K], which GPUs want: the same formula, the same kernel. Features that fill up the
last panel are computed but never stored, so their values do not matter.

One program computes BLOCK_M rows of x times BLOCK_N features, walking k in steps of BLOCK_K with a `tl.dot` that adds
into one accumulator: no split over k, so that a row's sum does not depend on how many rows there are. Programs are
ordered in groups of GROUP_M row blocks, see `_tile_place`.

Three kernels, all of them that loop:

    _linear_kernel       CPUs, and every GPU and type that the other two are not for
    _skinny_kernel       Hopper, few rows: as many programs along n as there are multiprocessors, many loads in flight
    _persistent_kernel   Hopper, many rows: a program a multiprocessor, tiles by the tensor memory accelerator, loads of
                         the next tile during the end of the last (after Triton's tutorial on persistent matmul)

They may also end in SwiGLU, `gated_linear`: out = silu(x Wgate) * (x Wup), one weight with gate's rows first (the first
kernel on CPUs only).

That a token keeps its bits from one to the other is a matter of fact on Hopper (sm_90): its tensor cores add 16
products at a time whatever the instruction, so that in bf16 all tiles, transposed ones too, give the same float32 sums
(81 shapes of tiles compared bit by bit; tests/gpu does it again). On other GPUs tiles are 64 rows high, always.

Cost: N*K weights read once per BLOCK_M rows (decode: bound by memory), 2*T*N*K FLOPs (prefill: bound by arithmetic).
bench/results/h200.md has what an H200 makes of it.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.formats import QuantisedWeight
from fastdeploy.kernels.launch import (
    FLOATS,
    ITEM_SIZES,
    Target,
    TensorView,
    cdiv,
    early,
    expect,
    launch,
    next_power_of_2,
    operand_dtype,
    target,
    view,
    wait_for_inputs,
)
from fastdeploy.kernels.quantised import (
    QuantisedRows,
    gated_quantised_linear,
    quantised_linear,
    swiglu,
)


@dataclass(frozen=True)
class LinearWeight:
    """The weight of y = x @ W.T (+ bias), W being [out_features, in_features], and its layout.

    data: see `packed_shape`, any float type.  bias: [out_features] float32 or None.
    """

    data: TensorView
    out_features: int
    in_features: int
    panel: int
    bias: TensorView | None = None

    def __post_init__(self) -> None:
        expect("weight data", self.data, packed_shape(self.out_features, self.in_features, self.panel), *FLOATS)
        if self.bias is not None:
            expect("bias", self.bias, (self.out_features,), "float32")

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix."""
        return self.data.nbytes

    @property
    def takes_integers(self) -> bool:
        """Whether activations may be integers."""
        return False

    @property
    def ordered(self) -> bool:
        """Whether activations have to be brought into an order."""
        return False


@dataclass(frozen=True)
class FusedWeight:
    """Weights that read the same input, side by side, where no single format holds them all.

    parts: the first has the first output features, and so on.
    """

    parts: tuple[LinearWeight | QuantisedWeight, ...]

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def takes_integers(self) -> bool:
        """Whether activations may be integers: floats serve every part."""
        return all(part.takes_integers for part in self.parts)

    @property
    def ordered(self) -> bool:
        """Whether activations have to be brought into an order, which each part has for itself."""
        return any(part.ordered for part in self.parts)

    @property
    def wide_inputs(self) -> bool:
        """Whether activations that are quantised have low bytes."""
        return any(isinstance(part, QuantisedWeight) and part.wide_inputs for part in self.parts)


Weight: TypeAlias = LinearWeight | QuantisedWeight | FusedWeight  # what linear layers take


def default_panel(target: Target) -> int:
    """Features per panel: 32 on a CPU (a cache line of 16-bit weights, two AVX-512 vectors of sums), none on a GPU."""
    return 32 if target.is_cpu else 1


def packed_shape(out_features: int, in_features: int, panel: int) -> tuple[int, int, int]:
    """The shape of a packed weight's data."""
    return (cdiv(out_features, panel), in_features, panel)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    y, x, weight, bias, rows, N, K, STRIDE,
    GATED: tl.constexpr, PANEL: tl.constexpr, OPERAND: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """GATED: y = silu(gate) * up; up's features begin N rows down the weight, where a panel begins, too."""
    block_m, block_n = _tile_place(tl.program_id(0), rows, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    # Rows and features past the end are read again from the last one: cheaper than a mask in the loop.
    x_tile = x + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK_K]
    if PANEL == 1:
        weight_tile = weight + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_N]
    else:  # a tile is as wide as a panel, which is padded
        weight_tile = weight + block_n.to(tl.int64) * K * PANEL + k[:, None] * PANEL + tl.arange(0, BLOCK_N)[None, :]
    sums = sum_of_products(x_tile, weight_tile, K, PANEL, OPERAND, EVEN_K)
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    if GATED:
        up = sum_of_products(x_tile, weight_tile + N.to(tl.int64) * K, K, PANEL, OPERAND, EVEN_K)
        if bias is not None:
            up += tl.load(bias + N + n, mask=n < N, other=0.0)[None, :]
        sums = swiglu(sums, up)
    y_tile = y + m.to(tl.int64)[:, None] * STRIDE + n[None, :]
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < N)[None, :])


@triton.jit
def sum_of_products(x_tile, weight_tile, K, PANEL: tl.constexpr, OPERAND: tl.constexpr, EVEN_K: tl.constexpr):
    """x @ W.T in float32, from pointers to the first [BLOCK_M, BLOCK_K] of x and [BLOCK_K, BLOCK_N] of W."""
    BLOCK_K: tl.constexpr = x_tile.shape[1]
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([x_tile.shape[0], weight_tile.shape[1]], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_tile)
            b = tl.load(weight_tile)
        else:
            a = tl.load(x_tile, mask=(start + k < K)[None, :], other=0.0)
            b = tl.load(weight_tile, mask=(start + k < K)[:, None], other=0.0)
        sums = tl.dot(a.to(OPERAND), b.to(OPERAND), sums, input_precision="ieee")
        x_tile += BLOCK_K
        weight_tile += BLOCK_K * PANEL
    return sums


@triton.jit
def _tile_place(tile, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The row block and the feature block of a tile, by its number.

    Within a group of GROUP_M row blocks, the row blocks run first, so that the tiles which share weights run at the
    same time, and the features of the group follow each other:

        GROUP_M = 2     features ->   0 2 4 6          row blocks of a group reread its x, which stays in the cache;
                        row blocks    1 3 5 7          weights come from memory once per group
                                      8 10 12 14
    """
    feature_blocks = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * feature_blocks)
    first = group * GROUP_M
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP_M)
    within = tile % (GROUP_M * feature_blocks)
    return first + within % size, within // size


def tiles(target: Target, rows: int, weight: LinearWeight) -> dict[str, Any]:
    """Tile rule. BLOCK_K and BLOCK_N follow from the weight alone.

    On a CPU the row block follows the number of rows, up to 64: our `tl.dot` adds the terms of each element one after
    the other in order of k, so the tile does not change a bit. Eight row blocks share what weights they read from
    memory (float32, 512 rows, K = 576: 146 GFLOP/s on a core, one by one 136; K = 4096: 156 and 134). Tensor cores
    choose their instruction, and with it the order, by the tile: there it is 64 rows always, which costs a
    bandwidth-bound decode nothing.
    """
    even = min(weight.in_features & -weight.in_features, 64)  # the largest power of two that divides K
    if target.is_cpu:
        block_m = min(next_power_of_2(rows), 64)
        return {"BLOCK_M": block_m, "BLOCK_N": max(weight.panel, 16), "BLOCK_K": even, "GROUP_M": 8, "EVEN_K": True}
    block_n = 128 if weight.out_features >= 8192 else 64  # enough programs for small layers, fewer x reads for large
    block_k = even if even >= 16 else 64
    shape = {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8, "EVEN_K": even >= 16}
    return {**shape, "num_warps": 4, "num_stages": 3 if target.kind == "cuda" else 2}


@triton.jit(do_not_specialize=["rows"])
def _skinny_kernel(
    y, x, weight, bias, rows, N, K,
    GATED: tl.constexpr, SWAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """SWAPPED: y.T = W x.T, where 16 rows are enough for a tensor core whose left operand has 64. GATED: half of a
    tile's features are gate's, the other half up's."""
    wait_for_inputs(EARLY)
    FEATURES: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N  # of y
    row_blocks = tl.cdiv(rows, BLOCK_M)
    first = tl.program_id(0) // row_blocks * FEATURES
    m = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    j = tl.arange(0, BLOCK_N)
    n = tl.minimum(first + j % FEATURES, N - 1) + j // FEATURES * N  # [BLOCK_N] rows of the weight
    k = tl.arange(0, BLOCK_K)
    real = (m < rows)[:, None]
    x_tile = x + m.to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_tile = weight + n.to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_N, BLOCK_K]
    sums = tl.zeros([BLOCK_N, BLOCK_M] if SWAPPED else [BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K, BLOCK_K):
        a = tl.load(x_tile, mask=real, other=0.0)  # masked rows cost no loads
        b = tl.load(weight_tile)
        sums = tl.dot(b, a.T, sums) if SWAPPED else tl.dot(a, b.T, sums)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K
    if SWAPPED:
        sums = tl.trans(sums)
    if bias is not None:
        sums += tl.load(bias + n)[None, :]
    if GATED:
        gate, up = _halves(sums)
        sums = swiglu(gate, up)
    n = first + tl.arange(0, FEATURES)
    y_tile = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=real & (n < N)[None, :])


@triton.jit
def _halves(x):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit(do_not_specialize=["rows"])
def _persistent_kernel(
    y, x, weight, bias, rows, N, K,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HALVES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """HALVES: a tile is stored in so many parts, because its copy in shared memory takes room from loads."""
    wait_for_inputs(EARLY)
    x_tiles = tl.make_tensor_descriptor(x, [rows, K], [K, 1], [BLOCK_M, BLOCK_K])  # zeros past the end
    weight_tiles = tl.make_tensor_descriptor(weight, [2 * N if GATED else N, K], [K, 1], [BLOCK_N, BLOCK_K])
    y_tiles = tl.make_tensor_descriptor(y, [rows, N], [N, 1], [BLOCK_M, BLOCK_N // HALVES])
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block_m, block_n = _tile_place(tile, rows, N, BLOCK_M, BLOCK_N, GROUP_M)
        m = block_m * BLOCK_M
        n = block_n * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        ups = sums
        for k in range(0, K, BLOCK_K):
            a = x_tiles.load([m, k])
            sums = tl.dot(a, weight_tiles.load([n, k]).T, sums)
            if GATED:
                ups = tl.dot(a, weight_tiles.load([N + n, k]).T, ups)
        if bias is not None:
            columns = n + tl.arange(0, BLOCK_N)
            sums += tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
            if GATED:
                ups += tl.load(bias + N + columns, mask=columns < N, other=0.0)[None, :]
        if GATED:
            sums = swiglu(sums, ups)
        if HALVES == 1:
            y_tiles.store([m, n], sums.to(y.dtype.element_ty))
        else:
            left, right = _halves(sums)
            y_tiles.store([m, n], left.to(y.dtype.element_ty))
            y_tiles.store([m, n + BLOCK_N // 2], right.to(y.dtype.element_ty))


HOPPER_TILES = (  # rows, features; the largest of which there are enough
    (128, 256, {"BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
    (128, 128, {"BLOCK_K": 64, "num_warps": 4, "num_stages": 4}),
    (64, 128, {"BLOCK_K": 64, "num_warps": 4, "num_stages": 4}),
    (64, 64, {"BLOCK_K": 128, "num_warps": 4, "num_stages": 5}),
    (64, 32, {"BLOCK_K": 128, "num_warps": 4, "num_stages": 5}),
)


def hopper_tiles(target: Target, rows: int, features: int, width: int) -> dict[str, Any]:
    """Tile rule for `features` sums of `width` products for each row; "kernel" names the kernel.

    As many programs as multiprocessors, or nearly, of the largest tiles: what came out fastest, or close to it, of 20
    tiles for the layers of Qwen3-0.6B and Llama-3-8B with 16 to 8192 rows on an H200.
    """
    if rows <= 16:  # a deep queue of loads: with 4 stages 3 to 8 % slower
        shape = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 6}
        return {"kernel": "skinny", "SWAPPED": True, **shape}
    for block_m, block_n, rule in HOPPER_TILES:  # noqa: B007 (used after the loop)
        enough = cdiv(rows, block_m) * cdiv(features, block_n) >= 0.7 * target.parallelism
        if block_m <= max(64, next_power_of_2(rows)) and (enough or block_n == 32):
            break
    shape = {"BLOCK_M": block_m, "BLOCK_N": block_n, **rule}
    if block_m == 128 or (block_n == 128 and width >= 4096):
        return {"kernel": "persistent", **shape, "GROUP_M": 8, "HALVES": 2 if block_n == 256 else 1}
    return {"kernel": "skinny", "SWAPPED": False, **shape}


def _runs_on_hopper(here: Target, out: TensorView, x: TensorView, weight: LinearWeight) -> bool:
    """Whether the kernels for Hopper can do it: 16-bit operands, rows that begin on 16 bytes, no rest along k."""
    if here.kind != "cuda" or here.arch != 90 or x.dtype == "float32" or x.dtype != weight.data.dtype:
        return False
    row_bytes = out.shape[1] * ITEM_SIZES[out.dtype]
    aligned = all(tensor.pointer % 16 == 0 for tensor in (out, x, weight.data))
    return out.contiguous and weight.panel == 1 and weight.in_features % 64 == 0 and row_bytes % 16 == 0 and aligned


def _launch_on_hopper(here: Target, out: TensorView, x: TensorView, weight: LinearWeight, gated: bool) -> None:
    (rows, width), features = x.shape, out.shape[1]
    rule = hopper_tiles(here, rows, weight.out_features, width)
    if width % 128:
        rule["BLOCK_K"] = 64
    tiles = cdiv(rows, rule["BLOCK_M"]) * cdiv(weight.out_features, rule["BLOCK_N"])
    arguments = (out, x, weight.data, weight.bias, rows, features, width)
    if rule.pop("kernel") == "skinny":
        launch(_skinny_kernel, (tiles,), *arguments, GATED=gated, **early(here), **rule)
        return
    if gated:  # the tile's weights are those of two smaller tiles
        rule["BLOCK_N"] //= 2
        rule["HALVES"] = 1
    elif width >= 8192 and out.dtype != "float32":
        rule["HALVES"] = 1  # a tile takes long, its end matters less than room for loads: 12 % faster at 14336
    launch(_persistent_kernel, (min(tiles, here.parallelism),), *arguments, GATED=gated, **early(here), **rule)


def _launch_anywhere(here: Target, out: TensorView, x: TensorView, weight: LinearWeight, gated: bool) -> None:
    rule = tiles(here, x.shape[0], weight)
    blocks = cdiv(x.shape[0], rule["BLOCK_M"]) * cdiv(out.shape[1], rule["BLOCK_N"])
    arguments = (out, x, weight.data, weight.bias, x.shape[0], out.shape[1], weight.in_features, out.strides[0])
    known = {"GATED": gated, "PANEL": weight.panel, "OPERAND": operand_dtype(here, x, weight.data)}
    launch(_linear_kernel, (blocks,), *arguments, **known, **rule)


def gated_linear(out: Any, x: Any, weight: Weight) -> bool:
    """out = silu(x @ Wgate.T) * (x @ Wup.T) in one launch, or False, and nothing done, where no kernel does that.

    Args:
        out: [T, I], any float type, or `QuantisedRows`.
        x: [T, in_features], of the weight's type; for a quantised weight any float type or `QuantisedRows`.
        weight: [2 I, in_features], the rows of gate, then up, as `linear` takes it.
    """
    here = target()
    if isinstance(weight, QuantisedWeight) and isinstance(x, QuantisedRows) and isinstance(out, QuantisedRows):
        gated_quantised_linear(out, x, weight)
        return True
    if not isinstance(weight, LinearWeight) or isinstance(out, QuantisedRows):
        return False
    out, x = view(out), view(x)
    on_hopper = _runs_on_hopper(here, out, x, weight)
    if not on_hopper and not (here.is_cpu and out.shape[1] % weight.panel == 0):
        return False
    expect("x", x, (x.shape[0], weight.in_features), *FLOATS)
    expect("out", out, (x.shape[0], weight.out_features // 2), *FLOATS)
    if x.shape[0]:
        (_launch_on_hopper if on_hopper else _launch_anywhere)(here, out, x, weight, gated=True)
    return True


def linear(out: Any, x: Any, weight: Weight) -> None:
    """out = x @ W.T (+ bias).

    Args:
        out: [T, out_features], any float type; rows may have gaps between them.
        x: [T, in_features], any float type, or `QuantisedRows` if the weight takes integers.
        weight: as packed by `pack`, or quantised, or several of these.
    """
    if isinstance(weight, QuantisedWeight):
        quantised_linear(out, x, weight)
        return
    if isinstance(weight, FusedWeight):
        start, out = 0, view(out)
        for part in weight.parts:
            linear(out.columns(start, start + part.out_features), x, part)
            start += part.out_features
        return
    out, x = view(out), view(x)
    expect("x", x, (x.shape[0], weight.in_features), *FLOATS)
    expect("out", out, (x.shape[0], weight.out_features), *FLOATS, row_gaps=True)
    if x.shape[0]:
        here = target()
        on_hopper = _runs_on_hopper(here, out, x, weight)
        (_launch_on_hopper if on_hopper else _launch_anywhere)(here, out, x, weight, gated=False)


@triton.jit(do_not_specialize=["count", "row_offset"])
def _pack_kernel(
    data, source, count, row_offset, row_stride, column_stride, K, PANEL: tl.constexpr, BLOCK_K: tl.constexpr
):
    panel = row_offset // PANEL + tl.program_id(0)
    first_row, first_k = panel * PANEL - row_offset, tl.program_id(1) * BLOCK_K  # in the slice
    n = first_row + tl.arange(0, PANEL)
    k = first_k + tl.arange(0, BLOCK_K)
    taken = source + n.to(tl.int64)[None, :] * row_stride + k.to(tl.int64)[:, None] * column_stride  # [BLOCK_K, PANEL]
    put = data + panel.to(tl.int64) * K * PANEL + k[:, None] * PANEL + tl.arange(0, PANEL)[None, :]
    if (first_row >= 0) & (first_row + PANEL <= count) & (first_k + BLOCK_K <= K):
        tl.store(put, tl.load(taken).to(data.dtype.element_ty))  # no masks: half the time
    else:
        inside = ((n >= 0) & (n < count))[None, :] & (k < K)[:, None]
        tl.store(put, tl.load(taken, mask=inside).to(data.dtype.element_ty), mask=inside)


def pack(out: Any, weight: Any, row_offset: int = 0) -> None:
    """Convert rows [row_offset, row_offset + n) of a weight matrix to `out`'s type and lay them out in panels.

    A fused weight (q, k and v, say) is packed by one call per part; other rows of `out` keep their values.

    Args:
        out: a packed weight's data, [ceil(N / panel), K, panel].
        weight: [n, K], any float type and strides: rows may have gaps between them, or lie side by side.
        row_offset: row of the packed weight that receives the first row of `weight`.
    """
    out, weight = view(out), view(weight)
    panels, width, panel = out.shape
    count = weight.shape[0]
    expect("out", out, (panels, width, panel), *FLOATS)
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight is {weight.dtype}, expected {' or '.join(FLOATS)}")
    if weight.shape[1:] != (width,):
        raise ValueError(f"weight of shape {weight.shape}: expected rows of {width} elements")
    if not 0 <= row_offset <= panels * panel - count:
        raise ValueError(f"rows {row_offset} to {row_offset + count} do not fit in {panels} panels of {panel} rows")
    if weight.dtype == out.dtype:  # bits need no arithmetic: float16 takes a third of the time
        bits = "uint32" if out.dtype == "float32" else "uint16"
        out, weight = view(out, bits), view(weight, bits)
    block_k = 1024 // panel  # a tile fits the registers
    panels_hit = cdiv(row_offset % panel + count, panel) if count else 0
    arguments = (out, weight, count, row_offset, *weight.strides, width)
    launch(_pack_kernel, (panels_hit, cdiv(width, block_k)), *arguments, PANEL=panel, BLOCK_K=block_k)


def pack_reference(weight: np.ndarray, panel: int) -> np.ndarray:
    """The layout's specification: [N, K] -> [ceil(N / panel), K, panel], zeros in the last panel's empty rows."""
    rows, width = weight.shape
    padded = np.zeros((cdiv(rows, panel) * panel, width), weight.dtype)
    padded[:rows] = weight
    return padded.reshape(-1, panel, width).transpose(0, 2, 1)


def linear_reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The specification, in float64; `weight` is [N, K] as stored, that is after rounding to its type."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    return y if bias is None else y + bias
