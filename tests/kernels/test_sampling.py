import numpy as np
import pytest

from fastdeploy.kernels.sampling import noise_reference, nucleus_reference, sample, sample_reference

VOCABULARIES = [5, 1000, 4097, 49152]  # every size is a compilation of a second: other tests use these, too


@pytest.fixture
def draw(store, blank):
    """draw(logits [S, V], temperature, top_p, seed, position): the sampled ids; scalars serve all rows."""

    def run(logits, temperature=1.0, top_p=1.0, seed=0, position=0):
        count = len(logits)
        ids, typed = blank((count,), "int32"), {"float32": (temperature, top_p), "int64": (seed,), "int32": (position,)}
        rows = [store(np.broadcast_to(value, count), dtype).view for dtype, values in typed.items() for value in values]
        sample(ids.view, store(logits).view, *rows)
        return ids.memory

    return run


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_greedy_is_the_argmax(vocabulary, rng, draw):
    logits = rng.standard_normal((6, vocabulary)).astype(np.float32)
    np.testing.assert_array_equal(draw(logits, temperature=0.0), logits.argmax(axis=1))
    np.testing.assert_array_equal(draw(logits, top_p=0.0), logits.argmax(axis=1))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ties_go_to_the_lowest_id(vocabulary, rng, draw):
    logits = rng.integers(-3, 3, (20, vocabulary)).astype(np.float32)
    np.testing.assert_array_equal(draw(logits, temperature=0.0), logits.argmax(axis=1))
    zeros = np.where(rng.random((20, vocabulary)) < 0.5, 0.0, -0.0).astype(np.float32)
    assert (draw(zeros, temperature=0.0) == 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("bad", ["nan", "all -inf", "+inf", "all nan"])
def test_a_row_without_a_finite_maximum_gives_minus_one(bad, temperature, top_p, rng, draw):
    logits = rng.standard_normal((3, 4097)).astype(np.float32)
    logits[1] = {"nan": logits[1], "+inf": logits[1], "all -inf": -np.inf, "all nan": np.nan}[bad]
    if bad in ("nan", "+inf"):
        logits[1, 1234] = float(bad)
    tokens = draw(logits, temperature, top_p)
    assert tokens[1] == -1
    assert (tokens[[0, 2]] >= 0).all()


def test_impossible_tokens_are_never_drawn(rng, draw):
    logits = np.full((200, 4097), -np.inf, np.float32)
    logits[:, [17, 4096]] = 1.0
    for top_p in (0.9, 1.0):
        assert set(draw(logits, 1.0, top_p, seed=np.arange(200))) == {17, 4096}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_match_reference(vocabulary, temperature, top_p, rng, draw):
    logits = (rng.standard_normal((8, vocabulary)) * 3 + 10).astype(np.float32)
    seeds, positions = rng.integers(-(2**63), 2**63, 8), rng.integers(0, 2**31, 8)
    tokens = draw(logits, temperature, top_p, seeds, positions)
    share = float(np.float32(top_p))
    expected = [
        sample_reference(row, temperature, share, int(seed), int(position))
        for row, seed, position in zip(logits, seeds, positions, strict=True)
    ]
    np.testing.assert_array_equal(tokens, expected)


def distributions(rng):
    """Rows of logits of all kinds, 300 tokens among 1000 ids."""
    for scale in (1e-3, 0.1, 1.0, 10.0, 1000.0):
        yield rng.standard_normal(300) * scale  # around zero
        yield rng.standard_normal(300) * scale + 20
    yield np.zeros(300)
    yield rng.integers(0, 3, 300) * 0.5  # ties everywhere
    yield np.round(rng.standard_normal(300) * 2) / 2
    yield np.where(np.arange(300) == 211, 40.0, 0.0)  # one certain token
    yield rng.standard_normal(300) * np.float32(1e-38)  # denormal distances
    yield -1.0 / np.arange(1, 301)
    yield np.where(rng.random(300) < 0.9, -np.inf, rng.standard_normal(300))


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 0.999999])
def test_the_nucleus_is_exact(top_p, rng, draw):
    """Over many seeds, and at so high a temperature of the noise that all kept tokens turn up, no other token does."""
    for logits in distributions(rng):
        logits = np.insert(logits, rng.integers(0, 300, 700), -np.inf).astype(np.float32)
        kept = nucleus_reference(logits, 1.0, float(np.float32(top_p)))
        draws = draw(np.tile(logits, (1500, 1)), 1.0, top_p, seed=np.arange(1500))
        outside = set(draws) - set(np.flatnonzero(kept))
        assert not outside or borderline(logits, kept, outside, top_p), (top_p, outside)
        probability = np.exp(logits.astype(np.float64) - logits.max()) * kept
        likely = np.flatnonzero(probability > 0.02 * probability.sum())  # missed in 1500 draws once in 10^13
        assert set(likely) - set(draws) <= {np.flatnonzero(kept)[-1]}


def borderline(logits, kept, outside, top_p):
    """Whether float64 and exact arithmetic may disagree: the sum lies within 1e-6 of top_p."""
    masses = np.exp(logits.astype(np.float64) - logits.max())
    return abs(masses[kept].sum() / masses.sum() - top_p) < 1e-6 and len(outside) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_equal_tokens_are_kept_by_lowest_id(count, draw):
    """Of 1024 equal tokens, top_p just below count / 1024 keeps the first `count`."""
    logits = np.tile(np.where(np.arange(4097) % 4 == 1, 2.5, -np.inf), (40 * count, 1))
    draws = draw(logits, 1.0, (count - 0.5) / 1024, seed=np.arange(40 * count))
    assert set(draws) == {4 * index + 1 for index in range(count)}


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (2.0, 0.9)])
def test_draws_follow_the_distribution(temperature, top_p, rng, draw):
    """Chi-square over 20,000 draws; the bound is passed by chance once in 10^5."""
    logits = np.full(1000, -np.inf, np.float32)
    logits[::25] = rng.standard_normal(40) * 1.5
    masses = np.exp(logits.astype(np.float64) / temperature) * nucleus_reference(logits, temperature, top_p)
    draws = draw(np.tile(logits, (20_000, 1)), temperature, top_p, seed=7, position=np.arange(20_000))
    counts, expected = np.bincount(draws, minlength=1000), masses / masses.sum() * 20_000
    assert (counts[expected == 0] == 0).all()
    frequent = expected > 5
    degrees = frequent.sum() - 1
    chi_square = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
    assert chi_square < degrees + 4.3 * np.sqrt(2 * degrees) + 12


def test_rare_tokens_are_drawn_as_rarely_as_they_should_be(draw):
    """49,151 rare tokens beside a likely one: uniforms too coarse near 0 would draw too few of them, or too many."""
    for share in (0.5, 0.1):  # of all the rare ones
        logits = np.zeros((100, 49152), np.float32)
        logits[:, 0] = np.log(49151 * (1 - share) / share)
        rare = (draw(logits, 1.0, 1.0, seed=np.arange(100)) != 0).sum()
        assert abs(rare - 100 * share) < 4.5 * np.sqrt(100 * share * (1 - share))


def test_a_draw_depends_on_seed_and_position_only(rng, draw):
    logits = (rng.standard_normal((9, 4097)) * 2).astype(np.float32)
    seeds, positions = rng.integers(0, 2**62, 9), rng.integers(0, 4096, 9)
    temperatures = np.array([0, 1, 0.5, 2, 1, 0, 1, 3, 0.1])
    shares = np.array([1, 1, 0.9, 0.5, 0, 1, 0.99, 1, 0.9])
    together = draw(logits, temperatures, shares, seeds, positions)
    order = rng.permutation(9)
    shuffled = draw(logits[order], temperatures[order], shares[order], seeds[order], positions[order])
    np.testing.assert_array_equal(shuffled, together[order])
    for row in range(9):
        one = slice(row, row + 1)
        alone = draw(logits[one], temperatures[one], shares[one], seeds[one], positions[one])
        assert alone[0] == together[row]


def test_seeds_and_positions_give_different_draws(draw):
    logits = np.zeros((100, 1000), np.float32)
    assert len(set(draw(logits, seed=np.arange(100)))) > 80
    assert len(set(draw(logits, position=np.arange(100)))) > 80
    assert len(set(draw(logits, seed=np.arange(100) << 32))) > 80


def test_tiny_temperatures_are_nearly_greedy(rng, draw):
    logits = rng.standard_normal((4, 1000)).astype(np.float32)
    for temperature in (1e-5, 1e-30, 1e-44):
        np.testing.assert_array_equal(draw(logits, temperature, 0.9), logits.argmax(axis=1))


def test_noise_is_exponential():
    noise = noise_reference(3, 5, 100_000)
    assert 0.98 < noise.mean() < 1.02
    assert 0.95 < noise.var() < 1.05


def test_no_rows_is_nothing_to_do(draw):
    assert draw(np.zeros((0, 1000))).shape == (0,)


def test_types_are_checked(store, blank):
    ids, ones = blank((1,), "int32"), store([1.0])
    with pytest.raises(TypeError, match="seed is int32, expected int64"):
        arguments = (ones.view, ones.view, store([0], "int32").view, store([0], "int32").view)
        sample(ids.view, store(np.zeros((1, 5))).view, *arguments)
