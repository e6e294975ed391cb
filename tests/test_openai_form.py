"""OpenAI's requests in our words, and choices in its. Whether its package takes them: tests/test_command_line.py."""

import math
from typing import Any

import pytest

from fastdeploy import CompletionOutput, Logprob, RequestOutput, SamplingParams
from fastdeploy.openai_form import ChoiceWriter, openai_request
from tests.engine.test_transcript import LLAMA, LLAMA_EOS


def test_an_openai_body_in_our_words() -> None:
    body = {"model": "m", "prompt": "p", "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, "seed": None}
    request = openai_request({"url": "/v1/chat/completions", "body": body})
    assert request == {"prompt": "p", "max_tokens": 3, "logprobs": 2}
    assert openai_request({"url": "/v1/completions", "body": {"logprobs": 4}}) == {"logprobs": 4}
    for bad in ({"url": "/v1/completions", "body": []}, {"body": {}}):
        with pytest.raises(ValueError):
            openai_request(bad)


TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        ({"response_format": {"type": "text"}, "tool_choice": "none", "echo": False, "suffix": None}, {}),
        ({"tool_choice": "auto", "tools": TOOLS, "parallel_tool_calls": True}, {"tools": TOOLS}),
        ({"tool_choice": "none", "tools": TOOLS, "parallel_tool_calls": False}, {}),
        ({"best_of": 3, "n": 3, "suffix": "", "stream": True, "stream_options": {}}, {"n": 3}),
        ({"best_of": 1, "user": "u", "metadata": {}, "store": True, "service_tier": "flex"}, {}),
        ({"logprobs": False, "top_logprobs": 0, "logit_bias": {}}, {"logprobs": None, "logit_bias": {}}),
        ({"top_logprobs": None, "functions": [], "function_call": "auto", "modalities": ["text"]}, {}),
        ({"max_completion_tokens": 3, "max_tokens": 9, "seed": 5}, {"max_tokens": 3, "seed": 5}),
    ],
)
def test_keys_that_ask_for_nothing_are_accepted(body: dict[str, Any], request_: dict[str, Any]) -> None:
    assert openai_request({"url": "/v1/chat/completions", "body": body}) == request_


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"parallel_tool_calls": False, "tools": TOOLS},
        {"echo": True},
        {"echo": 0},
        {"best_of": 2},
        {"best_of": 2, "n": 3},
        {"suffix": "x"},
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
        {"top_logprobs": 2},
    ],
)
def test_keys_that_ask_for_what_we_lack_are_refused_by_name(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^'{next(iter(body))}' is "):
        openai_request({"url": "/v1/chat/completions", "body": body})


def test_logprobs_tell_the_bytes_and_the_place_of_every_token() -> None:
    """Also of those that are parts of a character, not in the text, or lose a space at its beginning."""
    token_ids = [258, 256, 0xE4, 0xB8, 0xAD, LLAMA_EOS]  # "▁", "a", "中" in bytes, "</s>"
    logprobs = [{token_id: Logprob(-math.inf, 3, LLAMA.token_text(token_id))} for token_id in token_ids]
    said = CompletionOutput(0, 0, token_ids, "a中", logprobs=logprobs, finish_reason="stop")
    output, params = RequestOutput("id", "x", [1], said), SamplingParams(logprobs=0)
    chat = ChoiceWriter(True, params, LLAMA).choice(output)
    assert [place["bytes"] for place in chat["logprobs"]["content"]] == [
        [32], [97], [0xE4], [0xB8], [0xAD], list(b"</s>")
    ]  # fmt: skip
    assert [(place["logprob"], place["top_logprobs"]) for place in chat["logprobs"]["content"]] == [(-9999.0, [])] * 6
    text = ChoiceWriter(False, params, LLAMA).choice(output)
    assert text["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 2]
    assert text["logprobs"]["token_logprobs"] == [-9999.0] * 6
    assert text["logprobs"]["top_logprobs"][0] == {" ": -9999.0}
