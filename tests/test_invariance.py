"""A token does not depend on its neighbours: SmolLM2's logits, logprobs and tokens are the same bits alone, in a batch,
in chunks, from a cold and from a warm prefix cache, after preemptions, and at any number of threads.

By default that is with the file's own 4- and 8-bit weights and activations in integers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fastdeploy import LLM, SamplingParams
from tests.smollm2 import MODEL, needs_smollm2

NEW_TOKENS = 20
VOCABULARY = 49152

pytestmark = needs_smollm2


def prompts() -> list[list[int]]:
    """Eight prompts of 3 to 330 tokens: past a split of the context, over several blocks, shorter than one; three of
    them begin with the same two blocks."""
    rng = np.random.default_rng(0)
    made = [rng.integers(0, VOCABULARY, length).tolist() for length in (330, 3, 64, 65, 17, 128, 40, 257)]
    made[5] = made[0][:128]
    made[7] = made[0][:140] + made[7][140:]
    return made


def params() -> list[SamplingParams]:
    """A different way of sampling for each prompt, with logprobs of every kind."""
    common = {"max_tokens": NEW_TOKENS, "seed": 7, "ignore_eos": True, "logprobs": 4}
    ways = [
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0},
        {"temperature": 1.5, "top_p": 1.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.3},
        {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0, "repetition_penalty": 1.2, "logit_bias": {11: 2.0, 30: -2.0}},
        {"temperature": 0.9, "top_p": 0.8, "prompt_logprobs": 2},
        {"temperature": 2.0, "top_k": 500, "top_p": 1.0},
    ]
    return [SamplingParams(**common, **way) for way in ways]


class Answers:
    """What an LLM made of some of the prompts: tokens, logprobs, and the logits that each token was drawn from."""

    def __init__(self, llm: LLM, indices: list[int]) -> None:
        logits: dict[int, list[np.ndarray]] = {place: [] for place in range(len(indices))}
        run = llm.engine.runner.run

        def spy(step):
            sampled = [item.request.index for item in step.items if item.samples]
            output = run(step)
            for index, row in zip(sampled, llm.engine.runner.last_logits(), strict=True):
                logits[index].append(row.copy())
            return output

        llm.engine.runner.run = spy
        chosen = [params()[index] for index in indices]
        self.outputs = llm.generate([prompts()[index] for index in indices], chosen, use_tqdm=False)
        llm.engine.runner.run = run
        self.words = [self.said(output) for output in self.outputs]
        self.logits = [np.stack(rows).view(np.int32) for rows in logits.values()]

    @staticmethod
    def said(output) -> dict:
        """Tokens and logprobs of an output, as JSON would give them back: its floats lose nothing."""
        written = json.loads(json.dumps(output.to_dict()))
        return {
            "token_ids": written["outputs"]["token_ids"],
            "logprobs": written["outputs"]["logprobs"],
            "prompt_logprobs": written["prompt_logprobs"],
        }

    def assert_equal(self, other: "Answers", places: list[int]) -> None:
        """These answers are the other's answers at `places`, bit by bit."""
        for place, words, logits in zip(places, self.words, self.logits, strict=True):
            assert words == other.words[place]
            np.testing.assert_array_equal(logits, other.logits[place])


EVERYONE = list(range(8))


def new_llm(**keywords) -> LLM:
    return LLM(MODEL, max_model_len=512, **keywords)


@pytest.fixture(scope="module")
def together():
    """All eight at once, no prompt cut, no prefix known."""
    return Answers(new_llm(enable_prefix_caching=False), EVERYONE)


def test_alone_as_in_a_batch_of_eight(together):
    llm = new_llm(enable_prefix_caching=False)
    for index in EVERYONE:
        Answers(llm, [index]).assert_equal(together, [index])


@pytest.mark.parametrize("mode", [{"quantization": None}, {"quantization": "exact", "kv_cache_dtype": "int8"}])
def test_with_float_activations_alone_in_chunks_and_with_a_warm_cache_as_in_a_batch_of_eight(mode):
    batch = Answers(new_llm(enable_prefix_caching=False, **mode), EVERYONE)
    llm = new_llm(max_num_batched_tokens=48, **mode)
    for index in EVERYONE:
        Answers(llm, [index]).assert_equal(batch, [index])


def test_from_a_cold_and_from_a_warm_prefix_cache_as_without_one(together):
    llm = new_llm()
    cold, warm = Answers(llm, EVERYONE), Answers(llm, EVERYONE[::-1])
    cold.assert_equal(together, EVERYONE)
    warm.assert_equal(together, EVERYONE[::-1])
    assert [output.num_cached_tokens for output in cold.outputs] == [0, 0, 0, 0, 0, 127, 0, 128]
    assert [output.num_cached_tokens for output in warm.outputs[::-1]] == [320, 0, 63, 64, 0, 127, 0, 256]


@pytest.mark.parametrize("caching", [True, False])
def test_prefill_in_chunks_as_whole(together, caching):
    llm = new_llm(max_num_batched_tokens=48, enable_prefix_caching=caching)
    Answers(llm, EVERYONE).assert_equal(together, EVERYONE)


def test_launched_kernel_by_kernel_as_replayed(together):
    Answers(new_llm(enforce_eager=True), EVERYONE).assert_equal(together, EVERYONE)


@pytest.mark.parametrize("caching", [True, False])
def test_after_preemption_as_before(caching):
    """Blocks for the longest request and a few others, who lose theirs as it grows, and are computed again."""
    undisturbed = Answers(new_llm(block_size=16), EVERYONE)
    llm = new_llm(num_gpu_blocks_override=26, enable_prefix_caching=caching, block_size=16)
    Answers(llm, EVERYONE).assert_equal(undisturbed, EVERYONE)
    assert llm.statistics.num_preemptions > 0


@pytest.mark.parametrize("limits", [{"max_num_seqs": 1}, {"max_num_batched_tokens": 7, "num_gpu_blocks_override": 6}])
def test_at_the_narrowest_limits_as_without_them(together, limits):
    """One request at a time; chunks far below a block, and blocks for exactly the longest request."""
    Answers(new_llm(**limits), EVERYONE).assert_equal(together, EVERYONE)


def test_with_larger_blocks_as_with_blocks_of_64(together):
    """Smaller ones are smaller tiles of attention, and other last bits."""
    Answers(new_llm(block_size=256), EVERYONE).assert_equal(together, EVERYONE)


IN_ANOTHER_PROCESS = """
import json
from tests.test_invariance import EVERYONE, Answers, new_llm
print(json.dumps(Answers(new_llm(), EVERYONE).words))
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_with_any_number_of_threads(together, threads):
    environment = {**os.environ, "FASTDEPLOY_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout.splitlines()[-1]) == together.words
