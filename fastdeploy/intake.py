"""Intake: prompts and sampling parameters become Requests that this model can serve.

All is checked, of all prompts, before the first request exists: a call is served whole or not at all. The requests are
made while they are read, so that n of them for each of many prompts need not fit in memory.
"""

from __future__ import annotations

import dataclasses
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdeploy.checks import complaint
from fastdeploy.engine.request import Request
from fastdeploy.engine.transcript import Transcript
from fastdeploy.engine_config import ResolvedConfig
from fastdeploy.prompts import Prompt
from fastdeploy.sampling_params import SamplingParams, banned_sequences
from fastdeploy.text.reasoning import REASONING_PARSERS, ReasoningMarkers, ReasoningParser, ThinkingBudget

if TYPE_CHECKING:
    from fastdeploy.text.tokenizer import Tokenizer

BannedSequences = list[tuple[int, ...]]
PROMPT_END = 64  # tokens in which the prompt's last marker of reasoning is, if it ends with one


@dataclass(frozen=True)
class Order:
    """What was asked for one prompt, all checked. params: resolved, but for n."""

    prompt: Prompt
    params: SamplingParams
    banned: BannedSequences


class Requests:
    """The requests of one call, n for each prompt, prompt by prompt, each with its place as its index.

    They are made while they are read; `len` is their number.
    """

    def __init__(self, orders: Sequence[Order], make: Callable[[int, Order, SamplingParams], Request]) -> None:
        self.orders = orders
        self._make = make

    def __len__(self) -> int:
        return sum(order.params.n for order in self.orders)

    def __iter__(self) -> Iterator[Request]:
        samples = ((order, sample) for order in self.orders for sample in range(order.params.n))
        for index, (order, sample) in enumerate(samples):
            yield self._make(index, order, order.params.for_sample(sample))


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

    def requests(self, prompts: Sequence[Prompt], sampling_params: object) -> Requests:
        """n requests for each prompt, each with its transcript.

        sampling_params: one SamplingParams for all prompts, a list with one for each, or None. Raises TypeError or
        ValueError if it is anything else, or asks for what this model doesn't have.
        """
        all_given = spread_params(sampling_params, len(prompts))
        # Checked anew, each object once: somebody may have assigned to fields since.
        checked = {id(given): dataclasses.replace(given) for given in all_given}
        banned = {key: self._check(params) for key, params in checked.items()}
        orders = [
            Order(prompt, self._resolved(prompt, checked[id(given)]), banned[id(given)])
            for prompt, given in zip(prompts, all_given, strict=True)
        ]
        return Requests(orders, self._request)

    def _resolved(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        room = self._max_model_len - len(prompt.token_ids)
        try:
            return params.resolved(self._defaults, room, seed=self._seeds.getrandbits(63))
        except ValueError as error:  # min_tokens that this prompt leaves no room for
            raise ValueError(f"{prompt.name}: {error}") from error

    def _request(self, index: int, order: Order, params: SamplingParams) -> Request:
        from fastdeploy.text.tokenizer import StreamingDetokenizer  # brings the library, which a tokenizer has brought

        prompt, ends = order.prompt, self._eos_token_ids
        request = Request(str(uuid.uuid4()), prompt.given, prompt.token_ids, params, ends, index, banned=order.banned)
        parser: ReasoningParser | None = None
        shown: tuple[str, ...] = ()
        if self._markers is not None:
            shown = self._markers.texts  # the parser must see them, even where they are special tokens
            end = prompt.token_ids if prompt.continues else prompt.token_ids[-PROMPT_END:]
            text = self._tokenizer.decode(end, skip_special_tokens=False)
            parser = ReasoningParser(self._markers, text, prompt.continues)
            limit = params.reasoning_max_tokens
            if limit is not None:
                is_open = self._markers.open_after(text, prompt.continues)
                request.thinking = ThinkingBudget(limit, *self._marker_ids(self._markers), is_open)
        detokenizer = StreamingDetokenizer(self._tokenizer, params.skip_special_tokens, shown)
        Transcript(request, detokenizer, self._tokenizer.token_text, parser)  # introduces itself to the request
        return request

    def _marker_ids(self, markers: ReasoningMarkers) -> tuple[list[int], list[int]]:
        """The tokens of the start and the end marker. Raises ValueError if the model has none for one of them."""
        start, end = (self._tokenizer.encode(marker) for marker in (markers.start, markers.end))
        for marker, ids in {markers.start: start, markers.end: end}.items():
            if not ids or max(ids) >= self._vocab_size:
                raise ValueError(f"reasoning_max_tokens needs a model that has tokens for {marker!r}, found ids {ids}")
        return start, end

    # What SamplingParams can't check for itself, since it knows no model

    def _check(self, params: SamplingParams) -> BannedSequences:
        """The token sequences that `params` bans. Raises ValueError if it asks for what this model doesn't have."""
        params.check_token_ids(self._vocab_size)
        for field in ("logprobs", "prompt_logprobs"):
            number = getattr(params, field)
            if number is not None and number > self._vocab_size:
                must = f"must be at most {self._vocab_size}, the size of the vocabulary; -1 stands for all of it"
                raise ValueError(complaint("SamplingParams", field, number, must))
        if params.reasoning_max_tokens is not None:
            if self._markers is None:
                must = f"needs LLM(reasoning_parser=...), which may be {', '.join(map(repr, REASONING_PARSERS))}"
                raise ValueError(complaint("SamplingParams", "reasoning_max_tokens", params.reasoning_max_tokens, must))
            self._marker_ids(self._markers)
        # An id that a tokenizer has and the model lacks occurs in no output.
        banned = [ids for ids in banned_sequences(params, self._tokenizer) if max(ids) < self._vocab_size]
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
