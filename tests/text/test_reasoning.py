"""Reasoning told from answers: whole texts against regular expressions, cut anywhere; budgets against plain search."""

import random
import re

import pytest

from fastdeploy.text.reasoning import (
    REASONING_PARSERS,
    ReasoningMarkers,
    ReasoningParser,
    ThinkingBudget,
    partial_match,
)

PROMPTS = {True: "<|assistant|><think>\n", False: "<|assistant|><think>\n\n</think>\n\n", None: "<|assistant|>\n"}
SPLINTERS = [
    "<think>",
    "</think>",
    "<response>",
    "</response>",
    "<",
    "</",
    "think>",
    "\n",
    "\n\n",
    " ",
    "a",
    "b中",
    "👩",
]


def parse(name: str, text: str, prompt: str = PROMPTS[None]) -> tuple[str, str]:
    """The whole text at once."""
    parser = ReasoningParser(REASONING_PARSERS[name], prompt)
    parts = [parser.feed(text), parser.finish()]
    return "".join(reasoning for reasoning, _ in parts), "".join(answer for _, answer in parts)


def reference(markers: ReasoningMarkers, prompt: str, text: str) -> tuple[str, str]:
    reasoning = ""
    is_open = markers.open_after(prompt)
    if re.match("(?s)((?!<think>).)*</think>", text) and not re.search("</?think>\\s*$", prompt):
        is_open = True
    opening = re.match(r"\s*<think>", text)
    if opening or is_open:
        text = text[opening.end() :] if opening else text
        reasoning, closing, text = text.partition("</think>")
        reasoning = reasoning.lstrip("\n")
        if not closing:
            return reasoning, ""
        reasoning = reasoning.rstrip("\n")
    wrapper = re.match(r"\s*<response>", text) if markers.answer_start else None
    if wrapper:
        inside, closing, _ = text[wrapper.end() :].partition("</response>")
        inside = inside.lstrip("\n")
        return reasoning, inside.rstrip("\n") if closing else inside
    return reasoning, text.lstrip("\n") if opening or is_open else text


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(SPLINTERS, k=rng.randint(0, 14)))


def random_cuts(rng: random.Random, text: str) -> list[str]:
    places = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, len(text))))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)])]


@pytest.mark.parametrize("name", REASONING_PARSERS)
def test_any_text_cut_anywhere_is_split_as_in_one_piece(name: str) -> None:
    rng = random.Random(name)
    markers = REASONING_PARSERS[name]
    for _ in range(4000):
        text, prompt = random_text(rng), rng.choice(list(PROMPTS.values()))
        expected = reference(markers, prompt, text)
        parser = ReasoningParser(markers, prompt)
        reasoning = answer = ""
        fed = ""
        for piece in random_cuts(rng, text):
            fed += piece
            more_reasoning, more_answer = parser.feed(piece)
            reasoning, answer = reasoning + more_reasoning, answer + more_answer
            assert expected[0].startswith(reasoning) and expected[1].startswith(answer), "nothing is taken back"
            assert (reasoning, answer) == parser.fresh().feed(fed), "what is certain depends on the text alone"
        more_reasoning, more_answer = parser.finish()
        assert (reasoning + more_reasoning, answer + more_answer) == expected, repr(text)


def test_a_text_without_markers_is_held_back_by_a_marker_at_most() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        parser = ReasoningParser(REASONING_PARSERS["qwen3"], "<think>")
        text = "".join(rng.choices("ab</think", k=30))
        if "</think>" not in text:
            assert len(parser.feed(text)[0]) >= len(text) - len("</think")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("qwen3", "<think>\nwhy\n</think>\n\nyes", ("why", "yes")),
        ("qwen3", "\n<think>why</think>yes", ("why", "yes")),
        ("qwen3", "yes <think>no</think>", ("", "yes <think>no</think>")),
        ("qwen3", "\n\nyes\n", ("", "\n\nyes\n")),
        ("qwen3", "<think>\nwhy\n", ("why\n", "")),
        ("qwen3", "\nwhy\n</think>\n\nyes", ("why", "yes")),
        ("qwen3", "why</think>yes</think>", ("why", "yes</think>")),
        ("qwen3", "why</think>yes <think>", ("why", "yes <think>")),
        ("qwen3", "</think>yes", ("", "yes")),
        ("qwen3", "why</thin", ("", "why</thin")),
        ("deepseek_r1", "why</think>yes", ("why", "yes")),
        ("deepseek_r1", "<think>why</think>\nyes</think>", ("why", "yes</think>")),
        ("deepseek_r1", "why a <think> b", ("why a <think> b", "")),
        ("ernie-x1", "\nwhy\n</think>\n<response>\nyes\n</response>\n", ("why", "yes")),
        ("ernie-x1", "why</think>\n\nyes</response>", ("why", "yes</response>")),
        ("ernie-x1", "why</think><response>yes</response>\nand <response>more</response>", ("why", "yes")),
    ],
)
def test_examples(name: str, text: str, expected: tuple[str, str]) -> None:
    assert parse(name, text) == expected


def test_a_text_that_may_be_a_thinking_is_held_back_until_that_is_certain() -> None:
    parser = ReasoningParser(REASONING_PARSERS["qwen3"], PROMPTS[None])
    assert [parser.feed(piece) for piece in ("why", " not", "</think>y", "es")] == [
        ("", ""), ("", ""), ("why not", "y"), ("", "es"),
    ]  # fmt: skip
    parser = ReasoningParser(REASONING_PARSERS["qwen3"], PROMPTS[None])
    assert [parser.feed(piece) for piece in ("say ", "<think>", "</think>")] == [
        ("", ""), ("", "say <think>"), ("", "</think>"),
    ]  # fmt: skip
    told = ReasoningParser(REASONING_PARSERS["qwen3"], PROMPTS[False])
    assert [told.feed(piece) for piece in ("yes", "</think>")] == [("", "yes"), ("", "</think>")]


@pytest.mark.parametrize("name", REASONING_PARSERS)
def test_the_end_of_the_prompt_tells_whether_the_model_thinks(name: str) -> None:
    markers = REASONING_PARSERS[name]
    assert markers.open_after(PROMPTS[True])
    assert not markers.open_after(PROMPTS[False])
    assert markers.open_after("<think>a</think>b<|user|>What is <think>?<|assistant|>") == markers.starts_open
    assert markers.open_after("") == markers.starts_open


def test_partial_match_is_the_longest_beginning_at_the_end() -> None:
    rng = random.Random(2)
    for _ in range(3000):
        text, wanted = "".join(rng.choices("ab", k=rng.randint(0, 9))), "".join(rng.choices("ab", k=rng.randint(1, 5)))
        lengths = [n for n in range(len(wanted)) if n == 0 or text.endswith(wanted[:n])]
        assert partial_match(text, wanted) == max(lengths)


# --- ThinkingBudget -----------------------------------------------------------------------------------------------


def plain_forced(limit: int, start: list[int], end: list[int], is_open: bool, output: list[int]) -> int | None:
    """The rule over the whole output."""
    if not is_open:
        if output[: len(start)] != start:
            return None
        output = output[len(start) :]
    if any(output[place : place + len(end)] == end for place in range(len(output))) or len(output) < limit:
        return None
    begun = [n for n in range(len(end)) if n == 0 or output[-n:] == end[:n]]
    return end[max(begun)]


def test_the_end_marker_is_forced_when_the_budget_is_used_up() -> None:
    rng = random.Random(3)
    for _ in range(500):
        check_one_budget(rng)


def check_one_budget(rng: random.Random) -> None:
    start, end = rng.choices([1, 2], k=rng.randint(1, 2)), rng.choices([2, 3, 4], k=rng.randint(1, 3))
    limit, is_open = rng.randint(0, 9), rng.random() < 0.5
    prompt = rng.choices(range(5), k=3)
    budget = ThinkingBudget(limit, start, end, is_open)
    tokens = list(prompt) + (start if rng.random() < 0.8 else [])
    while len(tokens) < 30:
        expected = plain_forced(limit, start, end, is_open, tokens[3:])
        assert budget.forced(tokens, 3) == expected
        assert budget.forced(tokens, 3) == expected, "asking again changes nothing"
        if rng.random() < 0.5:
            assert ThinkingBudget(limit, start, end, is_open).forced(tokens, 3) == expected
        tokens.append(rng.choice([2, 3, 4, 5]) if expected is None else expected)


def test_a_budget_of_n_leaves_n_tokens_of_thinking() -> None:
    budget, tokens = ThinkingBudget(4, [1], [8, 9], open_at_start=True), [0]
    while len(tokens) < 10:
        forced = budget.forced(tokens, num_prompt=1)
        tokens.append(5 if forced is None else forced)
    assert tokens[1:] == [5, 5, 5, 5, 8, 9, 5, 5, 5]


def test_a_thinking_that_never_begins_is_not_ended() -> None:
    budget = ThinkingBudget(0, [1], [9], open_at_start=False)
    assert [budget.forced([0, 5, 1, 5, 5][:count], 1) for count in range(1, 6)] == [None] * 5


def test_markers_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"markers of thinking have no tokens: start \[1\], end \[\]"):
        ThinkingBudget(3, [1], [], open_at_start=True)


def test_tokens_are_read_once() -> None:
    class Counting(list):
        num_slices = 0

        def __getitem__(self, place: object) -> object:
            self.num_slices += 1
            return super().__getitem__(place)

    budget, tokens = ThinkingBudget(10_000, [1], [8, 9], open_at_start=True), Counting(range(10, 1010))
    budget.forced(tokens, num_prompt=1)
    tokens.append(5)
    before = tokens.num_slices
    assert budget.forced(tokens, num_prompt=1) is None
    assert tokens.num_slices - before < 4


@pytest.mark.parametrize("markers", REASONING_PARSERS.values(), ids=REASONING_PARSERS)
@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("user: hi assistant: The answer is", False),
        ("assistant: <think>\nFrance, so", True),
        ("assistant: <think>\nFrance.\n</think>\n\nThe capital is", False),
        ("assistant: France.</think>Paris. user: and? assistant: <think>", True),
    ],
)
def test_the_last_marker_tells_what_an_output_continues(markers: ReasoningMarkers, prompt: str, is_open: bool) -> None:
    assert markers.open_after(prompt, continues=True) == is_open
    reasoning, answer = ReasoningParser(markers, prompt, continues=True).feed("and so on")
    assert (reasoning, answer) == (("and so on", "") if is_open else ("", "and so on"))
