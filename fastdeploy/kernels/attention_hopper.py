"""Attention of prompts on Hopper.

Keys and values come by the tensor memory accelerator, and the scores of the next tile are under way on the tensor cores
while this tile's go through the softmax (as in FlashAttention-3; Shah et al., 2024):

    tensor cores    q . k of tile 0 | q . k of tile 1 | p . v of tile 0 | q . k of tile 2 | p . v of tile 1 | ...
    the others                      | softmax of tile 0 ...             | softmax of tile 1 ...             | ...

What is computed is what `attention.py` says.
"""

from typing import Any

import triton
import triton.language as tl

from fastdeploy.kernels.attention_rows import (
    add_columns,
    empty_part,
    find_sequence,
    finite,
    load_queries,
    merge,
    store_attended,
)
from fastdeploy.kernels.launch import Target, next_power_of_2, wait_for_inputs
from fastdeploy.kernels.rope import HeadLayout, KVBlocks


@triton.jit
def _next_scores(
    scores, place, peak, total, q, k_tiles, block_table, kv_head, position, key, end, log2_scale,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Begins the scores of the tile of keys after `key`'s, and takes `key`'s, which are done, through the softmax.

    Returns the next tile's scores and place in the cache; this one's weights; peak and total with them; what is kept of
    the sums before them.
    """
    following = tl.minimum(key + TILE, (end - 1) // TILE * TILE)  # after the last tile: the last once more
    block = tl.load(block_table + following // BLOCK_SIZE)
    next_place = (block * KV_HEADS + kv_head) * BLOCK_SIZE + following % BLOCK_SIZE
    next_scores = tl.dot(q, k_tiles.load([next_place, 0]).T)
    if MASKED:
        scores = tl.where((key + tl.arange(0, TILE))[None, :] <= position[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * log2_scale)
    shift = tl.broadcast_to(-finite(new_peak)[:, None], scores.shape)
    weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, log2_scale, tl.float32), shift)).to(q.dtype)
    kept = tl.exp2(peak - finite(new_peak))
    return next_scores, next_place, weights, new_peak, add_columns(total, kept, weights), kept


@triton.jit
def _attend_split(
    q, k_tiles, v_tiles, block_table, kv_head, position, first, seen_by_all, end, log2_scale,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state of the keys of one split, as `_attend` of attention.py; keys and values by tensor descriptors."""
    sums, peak, total = empty_part(q.shape[0], q.shape[1])
    place = (tl.load(block_table + first // BLOCK_SIZE) * KV_HEADS + kv_head) * BLOCK_SIZE + first % BLOCK_SIZE
    scores = tl.dot(q, k_tiles.load([place, 0]).T)
    unmasked = tl.minimum(tl.maximum(seen_by_all // TILE * TILE, first), end)
    for key in range(first, unmasked, TILE):
        scores, next_place, weights, peak, total, kept = _next_scores(
            scores, place, peak, total, q, k_tiles, block_table, kv_head, position, key, end, log2_scale,
            KV_HEADS, BLOCK_SIZE, TILE, False,
        )  # fmt: skip
        sums = tl.dot(weights, v_tiles.load([place, 0]), sums * kept[:, None])
        place = next_place
    for key in range(unmasked, end, TILE):
        scores, next_place, weights, peak, total, kept = _next_scores(
            scores, place, peak, total, q, k_tiles, block_table, kv_head, position, key, end, log2_scale,
            KV_HEADS, BLOCK_SIZE, TILE, True,
        )  # fmt: skip
        exists = (key + tl.arange(0, TILE) < end)[:, None]
        v = v_tiles.load([place, 0])
        sums = tl.dot(weights, tl.where(exists, v, 0.0).to(v.dtype), sums * kept[:, None])
        place = next_place
    return sums, peak, tl.max(total, axis=1)


@triton.jit(do_not_specialize=["num_decodes", "num_seqs", "max_blocks", "cache_rows"])
def prefill_kernel(
    out, out_scales, out_sums, qkv, k_cache, v_cache, cu_seqlens, context_lens, block_tables,
    num_decodes, num_seqs, max_blocks, log2_scale, cache_rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, OPERAND: tl.constexpr, BLOCK_M: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """What `_attention_kernel` of attention.py does, for prompts; of the cache's rows, one per token and KV head, there
    are `cache_rows`."""
    wait_for_inputs(EARLY)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys begin, so that none ends long after all
    sequence, first_tile = find_sequence(tile, cu_seqlens, num_decodes, num_seqs, GROUP, BLOCK_M)
    first_token = tl.load(cu_seqlens + sequence)
    first_row = (tile - first_tile) * BLOCK_M
    count = tl.load(cu_seqlens + sequence + 1) - first_token
    if first_row < count * GROUP:
        past = tl.load(context_lens + sequence) - count
        row = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        real = row < count * GROUP
        row = tl.minimum(row, count * GROUP - 1)
        q = load_queries(qkv, first_token * GROUP + row, kv_head, HEADS, KV_HEADS, D, DIM, OPERAND)
        position = past + row // GROUP
        seen_by_all = past + first_row // GROUP + 1
        end = past + tl.minimum((first_row + BLOCK_M - 1) // GROUP + 1, count)
        block_table = block_tables + sequence.to(tl.int64) * max_blocks
        k_tiles = tl.make_tensor_descriptor(k_cache, [cache_rows, D], [D, 1], [TILE, DIM])
        v_tiles = tl.make_tensor_descriptor(v_cache, [cache_rows, D], [D, 1], [TILE, DIM])
        sums, peak, total = _attend_split(
            q, k_tiles, v_tiles, block_table, kv_head, position, 0, seen_by_all, tl.minimum(end, SPLIT), log2_scale,
            KV_HEADS, BLOCK_SIZE, TILE,
        )  # fmt: skip
        for first in range(SPLIT, end, SPLIT):
            more_sums, more_peak, more_total = _attend_split(
                q, k_tiles, v_tiles, block_table, kv_head, position, first, seen_by_all,
                tl.minimum(end, first + SPLIT), log2_scale, KV_HEADS, BLOCK_SIZE, TILE,
            )  # fmt: skip
            sums, peak, total = merge(sums, peak, total, more_sums, more_peak, more_total)
        row += first_token * GROUP
        store_attended(out, out_scales, out_sums, sums, total, row, real, kv_head, HEADS, KV_HEADS, D, DIM)


def prefill_tiles(target: Target, heads: HeadLayout, cache: KVBlocks, operand: str) -> dict[str, Any] | None:
    """The tile rule of `prefill_kernel`, or None where it can't be used."""
    dim, rows = next_power_of_2(heads.head_dim), max(64, next_power_of_2(heads.group))
    hopper = target.kind == "cuda" and target.arch == 90
    if not hopper or operand != cache.k_cache.dtype or operand not in ("bfloat16", "float16") or dim > 128:
        return None
    if cache.block_size < 64 or heads.head_dim % 8 or rows > 64:  # 16 bytes, the unit of descriptors
        return None
    return {"DIM": dim, "TILE": 64, "BLOCK_M": rows, "num_warps": 4, "num_stages": 2}
