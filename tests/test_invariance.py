"""A token does not depend on its neighbours: SmolLM2's logits are the same bits alone, in a batch, and in chunks."""

import numpy as np
import pytest

from fastdeploy import LLM, SamplingParams
from tests.smollm2 import MODEL, needs_smollm2

NEW_TOKENS = 6


pytestmark = needs_smollm2


def prompts() -> list[list[int]]:
    """Eight prompts of 3 to 330 tokens: past a split of the context, over several blocks, and shorter than one."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 49152, length).tolist() for length in (330, 3, 64, 65, 17, 128, 40, 257)]


def answers(batch: list[list[int]], temperature: float, **keywords) -> list[tuple[list[int], list[np.ndarray]]]:
    """For each prompt its new tokens and the logits that each was sampled from."""
    llm = LLM(MODEL, max_model_len=512, **keywords)
    logits: dict[int, list[np.ndarray]] = {index: [] for index in range(len(batch))}
    run = llm.engine.runner.run

    def spy(step):
        sampled = [item.request.index for item in step.items if item.samples]
        tokens = run(step)
        for index, row in zip(sampled, llm.engine.runner.last_logits(), strict=True):
            logits[index].append(row.copy())
        return tokens

    llm.engine.runner.run = spy
    params = [SamplingParams(temperature=temperature, max_tokens=NEW_TOKENS, seed=7, ignore_eos=True)] * len(batch)
    outputs = llm.generate(batch, params, use_tqdm=False)
    return [(output.outputs.token_ids, logits[index]) for index, output in enumerate(outputs)]


@pytest.fixture(scope="module")
def together():
    """All eight at once, long prompts whole."""
    return answers(prompts(), 0.8, max_num_seqs=8, max_num_batched_tokens=2048)


def assert_same_bits(found, expected) -> None:
    for (tokens, logits), (expected_tokens, expected_logits) in zip(found, expected, strict=True):
        assert tokens == expected_tokens
        np.testing.assert_array_equal(np.stack(logits).view(np.int32), np.stack(expected_logits).view(np.int32))


@pytest.mark.parametrize("index", [0, 1, 3])
def test_alone_as_in_a_batch_of_eight(together, index):
    assert_same_bits(answers([prompts()[index]], 0.8), [together[index]])


def test_prefill_in_chunks_as_whole(together):
    assert_same_bits(answers(prompts(), 0.8, max_num_seqs=8, max_num_batched_tokens=48), together)


def test_after_preemption_as_before(together):
    """Blocks for two of the long prompts: requests lose theirs and are computed again."""
    assert_same_bits(answers(prompts(), 0.8, max_num_seqs=8, num_gpu_blocks_override=11), together)
