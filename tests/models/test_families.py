"""Every model family computes what transformers computes in fp32, from a tiny random checkpoint on disk.

tests/references/families.py has the checkpoints, make_families.py tells how the answers were made.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from fastdeploy import LLM, SamplingParams
from tests.references.families import CASES, NEW_TOKENS, prompts, write_checkpoint

STORED = json.loads(Path(__file__).parents[1].joinpath("references", "families.json").read_text())["references"]
MARGIN = 1e-3  # where the reference's two largest logits are closer, a right engine may choose the other
TOLERANCE = 1e-4  # of logits and logprobs; they are stored with five digits after the point


def open_llm(directory: Path, config: dict, **keywords) -> LLM:
    """An LLM of a checkpoint written to `directory`."""
    write_model(directory, config)
    return LLM(directory, max_model_len=64, block_size=16, max_num_seqs=4, **keywords)


def write_model(directory: Path, config: dict) -> None:
    """A checkpoint with a tokenizer that nobody asks for anything."""
    write_checkpoint(directory, config)
    vocabulary = {str(token): token for token in range(config["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="0")).save(str(directory / "tokenizer.json"))


def greedy(llm: LLM, ids: list[list[int]], **params) -> list:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1, prompt_logprobs=0, **params)
    return llm.generate(ids, params, use_tqdm=False)


def chosen(entries: list) -> list[float]:
    """The logprob of the token that stands there, which is the first of each entry."""
    return [next(iter(entry.values())).logprob for entry in entries]


def certain(reference: dict) -> int:
    """How many of the reference's tokens come before the first at which it hesitated."""
    return next((step for step, margin in enumerate(reference["margins"]) if margin < MARGIN), NEW_TOKENS)


@pytest.mark.parametrize("name", CASES)
def test_logits_logprobs_and_greedy_tokens_are_those_of_transformers(name, tmp_path):
    config, references = CASES[name], STORED[name]
    with open_llm(tmp_path, config, dtype="float32") as llm:
        for reference, output in zip(references, greedy(llm, prompts(config)), strict=True):
            count = certain(reference)
            assert output.prompt_token_ids == reference["prompt_token_ids"]
            assert output.outputs.token_ids[:count] == reference["token_ids"][:count]
            found = chosen(output.prompt_logprobs[1:]) + chosen(output.outputs.logprobs[:count])
            expected = reference["prompt_logprobs"] + reference["logprobs"][:count]
            np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        for reference in references:
            llm.generate(reference["prompt_token_ids"], SamplingParams(max_tokens=1), use_tqdm=False)
            np.testing.assert_allclose(llm.engine.runner.last_logits()[-1], reference["logits"], atol=TOLERANCE)


def test_references_are_certain_of_nearly_all_tokens():
    steps = [certain(reference) for references in STORED.values() for reference in references]
    assert STORED.keys() == CASES.keys() and sum(steps) > 0.95 * NEW_TOKENS * len(steps)


@pytest.mark.parametrize("name", ["qwen3", "qwen3 moe, some layers dense, weights as they are", "ernie moe"])
def test_tokens_and_logprobs_are_the_same_bits_alone_in_chunks_and_in_a_batch(name, tmp_path):
    config = CASES[name]
    with open_llm(tmp_path, config, dtype="bfloat16") as llm:
        together = [said(output) for output in greedy(llm, prompts(config))]
    with open_llm(tmp_path, config, dtype="bfloat16", max_num_batched_tokens=7) as llm:
        assert [said(output) for ids in prompts(config) for output in greedy(llm, [ids])] == together


def said(output) -> tuple:
    return output.outputs.token_ids, chosen(output.prompt_logprobs[1:]) + chosen(output.outputs.logprobs)


@pytest.mark.parametrize("quantization", ["wint8", "w8a8"])
@pytest.mark.parametrize("name", ["ernie, untied, biases", "ernie moe", "qwen2"])
def test_quantised_linear_layers_change_logits_little(name, quantization, tmp_path):
    sizes = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 64}  # whole groups of 32
    config, found = CASES[name] | sizes, []
    for mode in (None, quantization):
        with open_llm(tmp_path, config, dtype="float32", quantization=mode) as llm:
            llm.generate(prompts(config)[2], SamplingParams(max_tokens=1), use_tqdm=False)
            found.append(llm.engine.runner.last_logits()[-1])
    change = np.abs(found[1] - found[0]).max() / found[0].std()
    assert 1e-4 < change < 0.2
