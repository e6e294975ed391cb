"""SmolLM2 in float32 writes what transformers wrote in fp32 (tests/references/make_smollm2.py tells how it was asked).

Two right engines add in different orders, so their logits differ in the last bits: tokens are compared up to the first
step at which the reference hesitated, that is where its two largest logits were less than MARGIN apart.
"""

import json
from pathlib import Path

import pytest

from fastdeploy import LLM, SamplingParams
from tests.smollm2 import MODEL, needs_smollm2

MARGIN = 0.005  # float32 logits are within 0.0001 of float64's here; at 0.05 bfloat16 weights would pass, too
STORED = json.loads((Path(__file__).parent / "references" / "smollm2_greedy.json").read_text(encoding="utf-8"))
REFERENCES = STORED["references"]
CONVERSATIONS = [reference for reference in REFERENCES if "messages" in reference]
NEW_TOKENS = max(len(reference["token_ids"]) for reference in REFERENCES)
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
LONGEST = max(len(reference["prompt_token_ids"]) for reference in REFERENCES) + NEW_TOKENS


pytestmark = needs_smollm2


def named(references: list[dict]) -> dict:
    return {"argvalues": references, "ids": [reference["name"] for reference in references]}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, dtype="float32", max_model_len=LONGEST, max_num_seqs=len(REFERENCES))


@pytest.fixture(scope="module")
def batched(llm: LLM) -> list:
    """The answers to all prompts, computed together; the long prompts are cut into chunks between the decodes."""
    return llm.generate([reference["prompt_token_ids"] for reference in REFERENCES], GREEDY, use_tqdm=False)


def certain_tokens(reference: dict) -> list[int]:
    """The reference's tokens before the first at which it hesitated."""
    hesitations = (step for step, margin in enumerate(reference["margins"]) if margin < MARGIN)
    return reference["token_ids"][: next(hesitations, None)]


def test_references_are_certain_of_enough_tokens():
    certain = [len(certain_tokens(reference)) for reference in REFERENCES]
    assert sum(certain) >= 500 and min(certain) >= 8
    assert any(len(reference["prompt_token_ids"]) > 600 for reference in REFERENCES)


@pytest.mark.parametrize("index", range(len(REFERENCES)), ids=[reference["name"] for reference in REFERENCES])
def test_batched_prompts_are_answered_as_by_transformers(batched: list, index: int):
    reference, output = REFERENCES[index], batched[index]
    expected = certain_tokens(reference)
    assert output.outputs.token_ids[: len(expected)] == expected
    if len(expected) == len(reference["token_ids"]):
        assert len(output.outputs.token_ids) == len(expected)  # it also stopped where the reference did


@pytest.mark.parametrize("reference", **named([REFERENCES[0], REFERENCES[-2]]))
def test_a_prompt_alone_is_answered_as_in_the_batch(llm: LLM, batched: list, reference: dict):
    (alone,) = llm.generate(reference["prompt_token_ids"], GREEDY, use_tqdm=False)
    assert alone.outputs.token_ids == batched[REFERENCES.index(reference)].outputs.token_ids


@pytest.mark.parametrize("reference", **named([reference for reference in REFERENCES if "text" in reference]))
def test_text_becomes_the_same_ids(llm: LLM, reference: dict):
    assert llm.tokenizer.encode(reference["text"]) == reference["prompt_token_ids"]


@pytest.mark.parametrize("reference", **named(CONVERSATIONS))
def test_a_conversation_becomes_the_same_ids(llm: LLM, reference: dict):
    prompt = llm.tokenizer.apply_chat_template(reference["messages"], add_generation_prompt=True)
    assert llm.tokenizer.encode(prompt) == reference["prompt_token_ids"]


def test_chat_answers_as_transformers(llm: LLM):
    short = [reference for reference in CONVERSATIONS if len(reference["prompt_token_ids"]) < 100]
    outputs = llm.chat([reference["messages"] for reference in short], GREEDY, use_tqdm=False)
    for reference, output in zip(short, outputs, strict=True):
        expected = certain_tokens(reference)
        assert output.prompt_token_ids == reference["prompt_token_ids"]
        assert output.outputs.token_ids[: len(expected)] == expected


def test_answers_decode_to_the_same_text(llm: LLM):
    for reference in REFERENCES:
        assert llm.tokenizer.decode(reference["token_ids"], skip_special_tokens=False) == reference["answer"]
