"""Sampling: one token id per row of logits, by greedy choice or by a seeded draw from the top-p nucleus.

    temperature 0 or top_p 0:   argmax of the logits, ties to the lowest id
    otherwise:                  p = softmax(logits / temperature)
                                nucleus = the smallest set of most probable tokens whose p sum up to top_p or more; of
                                          tokens with equal logits the lower ids come first
                                draw from the nucleus in proportion to p

A row without a finite maximum (NaN, +inf, or nothing but -inf) gives -1: never an id that nobody chose.

One program does one row, in walks over its V logits, so that a row's token cannot depend on the other rows:

    1  maximum, argmax, NaN                                                 greedy rows end here
    2  the nucleus' smallest logit, by a search without sorting             top_p < 1 only
    3  the draw

The search (2) narrows an interval of logits that must hold the nucleus' smallest one. A walk sums the probability at
and above PIVOTS points of the interval; two neighbours of them are the next interval: first points at 2^j below the
maximum in units of log2 p, then equal steps over the integers that order floats ("keys", see `_key`), until one value
is left: 4 to 6 walks for a language model's logits. Probabilities are integers, floor(2^40 p / p_max), so that sums are
exact in any order and "reaches top_p" is a matter of fact. (Pivot search as in Qrita and in vLLM's multi-pivot sampler;
exact by integers instead of by a tolerance.)

The draw (3) is a race: token i finishes after E_i / p_i, E_i exponential, and the first to finish is the sample (the
Gumbel-max trick): argmax_i log2 p_i - log2 E_i, no normalisation, no cumulative sums. E_i comes from Philox-4x32-10
(Salmon et al., 2011) keyed by (seed, position, token id): the same request draws the same token wherever it runs.

Cost: V * 4 bytes per walk from the cache; greedy is bandwidth bound; a top-p draw is about 60 instructions per logit.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.launch import Target, expect, launch, target, view

# One Philox counter gives the bits of 4 tokens that lie LANES ids apart: token id is word id // LANES % 4 of counter
# id // (4 * LANES) * LANES + id % LANES. Part of the specification: another value draws other tokens.
LANES = 256
PIVOTS = 8
ONE = 1 << 40  # the integer probability of the most probable token; V * ONE must stay below 2^63


@triton.jit
def _load_logits(row, ids, V: tl.constexpr, WIDTH: tl.constexpr):
    """The logits of `ids`, -inf past the vocabulary's end; WIDTH divides their number."""
    if V % WIDTH == 0:
        return tl.load(row + ids)
    else:
        return tl.load(row + ids, mask=ids < V, other=float("-inf"))


@triton.jit
def _maximum(row, V: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest logit of a row, the lowest id that has it, and whether the row is free of NaN."""
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    nans = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = _load_logits(row, ids, V, BLOCK)
        nans += tl.sum((logits != logits).to(tl.int32), axis=0)
        best, token = _better(best, token, logits, ids)
    return best, token, nans == 0


@triton.jit
def _better(best, token, scores, ids):
    """The greater of `best` and the greatest score, with its lowest id; ids ascend from call to call."""
    greatest = tl.max(scores, axis=0)
    if greatest > best:
        best = greatest
        token = tl.min(tl.where(scores == greatest, ids, 0x7FFFFFFF), axis=0)
    return best, token


@triton.jit
def _key(logits):
    """int32 in the order of the floats, +0 and -0 being one."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _log2_probability(logits, greatest, sharpness):
    """log2 of p / p_max; sharpness is log2(e) / temperature."""
    return (logits - greatest) * sharpness


@triton.jit
def _mass(logits, greatest, sharpness, ONE: tl.constexpr):
    """The probability as an integer, ONE for the most probable token."""
    return (tl.exp2(_log2_probability(logits, greatest, sharpness)) * ONE).to(tl.int64)


@triton.jit
def _masses(row, pivots, low, high, greatest, sharpness, V: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """One walk of the search: the mass at and above each pivot (keys, [PIVOTS]), the mass of the whole row, and the
    least and the greatest key within [low, high)."""
    masses = tl.zeros(pivots.shape, tl.int64)
    total = tl.full([], 0, tl.int64)
    least = high
    most = low
    for start in range(0, V, BLOCK):
        logits = _load_logits(row, start + tl.arange(0, BLOCK), V, BLOCK)
        key = _key(logits).to(tl.int64)  # as wide as masses: a CPU does not mix widths in one vector loop
        mass = _mass(logits, greatest, sharpness, ONE)
        total += tl.sum(mass, axis=0)
        masses += tl.sum(tl.where(key[None, :] >= pivots[:, None], mass[None, :], 0), axis=1)
        least = tl.minimum(least, tl.min(tl.where(key >= low, key, high), axis=0))
        most = tl.maximum(most, tl.max(tl.where(key < high, key, low), axis=0))
    return masses, total, least, most


@triton.jit
def _nucleus(
    row, greatest, sharpness, top_p,
    V: tl.constexpr, ONE: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The key of the nucleus' smallest logit, and how many of the tokens that have it belong to the nucleus.

    Throughout, mass at and above `low` >= needed > mass at and above `high`, which is `above`.
    """
    steps = tl.arange(0, PIVOTS)
    low = tl.full([], -0x7FFFFFFF, tl.int64)
    high = _key(greatest).to(tl.int64) + 1
    pivots = _key(greatest - tl.exp2(steps.to(tl.float32) - 1.0) / sharpness).to(tl.int64)
    masses, total, least, most = _masses(row, pivots, low, high, greatest, sharpness, V, ONE, BLOCK)
    needed = tl.minimum(tl.maximum((total.to(tl.float64) * top_p).to(tl.int64), 1), total)
    above = tl.full([], 0, tl.int64)
    low, high, above = _narrowed(low, high, above, pivots, masses, needed, least, most)
    while high - low > 1:
        pivots = low + (steps + 1) * tl.cdiv(high - low, PIVOTS + 1)
        masses, _, least, most = _masses(row, pivots, low, high, greatest, sharpness, V, ONE, BLOCK)
        low, high, above = _narrowed(low, high, above, pivots, masses, needed, least, most)
    bits = low.to(tl.int32)
    smallest = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)  # _key is its own inverse
    ties = tl.cdiv(needed - above, tl.maximum(_mass(smallest, greatest, sharpness, ONE), 1))
    return bits, tl.minimum(ties, 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _narrowed(low, high, above, pivots, masses, needed, least, most):
    """The interval of the search after a walk: between two pivots, and no wider than the keys that were found in it."""
    enough = masses >= needed
    low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), axis=0))
    high = tl.minimum(high, tl.min(tl.where(enough, high, pivots), axis=0))
    above = tl.maximum(above, tl.max(tl.where(enough, above, masses), axis=0))
    return tl.maximum(low, least), tl.minimum(high, most + 1), above


@triton.jit
def _random_words(seed, position, counter):
    """The four words of Philox-4x32-10, as `tl.philox` gives them; a loop, as ten copies of a round compile slowly."""
    c0 = counter.to(tl.uint32)
    c1 = (counter * 0 + position).to(tl.uint32)
    c2 = (counter * 0).to(tl.uint32)
    c3 = c2
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in range(10):
        high_a, low_a = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high_b, low_b = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high_b ^ c1 ^ key0, low_b, high_a ^ c3 ^ key1, low_a
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _exponential(bits):
    """An exponential variate, up to a constant factor, from 32 random bits: -log2(1 - u), u = (bits + 1/2) / 2^32.

    The small ones win races, so u must be fine near 0 and 1 - u may be coarse: 1 - u rounded to y, and
    log(1 - u) = log(y) * u / (1 - y) undoes the rounding (Kahan's log1p).
    """
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    y = 1.0 - u
    return tl.where(y == 1.0, u * 1.4426950408889634, -tl.log2(y) * u / (1.0 - y))


@triton.jit
def _draw(row, seed, position, greatest, sharpness, threshold, ties, V: tl.constexpr, LANES: tl.constexpr):
    """The winner of the race among the tokens above `threshold` and the first `ties` tokens at it."""
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0x7FFFFFFF, tl.int32)
    for start in range(0, V, 4 * LANES):
        greatest_here = tl.max(_load_logits(row, start + tl.arange(0, 4 * LANES), V, 4 * LANES), axis=0)
        if _key(greatest_here) >= threshold:  # noise costs most: only where the nucleus has a token
            r0, r1, r2, r3 = _random_words(seed, position, start // 4 + tl.arange(0, LANES))
            for word in range(4):
                ids = start + word * LANES + tl.arange(0, LANES)
                logits = _load_logits(row, ids, V, LANES)
                key = _key(logits)
                tied = (key == threshold).to(tl.int32)
                kept = (key > threshold) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= ties))
                scores = _log2_probability(logits, greatest, sharpness) - tl.log2(_exponential(r0))
                best, token = _better(best, token, tl.where(kept, scores, float("-inf")), ids)
                ties -= tl.sum(tied, axis=0)
                r0, r1, r2, r3 = r1, r2, r3, r0  # the next word's turn
    return token


@triton.jit
def _sample_kernel(
    ids_out, logits, temperature, top_p, seed, position,
    V: tl.constexpr, ONE: tl.constexpr, PIVOTS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    this = tl.program_id(0)
    row = logits + this.to(tl.int64) * V
    greatest, token, valid = _maximum(row, V, BLOCK)
    heat = tl.load(temperature + this)
    share = tl.load(top_p + this)
    valid = valid & (tl.abs(greatest) < float("inf"))
    if valid & (heat > 0.0) & (share > 0.0):
        sharpness = tl.minimum(1.4426950408889634 / heat, 1e30)  # finite, so that 0 * sharpness is 0
        threshold = tl.full([], -0x7FFFFFFF, tl.int32)
        ties = tl.full([], 0, tl.int32)
        if share < 1.0:
            threshold, ties = _nucleus(row, greatest, sharpness, share, V, ONE, PIVOTS, BLOCK)
        token = _draw(
            row, tl.load(seed + this), tl.load(position + this), greatest, sharpness, threshold, ties, V, LANES
        )
    tl.store(ids_out + this, tl.where(valid, token, -1))


def tiles(target: Target) -> dict[str, int]:
    """Tile rule: 1024 logits are 4 KB of each quantity in a CPU's first-level cache; 8 warps hide a GPU's latencies."""
    return {"BLOCK": 1024} if target.is_cpu else {"BLOCK": 1024, "num_warps": 8}


def sample(ids_out: Any, logits: Any, temperature: Any, top_p: Any, seed: Any, position: Any) -> None:
    """Choose one token id per row of logits; -1 for a row without a finite maximum.

    Args:
        ids_out: [S] int32.
        logits: [S, V] float32.
        temperature: [S] float32, 0 for the greedy choice.
        top_p: [S] float32 from 0 to 1; 0 for the greedy choice.
        seed: [S] int64, the request's.
        position: [S] int32, of the token that is drawn.
    """
    ids_out, logits, temperature, top_p = view(ids_out), view(logits), view(temperature), view(top_p)
    seed, position = view(seed), view(position)
    count, vocabulary = logits.shape
    expect("logits", logits, (count, vocabulary), "float32")
    expect("ids_out", ids_out, (count,), "int32")
    expect("temperature", temperature, (count,), "float32")
    expect("top_p", top_p, (count,), "float32")
    expect("seed", seed, (count,), "int64")
    expect("position", position, (count,), "int32")
    arguments = (ids_out, logits, temperature, top_p, seed, position)
    launch(_sample_kernel, (count,), *arguments, V=vocabulary, ONE=ONE, PIVOTS=PIVOTS, LANES=LANES, **tiles(target()))


def nucleus_reference(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The specification of the kept tokens of one row, [V] bool, in float64."""
    order = np.lexsort((np.arange(logits.size), -logits))  # by logit, descending, then by id
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    masses = np.exp(scaled[order])
    before = np.concatenate([[0.0], np.cumsum(masses)[:-1]])
    kept = np.zeros(logits.size, bool)
    kept[order[before < top_p * masses.sum()]] = True
    return kept


def noise_reference(seed: int, position: int, vocabulary: int) -> np.ndarray:
    """The specification of the random numbers: one exponential variate per token id, [V] float64."""
    ids = np.arange(vocabulary, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    counter = ids // (4 * LANES) * LANES + ids % LANES
    words = [counter, np.full_like(ids, position), np.zeros_like(ids), np.zeros_like(ids)]
    keys = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):  # Philox-4x32
        product_a, product_b = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            product_b >> np.uint64(32) ^ words[1] ^ np.uint64(keys[0]), product_b & low,
            product_a >> np.uint64(32) ^ words[3] ^ np.uint64(keys[1]), product_a & low,
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    bits = np.choose((ids // LANES % 4).astype(int), words)
    return -np.log1p(-(bits.astype(np.float64) + 0.5) / 2**32)


def sample_reference(logits: np.ndarray, temperature: float, top_p: float, seed: int, position: int) -> int:
    """The specification for one row."""
    if not np.isfinite(logits.max()):  # NaN included
        return -1
    if temperature == 0 or top_p == 0:
        return int(logits.argmax())
    finish = noise_reference(seed, position, logits.size) / np.exp((logits - logits.max()) / np.float64(temperature))
    return int(np.where(nucleus_reference(logits, temperature, top_p), finish, np.inf).argmin())
