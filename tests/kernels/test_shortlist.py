"""The sampler's short way, run on a CPU: what it decides is what the long way decides, and it decides where it can."""

import numpy as np
import pytest

from fastdeploy.kernels import sampling
from fastdeploy.kernels.launch import target, view
from fastdeploy.kernels.sampling import SamplingState, Steering, allocate_workspace, sample, sample_reference
from fastdeploy.kernels.selection import CHUNK, group_size, num_groups
from fastdeploy.kernels.shortlist import CAPACITY, UNDECIDED, draw_from_shortlists, makes_shortlists


@pytest.fixture(autouse=True)
def on_a_cpu_too(monkeypatch):
    monkeypatch.setattr(sampling, "makes_shortlists", lambda *_: True)


class Rows:
    """Rows of logits [S, V], each with its own steering, at one position."""

    def __init__(self, logits, steerings, position=3, forced=-1):
        count, self.memory = len(steerings), []
        self.logits, self.steerings, self.position = logits.astype(np.float32), steerings, position
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        arrays = {name: np.array([getattr(row, name) for row in steerings], np.float32) for name in names}
        arrays |= {
            name: np.array([getattr(row, name) for row in steerings], np.int32) for name in ("top_k", "hold_until")
        }
        arrays |= {"seed": np.array([row.seed for row in steerings]), "num_edits": np.zeros(count, np.int32)}
        arrays |= {name: np.zeros((count, 1), np.int32) for name in ("edit_ids", "edit_seen")}
        self.state = SamplingState(
            **{name: view(array) for name, array in arrays.items()}, edit_bias=view(np.zeros((count, 1), np.float32))
        )
        self.workspace = allocate_workspace(self._allocate, count, logits.shape[1], 1)
        numbers = [np.arange(count), np.full(count, position), np.full(count, forced)]
        self.rows = tuple(view(each.astype(np.int32)) for each in numbers)

    def _allocate(self, shape, dtype):
        self.memory.append(np.full(shape, -77, dtype))
        return self.memory[-1]

    def sampled(self):
        out = np.full(len(self.steerings), -77, np.int32)
        sample(out, self.logits, *self.rows, self.state, self.workspace)
        return out

    def decided(self):
        """What the short way alone says, UNDECIDED for the rest."""
        self.sampled()  # which fills the peaks
        choice = np.full(len(self.steerings), -77, np.int32)
        randomness = {"RANDOM": sampling._random_words, "EXPONENTIAL": sampling._exponential}
        lists, group = self.workspace.shortlist, group_size(target())
        peaks = self.workspace.peaks
        draw_from_shortlists(view(choice), view(self.logits), peaks, self.rows, self.state, lists, group, randomness)
        return choice

    def expected(self):
        pairs = zip(self.logits, self.steerings, strict=True)
        return np.array([sample_reference(row, steering, self.position) for row, steering in pairs])


def steerings(rng):
    return [
        Steering(float(rng.choice([0.3, 1.0, 2.0])), p, m, top_k=k, seed=int(rng.integers(1 << 60)))
        for k in (0, 1, 2, 7, 50, 200)
        for p in (1.0, 0.9, 0.3, 0.0)
        for m in (0.0, 0.05, 0.5)
    ]


@pytest.mark.parametrize("vocabulary", [500, 4096, 9001, 16_000])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_tokens_are_those_of_the_reference_and_most_rows_are_decided(vocabulary, spread, rng):
    some = steerings(rng)
    logits = rng.standard_normal((len(some), vocabulary)) * spread
    logits[::3] = np.round(logits[::3] * 3) / 3  # ties
    rows = Rows(logits, some)
    expected = rows.expected()
    np.testing.assert_array_equal(rows.sampled(), expected)
    choice = rows.decided()
    decided = choice != UNDECIDED.value
    np.testing.assert_array_equal(choice[decided], expected[decided])
    limit = min(num_groups(vocabulary), CAPACITY // 2)
    sure = [1 < row.top_k <= limit and row.top_p > 0 for row, flat in zip(some, range(len(some))) if flat % 3]
    assert decided[np.arange(len(some)) % 3 > 0][sure].all()


def test_rows_that_the_list_is_not_for_go_the_long_way(rng):
    never = [
        Steering(),
        Steering(temperature=0.0, top_k=5),
        Steering(top_k=1),
        Steering(top_p=0.0),
        Steering(top_k=4000),
    ]
    rows = Rows(rng.standard_normal((len(never), 5000)), never)
    assert (rows.decided() == UNDECIDED.value).all()
    np.testing.assert_array_equal(rows.sampled(), rows.expected())
    for forced, token in {7: 7, 5000: -5, -2: -5}.items():
        rows = Rows(rng.standard_normal((1, 5000)), [Steering(top_k=5)], forced=forced)
        assert rows.decided() == [UNDECIDED.value] and rows.sampled() == [token]


def test_a_list_without_room_goes_the_long_way(rng):
    """More tokens reach the bound than a chunk of ids has places."""
    logits = np.zeros((2, 2 * CHUNK))
    logits[1, : CAPACITY + 1] = 1.0
    rows = Rows(logits, [Steering(top_k=3, seed=1), Steering(top_k=3, seed=2)])
    assert (rows.decided() == UNDECIDED.value).all()
    np.testing.assert_array_equal(rows.sampled(), rows.expected())


def test_rows_without_numbers_are_left_to_who_reports_them():
    logits = np.random.default_rng(0).standard_normal((3, 1000))
    logits[0, 7], logits[1, 9], logits[2] = np.nan, np.inf, -np.inf
    rows = Rows(logits, [Steering(top_k=5)] * 3)
    assert (rows.decided() == UNDECIDED.value).all() and rows.sampled().tolist() == [-1, -1, -2]


def test_a_cpu_searches_instead_and_rows_of_too_many_groups_are_searched_anywhere():
    assert not makes_shortlists(target(), 100)
