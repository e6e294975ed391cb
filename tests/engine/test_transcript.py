"""Text of growing requests: stop texts, reasoning, special tokens and logprobs, against plain searches of the whole."""

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from fastdeploy.engine.request import Logprob, Request, RequestOutput, TokenLogprobs
from fastdeploy.engine.transcript import StopSearch, Transcript
from fastdeploy.sampling_params import SamplingParams, sampling_defaults
from fastdeploy.text.reasoning import REASONING_PARSERS, ReasoningParser
from fastdeploy.text.tokenizer import BYTE_OF_CHARACTER, StreamingDetokenizer, Tokenizer
from tests.text.test_reasoning import PROMPTS, SPLINTERS, reference

DEFAULTS = sampling_defaults({})
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
PROMPT = [0, 0, 0]
EOS_TEXT = "<|end|>"


def make_tokenizer(pieces: list[bytes]) -> Tokenizer:
    """Token i stands for pieces[i], which may begin and end in the middle of a character; then comes one special."""
    spelled = ["".join(CHARACTER_OF_BYTE[byte] for byte in piece) for piece in pieces]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(spelled)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS_TEXT])
    return Tokenizer(backend)


def cut(rng: random.Random, text: str) -> list[bytes]:
    data = text.encode()
    places = sorted({0, len(data), *rng.choices(range(len(data) + 1), k=rng.randint(0, len(data)))})
    return [data[start:end] for start, end in itertools.pairwise(places)]


class Story:
    """A text cut into tokens, and a request that is to say it."""

    def __init__(self, pieces: list[bytes], parser: ReasoningParser | None = None, **params: object) -> None:
        different = list(dict.fromkeys(pieces))
        self.tokenizer = make_tokenizer(different)
        self.eos = len(different)
        self.token_ids = [different.index(piece) for piece in pieces]
        self.pieces = pieces
        params.setdefault("max_tokens", len(pieces))
        resolved = SamplingParams(**params).resolved(DEFAULTS, room=10**6, seed=0)
        self.request = Request("a", PROMPT, PROMPT, resolved, frozenset([self.eos]))
        detokenizer = StreamingDetokenizer(self.tokenizer, resolved.skip_special_tokens)
        self.transcript = Transcript(self.request, detokenizer, self.tokenizer.token_text, parser)

    def text_of(self, num_tokens: int) -> str:
        """Whole characters only."""
        return b"".join(self.pieces[:num_tokens]).decode(errors="ignore")

    def say(self, count: int | None = None) -> RequestOutput:
        """The next `count` tokens, or all until the request is finished; then an output."""
        said = self.request.num_output_tokens
        for token_id in self.token_ids[said : None if count is None else said + count]:
            if not self.request.finished:
                self.request.append(token_id)
        return self.transcript.output()


def find_first(story: Story, stops: list[str], min_tokens: int) -> tuple[int, int, str] | None:
    """(start, end, stop text) of the stop text that is complete first in token number min_tokens or later."""
    for number in range(max(min_tokens, 1), len(story.pieces) + 1):
        text = story.text_of(number)
        for end in range(len(story.text_of(number - 1)) + 1, len(text) + 1):
            for stop in sorted(stops, key=len, reverse=True):
                if text[:end].endswith(stop):
                    return end - len(stop), end, stop
    return None


def random_stops(rng: random.Random, text: str) -> list[str]:
    """Some that occur and some that may."""
    if not text or rng.random() < 0.2:
        return []
    starts = [rng.randrange(len(text)) for _ in range(rng.randint(0, 2))]
    made_up = ["".join(rng.choices("ab中👩", k=rng.randint(2, 6))) for _ in range(rng.randint(0, 2))]
    return [text[start : start + rng.randint(1, 6)] for start in starts] + made_up


@pytest.mark.parametrize("seed", range(20))
def test_a_text_cut_anywhere_ends_at_the_first_stop_text(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        check_one_story(rng)


def check_one_story(rng: random.Random) -> None:
    text = "".join(rng.choices(["a", "b", "中", "é", "👩", "aab"], k=rng.randint(1, 25)))
    stops = random_stops(rng, text)
    include, min_tokens = rng.random() < 0.3, rng.randint(0, 3)
    pieces = cut(rng, text)
    min_tokens = min(min_tokens, len(pieces))
    story = Story(pieces, stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    match = find_first(story, stops, min_tokens)
    expected = text if match is None else text[: match[1] if include else match[0]]

    deltas: list[str] = []
    while not story.request.finished:
        output = story.say(rng.randint(1, 3))
        completion = output.outputs
        deltas.append(completion.delta)
        assert completion.text == "".join(deltas), "nothing is taken back, nothing is lost"
        assert expected.startswith(completion.text)
        if not output.finished:
            known = story.text_of(len(completion.token_ids))
            held = max((n for stop in stops for n in range(1, len(stop)) if known.endswith(stop[:n])), default=0)
            assert completion.text == known[: len(known) - held], "no more is held back than may become a stop text"
    assert completion.text == expected
    assert completion.token_ids == story.token_ids[: len(completion.token_ids)]
    if match is None:
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)
        assert len(completion.token_ids) == len(pieces)
    else:
        assert (completion.finish_reason, completion.stop_reason) == ("stop", match[2])
        number = len(completion.token_ids)
        assert len(story.text_of(number - 1)) < match[1] <= len(story.text_of(number)), "it ended at that token"


@pytest.mark.parametrize("seed", range(20))
def test_stop_texts_are_looked_for_in_reasoning_and_markers_too(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        check_one_reasoned_story(rng)


def check_one_reasoned_story(rng: random.Random) -> None:
    text = "".join(rng.choices(SPLINTERS, k=rng.randint(1, 14)))
    stops = random_stops(rng, text)
    name, prompt = rng.choice(list(REASONING_PARSERS)), rng.choice(list(PROMPTS.values()))
    markers = REASONING_PARSERS[name]
    story = Story(cut(rng, text), ReasoningParser(markers, prompt), stop=stops)
    match = find_first(story, stops, 1)
    reasoning, answer = reference(markers, prompt, text if match is None else text[: match[0]])

    given = ["", ""]
    while not story.request.finished:
        completion = story.say(rng.randint(1, 3)).outputs
        given = [given[0] + completion.reasoning_delta, given[1] + completion.delta]
        assert [completion.reasoning_content, completion.text] == given
    assert given == [reasoning, answer]


def test_the_longest_of_two_stop_texts_that_end_together_counts() -> None:
    story = Story([b"x", b"a", b"b", b"c"], stop=["b", "ab"])
    assert story.say().outputs.text == "x" and story.request.stop_reason == "ab"


def make_llama_tokenizer() -> Tokenizer:
    """Token i below 256 spells a byte; then come "a", "b", "▁" and a special one.

    Bytes are held back until another token follows: all of a run become U+FFFD if together they are not valid.
    """
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "▁"]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


LLAMA = make_llama_tokenizer()
LLAMA_EOS = LLAMA.vocab_size - 1


def say_as_llama(
    token_ids: list[int], ends: Sequence[int] = (), **params: object
) -> tuple[Request, list[RequestOutput]]:
    resolved = SamplingParams(**{"max_tokens": len(token_ids), **params}).resolved(DEFAULTS, room=10**6, seed=0)
    request = Request("a", PROMPT, PROMPT, resolved, frozenset(ends))
    detokenizer = StreamingDetokenizer(LLAMA, resolved.skip_special_tokens)
    transcript = Transcript(request, detokenizer, LLAMA.token_text)
    outputs = []
    for token_id in token_ids:
        if not request.finished:
            request.append(token_id)
            outputs.append(transcript.output())
    return request, outputs


@pytest.mark.parametrize("seed", range(10))
def test_a_stop_text_in_held_back_bytes_ends_the_output_at_its_last_byte(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        text = "".join(rng.choices(["a", "b", "\n", "\n\n", "中", "é"], k=rng.randint(1, 12)))
        token_ids = [LLAMA.backend.token_to_id(c) if c in "ab" else byte for c in text for byte in c.encode()]
        ends = list(itertools.accumulate(len(c.encode()) for c in text))  # tokens after each character
        stops = rng.choices(["\n", "\n\n", "a\n", "中", "\na", "é中", "bb", "\n中"], k=2)
        min_tokens = rng.randint(0, min(4, len(token_ids)))
        matches = [
            (end, -len(stop), stop)
            for end in range(1, len(text) + 1)
            for stop in stops
            if text[:end].endswith(stop) and ends[end - 1] >= min_tokens
        ]
        request, outputs = say_as_llama(token_ids, stop=stops, min_tokens=min_tokens)
        given = ["".join(output.outputs.delta for output in outputs), outputs[-1].outputs.text]
        if matches:
            end, _, stop = min(matches)
            assert (request.finish_reason, request.stop_reason) == ("stop", stop), (text, stops)
            assert given == [text[: end - len(stop)]] * 2 and request.num_output_tokens == ends[end - 1]
        else:
            assert request.finish_reason == "length" and given == [text] * 2


def test_half_a_character_in_held_back_bytes_is_no_stop_text() -> None:
    token_ids = [256, 0xE4, 0xB8, 0xAD, 257]
    request, _ = say_as_llama(token_ids, stop="\ufffd")
    assert request.finish_reason == "length"


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "a</s>")])
@pytest.mark.parametrize("ends", [[], [LLAMA_EOS]])
@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_is_a_stop_text_whether_or_not_the_text_has_it(
    skip: bool, ends: list[int], include: bool, text: str
) -> None:
    params = {"skip_special_tokens": skip, "include_stop_str_in_output": include}
    for tail in ([LLAMA_EOS], [LLAMA_EOS, 257]):
        request, outputs = say_as_llama([256, *tail], ends, stop=["</s>"], max_tokens=9, **params)
        assert (request.finish_reason, request.stop_reason) == ("stop", "</s>")
        assert (outputs[-1].outputs.text, outputs[-1].outputs.token_ids) == (text, [256, LLAMA_EOS])


@pytest.mark.parametrize("ends", [[], [LLAMA_EOS]])
@pytest.mark.parametrize(
    ("token_ids", "stop"),
    [
        ([257, 257, LLAMA_EOS], "b</s>"),
        ([257, 10, LLAMA_EOS], "\n</s>"),
        ([257, *b"</s>b"], "</s>b"),
    ],
)
def test_a_skipped_special_token_may_be_a_part_of_a_stop_text(token_ids: list[int], stop: str, ends: list[int]) -> None:
    request, outputs = say_as_llama(token_ids, ends, stop=stop, max_tokens=9)
    assert (request.stop_reason, outputs[-1].outputs.text) == (stop, "b")


def test_a_stop_text_of_many_special_tokens_is_found_at_its_last() -> None:
    hidden = {token_id: f"<{token_id}>" for token_id in range(40)}
    stop = "".join(hidden.values())
    search = StopSearch([stop], include=False, hidden=hidden)
    said = [search.feed(search.marks[token_id], "", counts=True) for token_id in (7, *range(40), 8)]
    assert (said, search.found) == ([""] * 42, stop)


def test_of_special_tokens_in_a_stop_text_the_longest_is_meant() -> None:
    search = StopSearch(["<a><b>"], include=True, hidden={1: "<a>", 2: "<a><b>"})
    said = [search.feed(search.marks[token_id], "", counts=True) for token_id in (1, 2, 1)]
    assert (said, search.found) == (["", "<a><b>", ""], "<a><b>")


def test_a_skipped_special_token_that_completes_no_stop_text_stays_out_of_the_text() -> None:
    token_ids = [256, LLAMA_EOS, 257, 10, LLAMA_EOS, 256]
    _, outputs = say_as_llama(token_ids, stop=["b</s>", "</s>\n"])
    assert [output.outputs.text for output in outputs] == ["a", "a", "a", "a", "ab", "ab\na"]
    _, outputs = say_as_llama(token_ids, stop=["a</s>"], min_tokens=3)
    assert outputs[-1].outputs.text == "ab\na" and outputs[-1].outputs.stop_reason is None


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    story = Story([b"a", "中".encode()[:2]], stop="b")
    assert story.say(1).outputs.text == "a"
    assert story.say().outputs.delta == "\ufffd"


def test_what_was_held_back_is_given_when_the_request_ends_otherwise() -> None:
    story = Story([b"a", b"b", b"b"], stop="bbb")
    assert [story.say(1).outputs.text for _ in range(3)] == ["a", "a", "abb"]
    story = Story([b"a", b"b", b"b"], stop="bbb", max_tokens=9)
    story.say()
    story.request.fail(500, "the device is gone")
    outputs = [story.transcript.output().outputs for _ in range(2)]
    assert [output.delta for output in outputs] == ["bb", ""], "and given once"
    assert outputs[1].text == "abb"


@pytest.mark.parametrize(
    ("skip", "include", "text"),
    [
        (True, False, "ab"),
        (False, False, f"a{EOS_TEXT}b"),
        (True, True, "ab"),
        (False, True, f"a{EOS_TEXT}b{EOS_TEXT}"),
    ],
)
def test_special_tokens_in_text(skip: bool, include: bool, text: str) -> None:
    """The first one is no end because of min_tokens; the last ends the output."""
    params = {"skip_special_tokens": skip, "include_stop_str_in_output": include, "min_tokens": 3, "max_tokens": 9}
    story = Story([b"a", b"b"], **params)
    for token_id in (0, story.eos, 1, story.eos):
        story.request.append(token_id)
    completion = story.transcript.output().outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", None)
    assert len(completion.token_ids) == 4
    story.transcript.rewind()
    assert story.transcript.output().outputs.text == text


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
def test_the_text_of_a_stop_token(include: bool, text: str) -> None:
    story = Story([b"a", b"b", b"c"], stop_token_ids=[1], include_stop_str_in_output=include)
    completion = story.say().outputs
    assert (completion.text, completion.token_ids, completion.stop_reason) == (text, [0, 1], 1)


def test_a_special_token_shown_can_be_a_stop_text() -> None:
    story = Story([b"a"], stop=EOS_TEXT, skip_special_tokens=False, ignore_eos=True, max_tokens=9)
    for token_id in (0, story.eos):
        story.request.append(token_id)
    assert (story.request.stop_reason, story.transcript.output().outputs.text) == (EOS_TEXT, "a")


def test_an_output_counts_itself_and_copies_what_goes_on_changing() -> None:
    story = Story([b"a", b"b", b"c"])
    first, second = story.say(1), story.say(1)
    story.request.metrics.preempted_count = 7
    assert [first.outputs.send_idx, second.outputs.send_idx] == [0, 1]
    assert (first.outputs.token_ids, second.outputs.token_ids) == ([0], [0, 1])
    assert first.metrics.preempted_count == 0 and first.outputs.reasoning_content is None
    assert (first.finished, story.say().finished) == (False, True)


def test_what_the_caller_does_to_an_output_does_nothing_to_the_request() -> None:
    story = Story([b"a", b"b", b"c"])
    output = story.say(1)
    output.prompt_token_ids += [7, 7]
    output.prompt.clear()
    output.outputs.token_ids.clear()
    last = story.say()
    assert (last.prompt, last.prompt_token_ids, last.outputs.token_ids) == (PROMPT, PROMPT, [0, 1, 2])
    assert (last.finished, last.outputs.finish_reason) == (True, "length")


def test_an_output_has_what_the_request_has() -> None:
    story = Story([b"a"], max_tokens=9)
    story.request.num_cached_tokens = 2
    story.say()
    story.request.fail(500, "the device is gone")
    output = story.transcript.output()
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("a", PROMPT, PROMPT)
    assert (output.num_cached_tokens, output.error_code, output.error_msg) == (2, 500, "the device is gone")
    assert (output.finished, output.outputs.finish_reason) == (True, "error")


def test_reading_a_token_costs_the_same_late_as_early() -> None:
    """No line runs, and nothing is searched, more often for the ten thousandth token than for the hundredth."""

    def lines_of(num_tokens: int) -> int:
        story = Story([b"abc"], stop=["abd", "zzz"], max_tokens=10**5)
        for _ in range(num_tokens):
            story.request.append(0)
        count = 0

        def trace(frame: FrameType, event: str, argument: object) -> Callable | None:
            nonlocal count
            count += event == "line"
            return trace

        tracer = sys.gettrace()
        sys.settrace(trace)
        story.request.append(0)
        sys.settrace(tracer)
        return count

    assert lines_of(10_000) == lines_of(100)


# --- logprobs -----------------------------------------------------------------------------------------------------


def random_logprobs(rng: np.random.Generator, num_top: int, vocab: int) -> TokenLogprobs:
    """As a sort of the whole vocabulary gives them."""
    logprobs = np.log(rng.dirichlet(np.ones(vocab))).astype(np.float32)
    order = np.argsort(-logprobs, kind="stable")
    token_id = int(rng.integers(vocab))
    rank = 1 + int(np.flatnonzero(order == token_id)[0])
    top = order[:num_top].astype(np.int32)
    return TokenLogprobs(token_id, float(logprobs[token_id]), rank, top, logprobs[top])


@pytest.mark.parametrize("num_top", [0, 1, 3, 6])
def test_logprobs_hold_the_most_probable_tokens_and_the_token_itself(num_top: int, rng: np.random.Generator) -> None:
    pieces = [bytes([65 + index]) for index in range(6)]
    story = Story(pieces, logprobs=num_top, prompt_logprobs=num_top, max_tokens=20)
    raw = [random_logprobs(rng, num_top, len(pieces)) for _ in range(12)]
    story.request.prompt_logprobs += raw[:2]
    for place in raw[2:7]:
        story.request.append(place.token_id, place)
    early = story.transcript.output()
    for place in raw[7:]:
        story.request.append(place.token_id, place)
    output = story.transcript.output()
    assert output.prompt_logprobs is not None and output.outputs.logprobs is not None
    assert early.outputs.logprobs == output.outputs.logprobs[:5]
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(PROMPT)
    assert len(output.outputs.logprobs) == len(output.outputs.token_ids) == 10
    for place, described in zip(raw, output.prompt_logprobs[1:] + output.outputs.logprobs, strict=True):
        expected = {
            int(token_id): Logprob(float(logprob), rank, chr(65 + token_id))
            for rank, (token_id, logprob) in enumerate(zip(place.top_ids, place.top_logprobs), 1)
        }
        sampled = Logprob(place.logprob, place.rank, chr(65 + place.token_id))
        assert described == {place.token_id: sampled} | expected
        assert list(described)[: len(expected)] == list(expected), "most probable first"


def test_no_logprobs_unless_asked_for() -> None:
    output = Story([b"a"]).say()
    assert output.outputs.logprobs is None and output.prompt_logprobs is None


def test_the_text_of_a_token_alone_is_what_it_adds_to_others() -> None:
    byte_level = make_tokenizer([b" a", "中".encode()[:2], b"b\xe4"])
    assert [byte_level.token_text(token_id) for token_id in range(5)] == [" a", "\ufffd", "b\ufffd", EOS_TEXT, ""]
    vocabulary = {token: index for index, token in enumerate(["▁a", "b", "<0xE4>", "<0x41>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    llama = Tokenizer(backend)
    assert [llama.token_text(token_id) for token_id in range(5)] == [" a", "b", "\ufffd", "A", ""]


# --- interrupts ---------------------------------------------------------------------------------------------------


def interrupt_at_line(number: int) -> Callable:
    """A trace function: Ctrl-C before the number-th line that is run in the modules under test."""
    countdown = iter(range(number, -1, -1))

    def trace(frame: FrameType, event: str, argument: object) -> Callable | None:
        if event == "line" and next(countdown) == 0:
            raise KeyboardInterrupt
        return trace if frame.f_code.co_filename.endswith(("transcript.py", "reasoning.py", "request.py")) else None

    return trace


@contextmanager
def traced(trace: Callable | None) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace or before)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("stop", [None, "</b", "never"])
@pytest.mark.parametrize("interrupted", ["append", "output"])
def test_an_interrupt_between_any_two_lines_is_mended_by_rewind(stop: str | None, interrupted: str) -> None:
    """As the engine does it: rewind, conclude, go on; a token that was not appended is sampled again."""
    pieces = cut(random.Random(1), "<think>é中</think>a\n👩</b>c")
    for number in itertools.count():
        story = Story(pieces, ReasoningParser(REASONING_PARSERS["qwen3"], ""), stop=stop, logprobs=1)
        request, transcript = story.request, story.transcript
        trace: Callable | None = interrupt_at_line(number)
        outputs = []
        while not request.finished:
            token_id = story.token_ids[request.num_output_tokens]
            try:
                with traced(trace if interrupted == "append" else None):
                    request.append(token_id, TokenLogprobs(token_id, -1.0, 1, [token_id], [-1.0]))
                with traced(trace if interrupted == "output" else None):
                    outputs.append(transcript.output())
            except KeyboardInterrupt:
                trace = None
                transcript.rewind()
                request.conclude()
                outputs.append(transcript.output())
        assert all(len(output.outputs.logprobs) == len(output.outputs.token_ids) for output in outputs)
        last = transcript.output().outputs
        assert last.text == ("a\n👩" if stop == "</b" else "a\n👩</b>c") and last.reasoning_content == "é中"
        assert last.finish_reason == ("stop" if stop == "</b" else "length")
        assert last.logprobs == [{i: Logprob(-1.0, 1, story.tokenizer.token_text(i))} for i in last.token_ids]
        if interrupted == "append":  # an output that is interrupted is lost, and so is its delta
            deltas = [output.outputs.delta for output in outputs] + [last.delta]
            reasoning_deltas = [output.outputs.reasoning_delta for output in outputs] + [last.reasoning_delta]
            assert "".join(deltas) == last.text and "".join(reasoning_deltas) == last.reasoning_content
        if trace is not None:
            break
    assert number > 50, "the interrupts came where they should"
