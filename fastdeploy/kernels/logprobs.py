"""Log probabilities: of a given token of each row, its rank, and the most probable tokens.

    normaliser[r] = ln sum_i exp(logits[r, i])
    logprob[r]    = logits[r, tokens[r]] - normaliser[r]
    rank[r]       = 1 + the number of tokens with a greater logit, or an equal one and a lower id
    top_ids[r]    = the tokens of rank 1 to n, in the order of their ids; top_logits[r] their logits, by which to sort
                    them (different logits may have equal log probabilities, once rounded)

Launches, after the peaks of all groups (selection.py):

    sums    R x chunks    sum of exp(l - l_max) and the tokens before the given one, of each chunk
    tops    R             adds up the chunks; finds the n-th greatest logit without sorting; writes what reaches it

Sums are fp32, 16 of them side by side over the groups of a chunk, then together, then chunk by chunk: an order that V
alone fixes. Memory beside the logits and the results: 8 bytes for each group of 64 logits (1024 on a GPU) and for each
chunk of 8192.

NaN or +inf in a row makes its log probabilities NaN, as nothing but -inf does; ids stay within bounds.

Cost: two walks over the logits, one of them with an exponential each, and the search. 49,152 logits of SmolLM2 on one
core of a CPU (AMD EPYC, Zen 4): 33 us without tops, 37 us with 5, 74 us with 128. Their LM head takes 280 us.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.launch import TensorView, cdiv, expect, launch, target, view
from fastdeploy.kernels.selection import (
    CHUNK,
    IMPOSSIBLE,
    INFINITE,
    count_reaching,
    find_peaks,
    greatest_peak,
    group_ids,
    key_of,
    load_logits,
    next_reaching,
    nth_peak,
    num_groups,
    search,
    tiles,
    value_of,
)

LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class LogprobOutputs:
    """What `token_logprobs` computes, a row per row of logits.

    Attributes:
        normaliser, logprob: [rows] float32.
        rank: [rows] int32, from 1.
        top_ids, top_logits: [rows, N] int32 and float32; of a row the first num_top entries are written.
    """

    normaliser: TensorView
    logprob: TensorView
    rank: TensorView
    top_ids: TensorView
    top_logits: TensorView


@dataclass(frozen=True)
class LogprobWorkspace:
    """What the launches of `token_logprobs` tell each other.

    Attributes:
        peaks, below: [rows, groups] int32, the greatest key of each group of logits, and scratch of the search.
        sums, before: [rows, chunks] float32 and int32, the exponentials and the tokens before the given one.
    """

    peaks: TensorView
    below: TensorView
    sums: TensorView
    before: TensorView


@triton.jit(do_not_specialize=["V", "groups", "chunks"])
def _sums_kernel(
    sums_out, before_out, logits, peaks, tokens, V, groups, chunks,
    GROUP: tl.constexpr, PER_CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    this = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = logits + this * V
    greatest = value_of(greatest_peak(peaks + this * groups, groups, BLOCK)[0])
    token = tl.load(tokens + this)
    key = key_of(tl.load(row + token, mask=(token >= 0) & (token < V), other=float("-inf")))
    sums = tl.zeros([16], tl.float32)
    before = tl.zeros([16], tl.int32)
    for group in range(chunk * PER_CHUNK, tl.minimum((chunk + 1) * PER_CHUNK, groups)):
        ids = group_ids(group, GROUP)
        values = load_logits(row, ids, V)
        keys = key_of(values)
        sums += tl.sum(tl.exp2((values - greatest) * 1.4426950408889634), axis=0)
        before += tl.sum(((keys > key) | ((keys == key) & (ids < token))).to(tl.int32), axis=0)
    tl.store(sums_out + this * chunks + chunk, tl.sum(sums, axis=0))
    tl.store(before_out + this * chunks + chunk, tl.sum(before, axis=0))


@triton.jit(do_not_specialize=["V", "groups", "chunks", "N", "num_top"])
def _tops_kernel(
    normaliser_out, logprob_out, rank_out, top_ids, top_logits, logits, tokens, peaks, below, sums, before,
    V, groups, chunks, N, num_top, GROUP: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    this = tl.program_id(0).to(tl.int64)
    row = logits + this * V
    peaks += this * groups
    below += this * groups
    total = tl.full([], 0.0, tl.float32)
    rank = tl.full([], 1, tl.int32)
    for chunk in range(0, chunks):
        total += tl.load(sums + this * chunks + chunk)
        rank += tl.load(before + this * chunks + chunk)
    key = greatest_peak(peaks, groups, BLOCK)[0]
    greatest = value_of(key)
    normaliser = greatest + tl.log2(total) * LN2
    token = tl.load(tokens + this)
    value = tl.load(row + token, mask=(token >= 0) & (token < V), other=float("-inf"))
    tl.store(normaliser_out + this, normaliser)
    tl.store(logprob_out + this, value - normaliser)
    tl.store(rank_out + this, rank)
    top_ids += this * N
    top_logits += this * N
    if key == INFINITE:  # NaN or +inf: any ids do
        for start in range(0, num_top, BLOCK):
            places = start + tl.arange(0, BLOCK)
            tl.store(top_ids + places, places, mask=places < num_top)
            tl.store(top_logits + places, greatest + places * 0.0, mask=places < num_top)
    elif num_top > 0:
        low = nth_peak(peaks, groups, num_top, IMPOSSIBLE, key + 1, BLOCK)
        limit = num_top.to(tl.int64) << 40
        spacing = tl.where(low == IMPOSSIBLE, 1.0, 0.0)
        threshold, ties, _dropped = search(
            row, peaks, below, V, groups, low, key + 1, spacing, limit, 1.0, 0, greatest, 0.0, GROUP, BLOCK, PIVOTS
        )
        _write_tops(top_ids, top_logits, row, peaks, V, groups, threshold, ties, GROUP, BLOCK)


@triton.jit
def _write_tops(top_ids, top_logits, row, peaks, V, groups, threshold, ties, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens above the key `threshold` and the first `ties` at it, in the order of their ids."""
    group = tl.full([], -1, tl.int32)
    written = tl.full([], 0, tl.int32)
    for _ in range(count_reaching(peaks, groups, threshold, BLOCK)):
        group = next_reaching(peaks, group + 1, threshold)
        ids = group * GROUP + tl.arange(0, GROUP)
        values = load_logits(row, ids, V)
        keys = key_of(values)
        tied = (keys == threshold).to(tl.int32)
        kept = (keys > threshold) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= ties))
        places = written + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(top_ids + places, ids, mask=kept)
        tl.store(top_logits + places, values, mask=kept)
        written += tl.sum(kept.to(tl.int32), axis=0)
        ties -= tl.sum(tied, axis=0)


def workspace_fields(max_rows: int, vocabulary: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and element type of every field of a `LogprobWorkspace` for up to `max_rows` rows on this target."""
    chunks = cdiv(vocabulary, CHUNK)
    return {
        "peaks": ((max_rows, num_groups(vocabulary)), "int32"),
        "below": ((max_rows, num_groups(vocabulary)), "int32"),
        "sums": ((max_rows, chunks), "float32"),
        "before": ((max_rows, chunks), "int32"),
    }


def output_fields(max_rows: int, max_top: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and element type of every field of `LogprobOutputs` for up to `max_rows` rows and `max_top` tokens each."""
    return {
        "normaliser": ((max_rows,), "float32"),
        "logprob": ((max_rows,), "float32"),
        "rank": ((max_rows,), "int32"),
        "top_ids": ((max_rows, max_top), "int32"),
        "top_logits": ((max_rows, max_top), "float32"),
    }


def token_logprobs(out: LogprobOutputs, logits: Any, tokens: Any, num_top: int, workspace: LogprobWorkspace) -> None:
    """Log probability and rank of a token of each row, and the `num_top` most probable tokens of the row.

    Args:
        out: for R rows or more, N >= num_top.
        logits: [R, V] float32, not changed.
        tokens: [R] int32; where one is no id of the vocabulary its log probability is -inf and its rank means nothing.
        num_top: from 0 to V. The entries of top_ids and top_logits lie in the order of ids, not of probability.
        workspace: for R rows or more.
    """
    logits, tokens = view(logits), view(tokens)
    count, vocabulary = logits.shape
    expect("logits", logits, (count, vocabulary), "float32")
    expect("tokens", tokens, (count,), "int32")
    _check(out, workspace, count, vocabulary, num_top)
    find_peaks(workspace.peaks.rows(count), logits)
    sizes = (vocabulary, workspace.peaks.shape[1], workspace.sums.shape[1])
    searching = tiles(target())
    group, block = searching["GROUP"], searching["BLOCK"]
    launch(
        _sums_kernel, (count, sizes[2]), workspace.sums, workspace.before, logits, workspace.peaks, tokens, *sizes,
        GROUP=group, PER_CHUNK=CHUNK // group, BLOCK=block,
    )  # fmt: skip
    results = (out.normaliser, out.logprob, out.rank, out.top_ids, out.top_logits)
    scratch = (workspace.peaks, workspace.below, workspace.sums, workspace.before)
    launch(
        _tops_kernel, (count,), *results, logits, tokens, *scratch, *sizes, out.top_ids.shape[1], num_top, **searching
    )


def _check(out: LogprobOutputs, workspace: LogprobWorkspace, count: int, vocabulary: int, num_top: int) -> None:
    out_rows, width = out.top_ids.shape
    rows = workspace.sums.shape[0]
    if min(out_rows, rows) < count:
        raise ValueError(f"{count} rows of logits, but outputs for {out_rows} and a workspace for {rows}")
    if not 0 <= num_top <= min(width, vocabulary):
        raise ValueError(f"num_top={num_top}: expected 0 to {min(width, vocabulary)}")
    for name, (shape, dtype) in output_fields(out_rows, width).items():
        expect(name, getattr(out, name), shape, dtype)
    for name, (shape, dtype) in workspace_fields(rows, vocabulary).items():
        expect(name, getattr(workspace, name), shape, dtype)


def logprobs_reference(logits: np.ndarray, token: int, num_top: int) -> tuple[np.ndarray, int, np.ndarray]:
    """The specification for one row, in float64: all log probabilities, the token's rank, the top ids by rank."""
    logits = logits.astype(np.float64)
    logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    order = np.lexsort((np.arange(logits.size), -logits))
    return logprobs, int(np.flatnonzero(order == token)[0]) + 1, order[:num_top]
