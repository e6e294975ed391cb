"""Transcript: what a request's tokens say, and what of it the user has been given.

    output tokens -> Detokenizer -> StopSearch -> ReasoningParser -> text, reasoning_content, and what is new in them
                     (whole          (the text      (splits it at
                      characters)     up to a stop)   the markers)

Each stage holds back what later tokens may make something else of: half a character, the beginning of a stop text, the
beginning of a marker. So nothing that was given is ever taken back. Stop texts are looked for in what the detokenizer
holds back, too: what ends there is final.

Text costs more than all other bookkeeping of a token. So tokens are read when somebody asks for an output; those of a
request with stop texts at every token, because the text tells whether there is a next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from fastdeploy.engine.request import (
    CompletionOutput,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from fastdeploy.text.reasoning import ReasoningParser, partial_match


class Detokenizer(Protocol):
    """Turns the tokens of one request into text as they come."""

    def add(self, token_id: int) -> str:
        """The text that is complete with this token; incomplete UTF-8 is held back."""

    def finish(self) -> str:
        """What was held back; nothing if asked again."""

    def held(self) -> str:
        """What `finish` would give, if it is whole characters; it stays held back."""

    def hidden(self, texts: Sequence[str]) -> Mapping[int, str]:
        """The tokens in `texts` that are left out of the text, each with what it would be there."""

    def fresh(self) -> Detokenizer:
        """Another one of the same kind, which has seen nothing."""


class StopSearch:
    """Looks for the first of several texts in a text that comes piece by piece.

    The one that is complete first counts; of those complete at the same character, the longest. `found` is the text
    found or None. What `feed` and `finish` return is together the text up to the stop text, or through it with
    `include`; all of the text if there is none.

    hidden: tokens that are no part of the text but may be of a stop text, see `Detokenizer.hidden`. `marks` has a
    character that no text has for each, half of a surrogate pair: to be fed in its place, it never comes out.
    """

    def __init__(self, stops: Sequence[str], include: bool, hidden: Mapping[int, str]) -> None:
        self.found: str | None = None
        self.has_any = bool(stops)
        self.marks = {token_id: chr(0xD800 + index) for index, token_id in enumerate(hidden)}
        self._unmarked = str.maketrans(dict.fromkeys(self.marks.values(), ""))
        self._stops = {stop: stop for stop in stops}  # as it is looked for -> as it was given
        for stop in stops:
            marked = stop
            for token_id in sorted(hidden, key=lambda token_id: -len(hidden[token_id])):  # one may be part of another
                marked = marked.replace(hidden[token_id], self.marks[token_id])
            self._stops[marked] = stop
        self._first_characters = {stop[0] for stop in self._stops} | set(self.marks.values())
        self._include = include
        self._held = ""
        self._num_searched = 0  # characters of _held and of what follows in which a stop text may not end any more

    def feed(self, piece: str, pending: str, counts: bool) -> str:
        """The text that is certain with this piece. A stop text that ends in it is one only if `counts` says so.

        pending: what follows the piece if this is the end; a stop text may end there, too. What was searched as pending
        is not searched again as the beginning of a later piece.
        """
        if self.found is not None:
            return ""
        if not (self._held or pending or self._num_searched) and self._first_characters.isdisjoint(piece):
            return piece  # 19 tokens in 20, in a seventh of the time
        known = self._held + piece
        text = known + pending
        if counts:
            # Only what ends in the new text is new; a cost that does not grow with the text.
            places = [(text.find(stop, max(0, self._num_searched - len(stop) + 1)), stop) for stop in self._stops]
            ends = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
            if ends:
                _, start, form = min(ends)
                self.found = self._stops[form]
                self._held = ""
                return text[:start].translate(self._unmarked) + (self.found if self._include else "")
        certain = len(known) - max(partial_match(known, stop) for stop in self._stops)
        self._held = known[certain:]
        self._num_searched = max(self._num_searched, len(text)) - certain
        return known[:certain].translate(self._unmarked)

    def finish(self) -> str:
        """What was held back: nothing, if a stop text was found."""
        held, self._held = self._held, ""
        return held.translate(self._unmarked)


class _Reading:
    """What the output tokens read so far say. Rather than repaired it is made anew, see `Transcript.rewind`."""

    def __init__(self, detokenizer: Detokenizer, stops: StopSearch, parser: ReasoningParser | None) -> None:
        self.num_tokens = 0  # read
        self.text = ""
        self.reasoning = ""
        self.stops = stops
        self._detokenizer = detokenizer
        self._parser = parser
        self._unsplit: list[str] = []  # for the parser

    def add(self, token_id: int, counts: bool) -> None:
        """Read one token; counts: a stop text may be complete with it."""
        self.num_tokens += 1
        piece, mark = self._detokenizer.add(token_id), self.stops.marks.get(token_id, "")
        pending = self._detokenizer.held() + mark if self.stops.has_any else ""
        self._unsplit.append(self.stops.feed(piece, pending, counts))
        if mark:
            self._unsplit.append(self.stops.feed(mark, "", counts=False))

    def end(self) -> None:
        """There are no more tokens: the detokenizer holds nothing back any more."""
        self._unsplit.append(self.stops.feed(self._detokenizer.finish(), "", counts=True))

    def split(self, final: bool) -> None:
        """Bring `text` and `reasoning` up to what was read; final: nothing is held back, nothing will be read."""
        if final:
            self._unsplit.append(self.stops.finish())
        new = "".join(self._unsplit)
        self._unsplit.clear()
        if self._parser is None:
            self.text += new
            return
        parts = [self._parser.feed(new), self._parser.finish()] if final else [self._parser.feed(new)]
        self.reasoning += "".join(reasoning for reasoning, _ in parts)
        self.text += "".join(text for _, text in parts)


class Transcript:
    """The outputs of one request, made when somebody asks. For whoever holds the engine's lock.

    request: learns of this transcript. detokenizer: fresh. describe_token: the text of a token alone, for logprobs.
    parser: where reasoning_content is told apart; fresh.
    """

    def __init__(
        self,
        request: Request,
        detokenizer: Detokenizer,
        describe_token: Callable[[int], str],
        parser: ReasoningParser | None = None,
    ) -> None:
        self.request = request
        self._detokenizer = detokenizer
        self._parser = parser
        self._describe_token = describe_token
        self._reading = self._new_reading(detokenizer, parser)
        self._logprobs: list[dict[int, Logprob]] = []
        self._prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self._num_given = 0  # outputs; and how much text and reasoning the latest had
        self._num_text = 0
        self._num_reasoning = 0
        request.transcript = self

    def _new_reading(self, detokenizer: Detokenizer, parser: ReasoningParser | None) -> _Reading:
        params = self.request.sampling_params
        hidden = detokenizer.hidden(params.stop) if params.stop else {}
        return _Reading(detokenizer, StopSearch(params.stop or (), params.include_stop_str_in_output, hidden), parser)

    def rewind(self) -> None:
        """Read all tokens anew, from the next call on. What was given stays given.

        For after an exception, which may have struck between any two statements (Ctrl-C does).
        """
        self._reading = self._new_reading(self._detokenizer.fresh(), self._parser and self._parser.fresh())

    def find_stop(self) -> str | None:
        """The stop text that the output, as it is now, ends with, if any; it may be the token that ends the output."""
        request, params = self.request, self.request.sampling_params
        self._read()
        if request.num_output_tokens == params.max_tokens:
            self._reading.end()
        last = self._describe_token(request.token_ids[-1]) if request.ends_by_token() else None
        return self._reading.stops.found or (last if last in (params.stop or ()) else None)

    def output(self) -> RequestOutput:
        """What there is by now; its deltas are what the output before did not have."""
        request, reading = self.request, self._reading
        self._read()
        if request.finished:
            reading.end()
        reading.split(final=request.finished)
        output = RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt if isinstance(request.prompt, str) else list(request.prompt),
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=self._completion(),
            finished=request.finished,
            metrics=RequestMetrics(**vars(request.metrics)),  # `replace` takes twice as long
            num_cached_tokens=request.num_cached_tokens,
            error_code=request.error_code,
            error_msg=request.error_msg,
            prompt_logprobs=self._all_prompt_logprobs(),
        )
        self._num_given += 1
        self._num_text, self._num_reasoning = len(reading.text), len(reading.reasoning)
        return output

    def _read(self) -> None:
        """Read the new tokens. The token that ends the output has a text only if stop texts are to be included."""
        request, reading = self.request, self._reading
        params, first = request.sampling_params, len(request.prompt_token_ids)
        end, last = request.num_output_tokens, request.token_ids[-1]
        if request.ends_by_token() and not params.include_stop_str_in_output and last not in reading.stops.marks:
            end -= 1
        for token_id in request.token_ids[first + reading.num_tokens : first + end]:
            reading.add(token_id, counts=reading.num_tokens + 1 >= params.min_tokens)

    def _completion(self) -> CompletionOutput:
        request, reading = self.request, self._reading
        return CompletionOutput(
            index=request.index,
            send_idx=self._num_given,
            token_ids=request.token_ids[len(request.prompt_token_ids) :],
            text=reading.text,
            reasoning_content=reading.reasoning if self._parser is not None else None,
            logprobs=self._all_logprobs(),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            delta=reading.text[self._num_text :],
            reasoning_delta=reading.reasoning[self._num_reasoning :],
        )

    def _all_logprobs(self) -> list[dict[int, Logprob]] | None:
        request = self.request
        if request.sampling_params.logprobs is None:
            return None
        new = request.logprobs[len(self._logprobs) : request.num_output_tokens]
        self._logprobs += [self._described(place) for place in new]
        return list(self._logprobs)

    def _all_prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        request = self.request
        if request.sampling_params.prompt_logprobs is None:
            return None
        new = request.prompt_logprobs[len(self._prompt_logprobs) - 1 :]
        self._prompt_logprobs += [self._described(place) for place in new]
        return list(self._prompt_logprobs)

    def _described(self, place: TokenLogprobs) -> dict[int, Logprob]:
        ids, logprobs = np.asarray(place.top_ids).tolist(), np.asarray(place.top_logprobs).tolist()
        described = {
            token_id: Logprob(logprob, rank, self._describe_token(token_id))
            for rank, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True), start=1)
        }
        token_id = int(place.token_id)
        described[token_id] = Logprob(float(place.logprob), int(place.rank), self._describe_token(token_id))
        return described
