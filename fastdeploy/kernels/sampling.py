"""Sampling: one token id per row of logits, by greedy choice or by a seeded draw, with everything that steers it.

    edits         l[i] += bias[i];  l[i] = -inf for held-back tokens while position < hold_until
    penalties     of tokens that occur in prompt or output:   l = l / repetition if l > 0, else l * repetition
                  of those in the output, `count` times:      l -= frequency * count + presence
    temperature   log2(p / p_max) = (l - l_max) * log2(e) / temperature
    min_p         keeps the tokens with p >= min_p * p_max
    top_k         of these keeps the k most probable
    top_p         of these, renormalised, keeps the fewest most probable whose p sum up to top_p or more
    draw          from these in proportion to p

One tie rule everywhere: of tokens with equal logits the lower ids come first. So top_k keeps exactly k tokens, and the
greedy choice (temperature 0, top_p 0 or top_k 1) is the first argmax of the edited logits. top_k and top_p are exact,
and one search (selection.py): top_k looks for a mass at an infinite temperature, where every token weighs the same.

A row with NaN or +inf, before or after the edits, gives -1, a row of nothing but -inf gives -2: never an id that nobody
chose. A forced id comes out whatever the logits, NaN and +inf excepted; one that the row does not have gives -5. Edits
of ids that the row does not have are left out: no list can change a neighbour's logits.

The draw is a race: token i finishes after E_i / p_i, E_i exponential, and the first to finish is the sample (the
Gumbel-max trick): argmax_i log2 p_i - log2 E_i, no normalisation, no cumulative sums. E_i comes from Philox-4x32-10
(Salmon et al., 2011) keyed by (seed, position, token id): the same request draws the same token wherever it runs. One
Philox counter serves four ids that lie 16 apart:

    ids        0 ... 15 | 16 ... 31 | 32 ... 47 | 48 ... 63 | 64 ... 79 | ...
    counter    0 ... 15 |  0 ... 15 |  0 ... 15 |  0 ... 15 | 16 ... 31 | ...
    word       0        |  1        |  2        |  3        |  0        | ...

Launches, all of a shape that S and V alone fix, so that a step can be recorded; no row depends on another:

    edit         S            changes the few logits that a row's edits name, in place, and saves what they were
    peaks        S x chunks   the greatest logit of each group of ids (selection.py)
    threshold    S            decides greedy, forced and invalid rows from the peaks; else finds which tokens are kept
    race         S x chunks   the winner of each chunk of ids, among the groups that have a kept token
    finish       S            the best of the winners; puts the edited logits back: they are the same after the call

On a GPU two launches after the peaks decide most rows (shortlist.py), and the next two have nothing to do for them.

Cost: V * 4 bytes for the peaks; all else touches a few groups, unless all tokens may be drawn. On one core of a CPU
(AMD EPYC, Zen 4), microseconds for a row of 49,152 logits of SmolLM2:

    greedy 9 | top_k 50 26 | top_k 50, top_p 0.9 30 | the same, penalties, 300 edits 35 | top_p 0.95 140 | all tokens 68
"""

from collections.abc import Callable
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
    find_peaks,
    greatest_peak,
    group_ids,
    key_of,
    last_tied,
    load_logits,
    mass_of,
    nth_peak,
    num_groups,
    search,
    tiles,
    value_of,
)
from fastdeploy.kernels.shortlist import (
    UNDECIDED,
    Shortlist,
    draw_from_shortlists,
    least_allowed,
    makes_shortlists,
    shortlist_fields,
)

SEEN_IN_PROMPT = tl.constexpr(1 << 29)  # of SamplingState.edit_seen
HELD_BACK = tl.constexpr(1 << 30)
COUNT = tl.constexpr((1 << 29) - 1)
NOT_A_NUMBER = tl.constexpr(-1)  # what ids_out says instead of a token
NOTHING_POSSIBLE = tl.constexpr(-2)
FORCED_OUTSIDE = tl.constexpr(-5)
DRAW = tl.constexpr(-3)  # of SamplingWorkspace.choice: the race decides
LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class SamplingState:
    """What steers the draws: one row per slot; a slot belongs to one request while it runs.

    Attributes:
        temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: [slots] float32.
        top_k: [slots] int32; 0 is off.
        seed: [slots] int64.
        hold_until: [slots] int32; held-back tokens are impossible at positions below it.
        num_edits: [slots] int32, how many entries of the next three rows count, E at most.
        edit_ids: [slots, E] int32, the tokens that are edited, distinct within a row; outside [0, V): no edit.
        edit_bias: [slots, E] float32, added; -inf bans.
        edit_seen: [slots, E] int32: how often the token occurs in the output, plus SEEN_IN_PROMPT, plus HELD_BACK.
    """

    temperature: TensorView
    top_p: TensorView
    min_p: TensorView
    repetition_penalty: TensorView
    presence_penalty: TensorView
    frequency_penalty: TensorView
    top_k: TensorView
    seed: TensorView
    hold_until: TensorView
    num_edits: TensorView
    edit_ids: TensorView
    edit_bias: TensorView
    edit_seen: TensorView


@dataclass(frozen=True)
class SamplingWorkspace:
    """What the launches of `sample` tell each other, a row per row of logits; see `workspace_fields`.

    Attributes:
        saved: [rows, E] float32, the logits before the edits.
        peaks: [rows, groups] int32, the greatest key of each group of logits.
        below: [rows, groups] int32, scratch of the searches.
        choice: [rows] int32, the token or the error where no draw is needed, else DRAW.
        greatest: [rows] float32, the greatest logit.
        threshold: [rows] int32, the least key that a kept token has.
        last_id: [rows] int32, the greatest id that is kept among the tokens at the threshold.
        scores, winners: [rows, chunks] float32 and int32, the race in each chunk.
        shortlist: of all rows; None on a CPU.
    """

    saved: TensorView
    peaks: TensorView
    below: TensorView
    choice: TensorView
    greatest: TensorView
    threshold: TensorView
    last_id: TensorView
    scores: TensorView
    winners: TensorView
    shortlist: Shortlist | None = None


@triton.jit(do_not_specialize=["V", "E"])
def _edit_kernel(
    logits, saved, slots, positions, repetition, presence, frequency, hold_until, num_edits, ids, bias, seen, V, E,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    repetition = tl.load(repetition + slot)
    presence = tl.load(presence + slot)
    frequency = tl.load(frequency + slot)
    holding = tl.load(positions + row) < tl.load(hold_until + slot)
    count = tl.minimum(tl.load(num_edits + slot), E)
    for start in range(0, count, BLOCK):
        edits = start + tl.arange(0, BLOCK)  # [BLOCK]
        edited = tl.load(ids + slot * E + edits, mask=edits < count, other=-1)
        inside = (edited >= 0) & (edited < V)
        token = row * V + edited
        facts = tl.load(seen + slot * E + edits, mask=inside, other=0)
        value = tl.load(logits + token, mask=inside, other=0.0)
        tl.store(saved + row * E + edits, value, mask=inside)
        value += tl.load(bias + slot * E + edits, mask=inside, other=0.0)
        value += tl.where(holding & ((facts & HELD_BACK) != 0), float("-inf"), 0.0)  # added: NaN stays NaN
        uses = facts & COUNT
        penalised = tl.where(value > 0.0, value / repetition, value * repetition)
        value = tl.where((facts & (SEEN_IN_PROMPT | COUNT)) != 0, penalised, value)
        value = tl.where(uses > 0, value - (frequency * uses.to(tl.float32) + presence), value)
        tl.store(logits + token, value, mask=inside)


@triton.jit
def _argmax(row, V, group, key, GROUP: tl.constexpr):
    """The lowest id of a group that has a key."""
    ids = group_ids(group, GROUP)
    return tl.min(tl.min(tl.where(key_of(load_logits(row, ids, V)) == key, ids, 0x7FFFFFFF), axis=0), axis=0)


@triton.jit(do_not_specialize=["V", "groups"])
def _threshold_kernel(
    logits, peaks, below, choice, greatest_out, threshold_out, last_out, slots, forced,
    temperature, min_p, top_k, top_p, V, groups,
    SHORTLISTED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """SHORTLISTED: `choice` has been written for some rows, which are done."""
    this = tl.program_id(0).to(tl.int64)
    if SHORTLISTED:
        if tl.load(choice + this) != UNDECIDED:
            return
    row = logits + this * V
    peaks += this * groups
    below += this * groups
    slot = tl.load(slots + this).to(tl.int64)
    key, group = greatest_peak(peaks, groups, BLOCK)
    asked = tl.load(forced + this)
    heat = tl.load(temperature + slot)
    most = tl.load(top_k + slot)
    share = tl.load(top_p + slot)
    if key == INFINITE:
        tl.store(choice + this, NOT_A_NUMBER)
    elif asked != -1:
        tl.store(choice + this, tl.where((asked >= 0) & (asked < V), asked, FORCED_OUTSIDE))
    elif key == IMPOSSIBLE:
        tl.store(choice + this, NOTHING_POSSIBLE)
    elif (heat <= 0.0) | (share <= 0.0) | (most == 1):
        tl.store(choice + this, _argmax(row, V, group, key, GROUP))
    else:
        greatest = value_of(key)
        sharpness = tl.minimum(LOG2E / heat, 1e30)  # finite, so that 0 * sharpness is 0
        threshold = least_allowed(greatest, sharpness, tl.load(min_p + slot))
        ties = tl.full([], 0, tl.int64)
        dropped = tl.full([], 0, tl.int64)  # tokens at the threshold that are not kept
        for narrowing in range(2):  # by top_k, then by top_p: two searches would take twice as long to compile
            by_mass = narrowing == 1
            if tl.where(by_mass, share < 1.0, (most > 0) & (most < V)):
                low = threshold
                limit = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
                if not by_mass:
                    low = nth_peak(peaks, groups, most, threshold, key + 1, BLOCK)
                    limit = most.to(tl.int64) << 40
                slope = tl.where(by_mass, sharpness, 0.0)
                # Nuclei of SmolLM2, top_p 0.5 to 0.99, end 0 to 16 bits of p below the maximum: 2 for each of 8 pivots.
                # If not even k groups are above `low`, it says nothing of where the k-th logit is: 1 logit each.
                spacing = tl.where(by_mass, 2.0 / sharpness, tl.where(low == threshold, 1.0, 0.0))
                threshold, ties, dropped = search(
                    row, peaks, below, V, groups, low, key + 1, spacing, limit, tl.where(by_mass, share, 1.0),
                    dropped * mass_of(value_of(low), greatest, slope), greatest, slope, GROUP, BLOCK, PIVOTS,
                )  # fmt: skip
        last = tl.full([], 0x7FFFFFFF, tl.int32)
        if dropped > 0:
            last = last_tied(row, peaks, V, groups, threshold, ties, GROUP, BLOCK)
        tl.store(choice + this, DRAW)
        tl.store(greatest_out + this, greatest)
        tl.store(threshold_out + this, threshold)
        tl.store(last_out + this, last)


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
def _score_ceiling(row, ids, V, bits, greatest, sharpness):
    """No less than the tokens' scores in the race, and cheap: -log2(-log2(1 - u)) < -log2(u) - 1/2, and the exponent of
    `bits` as floats is log2(bits), rounded down."""
    exponent = (bits.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return (load_logits(row, ids, V) - greatest) * sharpness + (32 - exponent).to(tl.float32)


@triton.jit(do_not_specialize=["V", "groups", "chunks"])
def _race_kernel(
    scores_out, winners, logits, peaks, choice, greatest, threshold, last_id, slots, positions, temperature, seed,
    V, groups, chunks, GROUP: tl.constexpr, PER_CHUNK: tl.constexpr,
):  # fmt: skip
    this = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if tl.load(choice + this) != DRAW:
        return
    row = logits + this * V
    peaks += this * groups
    slot = tl.load(slots + this).to(tl.int64)
    greatest = tl.load(greatest + this)
    threshold = tl.load(threshold + this)
    last = tl.load(last_id + this)
    sharpness = tl.minimum(LOG2E / tl.load(temperature + slot), 1e30)
    seed = tl.load(seed + slot)
    position = tl.load(positions + this)
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0x7FFFFFFF, tl.int32)
    for group in range(chunk * PER_CHUNK, tl.minimum((chunk + 1) * PER_CHUNK, groups)):
        peak = tl.load(peaks + group)
        if peak >= threshold:
            runs = tl.arange(0, GROUP // 64)[:, None]
            lanes = tl.arange(0, 16)[None, :]
            r0, r1, r2, r3 = _random_words(seed, position, group * (GROUP // 4) + runs * 16 + lanes)
            ids = group * GROUP + runs * 64 + lanes  # [GROUP / 64, 16], whose bits are r0
            ceiling = tl.maximum(
                tl.maximum(
                    _score_ceiling(row, ids, V, r0, greatest, sharpness),
                    _score_ceiling(row, ids + 16, V, r1, greatest, sharpness),
                ),
                tl.maximum(
                    _score_ceiling(row, ids + 32, V, r2, greatest, sharpness),
                    _score_ceiling(row, ids + 48, V, r3, greatest, sharpness),
                ),
            )
            if tl.max(tl.max(ceiling, axis=0), axis=0) >= best:  # rarely: most groups need no logarithm
                for _ in range(4):
                    logit = load_logits(row, ids, V)
                    key = key_of(logit)
                    kept = (key > threshold) | ((key == threshold) & (ids <= last))
                    scores = (logit - greatest) * sharpness - tl.log2(_exponential(r0))
                    scores = tl.where(kept, scores, float("-inf"))
                    here = tl.max(tl.max(scores, axis=0), axis=0)
                    if here > best:
                        best = here
                        token = tl.min(tl.min(tl.where(scores == here, ids, 0x7FFFFFFF), axis=0), axis=0)
                    r0, r1, r2, r3 = r1, r2, r3, r0  # the next word's turn
                    ids += 16
    tl.store(scores_out + this * chunks + chunk, best)
    tl.store(winners + this * chunks + chunk, token)


@triton.jit(do_not_specialize=["V", "E", "chunks"])
def _finish_kernel(
    ids_out, logits, saved, choice, scores, winners, slots, num_edits, ids, V, E, chunks, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(choice + row)
    if token == DRAW:
        best = tl.full([], float("-inf"), tl.float32)
        for chunk in range(0, chunks):
            score = tl.load(scores + row * chunks + chunk)
            if score > best:
                best = score
                token = tl.load(winners + row * chunks + chunk)
    tl.store(ids_out + row, token)
    slot = tl.load(slots + row).to(tl.int64)
    count = tl.minimum(tl.load(num_edits + slot), E)
    for start in range(0, count, BLOCK):
        edits = start + tl.arange(0, BLOCK)
        edited = tl.load(ids + slot * E + edits, mask=edits < count, other=-1)
        inside = (edited >= 0) & (edited < V)
        value = tl.load(saved + row * E + edits, mask=inside, other=0.0)
        tl.store(logits + row * V + edited, value, mask=inside)


def workspace_fields(max_seqs: int, vocabulary: int, max_edits: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and element type of every field of a `SamplingWorkspace` for up to `max_seqs` rows on this target.

    `max_edits` is the width of `SamplingState.edit_ids`.
    """
    rows, chunks = (max_seqs,), cdiv(vocabulary, CHUNK)
    return {
        "saved": ((max_seqs, max_edits), "float32"),
        "peaks": ((max_seqs, num_groups(vocabulary)), "int32"),
        "below": ((max_seqs, num_groups(vocabulary)), "int32"),
        "choice": (rows, "int32"),
        "greatest": (rows, "float32"),
        "threshold": (rows, "int32"),
        "last_id": (rows, "int32"),
        "scores": ((max_seqs, chunks), "float32"),
        "winners": ((max_seqs, chunks), "int32"),
    }


def allocate_workspace(
    allocate: Callable[[tuple[int, ...], str], Any], max_seqs: int, vocabulary: int, max_edits: int
) -> SamplingWorkspace:
    """A workspace in memory that `allocate(shape, dtype)` gives, on this target; the sizes as in `workspace_fields`."""
    fields = workspace_fields(max_seqs, vocabulary, max_edits)
    memory = {name: view(allocate(*field)) for name, field in fields.items()}
    lists = None
    if makes_shortlists(target(), num_groups(vocabulary)):
        shapes = shortlist_fields(max_seqs, vocabulary)
        lists = Shortlist(**{name: view(allocate(*field)) for name, field in shapes.items()})
    return SamplingWorkspace(**memory, shortlist=lists)


def sample(
    ids_out: Any,
    logits: Any,
    slots: Any,
    positions: Any,
    forced: Any,
    state: SamplingState,
    workspace: SamplingWorkspace,
) -> None:
    """Choose one token id per row of logits; -1 for a row with NaN or +inf, -2 for a row of nothing but -inf, -5 for a
    forced id that is none.

    Args:
        ids_out: [S] int32.
        logits: [S, V] float32; changed by the edits during the call, the same after it.
        slots: [S] int32, the row of `state` that steers each row of logits.
        positions: [S] int32, of the token that is drawn.
        forced: [S] int32, the token that comes out whatever the logits, -1 for none.
        state: of all slots.
        workspace: for S rows or more.
    """
    ids_out, logits, slots = view(ids_out), view(logits), view(slots)
    positions, forced = view(positions), view(forced)
    count, vocabulary = logits.shape
    expect("logits", logits, (count, vocabulary), "float32")
    for name, tensor in {"ids_out": ids_out, "slots": slots, "positions": positions, "forced": forced}.items():
        expect(name, tensor, (count,), "int32")
    _check(state, workspace, count, vocabulary)
    _launch(ids_out, logits, slots, positions, forced, state, workspace)


_INTEGERS = ("top_k", "hold_until", "num_edits", "edit_ids", "edit_seen")
_STATE_DTYPES = {"seed": "int64"} | dict.fromkeys(_INTEGERS, "int32")  # the others are float32


def _check(state: SamplingState, workspace: SamplingWorkspace, count: int, vocabulary: int) -> None:
    num_slots, num_edits = state.edit_ids.shape
    for name, tensor in vars(state).items():
        widths = (num_edits,) if name.startswith("edit_") else ()
        expect(name, tensor, (num_slots, *widths), _STATE_DTYPES.get(name, "float32"))
    rows = workspace.choice.shape[0]
    if rows < count:
        raise ValueError(f"the workspace is for {rows} rows of logits, not for {count}")
    for name, (shape, dtype) in workspace_fields(rows, vocabulary, num_edits).items():
        expect(name, getattr(workspace, name), shape, dtype)


def _launch(
    ids_out: TensorView, logits: TensorView, slots: TensorView, positions: TensorView, forced: TensorView,
    state: SamplingState, work: SamplingWorkspace,
) -> None:  # fmt: skip
    count, vocabulary = logits.shape
    max_edits, groups, chunks = state.edit_ids.shape[1], work.peaks.shape[1], work.scores.shape[1]
    searching = tiles(target())
    block = {"BLOCK": 16 if target().is_cpu else 256}  # edits at a time
    penalties = (state.repetition_penalty, state.presence_penalty, state.frequency_penalty, state.hold_until)
    edits = (state.num_edits, state.edit_ids, state.edit_bias, state.edit_seen)
    kept = (work.choice, work.greatest, work.threshold, work.last_id)
    race = {"GROUP": searching["GROUP"], "PER_CHUNK": CHUNK // searching["GROUP"]}
    launch(
        _edit_kernel, (count,), logits, work.saved, slots, positions, *penalties, *edits, vocabulary, max_edits, **block
    )
    find_peaks(work.peaks.rows(count), logits)
    if work.shortlist is not None:
        randomness = {"RANDOM": _random_words, "EXPONENTIAL": _exponential}
        rows = (slots, positions, forced)
        group = searching["GROUP"]
        draw_from_shortlists(work.choice, logits, work.peaks, rows, state, work.shortlist, group, randomness)
    launch(
        _threshold_kernel, (count,), logits, work.peaks, work.below, *kept, slots, forced,
        state.temperature, state.min_p, state.top_k, state.top_p, vocabulary, groups,
        SHORTLISTED=work.shortlist is not None, **searching,
    )  # fmt: skip
    launch(
        _race_kernel, (count, chunks), work.scores, work.winners, logits, work.peaks, *kept, slots, positions,
        state.temperature, state.seed, vocabulary, groups, chunks, **race,
    )  # fmt: skip
    launch(
        _finish_kernel, (count,), ids_out, logits, work.saved, work.choice, work.scores, work.winners, slots,
        state.num_edits, state.edit_ids, vocabulary, max_edits, chunks, **block,
    )  # fmt: skip


@dataclass(frozen=True)
class Steering:
    """One request's row of a `SamplingState`, for the references."""

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_k: int = 0
    seed: int = 0
    hold_until: int = 0


def edit_reference(
    logits: np.ndarray, steering: Steering, position: int, ids: np.ndarray, bias: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """The specification of the edits and penalties of one row, [V] float64; the arrays as in SamplingState, [edits]."""
    edited = logits.astype(np.float64)
    inside = (ids >= 0) & (ids < logits.size)
    ids, bias, seen = ids[inside], bias[inside], seen[inside]
    values, count = edited[ids] + bias, seen & ((1 << 29) - 1)
    values[(seen & 1 << 30 != 0) & (position < steering.hold_until)] -= np.inf
    penalised = np.where(values > 0, values / steering.repetition_penalty, values * steering.repetition_penalty)
    values = np.where(seen & ~(1 << 30) != 0, penalised, values)
    values -= np.where(count > 0, steering.frequency_penalty * count + steering.presence_penalty, 0.0)
    edited[ids] = values
    return edited


def kept_reference(logits: np.ndarray, steering: Steering) -> np.ndarray:
    """The specification of the kept tokens of one row, [V] bool, in float64."""
    order = np.lexsort((np.arange(logits.size), -logits))  # by logit, descending, then by id
    scaled = (logits[order].astype(np.float64) - logits.max()) / steering.temperature
    with np.errstate(divide="ignore"):
        kept = (scaled >= np.log(steering.min_p)) & (scaled > -np.inf)
    masses = np.exp(scaled)
    if steering.top_k > 0:
        kept &= np.arange(logits.size) < steering.top_k
    if steering.top_p < 1:
        masses *= kept
        kept &= np.concatenate([[0.0], np.cumsum(masses)[:-1]]) < steering.top_p * masses.sum()
    chosen = np.zeros(logits.size, bool)
    chosen[order[kept]] = True
    return chosen


def noise_reference(seed: int, position: int, vocabulary: int) -> np.ndarray:
    """The specification of the random numbers: one exponential variate per token id, [V] float64."""
    ids = np.arange(vocabulary, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    words = [ids // 64 * 16 + ids % 16, np.full_like(ids, position), np.zeros_like(ids), np.zeros_like(ids)]
    keys = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):  # Philox-4x32
        product_a, product_b = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            product_b >> np.uint64(32) ^ words[1] ^ np.uint64(keys[0]), product_b & low,
            product_a >> np.uint64(32) ^ words[3] ^ np.uint64(keys[1]), product_a & low,
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    bits = np.choose((ids // 16 % 4).astype(int), words)
    return -np.log1p(-(bits.astype(np.float64) + 0.5) / 2**32)


def sample_reference(logits: np.ndarray, steering: Steering, position: int) -> int:
    """The specification for one row of edited logits."""
    if not logits.max() < np.inf:  # NaN included
        return -1
    if logits.max() == -np.inf:
        return -2
    if steering.temperature == 0 or steering.top_p == 0 or steering.top_k == 1:
        return int(logits.argmax())
    with np.errstate(divide="ignore"):
        finish = noise_reference(steering.seed, position, logits.size) / np.exp(
            (logits - logits.max()) / np.float64(steering.temperature)
        )
    return int(np.where(kept_reference(logits, steering), finish, np.inf).argmin())
