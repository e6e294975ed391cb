"""A model divided among ranks computes what it does whole. Ranks are threads here, processes in test_parallel.py."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastdeploy.config import ModelConfig
from fastdeploy.device import open_device
from fastdeploy.kernels.launch import TensorView
from fastdeploy.models import load_model
from fastdeploy.models.sharding import Shard, check_divisible
from fastdeploy.models.weights import Checkpoint, open_checkpoint
from tests.models.test_decoder import Steps, random_ids
from tests.models.test_loading import quantised_checkpoint
from tests.models.tiny import BIASED, GROUPED, INTERLEAVED, QWEN3, TIED, UNTIED, checkpoint, random_tensors
from tests.references.families import CASES, write_checkpoint


class Exchange:
    """What the threads that play ranks share. One computes at a time: the kernels' thread pool has room for one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.computing = threading.Lock()
        self.meeting = threading.Barrier(size, timeout=60)
        self.given: list[np.ndarray] = [np.empty(0)] * size


class ThreadGroup:
    """Stands in for `device.Group`."""

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self.exchange, self.rank, self.size = exchange, rank, exchange.size

    def all_gather(self, out: TensorView, x: TensorView) -> None:
        exchange = self.exchange
        exchange.given[self.rank] = array(x).copy()
        exchange.computing.release()
        exchange.meeting.wait()
        exchange.computing.acquire()
        array(out)[...] = np.stack(exchange.given)
        exchange.computing.release()
        exchange.meeting.wait()  # nobody gives anything new before all have read
        exchange.computing.acquire()


def array(tensor: TensorView) -> np.ndarray:
    """The float32 elements of a view, no copy."""
    assert tensor.dtype == "float32" and tensor.contiguous
    memory = (ctypes.c_float * (tensor.nbytes // 4)).from_address(tensor.pointer)
    return np.ctypeslib.as_array(memory).reshape(tensor.shape)


def logits_of(source: Checkpoint, ids: list[int], quantization: str | None, group: Any = None) -> np.ndarray:
    """The logits of a prompt and, after it, of a decode."""
    model = load_model(source, open_device(), "float32", 256, quantization, progress=False, group=group)
    steps = Steps(model)
    return np.concatenate([steps.run((0, 0, ids[:-1])), steps.run((0, len(ids) - 1, ids[-1:]))])


def divided_logits(source: Checkpoint, ranks: int, ids: list[int], quantization: str | None = None) -> list[np.ndarray]:
    """What each rank has for `logits_of`."""
    exchange = Exchange(ranks)

    def run(rank: int) -> np.ndarray:
        with exchange.computing:
            return logits_of(source, ids, quantization, ThreadGroup(exchange, rank))

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def tiny(config: ModelConfig) -> Checkpoint:
    return checkpoint(config, random_tensors(config))


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        (TIED, 2),  # an odd vocabulary: the last rank's share is smaller
        (replace(UNTIED, intermediate_size=51), 3),
        (replace(BIASED, intermediate_size=54), 3),
        (INTERLEAVED, 2),  # one KV head, which both ranks hold
        (replace(TIED, num_heads=8, num_kv_heads=2), 4),  # ranks 0 and 1 hold the first KV head, 2 and 3 the second
        (QWEN3, 2),
    ],
)
def test_ranks_have_the_logits_of_one(config, ranks):
    ids = random_ids(40)
    expected = logits_of(tiny(config), ids, None)
    found = divided_logits(tiny(config), ranks, ids)
    for logits in found:
        np.testing.assert_array_equal(logits, found[0])  # all ranks the same bits
    assert np.abs(found[0] - expected).max() < 3e-5 * np.abs(expected).max()


@pytest.mark.parametrize("quantization", ["wint8", "wint4"])
def test_quantised_weights_are_divided_between_their_groups(quantization):
    """Input features in shares of whole groups of 32, so that each rank has the very values of the whole."""
    config, ids = replace(GROUPED, num_heads=4, num_kv_heads=2, intermediate_size=128), random_ids(20)
    expected = logits_of(tiny(config), ids, quantization)
    found = divided_logits(tiny(config), 2, ids, quantization)
    assert np.abs(found[0] - expected).max() < 3e-5 * np.abs(expected).max()


@pytest.mark.parametrize("storage", ["Q4_0", "Q5_K", "Q6_K", "IQ4_XS"])
def test_shares_may_cut_the_spans_that_share_a_scale(storage):
    """Each rank has 128 input features of the attention's output and 384 of down, where scales are of 256."""
    config = replace(GROUPED, num_heads=4, num_kv_heads=2, head_dim=64, hidden_size=256, intermediate_size=768)
    source, ids = quantised_checkpoint(random_tensors(config), {"proj.weight": storage}, config), random_ids(20)
    expected = logits_of(source, ids, "exact")
    found = divided_logits(source, 2, ids, "exact")
    assert np.abs(found[0] - expected).max() < 3e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_every_family_can_be_divided(name, tmp_path):
    """The likeliest tokens are the same ones, too, wherever the two likeliest are further apart than rounding goes."""
    write_checkpoint(tmp_path, CASES[name])
    source = open_checkpoint(tmp_path)
    ids = [token % source.config.vocab_size for token in random_ids(20)]
    expected = logits_of(source, ids, None)
    found = divided_logits(source, 3 if source.config.num_heads % 2 else 2, ids)[0]
    tolerance = 3e-5 * np.abs(expected).max()
    assert np.abs(found - expected).max() < tolerance
    second, first = np.sort(expected, axis=1)[:, -2:].T
    certain = first - second > 2 * tolerance
    assert certain.sum() > len(ids) / 2
    np.testing.assert_array_equal(found.argmax(axis=1)[certain], expected.argmax(axis=1)[certain])


@pytest.mark.parametrize("ranks", range(1, 7))
@pytest.mark.parametrize("count", [12, 60])
def test_shares_are_complete_and_apart(ranks, count):
    shards = [Shard(rank, ranks) for rank in range(ranks)]
    if count % ranks == 0:
        assert [i for shard in shards for i in shard.of(count)] == list(range(count))
    for size in (1, 131, 132):
        assert [i for shard in shards for i in shard.of_vocabulary(size)] == list(range(size))
        assert all(len(shard.of_vocabulary(size)) <= shard.vocabulary_width(size) for shard in shards)


@pytest.mark.parametrize(
    ("config", "ranks", "complaint"),
    [
        (UNTIED, 2, "9 query heads and 3 KV heads .* takes 1$"),  # nor can 52 intermediate features be in thirds
        (TIED, 4, "6 query heads .* takes 1, 2$"),
        (replace(TIED, intermediate_size=53), 2, "53 intermediate features"),
    ],
)
def test_what_cannot_be_divided_is_an_error_that_says_what_can(config, ranks, complaint):
    with pytest.raises(ValueError, match=f"tensor_parallel_size={ranks}: {complaint}"):
        check_divisible(config, ranks)
