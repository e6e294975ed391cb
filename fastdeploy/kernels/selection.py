"""The n greatest logits of a row, or the most probable ones that reach a mass, found without sorting.

    key(l)       an int32 in the order of the floats; +0 and -0 have the same
    mass(l)      floor(2^40 p / p_max), log2(p / p_max) = (l - l_max) * slope
    threshold    the greatest key T such that the tokens with key >= T have the mass that is needed
    kept         key > T, and of the tokens with key = T the `ties` lowest ids

With slope 0 every token has the mass 2^40 and the search finds the n greatest. Masses are integers so that their sums
are exact in any order: "reaches" is a matter of fact, whatever the tiles, the threads and the other rows.

    logits    | group 0 | group 1 | ... |       [S, V] float32; GROUP consecutive ids each, the last group padded
    peaks       peak 0    peak 1    ...         [S, groups] int32, the greatest key of each group
    below       ...                             [S, groups] int32, its greatest key below `high`: the search's own

The search narrows an interval [low, high) of keys that holds T. A walk sums the mass at and above PIVOTS keys in it;
two neighbours of them, or the least and the greatest key seen between them, bound the next interval, until one key is
left: 3 to 6 walks. (Pivot search as in Qrita and in vLLM's multi-pivot sampler, made exact by integers.) A walk visits
only groups that may have a token in the interval, which `below` tells, so that all walks but the first are short. For n
tokens the first one is, too: the n-th greatest peak, found by bisection, bounds the n-th greatest logit from below.

One program does one row's search. 49,152 logits of SmolLM2 on one core of a CPU (AMD EPYC, Zen 4): peaks 8 us; the 50
greatest 17 us; a nucleus, whose first walk is over everything, 65 us if it holds one token, 290 us if it holds 5,000.
"""

from typing import Any

import triton
import triton.language as tl

from fastdeploy.kernels.launch import Target, cdiv, expect, launch, target, view

CHUNK = 8192  # logits per program where several share a row; a fixed size, as some add up floats
IMPOSSIBLE = tl.constexpr(-0x7F800001)  # the key of -inf
INFINITE = tl.constexpr(0x7F800000)  # the key of +inf; as a peak also that of NaN


@triton.jit
def key_of(numbers):
    """int32 in the order of the floats. NaN has none."""
    bits = (numbers + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is +0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float that has a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def group_ids(group, GROUP: tl.constexpr):
    """The token ids of a group, [GROUP / 16, 16]: sums over the rows are vectors of a CPU."""
    return group * GROUP + tl.arange(0, GROUP // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit
def load_logits(row, ids, V):
    """The logits of `ids`, -inf past the vocabulary's end."""
    return tl.load(row + ids, mask=ids < V, other=float("-inf"))


# Peaks


@triton.jit(do_not_specialize=["V", "groups"])
def _peaks_kernel(peaks, logits, V, groups, GROUP: tl.constexpr, PER_CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PER_CHUNK
    for group in range(first, tl.minimum(first + PER_CHUNK, groups)):
        values = load_logits(logits + row * V, group_ids(group, GROUP), V)
        keys = key_of(tl.where(values != values, float("inf"), values))
        tl.store(peaks + row * groups + group, tl.max(tl.max(keys, axis=0), axis=0))


@triton.jit
def greatest_peak(peaks, groups, BLOCK: tl.constexpr):
    """The greatest key of a row, and the first group that has it."""
    best = tl.full([], IMPOSSIBLE, tl.int32)
    place = tl.full([], 0, tl.int32)
    for start in range(0, groups, BLOCK):
        places = start + tl.arange(0, BLOCK)
        keys = tl.load(peaks + places, mask=places < groups, other=IMPOSSIBLE)
        greatest = tl.max(keys, axis=0)
        if greatest > best:
            best = greatest
            place = tl.min(tl.where(keys == greatest, places, 0x7FFFFFFF), axis=0)
    return best, place


@triton.jit
def count_reaching(peaks, groups, key, BLOCK: tl.constexpr):
    """How many groups have their peak at or above `key`."""
    count = tl.full([], 0, tl.int32)
    for start in range(0, groups, BLOCK):
        places = start + tl.arange(0, BLOCK)
        keys = tl.load(peaks + places, mask=places < groups, other=IMPOSSIBLE)
        count += tl.sum(((keys >= key) & (places < groups)).to(tl.int32), axis=0)
    return count


@triton.jit
def next_reaching(peaks, group, key):
    """The first group from `group` on that has its peak at or above `key`; there must be one."""
    while tl.load(peaks + group) < key:
        group += 1
    return group


@triton.jit
def nth_peak(peaks, groups, n, low, high, BLOCK: tl.constexpr):
    """The greatest key in [low, high) that n groups reach, or `low` if fewer do."""
    low = tl.full([], low, tl.int64)
    high = high.to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        if count_reaching(peaks, groups, middle.to(tl.int32), BLOCK) >= n:
            low = middle
        else:
            high = middle
    return low.to(tl.int32)


# The search


@triton.jit
def mass_of(logits, greatest, slope):
    """The integer mass of a logit; 2^40 of every token, -inf included, where the slope is 0."""
    return (tl.exp2(tl.maximum(logits - greatest, -3.4028234663852886e38) * slope) * (1 << 40)).to(tl.int64)


@triton.jit
def search(
    row, peaks, below, V, groups, low, high, spacing, limit, share, dropped, greatest, slope,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The threshold, a key in [low, high); how many of its tokens are kept; how many are not.

    Needed is the `share` of the mass at and above `low`, less `dropped`, but at most `limit`. No token reaches `high`.
    The first pivots are `spacing` logits apart, down from `high`, if that is not 0. `below` [groups] is scratch.
    """
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    for start in range(0, groups, BLOCK):
        places = start + tl.arange(0, BLOCK)
        tl.store(below + places, tl.load(peaks + places, mask=places < groups), mask=places < groups)
    tl.debug_barrier()  # before other threads read `below`
    needed = limit
    reached = limit  # the mass at and above low
    above = limit * 0  # the mass at and above high
    turn = tl.full([], 0, tl.int32)
    keys, pivots = _pivots(low, high, turn, spacing, PIVOTS)  # carried by the loop, so that a CPU keeps them in memory
    while (high - low > 1) | (turn == 0):
        total, masses, least, most = _walk(row, below, V, groups, pivots, low, high, greatest, slope, GROUP, BLOCK)
        if turn == 0:
            needed = tl.minimum(tl.maximum(((total - dropped).to(tl.float64) * share).to(tl.int64), 1), limit)
        masses += above
        enough = masses >= needed
        reached = tl.min(tl.where(enough, masses, total + above), axis=0)
        above = tl.maximum(above, tl.max(tl.where(enough, above, masses), axis=0))
        low = tl.maximum(tl.max(tl.where(enough, keys, low), axis=0), least)
        high = tl.minimum(tl.min(tl.where(enough, high, keys), axis=0), most + 1)
        turn += 1
        keys, pivots = _pivots(low, high, turn, spacing, PIVOTS)
    mass = mass_of(value_of(low), greatest, slope)
    ties = tl.cdiv(needed - above, mass)
    return low.to(tl.int32), ties, (reached - above) // mass - ties


@triton.jit
def _pivots(low, high, turn, spacing, PIVOTS: tl.constexpr):
    """Keys between `low` and `high`, and their logits, by turns even in value, which suits logits, and even in key,
    which comes to an end whatever the logits."""
    steps = tl.arange(0, PIVOTS) + 1
    top = value_of(high - 1)
    even = (top - value_of(low)) / (PIVOTS + 1)
    distance = tl.where((turn == 0) & (spacing > 0.0), spacing, even)
    by_value = key_of(top - steps.to(tl.float32) * distance).to(tl.int64)
    by_key = low + steps * tl.cdiv(high - low, PIVOTS + 1)
    keys = tl.minimum(tl.maximum(tl.where(turn % 2 == 0, by_value, by_key), low + 1), high - 1)
    return keys, value_of(keys)


@triton.jit
def _walk(row, below, V, groups, pivots, low, high, greatest, slope, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The mass in [low, high); its part at and above each pivot, a logit; the least and the greatest key in there.

    Brings `below` up to date in the groups that it visits.
    """
    QUARTER: tl.constexpr = GROUP // 4  # by quarters, so that a sum is loaded and stored once for four tokens
    bottom = value_of(low)
    top = value_of(high)  # not reached; a bound of value_of(high - 1) would take in +0 where that is the key of -0
    total = tl.full([], 0, tl.int64)
    masses = tl.zeros([pivots.shape[0], QUARTER], tl.int64)
    least = tl.full([QUARTER], float("inf"), tl.float32)
    most = tl.full([], IMPOSSIBLE, tl.int32)
    nothing = tl.full([QUARTER], float("-inf"), tl.float32)
    group = tl.full([], -1, tl.int32)
    for _ in range(count_reaching(below, groups, low.to(tl.int32), BLOCK)):
        group = next_reaching(below, group + 1, low)
        ids = group * GROUP + tl.arange(0, QUARTER)
        logits0, mass0 = _quarter(row, ids, V, bottom, top, greatest, slope)
        logits1, mass1 = _quarter(row, ids + QUARTER, V, bottom, top, greatest, slope)
        logits2, mass2 = _quarter(row, ids + 2 * QUARTER, V, bottom, top, greatest, slope)
        logits3, mass3 = _quarter(row, ids + 3 * QUARTER, V, bottom, top, greatest, slope)
        total += tl.sum((mass0 + mass1) + (mass2 + mass3), axis=0)
        masses += (_reaching(logits0, mass0, pivots) + _reaching(logits1, mass1, pivots)) + (
            _reaching(logits2, mass2, pivots) + _reaching(logits3, mass3, pivots)
        )
        least = _lower(
            _lower(_lower(_lower(least, logits0, bottom), logits1, bottom), logits2, bottom), logits3, bottom
        )
        under = _upper(_upper(_upper(_upper(nothing, logits0, top), logits1, top), logits2, top), logits3, top)
        greatest_under = key_of(tl.max(under, axis=0))
        tl.store(below + group, greatest_under)
        most = tl.maximum(most, greatest_under)
    tl.debug_barrier()
    return total, tl.sum(masses, axis=1), key_of(tl.min(least, axis=0)), most


@triton.jit
def _quarter(row, ids, V, bottom, top, greatest, slope):
    """Logits of a quarter of a group, and the masses of those in [bottom, top)."""
    logits = load_logits(row, ids, V)
    return logits, tl.where((logits >= bottom) & (logits < top), mass_of(logits, greatest, slope), 0)


@triton.jit
def _reaching(logits, mass, pivots):
    """The mass of each token at each pivot that it reaches, [PIVOTS, QUARTER]."""
    return tl.where(logits[None, :] >= pivots[:, None], mass[None, :], 0)


@triton.jit
def _lower(least, logits, bottom):
    return tl.where((logits >= bottom) & (logits < least), logits, least)


@triton.jit
def _upper(most, logits, top):
    return tl.where((logits < top) & (logits > most), logits, most)


@triton.jit
def last_tied(row, peaks, V, groups, threshold, ties, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The `ties`-th lowest id that has the key `threshold`; the greatest int32 if there are fewer."""
    last = tl.full([], 0x7FFFFFFF, tl.int32)
    group = tl.full([], -1, tl.int32)
    left = ties.to(tl.int32)
    for _ in range(count_reaching(peaks, groups, threshold, BLOCK)):
        if left > 0:
            group = next_reaching(peaks, group + 1, threshold)
            ids = group * GROUP + tl.arange(0, GROUP)
            tied = (key_of(load_logits(row, ids, V)) == threshold).to(tl.int32)
            found = tl.sum(tied, axis=0)
            if found >= left:
                last = tl.min(tl.where((tied > 0) & (tl.cumsum(tied, axis=0) == left), ids, last), axis=0)
            left -= found
    return last


# Launching


def group_size(target: Target) -> int:
    """Ids per peak, a multiple of 64 for the race's sake: 64 are four vectors of a CPU (with 128 the search for the 50
    greatest takes 1.5 times as long); a GPU's program takes 1024 at once."""
    return 64 if target.is_cpu else 1024


def tiles(target: Target) -> dict[str, int]:
    """Tile rule of the searches: BLOCK peaks at a time; PIVOTS 8 (on a CPU a nucleus takes 1.2 times as long with 16,
    1.6 times with 4)."""
    common = {"GROUP": group_size(target), "BLOCK": 256, "PIVOTS": 8}
    return common if target.is_cpu else {**common, "num_warps": 8}


def num_groups(vocabulary: int) -> int:
    """How many peaks a row of logits has."""
    return cdiv(vocabulary, group_size(target()))


def find_peaks(peaks: Any, logits: Any) -> None:
    """The greatest key of every group of every row, INFINITE where there is NaN.

    Args:
        peaks: [S, num_groups(V)] int32.
        logits: [S, V] float32.
    """
    peaks, logits = view(peaks), view(logits)
    count, vocabulary = logits.shape
    groups = num_groups(vocabulary)
    expect("logits", logits, (count, vocabulary), "float32")
    expect("peaks", peaks, (count, groups), "int32")
    group = group_size(target())
    grid = (count, cdiv(vocabulary, CHUNK))
    launch(_peaks_kernel, grid, peaks, logits, vocabulary, groups, GROUP=group, PER_CHUNK=CHUNK // group)
