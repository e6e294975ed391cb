r"""What a reasoning model thinks and what it answers: told apart by markers in its text, while the text still comes.

    <think>\nFrance, so ...\n</think>\n\nParis.          reasoning "France, so ...", answer "Paris."

A marker counts where it is markup: the start marker at the very beginning of the output, the end marker while the
model thinks. Anywhere else it is text. Line breaks directly beside a marker belong to it and are dropped.

A qwen3 model may think without a start marker in prompt or output: an end marker then tells that all before it was a
thinking. What a stream has given is never taken back. So text that begins without a marker is held back until a marker
comes, or the end. Nothing is held back where the prompt ends with a marker, as chat templates have it with
enable_thinking=False and for models that always think.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningMarkers:
    """How a family of models marks its thinking.

    start, end: the markers. starts_open: whether the thinking begins without a start marker, which the chat template
    has put at the end of the prompt, or nobody. answer_start, answer_end: markers that may be around the answer; what
    comes after them is dropped.
    """

    start: str
    end: str
    starts_open: bool
    answer_start: str = ""
    answer_end: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """All the markers there are."""
        return tuple(filter(None, (self.start, self.end, self.answer_start, self.answer_end)))

    def open_after(self, prompt_text: str, continues: bool = False) -> bool:
        """Whether the output begins within the thinking: the prompt tells, or else the family's habit."""
        told = self.told_by(prompt_text, continues)
        return self.starts_open if told is None else told

    def told_by(self, prompt_text: str, continues: bool = False) -> bool | None:
        """Whether the output begins within the thinking; None where the prompt doesn't tell.

        A template that lets the model think may end with the start marker, one that does not with the end marker.
        Markers elsewhere in the prompt say nothing: they may be an earlier turn, or what a user writes about them.
        Only where the output continues a message, which may have begun with a thinking, the last marker tells.
        """
        if continues:
            return prompt_text.rfind(self.start) > prompt_text.rfind(self.end)
        text = prompt_text.rstrip()
        return text.endswith(self.start) if text.endswith((self.start, self.end)) else None


REASONING_PARSERS: dict[str, ReasoningMarkers] = {
    "qwen3": ReasoningMarkers("<think>", "</think>", starts_open=False),
    "deepseek_r1": ReasoningMarkers("<think>", "</think>", starts_open=True),
    "ernie-x1": ReasoningMarkers(
        "<think>", "</think>", starts_open=True, answer_start="<response>", answer_end="</response>"
    ),
}


def partial_match(text: str, wanted: str) -> int:
    """How many characters at the end of `text` are the beginning of `wanted`, but not all of it: the most possible."""
    return next((n for n in range(min(len(text), len(wanted) - 1), 0, -1) if text.endswith(wanted[:n])), 0)


@dataclass
class _Section:
    """A part of the output, not read to its end yet.

    opening: what may open it; "" if nothing does or the place where it could has been read.
    closing: what ends it; "" for the last section.
    required: it is there even without its opening.
    told_by_closing: it is there if its closing comes before any opening.
    dropped: its text is nobody's.
    after_marker: nothing of its text is read yet and a marker precedes it, so that line breaks here are dropped.
    """

    opening: str
    closing: str
    is_reasoning: bool = False
    required: bool = False
    told_by_closing: bool = False
    dropped: bool = False
    after_marker: bool = False


class ReasoningParser:
    """Splits one output into reasoning and answer, piece by piece; holds back what may become a marker.

    prompt_text: the prompt, or its end; continues: the output goes on with its last message; see
    `ReasoningMarkers.open_after`.
    """

    def __init__(self, markers: ReasoningMarkers, prompt_text: str, continues: bool = False) -> None:
        self._origin = (markers, prompt_text, continues)
        is_open = markers.open_after(prompt_text, continues)
        thinking = _Section(markers.start, markers.end, is_reasoning=True, required=is_open, after_marker=is_open)
        thinking.told_by_closing = not is_open and markers.told_by(prompt_text, continues) is None
        self._sections = [
            thinking,
            _Section(markers.answer_start, markers.answer_end),
            _Section("", "", required=True),
        ]
        self._held = ""

    def fresh(self) -> ReasoningParser:
        """Another one for the same prompt, which has read nothing."""
        return ReasoningParser(*self._origin)

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) that are certain with this text and were not before."""
        self._held += text
        return self._split(final=False)

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        return self._split(final=True)

    def _split(self, final: bool) -> tuple[str, str]:
        reasoning = answer = ""
        while True:
            section = self._sections[0]
            text, ended = self._read(section, final)
            if section.is_reasoning:
                reasoning += text
            elif not section.dropped:
                answer += text
            if not ended:
                return reasoning, answer
            del self._sections[0]

    def _read(self, section: _Section, final: bool) -> tuple[str, bool]:
        """(text of the section, whether it is at its end): takes out of _held what is certain."""
        if not section.required or section.opening:
            start = self._held.lstrip()
            if section.opening and start.startswith(section.opening):
                self._held = start[len(section.opening) :]
                section.after_marker = section.required = True
            elif section.opening and section.opening.startswith(start) and not final:
                return "", False
            elif section.told_by_closing and section.closing in start.partition(section.opening)[0]:
                section.after_marker = section.required = True
            elif section.told_by_closing and section.opening not in start and not final:
                return "", False
            elif not section.required:
                self._sections[1].after_marker = section.after_marker
                return "", True
            section.opening = ""
        if section.after_marker:
            self._held = self._held.lstrip("\n")
            if not self._held:
                return "", False
            section.after_marker = False
        return self._read_body(section, final)

    def _read_body(self, section: _Section, final: bool) -> tuple[str, bool]:
        text, closing, rest = self._held.partition(section.closing) if section.closing else (self._held, "", "")
        if closing:
            self._held = rest
            self._sections[1].after_marker = True
            self._sections[1].dropped = not section.is_reasoning
            return text.rstrip("\n"), True
        if section.closing and not final:  # what may be the line breaks before the marker, and its beginning
            text = text[: len(text) - partial_match(text, section.closing)].rstrip("\n")
        self._held = self._held[len(text) :]
        return text, False


class ThinkingBudget:
    """Ends the thinking of one request after `limit` tokens: its end marker is forced, id by id.

    start_ids, end_ids: the tokens of the markers; open_at_start: `ReasoningMarkers.open_after` of the prompt. Where it
    is False the thinking begins with start_ids as the very first output tokens, or there is none. Markers are looked
    for as tokens: meant for models that have a token for each, as reasoning models do; of several tokens, an end marker
    that the model spells with others is overlooked.
    """

    def __init__(self, limit: int, start_ids: Sequence[int], end_ids: Sequence[int], open_at_start: bool) -> None:
        if not start_ids or not end_ids:
            raise ValueError(f"the markers of thinking have no tokens: start {list(start_ids)}, end {list(end_ids)}")
        self._limit = limit
        self._start_ids = [] if open_at_start else list(start_ids)
        self._end_ids = list(end_ids)
        self._num_read = 0  # output tokens after which the thinking goes on

    def forced(self, token_ids: Sequence[int], num_prompt: int) -> int | None:
        """The token that must come next; None: any may. token_ids: prompt and output, the prompt num_prompt long.

        A call reads the tokens that are new since the call before.
        """
        begin = num_prompt + len(self._start_ids)  # of the thinking
        if len(token_ids) < begin or list(token_ids[num_prompt:begin]) != self._start_ids:
            return None
        for end in range(num_prompt + self._num_read + 1, len(token_ids) + 1):
            if list(token_ids[max(begin, end - len(self._end_ids)) : end]) == self._end_ids:
                return None
            self._num_read = end - num_prompt
        if len(token_ids) - begin < self._limit:
            return None
        return self._end_ids[self._num_begun(token_ids[max(begin, len(token_ids) - len(self._end_ids)) :])]

    def _num_begun(self, tail: Sequence[int]) -> int:
        """How many ids of the end marker are there already: forced before, or said by the model at the last moment."""
        sizes = range(min(len(tail), len(self._end_ids) - 1), 0, -1)
        return next((size for size in sizes if list(tail[-size:]) == self._end_ids[:size]), 0)
