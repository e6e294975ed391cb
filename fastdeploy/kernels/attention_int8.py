"""DOC"""

import triton
import triton.language as tl

from fastdeploy.kernels.attention_rows import finite


@triton.jit
def quantise_queries(q, log2_scale, INTEGERS: tl.constexpr):
    """q [rows, DIM] as int8 with its scales [rows], which are factors of scores in base 2; as it is, with None, unless
    INTEGERS."""
    if INTEGERS:
        largest = tl.max(tl.abs(q), axis=1)
        largest = tl.where(largest > 1e-30, largest, 1.0) + tl.sum(q * 0.0, axis=1)  # NaN, if any of them is no number
        x = q * (127.0 / largest)[:, None]
        return (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int32).to(tl.int8), largest * (log2_scale / 127.0)
    else:
        return q, None


@triton.jit
def add_int8_keys(
    sums, peak, total, q, q_scales, k_cache, v_cache, k_scales, v_scales, block, key, position, end,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state after the TILE keys from `key` on; `block` is the place of their block's first token in the cache."""
    d = tl.arange(0, q.shape[1])
    d = tl.minimum(d >> 4, D // 16 - 1) * 16 + (d & 15) if D < q.shape[1] else d  # surplus ones repeat the last 16
    t = tl.arange(0, TILE)
    number = key + t  # places in the sequence
    first = block + key % BLOCK_SIZE  # the tile's first token
    k_tile = k_cache + (block * D + key % BLOCK_SIZE * 4) + ((d >> 2) * (4 * BLOCK_SIZE) + (d & 3))[:, None]
    k_tile += t[None, :] * 4  # [DIM, TILE]
    v_tile = v_cache + first * D + ((t >> 2) * (4 * D) + (t & 3))[:, None] + d[None, :] * 4  # [TILE, DIM]
    scores = tl.dot(q, tl.load(k_tile), out_dtype=tl.int32).to(tl.float32) * tl.load(k_scales + first + t)[None, :]
    scores = tl.where(number[None, :] <= position[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * q_scales)
    shift = tl.broadcast_to(-finite(new_peak)[:, None], scores.shape)
    weights = tl.exp2(tl.fma(scores, tl.broadcast_to(q_scales[:, None], scores.shape), shift))
    kept = tl.exp2(peak - finite(new_peak))
    v_scale = tl.load(v_scales + first + t, mask=number < end, other=0.0)
    total = tl.fma(total, kept, tl.sum(weights, axis=1))
    weights *= v_scale[None, :]
    bits = weights.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered as the weights are, from 0 on; NaN is the largest
    largest = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    inverse = tl.where(largest > 1e-30, 127.0 / largest, 0.0)
    half = tl.full(weights.shape, 0.5, tl.float32)
    p = tl.fma(weights, tl.broadcast_to(inverse[:, None], weights.shape), half).to(tl.int32) & 127
    products = tl.dot(p.to(tl.int8), tl.load(v_tile), out_dtype=tl.int32).to(tl.float32)
    scale = tl.broadcast_to((largest * (1.0 / 127.0))[:, None], sums.shape)
    return tl.fma(products, scale, sums * kept[:, None]), new_peak, total
