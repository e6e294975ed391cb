"""SamplingParams: how the tokens of one request are chosen and when they end. Checked when built."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdeploy.checks import check_int, check_number, complaint, suggesting_keywords

if TYPE_CHECKING:
    import numpy as np

    from fastdeploy.text.tokenizer import Tokenizer

logger = logging.getLogger("fastdeploy")

# What holds where neither the request nor the checkpoint's generation config says otherwise.
NEUTRAL: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 0.7,  # FastDeploy's default; most engines take 1.0
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
MAX_N = 16384  # outputs are held until a call returns them
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1  # the sampler has it as an int32
MAX_TEMPERATURE = 3.4e38  # it goes to the sampler as a float32
LARGE = 1e30  # leaves logits that are multiplied by it, or have it added, finite in float32

INTEGERS: dict[str, tuple[int, int | None]] = {
    "n": (1, MAX_N),
    "top_k": (-1, MAX_TOP_K),
    "min_tokens": (0, None),
    "max_tokens": (1, None),
    "seed": (0, MAX_SEED),
    "logprobs": (-1, None),
    "prompt_logprobs": (-1, None),
    "reasoning_max_tokens": (0, None),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, MAX_TEMPERATURE),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1 / LARGE, LARGE),
}
FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
ALWAYS_NAMED = ("n", "min_tokens", *FLAGS)  # the fields that must not be None

# (ids of prompt and output, logits [vocabulary] float32) -> logits of the same shape, or None: changed in place
LogitsProcessor = Callable[["list[int]", "np.ndarray"], "np.ndarray | None"]


@suggesting_keywords("SamplingParams")
@dataclass(repr=False)
class SamplingParams:
    """How to sample one completion. Wrong types are a TypeError, wrong values a ValueError, when built.

    One object may serve many prompts and many calls: the engine works on a copy and never changes it. Where the
    default is None, the checkpoint's generation config is asked for temperature, top_p, top_k, min_p and the
    penalties; what it does not name either is temperature 1.0, top_p 0.7, and everything else off.

    Which token comes:
    n: completions per prompt, one RequestOutput each, prompt by prompt, 1 to 16384. Number i > 0 of them has a seed of
        its own made of the request's and i, see `for_sample`.
    temperature: logits are divided by it before the softmax; 0 takes the most probable token (ties: lowest id).
    top_p: keep the fewest most probable tokens whose probabilities reach top_p; 0 takes the most probable token.
    top_k: keep the k most probable tokens; 1 takes the most probable one, 0 and -1 keep all (-1 is read as 0).
    min_p: keep the tokens at least min_p times as probable as the most probable one.
    presence_penalty: taken from the logit of each token that occurs in the output, -2 to 2.
    frequency_penalty: taken once for each time it occurs there, -2 to 2.
    repetition_penalty: logits of tokens that occur in prompt or output are divided by it if positive, else multiplied.
    seed: the random numbers are a function of (seed, position, token id) alone, so a seeded request draws the same
        tokens in any company. None: drawn from the engine's own seed, another one for each request.
    bad_words: texts that must not occur in the output: the tokens of each, as it is and with a space before it; of
        several tokens in a row the last is impossible after the others.
    bad_words_token_ids: ids that must not occur in the output.
    logit_bias: {id: number added to its logit}; -inf: the token must not occur.
    logits_processors: callables f(ids of prompt and output, logits [vocabulary] float32 NumPy array) that return new
        logits, or change them in place and return None; they go before everything else, in this order.

    When it ends:
    min_tokens: end-of-sequence and stop tokens are impossible before output token number min_tokens + 1, and a stop
        text counts from token number min_tokens on. 1: the model can't end an answer before it has begun.
    max_tokens: end after this many output tokens; clipped to what the prompt leaves of max_model_len. None: all of it.
    stop: a text or several: end where one is complete in the output's text, reasoning included, wherever tokens begin
        and end. Of several the one that is complete first counts, then the longest. The text is cut off before it.
        A special token written out in one is found where the text leaves it out, too.
    stop_token_ids: end after any of these ids, which stays in token_ids but not in the text.
    include_stop_str_in_output: leave the stop text in the text, and the text of the stop or end-of-sequence token
        too (that of a special token only if skip_special_tokens is False).
    ignore_eos: go on after an end-of-sequence token.
    reasoning_max_tokens: end the thinking of a reasoning model after this many tokens by putting its end marker.

    What is told:
    logprobs: for each output token the log-probabilities of this many most probable tokens, -1: of the vocabulary,
        and of the token itself in any case. Of the model's own distribution, before any of the above. None: none.
    prompt_logprobs: the same for each prompt token but the first.
    skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int = 1
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    bad_words: list[str] | None = None
    bad_words_token_ids: list[int] | None = None
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: list[LogitsProcessor] | None = None
    reasoning_max_tokens: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_numbers()
        self.stop = self._checked_texts("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self.bad_words = self._checked_texts("bad_words", self.bad_words)
        self.stop_token_ids = self._checked_ids("stop_token_ids", self.stop_token_ids)
        self.bad_words_token_ids = self._checked_ids("bad_words_token_ids", self.bad_words_token_ids)
        self.logit_bias = self._checked_bias(self.logit_bias)
        self.logits_processors = self._checked_processors(self.logits_processors)
        if self.max_tokens is not None:
            for field in ("min_tokens", "reasoning_max_tokens"):
                value = getattr(self, field)
                if value is not None and value > self.max_tokens:
                    raise self._value_error(field, value, f"must be at most max_tokens, which is {self.max_tokens}")

    def _check_numbers(self) -> None:
        owner = type(self).__name__
        for field, (least, most) in INTEGERS.items():
            if getattr(self, field) is not None or field in ALWAYS_NAMED:
                setattr(self, field, check_int(owner, field, getattr(self, field), least, most))
        if self.top_k == -1:
            self.top_k = 0
        for field, (low, high) in NUMBERS.items():
            if getattr(self, field) is not None:
                setattr(self, field, check_number(owner, field, getattr(self, field), low, high))
        for field in FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise self._type_error(field, getattr(self, field), "must be True or False")

    # The checks below return copies: a list the caller changes later does not change the request.

    def _checked_list(self, field: str, given: object, of: str) -> list:
        if not isinstance(given, (list, tuple)):
            raise self._type_error(field, given, f"must be a list of {of}, not {type(given).__name__}")
        return list(given)

    def _checked_texts(self, field: str, given: object) -> list[str] | None:
        if given is None:
            return None
        texts = self._checked_list(field, given, "texts")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise self._type_error(f"{field}[{place}]", text, f"must be text, not {type(text).__name__}")
            if not text:
                raise self._value_error(f"{field}[{place}]", text, "must have at least one character")
            if not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise self._value_error(f"{field}[{place}]", text, "must be valid Unicode, not half a surrogate pair")
        return texts

    def _checked_ids(self, field: str, given: object) -> list[int] | None:
        if given is None:
            return None
        ids = self._checked_list(field, given, "token ids")
        owner = type(self).__name__
        return [check_int(owner, f"{field}[{place}]", token_id, low=0) for place, token_id in enumerate(ids)]

    def _checked_bias(self, given: object) -> dict[int, float] | None:
        if given is None:
            return None
        if not isinstance(given, Mapping):
            must = f"must be a dict of token ids and numbers, not {type(given).__name__}"
            raise self._type_error("logit_bias", given, must)
        owner = type(self).__name__
        checked = {}
        for token_id, bias in given.items():
            if isinstance(token_id, str) and token_id.isdecimal():  # what JSON makes of integer keys
                token_id = int(token_id)
            key = check_int(owner, "logit_bias key", token_id, low=0)
            if isinstance(bias, numbers.Real) and bias == -math.inf:
                checked[key] = -math.inf
            else:
                checked[key] = check_number(owner, f"logit_bias[{key}]", bias, -LARGE, LARGE)
        return checked

    def _checked_processors(self, given: object) -> list[LogitsProcessor] | None:
        if given is None:
            return None
        processors = self._checked_list("logits_processors", given, "callables")
        for place, processor in enumerate(processors):
            if not callable(processor):
                must = f"must be callable as f(token_ids, logits), not {type(processor).__name__}"
                raise self._type_error(f"logits_processors[{place}]", processor, must)
        return processors

    def _type_error(self, field: str, value: object, must: str) -> TypeError:
        return TypeError(complaint(type(self).__name__, field, value, must))

    def _value_error(self, field: str, value: object, must: str) -> ValueError:
        return ValueError(complaint(type(self).__name__, field, value, must))

    def __repr__(self) -> str:
        """The fields that differ from their defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        parts = [f"{name}={value!r}" for name, (value, default) in values.items() if value != default]
        return f"{type(self).__name__}({', '.join(parts)})"

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ValueError for a token id that a model with ids 0 to vocab_size - 1 does not have."""
        for field in ("stop_token_ids", "bad_words_token_ids", "logit_bias"):
            ids = getattr(self, field) or ()
            for token_id in ids:
                if token_id >= vocab_size:
                    must = f"{token_id} never occurs, token ids run from 0 to {vocab_size - 1}"
                    raise self._value_error(field, ids, must)

    def resolved(self, defaults: SamplingParams, room: int, seed: int) -> SamplingParams:
        """A copy in which nothing is left open. It shares its containers with this one.

        None remains where it says that something is not wanted: logprobs, prompt_logprobs, reasoning_max_tokens.
        Containers are empty instead.

        defaults: what `sampling_defaults` made of the checkpoint. room: most output tokens that max_model_len leaves.
        seed: for a request that names none. Raises ValueError if min_tokens is more than room.
        """
        if self.min_tokens > room:
            must = (
                f"the prompt leaves room for {room} output tokens within max_model_len: shorten it or lower min_tokens"
            )
            raise self._value_error("min_tokens", self.min_tokens, must)
        made = copy.copy(self)  # not dataclasses.replace, which checks everything again: 0.1 ms, more with many biases
        for name in NEUTRAL:
            if getattr(made, name) is None:
                setattr(made, name, getattr(defaults, name))
        made.max_tokens = room if self.max_tokens is None else min(self.max_tokens, room)
        made.seed = seed if self.seed is None else self.seed
        for name in ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids", "logits_processors"):
            setattr(made, name, getattr(self, name) or [])
        made.logit_bias = self.logit_bias or {}
        if made.reasoning_max_tokens is not None:
            made.reasoning_max_tokens = min(made.reasoning_max_tokens, made.max_tokens)
        return made

    def for_sample(self, index: int) -> SamplingParams:
        """A copy for completion number `index` of the n of a prompt, with n=1: what it says if asked alone.

        Number 0 has the seed of the request itself, so it says what n=1 would say; number i the first 63 bits of the
        SHA-256 of "seed/i", so that neighbouring seeds share no sample.
        """
        made = copy.copy(self)
        made.n = 1
        if self.seed is not None and index > 0:
            digest = hashlib.sha256(f"{self.seed}/{index}".encode()).digest()
            made.seed = int.from_bytes(digest[:8], "big") >> 1
        return made


def sampling_defaults(generation_config: Mapping[str, object]) -> SamplingParams:
    """What holds where a request says nothing: the checkpoint's word, else `NEUTRAL`. Logged in one line.

    Raises ValueError if the generation config has a value that no request could have.
    """
    named = {field: generation_config[field] for field in NEUTRAL if generation_config.get(field) is not None}
    try:
        defaults = SamplingParams(**{**NEUTRAL, **named})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's generation_config has a bad default: {error}") from error
    values = ", ".join(f"{field} {getattr(defaults, field):g}" for field in NEUTRAL)
    origin = "the generation config names " + ", ".join(named) if named else "the generation config names none of them"
    logger.info("sampling defaults: %s (%s)", values, origin)
    return defaults


def banned_sequences(params: SamplingParams, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The token sequences that bad_words and bad_words_token_ids forbid, each once.

    A word is forbidden as it is, whitespace too, and with a space before it, which is another token, unless it has one.
    Spelled with other tokens than the tokenizer's own it still may occur.
    """

    def sequences() -> Iterator[tuple[int, ...]]:
        for token_id in params.bad_words_token_ids or ():
            yield (token_id,)
        for word in params.bad_words or ():
            yield _within_text(word, tokenizer)
            if word[0] != " " or word.isspace():
                yield _within_text(f" {word}", tokenizer)

    return [ids for ids in dict.fromkeys(sequences()) if ids]


ANCHORS = ("\n", ".", "0", "中", "a")  # texts that hardly ever share a token with what follows them


def _within_text(words: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of `words` after other text: at a text's beginning SentencePiece adds a space, or removes one."""
    for anchor in ANCHORS:
        before, together = (tuple(tokenizer.encode(text)) for text in (anchor, anchor + words))
        if before and together[: len(before)] == before:
            return together[len(before) :]
    return tuple(tokenizer.encode(words))
