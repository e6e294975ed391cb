"""The few tokens that may be drawn, gathered and drawn from: the sampler's short way on a GPU.

A GPU runs the search of selection.py badly: one program a row, each step of it waiting for the one before. But top_k,
top_p and min_p mostly leave few tokens, and those few are easy to bound: of the groups' peaks the n-th greatest is
reached by n tokens at least. Tokens that reach it are put on a list; one sort of the list decides everything.

    bound    the k-th greatest peak for top_k; for top_p, min_p alone the peak that 7 groups of 8 reach
    list     | chunk 0: up to CAPACITY tokens | chunk 1 | ... |    [S, chunks * CAPACITY], a chunk being 8192 ids
    sorted   by logit, descending, then by id: ranks are top_k, sums of masses before a token are top_p

A row is left to the long way where the list can't be complete (all tokens may be drawn, top_k exceeds the number of
groups, the nucleus reaches below the bound) or has no room. Which way a row goes depends on that row alone, and what is
kept is the same: masses are the integers of selection.py, ties go by id. Random numbers are those of sampling.py.

Launches: bound, S; gather, S x chunks; draw, S. Cost on an H200, 128 rows of 128,256 logits: bench/results/h200.md.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from fastdeploy.kernels.launch import Target, TensorView, cdiv, launch, next_power_of_2
from fastdeploy.kernels.selection import CHUNK, IMPOSSIBLE, INFINITE, key_of, load_logits, mass_of, value_of

CAPACITY = 64  # tokens of a chunk: the 50 most probable of a vocabulary sorted by frequency may lie in one
MOST_GROUPS = 256  # that a row may have: their peaks are sorted
UNDECIDED = tl.constexpr(-4)  # of SamplingWorkspace.choice: a row that goes the long way
LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Shortlist:
    """The lists of all rows; see `shortlist_fields`.

    Attributes:
        ids, keys: [rows, chunks * CAPACITY] int32.
        counts: [rows, chunks] int32, tokens of a chunk that reach the bound, listed or not.
        masses: [rows, chunks] int64, the mass of all tokens of a chunk that min_p allows, for top_p alone.
        bounds: [rows] int32, the key that all tokens on the list reach, and no others do; IMPOSSIBLE: no list.
    """

    ids: TensorView
    keys: TensorView
    counts: TensorView
    masses: TensorView
    bounds: TensorView


def shortlist_fields(rows: int, vocabulary: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and element type of every field of a `Shortlist`."""
    chunks = cdiv(vocabulary, CHUNK)
    return {
        "ids": ((rows, chunks * CAPACITY), "int32"),
        "keys": ((rows, chunks * CAPACITY), "int32"),
        "counts": ((rows, chunks), "int32"),
        "masses": ((rows, chunks), "int64"),
        "bounds": ((rows,), "int32"),
    }


def makes_shortlists(target: Target, groups: int) -> bool:
    """Whether rows with so many groups go the short way: not on a CPU, where the search takes 20 us."""
    return not target.is_cpu and groups <= MOST_GROUPS


@triton.jit
def least_allowed(greatest, sharpness, share):
    """The least finite key with p >= share * p_max: a bisection, as log2(p / p_max) grows with the key."""
    limit = tl.log2(share)
    low = tl.full([], IMPOSSIBLE, tl.int64)
    high = key_of(greatest).to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        if (value_of(middle) - greatest) * sharpness >= limit:
            high = middle
        else:
            low = middle
    return high.to(tl.int32)


@triton.jit(do_not_specialize=["V", "groups"])
def _bound_kernel(
    bounds, peaks, slots, forced, temperature, min_p, top_k, top_p, V, groups, GROUPS: tl.constexpr
):  # fmt: skip
    """The greatest peak that as many groups reach as a row may keep tokens, or 7 of 8 where that isn't known."""
    this = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + this).to(tl.int64)
    most = tl.load(top_k + slot)
    share = tl.load(top_p + slot)
    by_rank = (most > 0) & (most < V)
    n = tl.where(by_rank, most, groups - groups // 8)
    draws = (tl.load(temperature + slot) > 0.0) & (share > 0.0) & (most != 1) & (tl.load(forced + this) == -1)
    few = by_rank | (share < 1.0) | (tl.load(min_p + slot) > 0.0)
    bound = tl.full([], IMPOSSIBLE, tl.int32)
    if draws & few & (n <= groups):
        place = tl.arange(0, GROUPS)
        keys = tl.load(peaks + this * groups + place, mask=place < groups, other=IMPOSSIBLE)  # [GROUPS]
        if tl.max(keys, axis=0) != INFINITE:
            bound = tl.max(tl.where(place == n - 1, tl.sort(keys, descending=True), IMPOSSIBLE), axis=0)
    tl.store(bounds + this, bound)


@triton.jit(do_not_specialize=["V", "groups", "chunks"])
def _gather_kernel(
    ids_out, keys_out, counts, masses, bounds, logits, peaks, slots, temperature, min_p, top_k, top_p,
    V, groups, chunks, GROUP: tl.constexpr, GROUPS: tl.constexpr, PER_CHUNK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    this = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    bound = tl.load(bounds + this)
    if bound == IMPOSSIBLE:
        return
    slot = tl.load(slots + this).to(tl.int64)
    most = tl.load(top_k + slot)
    by_mass = ((most <= 0) | (most >= V)) & (tl.load(top_p + slot) < 1.0)
    greatest = tl.full([], 0.0, tl.float32)
    sharpness = tl.full([], 0.0, tl.float32)
    least = tl.full([], IMPOSSIBLE, tl.int32)
    if by_mass:
        place = tl.arange(0, GROUPS)
        greatest = value_of(tl.max(tl.load(peaks + this * groups + place, mask=place < groups, other=IMPOSSIBLE)))
        sharpness = tl.minimum(LOG2E / tl.load(temperature + slot), 1e30)  # finite, so that 0 * sharpness is 0
        least = least_allowed(greatest, sharpness, tl.load(min_p + slot))
    count = tl.full([], 0, tl.int32)
    total = tl.full([], 0, tl.int64)
    first = (this * chunks + chunk) * CAPACITY
    for group in range(chunk * PER_CHUNK, tl.minimum((chunk + 1) * PER_CHUNK, groups)):
        reaches = tl.load(peaks + this * groups + group) >= bound
        if reaches | by_mass:
            ids = group * GROUP + tl.arange(0, GROUP)  # [GROUP]
            values = load_logits(logits + this * V, ids, V)
            keys = key_of(values)
            if by_mass:
                allowed = (keys >= least) & (ids < V)
                total += tl.sum(tl.where(allowed, mass_of(values, greatest, sharpness), 0), axis=0)
            if reaches:
                wanted = (keys >= bound) & (ids < V)
                at = count + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
                tl.store(ids_out + first + at, ids, mask=wanted & (at < CAPACITY))
                tl.store(keys_out + first + at, keys, mask=wanted & (at < CAPACITY))
                count += tl.sum(wanted.to(tl.int32), axis=0)
    tl.store(counts + this * chunks + chunk, count)
    tl.store(masses + this * chunks + chunk, total)


@triton.jit
def _sorted(ids_in, keys_in, counts, chunks, LENGTH: tl.constexpr, CAPACITY: tl.constexpr):
    """A row's list by key, descending, then by id, and whether each place of it is taken: [LENGTH] each."""
    at = tl.arange(0, LENGTH)
    chunk = at // CAPACITY
    taken = at % CAPACITY < tl.load(counts + chunk, mask=chunk < chunks, other=0)
    keys = tl.load(keys_in + at, mask=taken, other=0)
    ids = tl.load(ids_in + at, mask=taken, other=0)
    pairs = (keys.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    pairs = tl.sort(tl.where(taken, pairs, -0x7FFFFFFFFFFFFFFF), descending=True)
    keys = (pairs >> 32).to(tl.int32)
    ids = 0x7FFFFFFF - (pairs & 0x7FFFFFFF).to(tl.int32)
    return keys, ids, at < tl.sum(taken.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["V", "chunks"])
def _draw_kernel(
    choice, ids_in, keys_in, counts, masses, bounds, slots, positions, temperature, min_p, top_k, top_p, seed,
    V, chunks, LENGTH: tl.constexpr, CHUNKS: tl.constexpr, CAPACITY: tl.constexpr, RANDOM: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
):  # fmt: skip
    """RANDOM, EXPONENTIAL: the sampler's functions for random words and for variates from them."""
    this = tl.program_id(0).to(tl.int64)
    counts += this * chunks
    part = tl.arange(0, CHUNKS)
    bound = tl.load(bounds + this)
    if bound == IMPOSSIBLE:
        tl.store(choice + this, UNDECIDED)
        return
    if tl.max(tl.load(counts + part, mask=part < chunks, other=0), axis=0) > CAPACITY:
        tl.store(choice + this, UNDECIDED)
        return
    keys, ids, real = _sorted(
        ids_in + this * chunks * CAPACITY, keys_in + this * chunks * CAPACITY, counts, chunks, LENGTH, CAPACITY
    )
    slot = tl.load(slots + this).to(tl.int64)
    most = tl.load(top_k + slot)
    share = tl.load(top_p + slot)
    sharpness = tl.minimum(LOG2E / tl.load(temperature + slot), 1e30)
    greatest = value_of(tl.max(tl.where(real, keys, IMPOSSIBLE), axis=0))
    by_rank = (most > 0) & (most < V)
    least = least_allowed(greatest, sharpness, tl.load(min_p + slot))
    kept = real & (keys >= least)
    kept = kept & ((tl.arange(0, LENGTH) < most) | (not by_rank))
    mass = tl.where(kept, mass_of(value_of(keys), greatest, sharpness), 0)
    listed = tl.sum(mass, axis=0)
    complete = by_rank | (bound <= least)
    if share < 1.0:
        total = tl.sum(tl.load(masses + this * chunks + part, mask=part < chunks, other=0), axis=0)
        total = tl.where(by_rank, listed, total)
        needed = tl.maximum((total.to(tl.float64) * share).to(tl.int64), 1)
        kept = kept & (tl.cumsum(mass, axis=0) - mass < needed)
        complete = complete | (listed >= needed)
    token = tl.full([], UNDECIDED, tl.int32)
    if complete:
        r0, r1, r2, r3 = RANDOM(tl.load(seed + slot), tl.load(positions + this), ids // 64 * 16 + ids % 16)
        word = ids // 16 % 4
        bits = tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))
        scores = (value_of(keys) - greatest) * sharpness - tl.log2(EXPONENTIAL(bits))
        scores = tl.where(kept, scores, float("-inf"))
        token = tl.min(tl.where(scores == tl.max(scores, axis=0), ids, 0x7FFFFFFF), axis=0)
    tl.store(choice + this, token)


def draw_from_shortlists(
    choice: TensorView, logits: TensorView, peaks: TensorView, rows: tuple[TensorView, ...], steering: Any,
    lists: Shortlist, group: int, randomness: dict[str, Any],
) -> None:  # fmt: skip
    """Write the drawn token to `choice`, [S] int32, or UNDECIDED.

    Args:
        logits: [S, V] float32. peaks: [S, groups] int32, of so many ids each as `group` says.
        rows: slots, positions, forced as in `sampling.sample`.
        steering: the `SamplingState`.
        lists: for S rows or more.
        randomness: RANDOM and EXPONENTIAL.
    """
    count, vocabulary = logits.shape
    groups, chunks = peaks.shape[1], cdiv(vocabulary, CHUNK)
    slots, positions, forced = rows
    listed = (lists.ids, lists.keys, lists.counts, lists.masses, lists.bounds)
    steered = (steering.temperature, steering.min_p, steering.top_k, steering.top_p)
    sorted_groups = next_power_of_2(groups)
    launch(
        _bound_kernel, (count,), lists.bounds, peaks, slots, forced, *steered, vocabulary, groups, GROUPS=sorted_groups
    )
    launch(
        _gather_kernel, (count, chunks), *listed, logits, peaks, slots, *steered, vocabulary, groups, chunks,
        GROUP=group, GROUPS=sorted_groups, PER_CHUNK=CHUNK // group, CAPACITY=CAPACITY,
    )  # fmt: skip
    padded = next_power_of_2(chunks)
    launch(
        _draw_kernel, (count,), choice, *listed, slots, positions, *steered, steering.seed, vocabulary, chunks,
        LENGTH=padded * CAPACITY, CHUNKS=padded, CAPACITY=CAPACITY, **randomness, num_warps=8,
    )  # fmt: skip
