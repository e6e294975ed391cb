from types import SimpleNamespace

import numpy as np
import pytest

from fastdeploy.kernels.launch import view
from fastdeploy.kernels.sampling import (
    SamplingState,
    SamplingWorkspace,
    Steering,
    edit_reference,
    kept_reference,
    noise_reference,
    sample,
    sample_reference,
    workspace_fields,
)

SEEN_IN_PROMPT, HELD_BACK = 1 << 29, 1 << 30
VOCABULARIES = [2, 5, 64, 1000, 4097, 49152, 200_000]


def steerings(count, position=0, forced=-1, **parameters):
    """Rows of parameters, one per slot; scalars serve all, and what is not named has no effect."""
    values = {**vars(Steering()), **parameters}
    return {
        "positions": np.broadcast_to(position, count).astype(np.int32),
        "forced": np.broadcast_to(forced, count).astype(np.int32),
        **{name: np.broadcast_to(value, count) for name, value in values.items()},
    }


def one(rows, index):
    """Row `index` of `steerings`, as the kernel sees it: floats rounded to fp32."""
    found = {name: rows[name][index] for name in vars(Steering())}
    return Steering(
        **{name: value if isinstance(value, np.integer) else float(np.float32(value)) for name, value in found.items()}
    )


def run(logits, rows, edits=None, slots=None, num_edits=None):
    """Sample from every row of logits [S, V]. `edits` is a list of (ids, bias, seen) arrays, one per slot.

    num_edits: how many the state says there are, if not that many.

    Returns the token ids, the logits as the call left them, and the workspace.
    """
    count, vocabulary = logits.shape
    edits = edits or [((), (), ())] * count
    width = 1 + max((len(ids) for ids, _, _ in edits), default=0)
    fields = {name: rows[name].astype(np.float32) for name in vars(Steering())}
    fields |= {name: rows[name].astype(np.int32) for name in ("top_k", "hold_until")}
    fields |= {
        "seed": rows["seed"].astype(np.int64),
        "num_edits": np.array(num_edits or [len(ids) for ids, _, _ in edits], np.int32),
    }
    for part, (name, dtype) in enumerate([("edit_ids", "int32"), ("edit_bias", "float32"), ("edit_seen", "int32")]):
        fields[name] = np.full((count, width), 99999999, dtype)  # what lies past num_edits must not be read
        for slot, edit in enumerate(edits):
            fields[name][slot, : len(edit[part])] = edit[part]
    work = {
        name: np.full(shape, -77, dtype)
        for name, (shape, dtype) in workspace_fields(count + 2, vocabulary, width).items()
    }
    state = SamplingState(**{name: view(array) for name, array in fields.items()})
    workspace = SamplingWorkspace(**{name: view(array) for name, array in work.items()})
    slots = np.arange(count, dtype=np.int32) if slots is None else slots
    ids, after = np.full(count, -77, np.int32), logits.copy()
    sample(ids, after, slots, rows["positions"], rows["forced"], state, workspace)
    return SimpleNamespace(ids=ids, after=after, work=work)


def kept_by_kernel(logits, work, row):
    """The kept set that the kernel found for edited logits [V]; None if it had not to draw."""
    if work["choice"][row] != -3:
        return None
    bits = (logits.astype(np.float32) + np.float32(0)).view(np.int32)
    keys = bits ^ (bits >> 31 & 0x7FFFFFFF)
    threshold = work["threshold"][row]
    return (keys > threshold) | ((keys == threshold) & (np.arange(len(keys)) <= work["last_id"][row]))


def draw(logits, **parameters):
    return run(np.ascontiguousarray(logits, np.float32), steerings(len(logits), **parameters)).ids


def bfloat16(values):
    """Rounded, so that many are equal."""
    return (np.asarray(values, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


# The greedy choice, and rows without one


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}])
def test_greedy_is_the_argmax(vocabulary, how, rng):
    logits = rng.standard_normal((6, vocabulary)).astype(np.float32)
    np.testing.assert_array_equal(draw(logits, **how), logits.argmax(axis=1))


@pytest.mark.parametrize("vocabulary", [5, 1000, 49152])
def test_ties_go_to_the_lowest_id(vocabulary, rng):
    logits = rng.integers(-3, 3, (20, vocabulary)).astype(np.float32)
    np.testing.assert_array_equal(draw(logits, temperature=0.0), logits.argmax(axis=1))
    zeros = np.where(rng.random((20, vocabulary)) < 0.5, 0.0, -0.0)
    assert (draw(zeros, temperature=0.0) == 0).all()


@pytest.mark.parametrize("steering", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}, {}])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_nan_and_infinity_give_minus_one(bad, everywhere, steering, rng):
    logits = rng.standard_normal((3, 4097)).astype(np.float32)
    logits[1, slice(None) if everywhere else 4096] = bad
    tokens = draw(logits, forced=[-1, 7, -1], **steering)
    assert tokens[1] == -1
    assert (tokens[[0, 2]] >= 0).all()


@pytest.mark.parametrize("steering", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}, {}])
def test_nothing_possible_gives_minus_two(steering, rng):
    logits = rng.standard_normal((3, 4097)).astype(np.float32)
    logits[1] = -np.inf
    tokens = draw(logits, **steering)
    assert tokens[1] == -2
    assert (tokens[[0, 2]] >= 0).all()


def test_a_forced_token_comes_whatever_the_logits(rng):
    logits = rng.standard_normal((4, 1000)).astype(np.float32)
    logits[1, 999] = -np.inf
    logits[3] = -np.inf
    tokens = draw(logits, temperature=[1, 1, 0, 1], forced=[5, 999, 0, 8])
    np.testing.assert_array_equal(tokens, [5, 999, 0, 8])


@pytest.mark.parametrize("steering", [{"temperature": 0.0}, {"top_k": 5}, {}])
def test_a_forced_id_that_the_row_does_not_have_gives_minus_five(steering, rng):
    logits = rng.standard_normal((5, 1000)).astype(np.float32)
    tokens = draw(logits, forced=[-1, 1000, 2**31 - 1, -2, -(2**31)], **steering)
    assert 0 <= tokens[0] < 1000
    np.testing.assert_array_equal(tokens[1:], [-5] * 4)


# Which tokens are kept


@pytest.mark.parametrize(
    "vocabulary, count",
    [(2, 1000), (5, 1500), (63, 1500), (64, 1500), (65, 1500), (1000, 1500), (4097, 1500), (49152, 60), (200_000, 12)],
)
def test_kept_sets_are_exact(vocabulary, count, rng):
    """Against a sort in float64, over more than 10,000 rows in all, half of them with many ties."""
    scale, shift = rng.choice([0.01, 0.3, 1, 3, 10, 100], (count, 1)), rng.choice([-20, 0, 20], (count, 1))
    logits = (rng.standard_normal((count, vocabulary)) * scale + shift).astype(np.float32)
    logits[: count // 2] = bfloat16(logits[: count // 2])
    logits[::3][rng.random(logits[::3].shape) < 0.3] = -np.inf
    logits[:, 0] = np.where(np.isfinite(logits[:, 0]), logits[:, 0], 1)
    rows = steerings(
        count,
        temperature=rng.choice([0.1, 0.7, 1, 2, 10], count),
        top_k=np.clip(rng.choice([0, 0, 2, 5, 50, 1000, vocabulary - 1, vocabulary + 1], count), 0, None),
        top_p=rng.choice([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999999, 1, 1, 1], count),
        min_p=rng.choice([0, 0, 0, 0.01, 0.1, 1], count),
    )
    found = run(logits, rows)
    drawn = 0
    for row in range(count):
        kept, steering = kept_by_kernel(logits[row], found.work, row), one(rows, row)
        if kept is not None:
            drawn += 1
            expected = kept_reference(logits[row], steering)
            assert (kept == expected).all() or borderline(logits[row], steering, kept, expected), (row, steering)
            assert kept[found.ids[row]]
    assert drawn > count / 2


def borderline(logits, steering, kept, expected):
    """Whether float64 and exact arithmetic may disagree: the sum of what one of them keeps is within 1e-6 of top_p."""
    allowed = Steering(steering.temperature, min_p=steering.min_p, top_k=steering.top_k)
    masses = np.exp((logits.astype(np.float64) - logits.max()) / steering.temperature) * kept_reference(logits, allowed)
    differing = np.flatnonzero(kept != expected)
    sums = masses[kept & expected].sum() + np.array([0, masses[differing].sum()])
    return (abs(sums / masses.sum() - steering.top_p) < 1e-6).any()


EXTREMES = {
    "denormal distances": lambda rng: rng.integers(-3, 4, 1000) * 1e-45,
    "from one end of the floats to the other": lambda rng: rng.choice([-1, 1], 1000) * 10 ** rng.uniform(-45, 38, 1000),
    "all equal": lambda rng: np.full(1000, 2.5),
    "zeros of both signs": lambda rng: np.where(rng.random(1000) < 0.5, 0.0, -0.0),
    "around zero": lambda rng: rng.integers(-2, 3, 1000),
    "one certain token": lambda rng: np.where(np.arange(1000) == 777, 40.0, 0.0),
    "one possible token": lambda rng: np.where(np.arange(1000) == 777, -40.0, -np.inf),
    "the lower half equal": lambda rng: np.maximum(rng.standard_normal(1000), 0),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_kept_sets_of_extreme_logits_are_exact(name, rng):
    logits = np.array([EXTREMES[name](rng) for _ in range(60)], np.float32)
    rows = steerings(60, top_k=rng.choice([0, 2, 50, 999], 60), top_p=rng.choice([0.1, 0.5, 0.9, 1], 60))
    found = run(logits, rows)
    for row in range(60):
        kept, steering = kept_by_kernel(logits[row], found.work, row), one(rows, row)
        expected = kept_reference(logits[row], steering)
        assert (kept == expected).all() or borderline(logits[row], steering, kept, expected), steering


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_equal_tokens_are_kept_by_lowest_id(count):
    """Of 1025 equal tokens, top_p just below count / 1025 keeps the first `count`, and so does top_k."""
    logits = np.tile(np.where(np.arange(4097) % 4 == 0, 2.5, -np.inf), (40 * count, 1))
    first = {4 * index for index in range(count)}
    assert set(draw(logits, top_p=(count - 0.5) / 1025, seed=np.arange(40 * count))) == first
    if count > 1:
        assert set(draw(logits, top_k=count, seed=np.arange(40 * count))) == first


# Edits and penalties


def random_edits(rng, count, vocabulary):
    """Edits whose arithmetic is exact in fp32: multiples of 1/4 and powers of two."""
    for _ in range(count):
        ids = rng.choice(vocabulary, rng.integers(0, min(vocabulary, 40)), replace=False)
        bias = rng.choice([0, 0, 0.25, -3.5, 4, -np.inf], len(ids))
        seen = rng.choice([0, 0, 1, 2, 7], len(ids)) + rng.choice([0, SEEN_IN_PROMPT], len(ids))
        yield ids, bias, seen + rng.choice([0, 0, 0, HELD_BACK], len(ids))


@pytest.mark.parametrize("vocabulary", [5, 65, 1000])
def test_edits_and_penalties_come_before_everything_else(vocabulary, rng):
    count = 300
    logits = (rng.integers(-32, 32, (count, vocabulary)) / 4).astype(np.float32)
    rows = steerings(
        count,
        position=rng.integers(0, 10, count),
        hold_until=5,
        temperature=rng.choice([0, 0.5, 1, 2], count),
        top_k=rng.choice([0, 3, 50], count),
        top_p=rng.choice([1, 0.9], count),
        repetition_penalty=rng.choice([0.5, 1, 2], count),
        presence_penalty=rng.choice([-0.5, 0, 0.25], count),
        frequency_penalty=rng.choice([-0.25, 0, 0.5], count),
        seed=rng.integers(0, 2**62, count),
    )
    edits = list(random_edits(rng, count, vocabulary))
    found = run(logits, rows, edits)
    for row in range(count):
        steering, position = one(rows, row), int(rows["positions"][row])
        edited = edit_reference(logits[row], steering, position, *edits[row])
        kept = kept_by_kernel(edited, found.work, row)
        if kept is None or (kept == kept_reference(edited, steering)).all():
            assert found.ids[row] == sample_reference(edited, steering, position)
        else:
            assert borderline(edited, steering, kept, kept_reference(edited, steering))


def test_penalties_of_any_size_are_right_to_rounding(rng):
    logits = rng.standard_normal((200, 1000)).astype(np.float32)
    rows = steerings(
        200, temperature=1.0, repetition_penalty=rng.uniform(0.5, 2, 200),
        presence_penalty=rng.uniform(-2, 2, 200), frequency_penalty=rng.uniform(-2, 2, 200),
    )  # fmt: skip
    everything = np.arange(1000)
    edits = [(everything, rng.standard_normal(1000), rng.integers(0, 50, 1000)) for _ in range(200)]
    found = run(logits, rows, edits)
    for row in range(200):
        greatest = edit_reference(logits[row], one(rows, row), 0, *edits[row]).max()
        assert abs(found.work["greatest"][row] - greatest) < 1e-5 * max(1, abs(greatest))


@pytest.mark.parametrize("steering", [{"temperature": 0.0}, {"top_k": 3}, {}])
def test_edits_of_ids_that_the_row_does_not_have_change_nothing(steering, rng):
    """Neither in the row nor in its neighbours, of which the first and the last have no edits."""
    count, vocabulary = 40, 100
    logits = (rng.integers(-32, 32, (count, vocabulary)) / 4).astype(np.float32)
    rows = steerings(count, seed=rng.integers(0, 2**62, count), presence_penalty=0.25, **steering)
    hostile = np.array([-1, -vocabulary, vocabulary, vocabulary + 5, 2**31 - 1, -(2**31), 2 * vocabulary])
    edits = [(np.array([], int), np.array([]), np.array([], int))]
    for _ in range(count - 2):
        ids = rng.permutation(np.concatenate([hostile, rng.choice(vocabulary, 25, replace=False)]))
        bias = np.where(np.isin(ids, hostile), rng.choice([1e9, -np.inf]), rng.choice([-4, 0, 4], len(ids)))
        edits.append((ids, bias, rng.choice([0, 3, SEEN_IN_PROMPT], len(ids))))
    edits.append(edits[0])
    found = run(logits, rows, edits)
    edited = [edit_reference(logits[row], one(rows, row), 0, *edits[row]) for row in range(count)]
    np.testing.assert_array_equal(found.ids, [sample_reference(edited[row], one(rows, row), 0) for row in range(count)])
    np.testing.assert_array_equal(found.after, logits)


def test_a_count_of_edits_beyond_the_list_is_the_list():
    edits = [([4, 3, 2], [1, 2, 3], [0, 0, 0])] * 3
    found = run(np.zeros((3, 100), np.float32), steerings(3, temperature=0.0), edits, num_edits=[3, 2**31 - 1, 4])
    np.testing.assert_array_equal(found.ids, [2, 2, 2])
    assert not found.after.any()


def test_banned_and_held_back_tokens_are_never_drawn():
    logits = np.zeros((600, 5), np.float32)
    edits = [([1, 3], [-np.inf, 0], [0, HELD_BACK + 2])] * 600
    position = np.repeat([9, 10, 11], 200)
    ids = run(logits, steerings(600, position=position, seed=np.arange(600), hold_until=10), edits).ids
    assert set(ids[:200]) == {0, 2, 4}
    assert set(ids[200:400]) == set(ids[400:]) == {0, 2, 3, 4}


def test_a_ban_does_not_hide_nan():
    logits = np.array([[1, np.nan, 2], [1, np.nan, 2]], np.float32)
    edits = [([1], [-np.inf], [0]), ([1], [0], [HELD_BACK])]
    np.testing.assert_array_equal(run(logits, steerings(2, hold_until=5), edits).ids, [-1, -1])


def test_everything_banned_gives_minus_two():
    edits = [([0, 1, 2], [-np.inf] * 3, [0, 1, SEEN_IN_PROMPT])]
    assert run(np.zeros((1, 3), np.float32), steerings(1), edits).ids[0] == -2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_logits_are_the_same_afterwards(temperature, rng):
    logits = rng.standard_normal((50, 1000)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -0.0
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    logits[::7, 3] = np.nan
    rows = steerings(50, temperature=temperature, hold_until=5, repetition_penalty=1.3, presence_penalty=0.1)
    after = run(logits, rows, list(random_edits(rng, 50, 1000))).after
    np.testing.assert_array_equal(after.view(np.int32), logits.view(np.int32))


# The draw


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_draws_match_reference(vocabulary, temperature, top_p, rng):
    logits = (rng.standard_normal((8, vocabulary)) * 3 + 10).astype(np.float32)
    seeds, positions = rng.integers(-(2**63), 2**63, 8), rng.integers(0, 2**31, 8)
    rows = steerings(8, temperature=temperature, top_p=top_p, seed=seeds, position=positions)
    expected = [sample_reference(logits[row], one(rows, row), int(positions[row])) for row in range(8)]
    np.testing.assert_array_equal(run(logits, rows).ids, expected)


@pytest.mark.parametrize(
    "steering",
    [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05, "top_k": 20}],
)
def test_draws_follow_the_distribution(steering, rng):
    """Chi-square over 20,000 draws; the bound is passed by chance once in 10^5."""
    logits = np.full(1000, -np.inf, np.float32)
    logits[::25] = rng.standard_normal(40) * 1.5
    expected = np.exp(logits.astype(np.float64) / steering.get("temperature", 1.0))
    expected *= kept_reference(logits, Steering(**steering))
    expected *= 20_000 / expected.sum()
    counts = np.bincount(
        draw(np.tile(logits, (20_000, 1)), seed=7, position=np.arange(20_000), **steering), minlength=1000
    )
    assert (counts[expected == 0] == 0).all()
    frequent = expected > 5
    degrees = frequent.sum() - 1
    chi_square = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
    assert chi_square < degrees + 4.3 * np.sqrt(2 * degrees) + 12


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_rare_tokens_are_drawn_as_rarely_as_they_should_be(share):
    """49,151 rare tokens beside a likely one: uniforms too coarse near 0 would draw too few of them, or too many."""
    logits = np.zeros((100, 49152), np.float32)
    logits[:, 0] = np.log(49151 * (1 - share) / share)
    rare = (draw(logits, seed=np.arange(100)) != 0).sum()
    assert abs(rare - 100 * share) < 4.5 * np.sqrt(100 * share * (1 - share))


def test_a_draw_depends_on_its_own_row_only(rng):
    """Not on the other rows, the order, the slots, nor on how many there are."""
    count = 12
    logits = (rng.standard_normal((count, 49152)) * 2).astype(np.float32)
    rows = steerings(
        count,
        position=rng.integers(0, 4096, count),
        seed=rng.integers(0, 2**62, count),
        temperature=rng.choice([0, 1, 0.5, 2], count),
        top_p=rng.choice([1, 0.9, 0.5], count),
        top_k=rng.choice([0, 50], count),
        repetition_penalty=1.2,
    )
    edits = list(random_edits(rng, count, 49152))
    together = run(logits, rows, edits).ids
    order = rng.permutation(count)
    slots = order.astype(np.int32)  # row i is steered by slot order[i]
    shuffled = rows | {name: rows[name][order] for name in ("positions", "forced")}
    np.testing.assert_array_equal(run(logits[order], shuffled, edits, slots).ids, together[order])
    for row in range(count):
        alone = {name: values[row : row + 1] for name, values in rows.items()}
        assert run(logits[row : row + 1], alone, edits[row : row + 1]).ids[0] == together[row]


def test_seeds_and_positions_give_different_draws():
    logits = np.zeros((100, 1000), np.float32)
    assert len(set(draw(logits, seed=np.arange(100)))) > 80
    assert len(set(draw(logits, position=np.arange(100)))) > 80
    assert len(set(draw(logits, seed=np.arange(100) << 32))) > 80


def test_tiny_temperatures_are_nearly_greedy(rng):
    logits = rng.standard_normal((4, 1000)).astype(np.float32)
    for temperature in (1e-5, 1e-30, 1e-44):
        for top_p in (0.9, 1.0):
            np.testing.assert_array_equal(draw(logits, temperature=temperature, top_p=top_p), logits.argmax(axis=1))


def test_noise_is_exponential():
    noise = noise_reference(3, 5, 100_000)
    assert 0.98 < noise.mean() < 1.02
    assert 0.95 < noise.var() < 1.05


def test_noise_comes_from_philox():
    """The published vector for counter 0, key 0; its four words belong to ids 16 apart."""
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    np.testing.assert_allclose(noise_reference(0, 0, 64)[::16], -np.log1p(-(words + 0.5) / 2**32), rtol=1e-12)


# Arguments


def test_no_rows_is_nothing_to_do():
    assert draw(np.zeros((0, 1000))).shape == (0,)


def sample_arguments(**changes):
    """Arguments of `sample` for one row, some replaced."""
    fields = {name: np.zeros(1, np.float32) for name in vars(Steering())}
    fields |= {name: np.zeros(1, np.int32) for name in ("top_k", "hold_until", "num_edits")}
    fields |= {"seed": np.zeros(1, np.int64), "edit_bias": np.zeros((1, 4), np.float32)}
    fields |= {name: np.zeros((1, 4), np.int32) for name in ("edit_ids", "edit_seen")}
    work = {name: np.zeros(shape, dtype) for name, (shape, dtype) in workspace_fields(1, 100, 4).items()}
    fields |= {name: value for name, value in changes.items() if name in fields}
    work |= {name: value for name, value in changes.items() if name in work}
    rows = {name: np.zeros(1, np.int32) for name in ("ids_out", "slots", "positions", "forced")}
    rows |= {"logits": np.zeros((1, 100), np.float32)}
    rows |= {name: value for name, value in changes.items() if name in rows}
    state = SamplingState(**{name: view(array) for name, array in fields.items()})
    return rows | {
        "state": state,
        "workspace": SamplingWorkspace(**{name: view(array) for name, array in work.items()}),
    }


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"seed": np.zeros(1, np.int32)}, TypeError, "seed is int32, expected int64"),
        ({"edit_bias": np.zeros((1, 5), np.float32)}, ValueError, r"edit_bias has shape \(1, 5\), expected \(1, 4\)"),
        ({"slots": np.zeros(1, np.int64)}, TypeError, "slots is int64, expected int32"),
        ({"logits": np.zeros((1, 100))}, TypeError, "logits is float64, expected float32"),
        ({"choice": np.zeros(0, np.int32)}, ValueError, "the workspace is for 0 rows of logits, not for 1"),
        ({"peaks": np.zeros((1, 1), np.int32)}, ValueError, r"peaks has shape \(1, 1\)"),
    ],
)
def test_arguments_are_checked(changes, error, message):
    with pytest.raises(error, match=message):
        sample(**sample_arguments(**changes))
