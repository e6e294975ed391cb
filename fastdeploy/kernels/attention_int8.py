"""Attention in integers, over an int8 cache on CPUs: how a tile of keys is added to a row's softmax.

    q . k[j] = q_scale k_scales[j] (q8 . k8[j])                     q8: the row's query in int8, one scale for it

    w[j] = 2^(score[j] - peak) v_scales[j] = p_scale p[j]           p: 0 ... 127, one scale for a row and tile
    sum_j w[j] v8[j] = p_scale (p . v8)

Both products are of bytes, summed exactly in 32 bits; a CPU makes four times as many of them as of floats. It
multiplies four at a time, so the cache has fours of what is summed over next to each other (rope.py):

    k_cache [blocks, KVH, D / 4, block_size, 4]       q8: d..d+3 | times    j: d..d+3 | j+1: d..d+3 | ...
    v_cache [blocks, KVH, block_size / 4, D, 4]        p: j..j+3 | times    d: j..j+3 | d+1: j..j+3 | ...

p_scale is what the largest w of the tile is divided by, to be 127. (A bound would do for the arithmetic. But the first
token of a text often has most of the weight and a small value: with v_scales' largest in place of w's, KL to the
model in floats is 0.0039, with w's 0.0016. p in 8 bits, q in 15: 0.0017, 0.0012. SmolLM2, bench/accuracy.py.)

A row's p depends on that row and on fixed tiles of keys alone, so its bits are the same however a batch is cut.
"""

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.attention_rows import finite
from fastdeploy.kernels.launch import cdiv
from fastdeploy.kernels.rope import to_int8_reference


@triton.jit
def quantise_queries(q, log2_scale, IN_INTEGERS: tl.constexpr):
    """q [rows, DIM] in int8 and its scales [rows], times what makes scores base 2. Unless IN_INTEGERS: q and None."""
    if IN_INTEGERS:
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
    """The state after the TILE keys from `key` on; `block` is the place of their block's first token in the cache.

    Keys from `end` on exist for no row: their bytes and scales may be anything.
    """
    DIM: tl.constexpr = q.shape[1]
    d = tl.arange(0, DIM)
    if DIM != D:  # surplus elements repeat the last 16: in q they are zeros, in the sums nobody reads them
        d = tl.minimum(d >> 4, D // 16 - 1) * 16 + (d & 15)
    t = tl.arange(0, TILE)
    number = key + t  # places in the sequence
    first = block + key % BLOCK_SIZE  # of the tile in the cache, tokens
    k_tile = k_cache + (block * D + key % BLOCK_SIZE * 4) + ((d >> 2) * (4 * BLOCK_SIZE) + (d & 3))[:, None]
    k_tile += t[None, :] * 4  # [DIM, TILE]
    v_tile = v_cache + first * D + ((t >> 2) * (4 * D) + (t & 3))[:, None] + d[None, :] * 4  # [TILE, DIM]

    scores = tl.dot(q, tl.load(k_tile), out_dtype=tl.int32).to(tl.float32) * tl.load(k_scales + first + t)[None, :]
    scores = tl.where(number[None, :] <= position[:, None], scores, float("-inf"))  # [rows, TILE]
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * q_scales)
    shift = tl.broadcast_to(-finite(new_peak)[:, None], scores.shape)
    weights = tl.exp2(tl.fma(scores, tl.broadcast_to(q_scales[:, None], scores.shape), shift))
    kept = tl.exp2(peak - finite(new_peak))
    total = tl.fma(total, kept, tl.sum(weights, axis=1))

    weights *= tl.load(v_scales + first + t, mask=number < end, other=0.0)[None, :]
    bits = (
        weights.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    )  # in the order of the weights, none of them below 0; NaN last
    largest = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    inverse = tl.broadcast_to(tl.where(largest > 1e-30, 127.0 / largest, 0.0)[:, None], weights.shape)
    p = tl.fma(weights, inverse, tl.full(weights.shape, 0.5, tl.float32)).to(tl.int32) & 127  # never more; now it shows
    products = tl.dot(p.to(tl.int8), tl.load(v_tile), out_dtype=tl.int32).to(tl.float32)  # [rows, DIM]
    p_scale = tl.broadcast_to((largest * (1.0 / 127.0))[:, None], sums.shape)
    return tl.fma(products, p_scale, sums * kept[:, None]), new_peak, total


def int8_attention_reference(
    q: np.ndarray, caches: tuple[np.ndarray, ...], block_table: np.ndarray, context: int, scale: float
) -> np.ndarray:
    """The specification for one sequence, in float64: q [tokens, H, D], its last token sees `context` keys; `caches`
    are the four tensors of `KVBlocks`."""
    block_size = caches[0].shape[3]
    tile_size = min(block_size, 64)
    k_cache, v_cache, k_scales, v_scales = (cache[block_table[: cdiv(context, block_size)]] for cache in caches)
    (tokens, num_heads, width), kv_heads = q.shape, k_scales.shape[1]
    keys = k_cache.transpose(1, 0, 3, 2, 4).reshape(kv_heads, -1, width)
    values = v_cache.transpose(1, 0, 2, 4, 3).reshape(kv_heads, -1, width)
    k_scales, v_scales = (scales.swapaxes(0, 1).reshape(kv_heads, -1) for scales in (k_scales, v_scales))
    out = np.zeros(q.shape)
    for t, h in np.ndindex(tokens, num_heads):
        group, seen = h * kv_heads // num_heads, context - tokens + t + 1
        q8, q_scale = to_int8_reference(q[t, h])
        scores = keys[group, :seen].astype(int) @ q8 * k_scales[group, :seen] * (q_scale * scale)
        weights = np.exp(scores - scores.max())
        for first in range(0, seen, tile_size):
            tile = slice(first, min(first + tile_size, seen))
            w = weights[tile] * v_scales[group, tile]
            p = np.floor(w * (127 / w.max()) + 0.5).astype(int)
            out[t, h] += p @ values[group, tile] * (w.max() / 127 / weights.sum())
    return out
