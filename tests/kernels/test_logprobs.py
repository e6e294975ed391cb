from types import SimpleNamespace

import numpy as np
import pytest

from fastdeploy.kernels.launch import view
from fastdeploy.kernels.logprobs import (
    LogprobOutputs,
    LogprobWorkspace,
    logprobs_reference,
    output_fields,
    token_logprobs,
    workspace_fields,
)

UNTOUCHED = -77


def run(logits, tokens, num_top):
    """The outputs for rows of logits [R, V], each with room for three entries too many."""
    count, vocabulary = logits.shape
    fields = output_fields(count + 1, num_top + 3).items()
    found = {name: np.full(shape, UNTOUCHED, dtype) for name, (shape, dtype) in fields}
    fields = workspace_fields(count + 2, vocabulary).items()
    work = {name: np.full(shape, UNTOUCHED, dtype) for name, (shape, dtype) in fields}
    out = LogprobOutputs(**{name: view(array) for name, array in found.items()})
    workspace = LogprobWorkspace(**{name: view(array) for name, array in work.items()})
    token_logprobs(out, logits, np.asarray(tokens, np.int32), num_top, workspace)
    return SimpleNamespace(**found)


def fuzzed(rng, count, vocabulary):
    """Rows of logits, half of them with many ties, a third with impossible tokens."""
    scale = rng.choice([0.1, 1, 3, 20], (count, 1))
    logits = (rng.standard_normal((count, vocabulary)) * scale).astype(np.float32)
    logits[::2] = (logits[::2].view(np.uint32) & 0xFFFF0000).view(np.float32)
    logits[::3][rng.random(logits[::3].shape) < 0.5] = -np.inf
    logits[:, -1] = 0.5
    return logits


@pytest.mark.parametrize("num_top", [0, 1, 5, 200])
@pytest.mark.parametrize(
    "vocabulary, count", [(2, 100), (5, 100), (64, 100), (65, 100), (1000, 100), (4097, 30), (49152, 6), (200_000, 3)]
)
def test_logprobs_ranks_and_tops_match_reference(vocabulary, count, num_top, rng):
    num_top = min(num_top, vocabulary)
    logits, tokens = fuzzed(rng, count, vocabulary), rng.integers(0, vocabulary, count)
    found = run(logits, tokens, num_top)
    for row in range(count):
        logprobs, rank, tops = logprobs_reference(logits[row], tokens[row], num_top)
        ids = found.top_ids[row, :num_top]
        np.testing.assert_array_equal(ids, np.sort(tops))
        np.testing.assert_array_equal(found.top_logits[row, :num_top], logits[row, ids])
        np.testing.assert_allclose(found.logprob[row], logprobs[tokens[row]], rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(found.normaliser[row], logits[row, -1] - logprobs[-1], rtol=1e-6, atol=1e-5)
        assert found.rank[row] == rank


@pytest.mark.parametrize("vocabulary", [5, 65, 1000])
def test_the_whole_vocabulary_may_be_asked_for(vocabulary, rng):
    logits = fuzzed(rng, 20, vocabulary)
    found = run(logits, np.zeros(20), vocabulary)
    np.testing.assert_array_equal(found.top_ids[:20, :vocabulary], np.tile(np.arange(vocabulary), (20, 1)))
    np.testing.assert_array_equal(found.top_logits[:20, :vocabulary], logits)


def test_nothing_is_written_past_the_entries_asked_for(rng):
    found = run(fuzzed(rng, 20, 1000), np.zeros(20), 7)
    assert (found.top_ids[:, 7:] == UNTOUCHED).all()
    assert (found.top_logits[:, 7:] == UNTOUCHED).all()
    assert (found.rank[20:] == UNTOUCHED).all()


def test_of_equal_tokens_the_lower_ids_come_first():
    logits = np.zeros((1, 1000), np.float32)
    logits[0, ::2] = -0.0
    logits[0, 500] = 1
    found = run(logits, [300], 4)
    np.testing.assert_array_equal(found.top_ids[0, :4], [0, 1, 2, 500])
    assert found.rank[0] == 302


def test_small_probabilities_add_up():
    """Half of the probability lies in 200,000 tokens of which each is too small to change a float beside the other."""
    logits = np.zeros((1, 200_000), np.float32)
    logits[0, 0] = np.log(199_999)
    np.testing.assert_allclose(run(logits, [0], 0).logprob[0], np.log(0.5), atol=2e-6)


@pytest.mark.parametrize("num_top", [0, 5, 1000])
@pytest.mark.parametrize("bad, share", [(np.nan, 0.01), (np.nan, 1), (np.inf, 0.01), (np.inf, 1), (-np.inf, 1)])
def test_rows_without_probabilities_give_nan_and_ids_within_bounds(bad, share, num_top, rng):
    logits = rng.standard_normal((3, 1000)).astype(np.float32)
    logits[1, rng.random(1000) < share] = bad
    logits[1, 3] = bad
    found = run(logits, [0, 3, 2], num_top)
    ids = found.top_ids[1, :num_top]
    assert ((ids >= 0) & (ids < 1000)).all()
    assert len(set(ids)) == num_top
    assert np.isnan(found.logprob[1]) and not np.isfinite(found.normaliser[1])
    for row, token in ((0, 0), (2, 2)):
        np.testing.assert_allclose(found.logprob[row], logprobs_reference(logits[row], token, 0)[0][token], rtol=1e-5)


@pytest.mark.parametrize("token", [-1, 1000, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_impossible(token, rng):
    assert run(rng.standard_normal((1, 1000)).astype(np.float32), [token], 1).logprob[0] == -np.inf


def test_the_bits_of_a_row_depend_on_nothing_else(rng):
    logits, tokens = fuzzed(rng, 9, 49152), rng.integers(0, 49152, 9)
    together = run(logits, tokens, 20)
    for row in range(9):
        alone = run(logits[row : row + 1], tokens[row : row + 1], 20)
        for name in ("normaliser", "logprob", "rank", "top_ids", "top_logits"):
            assert getattr(alone, name)[0].tobytes() == getattr(together, name)[row].tobytes()


def test_the_logits_are_not_changed(rng):
    logits = fuzzed(rng, 5, 1000)
    before = logits.copy()
    run(logits, np.zeros(5), 5)
    np.testing.assert_array_equal(logits, before)


def test_no_rows_is_nothing_to_do():
    assert (run(np.zeros((0, 1000), np.float32), [], 5).rank == UNTOUCHED).all()


def arguments(rows=1, vocabulary=100, width=5):
    out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in output_fields(rows, width).items()}
    work = {name: np.zeros(shape, dtype) for name, (shape, dtype) in workspace_fields(rows, vocabulary).items()}
    out = LogprobOutputs(**{name: view(array) for name, array in out.items()})
    return out, LogprobWorkspace(**{name: view(array) for name, array in work.items()})


@pytest.mark.parametrize(
    "shape, num_top, sizes, message",
    [
        ((1, 100), 6, {}, "num_top=6: expected 0 to 5"),
        ((1, 100), -1, {}, "num_top=-1: expected 0 to 5"),
        ((1, 3), 4, {"vocabulary": 3}, "num_top=4: expected 0 to 3"),
        ((2, 100), 5, {}, "2 rows of logits, but outputs for 1 and a workspace for 1"),
        ((1, 200), 5, {}, r"peaks has shape \(1, 2\), expected \(1, 4\)"),
    ],
)
def test_arguments_are_checked(shape, num_top, sizes, message):
    out, workspace = arguments(**sizes)
    with pytest.raises(ValueError, match=message):
        token_logprobs(out, np.zeros(shape, np.float32), np.zeros(shape[0], np.int32), num_top, workspace)
