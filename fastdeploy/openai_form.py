"""OpenAI's form of a request and of its answer: a line of its batches in our words, what was said in its.

Answers are what the `openai` package's `ChatCompletion` and `Completion` take. On top come `reasoning_content` of a
message, `stop_reason` and `prompt_logprobs` of a choice, where there are any.
"""

from __future__ import annotations

import codecs
import math
import re
import reprlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdeploy.engine.request import CompletionOutput, Logprob, RequestOutput
from fastdeploy.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fastdeploy.text.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IMPOSSIBLE = -9999.0  # what OpenAI writes for a logprob too small to tell: JSON has no -inf

# Keys of a request that change no token, whatever they say; "model" is the one that runs.
IGNORED = {
    "metadata", "model", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "stream", "stream_options", "user",
}  # fmt: skip
# Keys for what we don't have, and the test of a value that asks for nothing.
NEUTRAL: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "best_of": lambda value, body: value == (body.get("n") or 1),
    "echo": lambda value, body: value is False,
    "function_call": lambda value, body: value in ("none", "auto"),
    "functions": lambda value, body: value == [],
    "modalities": lambda value, body: value == ["text"],
    "parallel_tool_calls": lambda value, body: value is True or not body.get("tools"),
    "response_format": lambda value, body: value == {"type": "text"},
    "suffix": lambda value, body: value == "",
    "tool_choice": lambda value, body: value in ("none", "auto"),
    "verbosity": lambda value, body: value == "medium",
}


def openai_request(given: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a line of an OpenAI batch in our words. Raises ValueError for what we don't have."""
    body = given["body"]
    if given.get("url") not in (CHAT, COMPLETIONS):
        raise ValueError(f"'url' is {given.get('url')!r}; it may be {CHAT!r} or {COMPLETIONS!r}")
    if not isinstance(body, dict):
        raise ValueError(f"'body' is a JSON object, not {type(body).__name__}")
    request = {key: value for key, value in body.items() if value is not None and key not in IGNORED}
    if request.get("tool_choice") == "none":
        request.pop("tools", None)
    for key, asks_for_nothing in NEUTRAL.items():
        if key in request and not asks_for_nothing(request[key], request):
            raise ValueError(f"{key!r} is {reprlib.repr(request[key])}: this engine does not have that, leave it out")
    request = {key: value for key, value in request.items() if key not in NEUTRAL}
    if "max_completion_tokens" in request:
        request["max_tokens"] = request.pop("max_completion_tokens")
    number = request.pop("top_logprobs", 0)  # chat says whether, and how many elsewhere
    if isinstance(request.get("logprobs"), bool):
        request["logprobs"] = number if request["logprobs"] else None
    if number and request.get("logprobs") is None:
        raise ValueError(f"'top_logprobs' is {number!r}: it needs 'logprobs' to be true")
    return request


@dataclass(frozen=True)
class ChoiceWriter:
    """Writes the choices of one request. params: as resolved for it."""

    is_chat: bool
    params: SamplingParams
    tokenizer: Tokenizer

    def choice(self, output: RequestOutput) -> dict[str, Any]:
        """What was said, as a choice of a chat completion or a completion."""
        said = output.outputs
        choice: dict[str, Any] = {"index": said.index, "finish_reason": said.finish_reason}
        if said.stop_reason is not None:
            choice["stop_reason"] = said.stop_reason
        if output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = output.to_dict()["prompt_logprobs"]
        if not self.is_chat:
            return {"text": said.text, "logprobs": self._logprobs(said), **choice}
        message = {"role": "assistant", "content": said.text, "refusal": None}
        if said.reasoning_content is not None:
            message["reasoning_content"] = said.reasoning_content
        return {"message": message, "logprobs": self._chat_logprobs(said), **choice}

    def _chat_logprobs(self, said: CompletionOutput) -> dict[str, Any] | None:
        if said.logprobs is None:
            return None
        content = []
        most = math.inf if self.params.logprobs == -1 else self.params.logprobs or 0
        for token_id, place in zip(said.token_ids, said.logprobs, strict=True):
            tops = [self._chat_logprob(other, entry) for other, entry in place.items() if entry.rank <= most]
            content.append({**self._chat_logprob(token_id, place[token_id]), "top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _chat_logprob(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        spelled = list(self._bytes(token_id, entry))
        return {"token": entry.decoded_token or "", "bytes": spelled, "logprob": max(entry.logprob, IMPOSSIBLE)}

    def _bytes(self, token_id: int, entry: Logprob) -> bytes:
        """What a token adds to the text, which may be less than a character."""
        if self.tokenizer.is_byte_level:
            return self.tokenizer.token_bytes(token_id)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", self.tokenizer.token(token_id) or "")
        return bytes.fromhex(byte[1]) if byte else (entry.decoded_token or "").encode()

    def _logprobs(self, said: CompletionOutput) -> dict[str, Any] | None:
        """Token by token; an offset is the place in the text where the token, or its character, begins."""
        if said.logprobs is None:
            return None
        entries = [place[token_id] for token_id, place in zip(said.token_ids, said.logprobs, strict=True)]
        tokens = [entry.decoded_token or "" for entry in entries]
        skipped = self.tokenizer.special_token_ids if self.params.skip_special_tokens else ()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        lost = tokens and tokens[0].startswith(" ") and not said.text.startswith(" ")  # SentencePiece's first space
        offsets, place_in_text = [], -1 if lost else 0
        for token_id, entry in zip(said.token_ids, entries):
            offsets.append(min(max(place_in_text, 0), len(said.text)))
            if token_id not in skipped:
                place_in_text += len(decoder.decode(self._bytes(token_id, entry)))
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, IMPOSSIBLE) for entry in entries],
            "top_logprobs": [_by_text(place.values()) for place in said.logprobs],
            "text_offset": offsets,
        }


def _by_text(entries: Iterable[Logprob]) -> dict[str, float]:
    """Of tokens with the same text (parts of characters have U+FFFD) the most probable."""
    found: dict[str, float] = {}
    for entry in entries:
        found.setdefault(entry.decoded_token or "", max(entry.logprob, IMPOSSIBLE))
    return found


def openai_body(is_chat: bool, model: str, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
    """A `ChatCompletion` or `Completion`."""
    kind, prefix = ("chat.completion", "chatcmpl") if is_chat else ("text_completion", "cmpl")
    heading = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
    return {**heading, "choices": choices, "usage": usage}


def openai_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """The body of an answer that is none. error: {"code": ..., "message": ...}."""
    kind = "invalid_request_error" if error["code"] < 500 else "server_error"
    return {"error": {"message": error["message"], "type": kind, "param": None, "code": None}}
