"""Intake: prompts and sampling parameters become Requests that this model can serve.

All is checked, of all prompts, before the first request exists: a call is queued whole or not at all.
"""

from __future__ import annotations

import dataclasses
import random
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdeploy.checks import complaint
from fastdeploy.engine.request import Request
from fastdeploy.engine.transcript import Transcript
from fastdeploy.engine_config import ResolvedConfig
from fastdeploy.prompts import Prompt
from fastdeploy.sampling_params import SamplingParams, banned_sequences
from fastdeploy.text.reasoning import REASONING_PARSERS, ReasoningParser, ThinkingBudget

if TYPE_CHECKING:
    from fastdeploy.text.tokenizer import Tokenizer

BannedSequences = list[tuple[int, ...]]


class Intake:
    """Makes the requests of all calls of one LLM.

    vocab_size: of the model. eos_token_ids: what ends an answer. defaults: temperature, top_p and
    the like for requests that name none.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        defaults: SamplingParams,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = config.max_model_len
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._defaults = defaults
        self._markers = None if config.reasoning_parser is None else REASONING_PARSERS[config.reasoning_parser]
        self._seeds = random.Random(config.seed)

    def requests(self, prompts: Sequence[Prompt], sampling_params: object) -> list[Request]:
        """n requests for each prompt, prompt by prompt, each with its transcript and its place as its index.

        sampling_params: one SamplingParams for all prompts, a list with one for each, or None. Raises TypeError or
        ValueError if it is anything else, or asks for what this model doesn't have.
        """
        all_given = spread_params(sampling_params, len(prompts))
        # Checked anew, each object once: somebody may have assigned to fields since.
        checked = {id(given): dataclasses.replace(given) for given in all_given}
        banned = {key: self._check(params) for key, params in checked.items()}
        requests: list[Request] = []
        for prompt, given in zip(prompts, all_given, strict=True):
            for sample in range(given.n):
                params = self._resolved(prompt, checked[id(given)].for_sample(sample))
                requests.append(self._request(len(requests), prompt, params, banned[id(given)]))
        return requests

    def _resolved(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        room = self._max_model_len - len(prompt.token_ids)
        try:
            return params.resolved(self._defaults, room, seed=self._seeds.getrandbits(63))
        except ValueError as error:  # min_tokens that this prompt leaves no room for
            raise ValueError(f"{prompt.name}: {error}") from error

    def _request(self, index: int, prompt: Prompt, params: SamplingParams, banned: BannedSequences) -> Request:
        from fastdeploy.text.tokenizer import (
            StreamingDetokenizer,  # brings the tokenizers library: not before there is one
        )

        request = Request(
            str(uuid.uuid4()), prompt.given, prompt.token_ids, params, self._eos_token_ids, index, banned=banned
        )
        parser: ReasoningParser | None = None
        shown: tuple[str, ...] = ()
        if self._markers is not None:
            shown = self._markers.texts  # the parser must see them, even where they are special tokens
            text = self._text(prompt)
            parser = ReasoningParser(self._markers, text)
            if params.reasoning_max_tokens is not None:
                start, end = (self._tokenizer.encode(marker) for marker in (self._markers.start, self._markers.end))
                is_open = self._markers.open_after(text)
                request.thinking = ThinkingBudget(params.reasoning_max_tokens, start, end, is_open)
        detokenizer = StreamingDetokenizer(self._tokenizer, params.skip_special_tokens, shown)
        Transcript(request, detokenizer, self._tokenizer.token_text, parser)  # introduces itself to the request
        return request

    def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt.given, str):
            return prompt.given
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False)

    # What SamplingParams can't check for itself, since it knows no model

    def _check(self, params: SamplingParams) -> BannedSequences:
        """The token sequences that `params` bans. Raises ValueError if it asks for what this model doesn't have."""
        params.check_token_ids(self._vocab_size)
        for field in ("logprobs", "prompt_logprobs"):
            number = getattr(params, field)
            if number is not None and number > self._vocab_size:
                must = f"must be at most {self._vocab_size}, the size of the vocabulary; -1 stands for all of it"
                raise ValueError(complaint("SamplingParams", field, number, must))
        if params.reasoning_max_tokens is not None and self._markers is None:
            must = f"needs LLM(reasoning_parser=...), which may be {', '.join(map(repr, REASONING_PARSERS))}"
            raise ValueError(complaint("SamplingParams", "reasoning_max_tokens", params.reasoning_max_tokens, must))
        banned = banned_sequences(params, self._tokenizer)
        self._check_edits(params, banned)
        return banned

    def _check_edits(self, params: SamplingParams, banned: BannedSequences) -> None:
        """The sampler has room to change MAX_EXTRA_EDITS logits of a request, besides penalties."""
        if not (params.logit_bias or params.stop_token_ids or banned):
            return
        from fastdeploy.engine.sampler import MAX_EXTRA_EDITS  # brings Paddle and Triton: see `llm.load`

        ends = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else self._eos_token_ids)
        words = "bad_words" if params.bad_words else "bad_words_token_ids"
        edits = {
            "logit_bias": set(params.logit_bias or ()),
            words: {sequence[-1] for sequence in banned},
            "stop_token_ids": ends if params.min_tokens else set(),
        }
        number = len(set().union(*edits.values()))
        if number > MAX_EXTRA_EDITS:
            field = max(edits, key=lambda name: len(edits[name]))
            must = (
                f"bias, bans and stop tokens held back by min_tokens change {number} token ids, at most "
                f"{MAX_EXTRA_EDITS} are possible: change more of them with a function in logits_processors"
            )
            raise ValueError(complaint("SamplingParams", field, getattr(params, field), must))


def spread_params(given: object, num_prompts: int) -> list[SamplingParams]:
    """One SamplingParams for each prompt. Raises TypeError or ValueError if that is not what was given."""
    if given is None:
        given = SamplingParams()
    if isinstance(given, SamplingParams):
        given = [given] * num_prompts
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"sampling_params must be a SamplingParams or a list of them, not {type(given).__name__}")
    if len(given) != num_prompts:
        raise ValueError(f"sampling_params has {len(given)} elements for {num_prompts} prompts: give one for each")
    for position, params in enumerate(given):
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params[{position}] must be a SamplingParams, not {type(params).__name__}")
    return list(given)
