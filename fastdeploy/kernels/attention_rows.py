"""What attention's kernels share: the rows of a query tile, and the softmax's state of each row.

The state of a softmax over some keys, in the manner of FlashAttention-2 (Dao, 2023), in base 2:
    peak = max of scores,   total = sum of 2^(score - peak),   sums = sum of 2^(score - peak) v
Of no keys it is peak -inf, total 0, sums 0; every formula here keeps that free of NaN.

GPUs add a row's weights up by the tensor cores, in which a sum's order is the same for tiles of 16 rows (decodes) and
of 64 (prompts): the total is the product with a column of ones.
"""

import triton
import triton.language as tl

from fastdeploy.kernels.quantised import store_groups


@triton.jit
def empty_state(ROWS: tl.constexpr, DIM: tl.constexpr):
    sums = tl.zeros([ROWS, DIM], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    return sums, peak, tl.zeros([ROWS], tl.float32)


@triton.jit
def empty_part(ROWS: tl.constexpr, DIM: tl.constexpr):
    """The state of a split under way on a GPU: its total comes in equal columns, the fewest that a product has."""
    sums, peak, _ = empty_state(ROWS, DIM)
    return sums, peak, tl.zeros([ROWS, 16], tl.float32)


@triton.jit
def finite(peak):
    """`peak` as something to subtract: -inf - -inf would be NaN, while 2^(-inf - 0) is the 0 we want."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def merge(sums, peak, total, more_sums, more_peak, more_total):
    """The state of two sets of keys. Written with fma, so that no compiler decides where to round."""
    new_peak = tl.maximum(peak, more_peak)
    kept = tl.exp2(peak - finite(new_peak))  # [rows]
    added = tl.exp2(more_peak - finite(new_peak))
    sums = tl.fma(sums, tl.broadcast_to(kept[:, None], sums.shape), more_sums * added[:, None])
    return sums, new_peak, tl.fma(total, kept, more_total * added)


@triton.jit
def add_columns(total, kept, weights):
    """total [rows, 16] with the sum of each row of weights added to all of its columns."""
    ones = tl.full([weights.shape[1], total.shape[1]], 1.0, weights.dtype)
    return tl.dot(weights, ones, total * kept[:, None], input_precision="ieee")


@triton.jit
def head_mask(d, D: tl.constexpr, DIM: tl.constexpr):
    """Which of DIM lanes are elements of a head; folded away where the head's width is a power of two."""
    if DIM == D:
        return tl.full([DIM], True, tl.int1)
    else:
        return d < D


@triton.jit
def load_queries(
    qkv, row, kv_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """q of the rows (token * group + head of the group) of one KV head: [rows, DIM]."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    d = tl.arange(0, DIM)
    start = (row // GROUP).to(tl.int64) * (HEADS + 2 * KV_HEADS) * D + (kv_head * GROUP + row % GROUP) * D
    return tl.load(qkv + start[:, None] + d[None, :], mask=head_mask(d, D, DIM)[None, :], other=0.0).to(OPERAND)


@triton.jit
def store_attended(
    out, out_scales, out_sums, sums, total, row, mask, kv_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """sums / total to the rows of `out`, as floats or as int8 in groups of 32; zeros for a row that saw no key."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    attended = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    start = (row // GROUP).to(tl.int64) * HEADS * D + (kv_head * GROUP + row % GROUP) * D
    if out_scales is None:
        d = tl.arange(0, DIM)
        mask = mask[:, None] & head_mask(d, D, DIM)[None, :]
        tl.store(out + start[:, None] + d[None, :], attended.to(out.dtype.element_ty), mask=mask)
    else:
        COUNT: tl.constexpr = sums.shape[0] * DIM // 32
        g = tl.arange(0, DIM // 32)
        group = tl.reshape(start[:, None] // 32 + g[None, :], [COUNT])
        inside = tl.reshape(mask[:, None] & head_mask(g, D // 32, DIM // 32)[None, :], [COUNT])
        store_groups((out, out_scales, out_sums, None, None), tl.reshape(attended, [COUNT, 32]), 0.0, group, inside)


@triton.jit
def find_sequence(tile, cu_seqlens, num_decodes, num_seqs, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The prompt chunk that a query tile belongs to and the chunk's first tile.

    Chunk i begins with tile cu_seqlens[i] * group // BLOCK_M + i (counted from the first chunk): that leaves room for
    all chunks before it without a sum over them, at the price of a few tiles that find no rows. Bisection.
    """
    low = num_decodes
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        begins = (tl.load(cu_seqlens + middle) - num_decodes) * GROUP // BLOCK_M + middle - num_decodes
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle)
    return low, (tl.load(cu_seqlens + low) - num_decodes) * GROUP // BLOCK_M + low - num_decodes
