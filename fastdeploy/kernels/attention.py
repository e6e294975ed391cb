"""Paged attention over a mixed batch: decodes (one new token each) and chunks of prompts, grouped heads, block tables.

    out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h / group]) v[j, h / group]      over the keys j <= position of t

    qkv [T, (H + 2 KVH) * D]                    only q is read; the new keys and values are already in the cache
    k_cache [blocks, KVH, D, block_size]        transposed, so that a tile of keys is a right operand of q.k as it lies;
                                                on GPUs, whose tensor cores take either, [blocks, KVH, block_size, D]
    v_cache [blocks, KVH, block_size, D]
    k_scales, v_scales [blocks, KVH, block_size]   of an int8 cache, see rope.py
    block_tables [sequences, max_blocks]        key j of a sequence is in its block table[j // block_size]
    out [T, H * D]                              floats or, for the int8 layer that follows, `QuantisedRows`

Tiles. The rows of a query tile are the (token, query head) pairs that share a KV head: row r is token r // group, head
r % group, so that keys and values are read once for the whole group, whatever its size. A tile of keys is part of one
block. Tiles of keys that no row may see are never visited; only those that some row may not see need a mask.

               keys ->  | split 0: 256 keys     | split 1             | ...
    rows of tokens  . . . . . . . . . . . . . . . . . . \\               \\ = the causal edge
    4, 5, 6, ...    . . . . . . . . . . . . . . . . . . . . \\

Splits. The softmax is computed over splits of `split_keys` keys at fixed positions and the splits' states are merged in
ascending order, always: a row's sum is done in one order only, whether one program walks over the splits or, for the
few decodes of a small batch, every split is a program of its own (`_split_kernel`) and a second launch merges
(`_merge_kernel`). What that fixed order costs: a merge every 256 keys. A decode of 512 keys takes 23 us on one core
of a CPU (9 query heads of 64, 3 KV heads), without merges 22; of 4096 keys 178, without 169. On GPUs it is every 1024
keys: a prompt's query tile has no registers left for a second state, and parks it in memory during a split.

Prompts on Hopper have a kernel of their own, attention_hopper.py. An int8 cache's scales belong to keys, so they are
factors of the scores and of the weights, one for each key of a tile. GPUs turn the integers into floats before they
multiply; CPUs multiply them as they are, attention_int8.py, from a cache that lies as rope.py says.

    q . k[j] = k_scales[j] (q . kq[j]),        sum_j w[j] v[j] = sum_j (w[j] v_scales[j]) vq[j]

Cost: a decode reads its context once, 2 * context * KVH * D elements, bound by memory; prefill is 4 * D FLOPs per
(query head, key) pair, bound by arithmetic. Grouping, splits and the search for a program's sequence follow vLLM's
unified Triton attention; the fixed split size follows Thinking Machines' work on batch invariance.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.attention_hopper import prefill_kernel, prefill_tiles
from fastdeploy.kernels.attention_int8 import add_int8_keys, quantise_queries
from fastdeploy.kernels.attention_rows import (
    add_columns,
    empty_part,
    empty_state,
    find_sequence,
    finite,
    head_mask,
    load_queries,
    merge,
    store_attended,
)
from fastdeploy.kernels.launch import (
    FLOATS,
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
from fastdeploy.kernels.quantised import GROUP, QuantisedRows
from fastdeploy.kernels.rope import HeadLayout, KVBlocks

SPLIT, GPU_SPLIT = 256, 1024  # keys; a multiple of every block size. Part of the arithmetic: it decides on last bits.


@dataclass(frozen=True)
class AttentionBatch:
    """Who attends to what in one step. Decodes come first: sequence i < num_decodes is the one token i.

    num_decodes, num_seqs, max_query_len: known on the host; max_query_len is the longest prompt chunk.
    num_splits: at least ceil(longest context of a decode / split_keys()); more is right too, if slower.
    cu_seqlens [num_seqs + 1] int32: sequence i has the tokens cu_seqlens[i] to cu_seqlens[i + 1] of the step.
    context_lens [num_seqs] int32: keys that the last token of a sequence sees, itself included; 0 for padding.
    block_tables [num_seqs, max_blocks] int32.
    """

    num_decodes: int
    num_seqs: int
    max_query_len: int
    num_splits: int
    cu_seqlens: TensorView
    context_lens: TensorView
    block_tables: TensorView


# Keys in floats


@triton.jit
def _add_part(sums, peak, total, part_sums, part_peak, part_total):
    """The state with that of a split that is done."""
    return merge(sums, peak, total, part_sums, part_peak, tl.max(part_total, axis=1))


@triton.jit
def _add_keys(
    sums, peak, total, q, k_cache, v_cache, k_scales, v_scales, block, key, position, end, log2_scale,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BY_TOKEN: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state after the TILE keys from `key` on; `block` is the place of their block's first token in the cache.

    MASKED: some row may not see some of them, those from `end` on exist for no row and may hold anything, even NaN.
        (NaN in the value of a key that exists reaches rows of its tile that may not see it, too: 0 NaN is NaN.)
    """
    DIM: tl.constexpr = q.shape[1]
    d = tl.arange(0, DIM)
    t = key % BLOCK_SIZE + tl.arange(0, TILE)  # places in the block
    number = key + tl.arange(0, TILE)  # places in the sequence
    k_tile = (
        k_cache + block * D + (t[None, :] * D + d[:, None] if BY_TOKEN else d[:, None] * BLOCK_SIZE + t[None, :])
    )  # [DIM, TILE]
    if MASKED and not BY_TOKEN:  # a CPU multiplies with the keys that exist only
        k = tl.load(k_tile, mask=head_mask(d, D, DIM)[:, None] & (number < end)[None, :], other=0.0)
    else:
        k = tl.load(k_tile, mask=head_mask(d, D, DIM)[:, None], other=0.0)
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")  # [rows, TILE]
    if k_scales is not None:
        scores *= tl.load(k_scales + block + t)[None, :]
    if MASKED:
        scores = tl.where(number[None, :] <= position[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * log2_scale)
    shift = tl.broadcast_to(-finite(new_peak)[:, None], scores.shape)
    weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, log2_scale, tl.float32), shift))
    kept = tl.exp2(peak - finite(new_peak))
    if len(total.shape) == 2:
        total = add_columns(total, kept, weights.to(q.dtype))
    else:
        total = tl.fma(total, kept, tl.sum(weights, axis=1))
    if v_scales is not None:
        exists = number < end if MASKED else tl.full([TILE], True, tl.int1)
        weights *= tl.load(v_scales + block + t, mask=exists, other=0.0)[None, :]
    v_tile = v_cache + block * D + t[:, None] * D + d[None, :]
    if MASKED and v_scales is None:  # int8 is never NaN
        v = tl.load(v_tile, mask=(number < end)[:, None] & head_mask(d, D, DIM)[None, :], other=0.0)
    else:
        v = tl.load(v_tile, mask=head_mask(d, D, DIM)[None, :], other=0.0)
    sums = tl.dot(weights.to(q.dtype), v.to(q.dtype), sums * kept[:, None], input_precision="ieee")
    return sums, new_peak, total


@triton.jit
def _attend(
    q, q_scales, k_cache, v_cache, k_scales, v_scales, block_table, kv_head, position, first, seen_by_all, end,
    log2_scale, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BY_TOKEN: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """The state of the keys from `first`, where a split begins, to `end`: its splits' states, merged.

    q: [rows, DIM]; q_scales: [rows], or None where floats are multiplied; position: [rows], a row sees keys up to it;
    seen_by_all: the number of keys that every row sees.
    FLAT: for GPUs, one loop over all tiles, because loads are pipelined within a loop, and a second for those that need
        a mask. On a CPU a loop for each split and a mask for each tile are no slower, and half the code to compile.
    """
    sums, peak, total = empty_state(q.shape[0], q.shape[1])
    if FLAT:
        part_sums, part_peak, part_total = empty_part(q.shape[0], q.shape[1])  # the split under way
        unmasked = tl.minimum(tl.maximum(seen_by_all // TILE * TILE, first), end)
        for key in range(first, unmasked, TILE):
            if key % SPLIT == 0:
                sums, peak, total = _add_part(sums, peak, total, part_sums, part_peak, part_total)
                part_sums, part_peak, part_total = empty_part(q.shape[0], q.shape[1])
            block = (tl.load(block_table + key // BLOCK_SIZE).to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE
            part_sums, part_peak, part_total = _add_keys(
                part_sums, part_peak, part_total, q, k_cache, v_cache, k_scales, v_scales, block, key, position, end,
                log2_scale, D, BLOCK_SIZE, BY_TOKEN, TILE, False,
            )  # fmt: skip
        for key in range(unmasked, end, TILE):
            if key % SPLIT == 0:
                sums, peak, total = _add_part(sums, peak, total, part_sums, part_peak, part_total)
                part_sums, part_peak, part_total = empty_part(q.shape[0], q.shape[1])
            block = (tl.load(block_table + key // BLOCK_SIZE).to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE
            part_sums, part_peak, part_total = _add_keys(
                part_sums, part_peak, part_total, q, k_cache, v_cache, k_scales, v_scales, block, key, position, end,
                log2_scale, D, BLOCK_SIZE, BY_TOKEN, TILE, True,
            )  # fmt: skip
        sums, peak, total = _add_part(sums, peak, total, part_sums, part_peak, part_total)
    else:
        for start in range(first, end, SPLIT):
            more_sums, more_peak, more_total = empty_state(q.shape[0], q.shape[1])
            for key in range(start, tl.minimum(start + SPLIT, end), TILE):
                block = (tl.load(block_table + key // BLOCK_SIZE).to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE
                if q_scales is not None:
                    more_sums, more_peak, more_total = add_int8_keys(
                        more_sums, more_peak, more_total, q, q_scales, k_cache, v_cache, k_scales, v_scales, block, key,
                        position, end, D, BLOCK_SIZE, TILE,
                    )  # fmt: skip
                else:
                    more_sums, more_peak, more_total = _add_keys(
                        more_sums, more_peak, more_total, q, k_cache, v_cache, k_scales, v_scales, block, key, position,
                        end, log2_scale, D, BLOCK_SIZE, BY_TOKEN, TILE, True,
                    )  # fmt: skip
            sums, peak, total = merge(sums, peak, total, more_sums, more_peak, more_total)
    return sums, peak, total


# The kernels


@triton.jit(do_not_specialize=["num_decodes", "num_seqs", "max_blocks"])
def _attention_kernel(
    out, out_scales, out_sums, qkv, k_cache, v_cache, k_scales, v_scales, cu_seqlens, context_lens, block_tables,
    num_decodes, num_seqs, max_blocks, log2_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BY_TOKEN: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, OPERAND: tl.constexpr, FLAT: tl.constexpr,
    IN_INTEGERS: tl.constexpr, BLOCK_M: tl.constexpr, DECODE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One query tile of one KV head, over all its splits. DECODE: a tile is one sequence's only token."""
    wait_for_inputs(EARLY)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    if FLAT:
        kv_head = tl.program_id(1)
        tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys begin: none ends long after all
    else:
        kv_head = tl.program_id(0)
        tile = tl.program_id(1)  # in the order of rows, so that a CPU's core has the same rows in every kernel
    if DECODE:
        sequence = tile
        first_token = sequence
        first_row = 0
        count = 1
    else:
        sequence, first_tile = find_sequence(tile, cu_seqlens, num_decodes, num_seqs, GROUP, BLOCK_M)
        first_token = tl.load(cu_seqlens + sequence)
        first_row = (tile - first_tile) * BLOCK_M
        count = tl.load(cu_seqlens + sequence + 1) - first_token
    if first_row < count * GROUP:
        past = tl.load(context_lens + sequence) - count  # keys before this step's
        row = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        real = row < count * GROUP
        row = tl.minimum(row, count * GROUP - 1)  # surplus rows repeat the last one
        q = load_queries(qkv, first_token * GROUP + row, kv_head, HEADS, KV_HEADS, D, DIM, OPERAND)
        q, q_scales = quantise_queries(q, log2_scale, IN_INTEGERS)
        position = past + row // GROUP
        seen_by_all = past + first_row // GROUP + 1
        end = past + tl.minimum((first_row + BLOCK_M - 1) // GROUP + 1, count)
        block_table = block_tables + sequence.to(tl.int64) * max_blocks
        sums, _, total = _attend(
            q, q_scales, k_cache, v_cache, k_scales, v_scales, block_table, kv_head, position, 0, seen_by_all, end,
            log2_scale, KV_HEADS, D, BLOCK_SIZE, BY_TOKEN, TILE, SPLIT, FLAT,
        )  # fmt: skip
        row += first_token * GROUP
        store_attended(out, out_scales, out_sums, sums, total, row, real, kv_head, HEADS, KV_HEADS, D, DIM)


@triton.jit(do_not_specialize=["num_splits", "max_blocks"])
def _split_kernel(
    partials, qkv, k_cache, v_cache, k_scales, v_scales, context_lens, block_tables, num_splits, max_blocks, log2_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BY_TOKEN: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, OPERAND: tl.constexpr, FLAT: tl.constexpr,
    IN_INTEGERS: tl.constexpr, BLOCK_M: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One split of one decode and KV head: its state to partials [decodes, H, num_splits, D + 2]."""
    wait_for_inputs(EARLY)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    end = tl.load(context_lens + sequence)
    if split * SPLIT < end:
        row = tl.arange(0, BLOCK_M)  # [BLOCK_M] heads of the group
        real = row < GROUP
        row = tl.minimum(row, GROUP - 1)
        q = load_queries(qkv, sequence * GROUP + row, kv_head, HEADS, KV_HEADS, D, DIM, OPERAND)
        q, q_scales = quantise_queries(q, log2_scale, IN_INTEGERS)
        position = tl.full([BLOCK_M], 0, tl.int32) + (end - 1)
        sums, peak, total = _attend(
            q, q_scales, k_cache, v_cache, k_scales, v_scales, block_tables + sequence.to(tl.int64) * max_blocks,
            kv_head, position, split * SPLIT, end, tl.minimum(end, split * SPLIT + SPLIT), log2_scale,
            KV_HEADS, D, BLOCK_SIZE, BY_TOKEN, TILE, SPLIT, FLAT,
        )  # fmt: skip
        d = tl.arange(0, DIM)
        start = partials + ((sequence * HEADS + kv_head * GROUP + row).to(tl.int64) * num_splits + split) * (D + 2)
        tl.store(start[:, None] + d[None, :], sums, mask=real[:, None] & head_mask(d, D, DIM)[None, :])
        tl.store(start + D, peak, mask=real)
        tl.store(start + D + 1, total, mask=real)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    out, out_scales, out_sums, partials, context_lens, num_splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, AT_ONCE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The states of one decode and KV head, merged in ascending order as `_attention_kernel` does.

    AT_ONCE: so many are loaded before the first of them is merged; what is past the end merges as a state of no keys.
    """
    wait_for_inputs(EARLY)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    real = row < GROUP
    row = tl.minimum(row, GROUP - 1)
    d = tl.arange(0, DIM)
    start = partials + (sequence * HEADS + kv_head * GROUP + row).to(tl.int64) * num_splits * (D + 2)
    sums, peak, total = empty_state(BLOCK_M, DIM)
    num_used = tl.cdiv(tl.load(context_lens + sequence), SPLIT)
    for first in range(0, num_used, AT_ONCE):
        for split in tl.static_range(AT_ONCE):
            used = tl.full([BLOCK_M], first + split, tl.int32) < num_used
            at = start + (first + split) * (D + 2)
            inside = used[:, None] & head_mask(d, D, DIM)[None, :]
            more_sums = tl.load(at[:, None] + d[None, :], mask=inside, other=0.0)
            more_peak = tl.load(at + D, mask=used, other=float("-inf"))
            sums, peak, total = merge(
                sums, peak, total, more_sums, more_peak, tl.load(at + D + 1, mask=used, other=0.0)
            )
    row += sequence * GROUP
    store_attended(out, out_scales, out_sums, sums, total, row, real, kv_head, HEADS, KV_HEADS, D, DIM)


# The launcher


def split_keys() -> int:
    """Keys of a split on the active target."""
    return SPLIT if target().is_cpu else GPU_SPLIT


def tiles(
    target: Target, heads: HeadLayout, cache: KVBlocks, query_len: int, in_splits: bool = False
) -> dict[str, Any]:
    """Tile rule. The tile of keys follows from the block size alone: 64 keys, or the block where that is smaller.

    On a CPU the query tile fits the rows there are, up to 32 (see linear.py on why it may depend on them there): with
    64, the tiles of a head of 128 leave the first cache (512 tokens, 16 heads: 26 ms on a core, with 32 15.6). On an
    NVIDIA GPU it is 16 rows for decodes, with 2 warps, so that many programs have loads under way (an H200: 64 decodes
    of 4096 keys at 4.3 TB/s; 64 rows 3.9), and 64 for prompts. It is 64 for both where the order of a product's sum
    differs by tile: for int8 caches, whose conversion to operands reorders them, and for AMD's matrix instructions.
    """
    shape: dict[str, Any] = {"DIM": next_power_of_2(heads.head_dim), "TILE": min(cache.block_size, 64)}
    rows = next_power_of_2(heads.group * query_len)
    if target.is_cpu:
        # one size for decodes, two for prompts: every size is a compilation of 0.3 s
        return {**shape, "BLOCK_M": rows if query_len == 1 else 16 if rows <= 16 else 32}
    small = cache.k_cache.dtype in ("bfloat16", "float16") and shape["DIM"] <= 128
    if target.kind == "cuda" and query_len == 1 and cache.k_cache.dtype != "int8":
        shape["BLOCK_M"] = max(16, next_power_of_2(heads.group))
        if not small or shape["BLOCK_M"] > 16:
            return {**shape, "num_warps": 4, "num_stages": 2}
        if in_splits:  # few programs: more loads for each. 32k keys take 5 % less, 4k 25 %
            return {**shape, "num_warps": 4, "num_stages": 6}
        return {**shape, "num_warps": 2, "num_stages": 4}
    shape["BLOCK_M"] = max(64, next_power_of_2(heads.group))
    # Without wgmma 4 warps spill registers; where int8 is converted on its way a second stage does, too.
    if target.kind == "cuda" and (not small or (target.arch == 80 and shape["DIM"] > 64)):
        return {**shape, "num_warps": 8, "num_stages": 2 if small else 1}
    return {**shape, "num_warps": 4, "num_stages": 2 if target.kind == "cuda" else 1}


def splits_in_parallel(target: Target, num_decodes: int, heads: HeadLayout, num_splits: int) -> bool:
    """Whether decodes are too few to keep the processor busy with one program per sequence and KV head."""
    return num_splits > 1 and num_decodes * heads.num_kv_heads < 4 * target.parallelism


def workspace_shape(max_decodes: int, heads: HeadLayout, max_context: int) -> tuple[int, int, int, int]:
    """The shape of the float32 workspace for steps of up to `max_decodes` decodes of up to `max_context` tokens."""
    return (max_decodes, heads.num_heads, cdiv(max_context, split_keys()), heads.head_dim + 2)


def paged_attention(
    out: Any, qkv: Any, cache: KVBlocks, batch: AttentionBatch, heads: HeadLayout, scale: float, workspace: Any
) -> None:
    """Attention of every token of the step over the keys of its own sequence up to itself.

    Args:
        out: [T, H * D], any float type, or `QuantisedRows` of 8 bits where D is a multiple of 32.
        qkv: [T, heads.qkv_width], q turned by `rope_and_cache`, which has also written the new keys and values.
        cache: of the layer that qkv belongs to; block_size a power of two from 16 to 256.
        batch: who attends to what. Its tensors' values are not checked: they lie on the device.
        scale: factor of the scores, above 0, usually 1 / sqrt(D).
        workspace: float32 of at least `workspace_shape` elements.
    """
    qkv, workspace = view(qkv), view(workspace)
    written = out.tensors[:3] if isinstance(out, QuantisedRows) else (view(out), None, None)
    cache.expect(heads)
    _check(out, qkv, batch, heads, cache.block_size)
    here = target()
    common = {
        "HEADS": heads.num_heads, "KV_HEADS": heads.num_kv_heads, "D": heads.head_dim, "BLOCK_SIZE": cache.block_size,
        "BY_TOKEN": cache.keys_by_token, "SPLIT": split_keys(), "OPERAND": operand_dtype(here, qkv),
        "FLAT": not here.is_cpu, "IN_INTEGERS": cache.in_quads, **early(here),
    }  # fmt: skip
    log2_scale = scale * 1.4426950408889634  # exp(x) = 2^(x log2(e))
    max_blocks = batch.block_tables.shape[1]
    read = (qkv, *cache.tensors())
    sequences = (batch.cu_seqlens, batch.context_lens, batch.block_tables)
    walked = (*written, *read, *sequences, batch.num_decodes, batch.num_seqs, max_blocks, log2_scale)
    in_splits = splits_in_parallel(here, batch.num_decodes, heads, batch.num_splits)
    rule = tiles(here, heads, cache, query_len=1, in_splits=in_splits)
    if in_splits:
        _launch_splits(written, read, batch, workspace, log2_scale, {**common, **rule})
    else:
        _launch_tiles(batch.num_decodes, walked, DECODE=True, **common, **rule)
    if batch.num_seqs > batch.num_decodes:
        _launch_prompts(walked, cache, batch, heads, common)


def _check(out: Any, qkv: TensorView, batch: AttentionBatch, heads: HeadLayout, block_size: int) -> None:
    if block_size & (block_size - 1) or not 16 <= block_size <= SPLIT:
        raise ValueError(f"block_size is {block_size}; attention takes powers of two from 16 to {SPLIT}")
    count = qkv.shape[0]
    expect("qkv", qkv, (count, heads.qkv_width), *FLOATS)
    width = heads.num_heads * heads.head_dim
    if isinstance(out, QuantisedRows):
        expect("out", out.values, (count, width), "int8")
        if heads.head_dim % GROUP or out.low is not None:
            raise ValueError(f"heads of {heads.head_dim} can't be written as whole groups of {GROUP} in 8 bits")
    else:
        expect("out", view(out), (count, width), *FLOATS)
    expect("cu_seqlens", batch.cu_seqlens, (batch.num_seqs + 1,), "int32")
    expect("context_lens", batch.context_lens, (batch.num_seqs,), "int32")
    expect("block_tables", batch.block_tables, (batch.num_seqs, batch.block_tables.shape[1]), "int32")


def _launch_prompts(
    walked: tuple[Any, ...], cache: KVBlocks, batch: AttentionBatch, heads: HeadLayout, constexprs: dict[str, Any]
) -> None:
    """The chunks of prompts; `walked` are the arguments of `_attention_kernel`."""
    out, _, _, qkv, *_ = walked
    quick = prefill_tiles(target(), heads, cache, qkv.dtype)
    rule = quick or tiles(target(), heads, cache, batch.max_query_len)
    rows = (qkv.shape[0] - batch.num_decodes) * heads.group
    count = rows // rule["BLOCK_M"] + batch.num_seqs - batch.num_decodes
    if quick is None:
        _launch_tiles(count, walked, DECODE=False, **constexprs, **rule)
    else:
        known = {name: value for name, value in constexprs.items() if name not in ("BY_TOKEN", "FLAT", "IN_INTEGERS")}
        inputs = (out, None, None, qkv, cache.k_cache, cache.v_cache, *walked[8:])
        grid = (count, heads.num_kv_heads)
        launch(prefill_kernel, grid, *inputs, prod(cache.v_cache.shape[:3]), **known, **rule)


def _launch_tiles(count: int, walked: tuple[Any, ...], **constexprs: Any) -> None:
    """`_attention_kernel` for so many query tiles of every KV head."""
    grid = (count, constexprs["KV_HEADS"])
    launch(_attention_kernel, grid if constexprs["FLAT"] else grid[::-1], *walked, **constexprs)


def _launch_splits(
    written: tuple[TensorView | None, ...], read: tuple[TensorView | None, ...], batch: AttentionBatch,
    workspace: TensorView, log2_scale: float, constexprs: dict[str, Any],
) -> None:  # fmt: skip
    """The decodes, a program per split. written: out and, of integers, scales and sums; read: qkv and the cache."""
    kv_heads, splits = constexprs["KV_HEADS"], batch.num_splits
    needed = batch.num_decodes * constexprs["HEADS"] * splits * (constexprs["D"] + 2)
    expect("workspace", workspace, workspace.shape, "float32")
    if prod(workspace.shape) < needed:
        raise ValueError(f"the workspace has {prod(workspace.shape)} elements; {splits} splits need {needed}")
    inputs = (*read, batch.context_lens, batch.block_tables, splits, batch.block_tables.shape[1])
    launch(_split_kernel, (splits, kv_heads, batch.num_decodes), workspace, *inputs, log2_scale, **constexprs)
    walking = ("BLOCK_SIZE", "BY_TOKEN", "TILE", "OPERAND", "FLAT", "IN_INTEGERS")
    merging = {name: value for name, value in constexprs.items() if name not in walking}
    if constexprs["FLAT"]:  # 16 loads under way hide their latency; surplus rows would be loads, too
        merging |= {"AT_ONCE": 16, "BLOCK_M": next_power_of_2(constexprs["HEADS"] // kv_heads), "num_warps": 2}
    else:
        merging["AT_ONCE"] = 1
    launch(_merge_kernel, (kv_heads, batch.num_decodes), *written, workspace, batch.context_lens, splits, **merging)


def attention_reference(
    q: np.ndarray, caches: tuple[np.ndarray, np.ndarray], block_table: np.ndarray, context: int, scale: float
) -> np.ndarray:
    """The specification for one sequence, in float64: q [tokens, H, D], its last token sees `context` keys."""
    k_cache, v_cache = caches
    tokens, num_heads, width = q.shape
    kv_heads, block_size = v_cache.shape[1:3]
    blocks = block_table[: cdiv(context, block_size)]
    keys = k_cache[blocks].astype(np.float64).transpose(1, 0, 3, 2).reshape(kv_heads, -1, width)[:, :context]
    values = v_cache[blocks].astype(np.float64).transpose(1, 0, 2, 3).reshape(kv_heads, -1, width)[:, :context]
    keys, values = (np.repeat(x, num_heads // kv_heads, axis=0) for x in (keys, values))  # [H, context, D]
    scores = np.einsum("thd,hkd->htk", q.astype(np.float64), keys) * scale
    unseen = np.arange(context)[None, :] > (context - tokens + np.arange(tokens))[:, None]
    scores = np.where(unseen[None], -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("htk,hkd->thd", weights / weights.sum(axis=-1, keepdims=True), values)
