import copy
import dataclasses
import inspect
import logging

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fastdeploy import SamplingParams
from fastdeploy.checks import FOREIGN
from fastdeploy.engine_config import EngineConfig
from fastdeploy.sampling_params import NEUTRAL, banned_sequences, sampling_defaults
from fastdeploy.text.tokenizer import Tokenizer

DEFAULTS = SamplingParams(
    temperature=0.6,
    top_p=0.9,
    top_k=20,
    min_p=0.05,
    presence_penalty=0.1,
    frequency_penalty=0.2,
    repetition_penalty=1.1,
)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("n", 0, ValueError),
        ("n", 16385, ValueError),
        ("n", 10**9, ValueError),
        ("n", None, TypeError),
        ("n", 1.0, TypeError),
        ("temperature", -0.1, ValueError),
        ("temperature", NAN, ValueError),
        ("temperature", INF, ValueError),
        ("temperature", 1e39, ValueError),
        ("temperature", "1", TypeError),
        ("temperature", True, TypeError),
        ("top_p", 1.01, ValueError),
        ("top_p", -1, ValueError),
        ("top_p", [0.5], TypeError),
        ("top_k", -2, ValueError),
        ("top_k", 2**31, ValueError),
        ("top_k", 5.0, TypeError),
        ("min_p", -0.1, ValueError),
        ("min_p", 1.1, ValueError),
        ("presence_penalty", 2.1, ValueError),
        ("presence_penalty", NAN, ValueError),
        ("frequency_penalty", -2.1, ValueError),
        ("frequency_penalty", "0", TypeError),
        ("repetition_penalty", 0, ValueError),
        ("repetition_penalty", -1.5, ValueError),
        ("repetition_penalty", INF, ValueError),
        ("min_tokens", -1, ValueError),
        ("min_tokens", None, TypeError),
        ("max_tokens", 0, ValueError),
        ("max_tokens", 2.0, TypeError),
        ("max_tokens", False, TypeError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
        ("seed", 1.5, TypeError),
        ("stop", "", ValueError),
        ("stop", 5, TypeError),
        ("stop", b"x", TypeError),
        ("stop", ["a", ""], ValueError),
        ("stop", ["a", "b\ud800"], ValueError),
        ("stop", ["a", 3], TypeError),
        ("stop", {"a"}, TypeError),
        ("stop_token_ids", 5, TypeError),
        ("stop_token_ids", "5", TypeError),
        ("stop_token_ids", [3, -1], ValueError),
        ("stop_token_ids", [3, "x"], TypeError),
        ("include_stop_str_in_output", 1, TypeError),
        ("ignore_eos", 1, TypeError),
        ("skip_special_tokens", None, TypeError),
        ("bad_words", "word", TypeError),
        ("bad_words", ["a", None], TypeError),
        ("bad_words", ["a", ""], ValueError),
        ("bad_words", ["a", "\udfff"], ValueError),
        ("bad_words_token_ids", [1, -5], ValueError),
        ("bad_words_token_ids", [1, [5]], TypeError),
        ("logit_bias", [1, 2], TypeError),
        ("logit_bias", {5: NAN}, ValueError),
        ("logit_bias", {5: INF}, ValueError),
        ("logit_bias", {5: 1e39}, ValueError),
        ("logit_bias", {5: "1"}, TypeError),
        ("logprobs", -2, ValueError),
        ("logprobs", True, TypeError),
        ("prompt_logprobs", -2, ValueError),
        ("prompt_logprobs", 1.5, TypeError),
        ("logits_processors", 5, TypeError),
        ("logits_processors", [max, 5], TypeError),
        ("reasoning_max_tokens", -1, ValueError),
        ("reasoning_max_tokens", "9", TypeError),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"SamplingParams\({field}.*=.*\): must") as raised:
        SamplingParams(**{field: value})
    shown = value[1] if isinstance(value, list) and len(value) > 1 else value
    shown = next(iter(shown.values())) if isinstance(shown, dict) else shown
    assert repr(shown) in str(raised.value)


@pytest.mark.parametrize(("key", "error"), [(-1, ValueError), ("x", TypeError), (1.0, TypeError), (None, TypeError)])
def test_a_bad_key_of_logit_bias_is_refused_by_name(key: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"SamplingParams\(logit_bias key={key!r}\): must"):
        SamplingParams(logit_bias={key: 1.0})


def test_the_table_of_foreign_names_has_none_of_ours_and_leads_to_ours() -> None:
    ours = {f.name for cls in (SamplingParams, EngineConfig) for f in dataclasses.fields(cls)}
    assert set(FOREIGN) <= ours
    for cls in (SamplingParams, EngineConfig):
        known = {f.name for f in dataclasses.fields(cls)}
        foreign = [foreign for name in known & set(FOREIGN) for foreign in FOREIGN[name].split()]
        assert not known & set(foreign) and len(set(foreign)) == len(foreign)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens=9.*at most max_tokens, which is 8"),
        ({"reasoning_max_tokens": 9, "max_tokens": 8}, r"reasoning_max_tokens=9.*at most max_tokens, which is 8"),
    ],
)
def test_no_part_may_be_longer_than_the_whole(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)
    SamplingParams(**dict.fromkeys(params, 8))


def test_an_integer_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SamplingParams\(temperature=1000.*must be a finite number"):
        SamplingParams(temperature=10**400)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("temprature", "did you mean 'temperature'?"),
        ("max_token", "did you mean 'max_tokens'?"),
        ("max_completion_tokens", "did you mean 'max_tokens'?"),
        ("max_new_tokens", "did you mean 'max_tokens'?"),
        ("min_new_tokens", "did you mean 'min_tokens'?"),
        ("repeat_penalty", "did you mean 'repetition_penalty'?"),
        ("stop_sequences", "did you mean 'stop'?"),
        ("zzz", "it takes n, temperature,"),
        ("top_a", "it takes n, temperature,"),
        ("length_penalty", "it takes n, temperature,"),
        ("spaces_between_special_tokens", "it takes n, temperature,"),
        ("max_model_len", "it takes n, temperature,"),
    ],
)
def test_an_unknown_keyword_is_a_type_error_that_suggests_a_name(name: str, remedy: str) -> None:
    with pytest.raises(TypeError) as raised:
        SamplingParams(**{name: 1})
    assert repr(name) in str(raised.value) and remedy in str(raised.value)


@pytest.mark.parametrize("value", [0, 0.0, 1, np.float32(0.5), np.int64(1)])
def test_numbers_of_any_kind_are_taken(value: float) -> None:
    params = SamplingParams(temperature=value, top_p=value)
    assert params.temperature == params.top_p == float(value) and type(params.temperature) is float


@pytest.mark.parametrize(
    ("given", "field", "taken"),
    [
        ({"top_k": -1}, "top_k", 0),
        ({"stop": "end"}, "stop", ["end"]),
        ({"stop": ("a", "b")}, "stop", ["a", "b"]),
        ({"stop": []}, "stop", []),
        ({"stop_token_ids": (1, np.int32(2))}, "stop_token_ids", [1, 2]),
        ({"logit_bias": {np.int64(3): 2, 4: -INF, "5": np.float32(-INF)}}, "logit_bias", {3: 2.0, 4: -INF, 5: -INF}),
        ({"logprobs": -1}, "logprobs", -1),
        ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
    ],
)
def test_what_is_taken_and_as_what(given: dict, field: str, taken: object) -> None:
    assert getattr(SamplingParams(**given), field) == taken


def test_lists_that_change_later_do_not_change_the_parameters() -> None:
    given = {
        "stop": ["a"],
        "stop_token_ids": [1],
        "bad_words": ["b"],
        "bad_words_token_ids": [2],
        "logit_bias": {3: 1.0},
        "logits_processors": [max],
    }
    params = SamplingParams(**given)
    before = copy.deepcopy(params)
    for container in given.values():
        container.clear()
    assert params == before


def test_the_docstring_names_every_field() -> None:
    documentation = inspect.getdoc(SamplingParams)
    assert documentation is not None
    assert [f.name for f in dataclasses.fields(SamplingParams) if f"{f.name}:" not in documentation] == []


def test_the_repr_shows_what_is_not_default_and_can_be_evaluated() -> None:
    params = SamplingParams(temperature=0, stop="x", max_tokens=5, logit_bias={3: 1})
    assert repr(params) == "SamplingParams(temperature=0.0, max_tokens=5, stop=['x'], logit_bias={3: 1.0})"
    assert eval(repr(params)) == params
    assert repr(SamplingParams()) == "SamplingParams()"


@pytest.mark.parametrize("field", ["stop_token_ids", "bad_words_token_ids", "logit_bias"])
def test_ids_that_the_model_does_not_have_are_refused_by_name(field: str) -> None:
    ids = [3, 100]
    params = SamplingParams(**{field: dict.fromkeys(ids, 1.0) if field == "logit_bias" else ids})
    params.check_token_ids(101)
    with pytest.raises(ValueError, match=rf"SamplingParams\({field}=.*100 never occurs, token ids run from 0 to 99"):
        params.check_token_ids(100)


# --- resolved -----------------------------------------------------------------------------------------------------


def test_resolved_fills_what_is_open_and_leaves_the_original_alone() -> None:
    params = SamplingParams()
    before = copy.deepcopy(params)
    resolved = params.resolved(DEFAULTS, room=100, seed=7)
    assert params == before
    unwanted = {name for name, value in dataclasses.asdict(resolved).items() if value is None}
    assert unwanted == {"logprobs", "prompt_logprobs", "reasoning_max_tokens"}
    assert all(getattr(resolved, field) == getattr(DEFAULTS, field) for field in NEUTRAL)
    assert (resolved.max_tokens, resolved.seed) == (100, 7)
    containers = ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids", "logit_bias", "logits_processors")
    assert [len(getattr(resolved, field)) for field in containers] == [0] * 6


def test_resolved_keeps_what_is_named_and_clips_to_the_room() -> None:
    named = dict.fromkeys(NEUTRAL, 0) | {"repetition_penalty": 2.0, "seed": 0, "stop": ["x"], "logit_bias": {1: 2.0}}
    params = SamplingParams(**named, max_tokens=300, reasoning_max_tokens=200)
    resolved = params.resolved(DEFAULTS, room=100, seed=7)
    assert {field: getattr(resolved, field) for field in named} == named
    assert (resolved.max_tokens, resolved.reasoning_max_tokens) == (100, 100)
    assert (params.max_tokens, params.reasoning_max_tokens) == (300, 200)
    assert SamplingParams(max_tokens=5).resolved(DEFAULTS, room=100, seed=7).max_tokens == 5


def test_a_prompt_that_leaves_no_room_for_min_tokens_is_an_error() -> None:
    SamplingParams(min_tokens=100).resolved(DEFAULTS, room=100, seed=7)
    with pytest.raises(ValueError, match=r"min_tokens=101\): the prompt leaves room for 100 output tokens"):
        SamplingParams(min_tokens=101).resolved(DEFAULTS, room=100, seed=7)


def test_samples_have_seeds_of_their_own_that_follow_from_the_seed() -> None:
    seeds = [SamplingParams(n=50, seed=seed).for_sample(index).seed for seed in range(20) for index in range(50)]
    assert len(set(seeds)) == 1000 and all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert seeds[::50] == list(range(20)), "the first sample is what n=1 would give"
    assert seeds[51] == 1341732422470200821, "the same on every machine and in every version"


def test_a_sample_asks_for_one_completion_and_for_nothing_else_than_the_request() -> None:
    params = SamplingParams(n=3, temperature=0.5, stop=["x"])
    assert [params.for_sample(index) for index in range(3)] == [SamplingParams(temperature=0.5, stop=["x"])] * 3
    assert params.n == 3


# --- defaults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        ({"temperature": 0.6, "do_sample": False, "max_length": 20}, {"temperature": 0.6}),
        ({"temperature": None, "top_p": None}, {}),
        ({"min_p": 0.1, "repetition_penalty": 1.2}, {"min_p": 0.1, "repetition_penalty": 1.2}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1, "frequency_penalty": -1}),
    ],
)
def test_defaults_come_from_the_generation_config_and_are_logged_in_one_line(
    config: dict, expected: dict, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        defaults = sampling_defaults(config)
    neutral = {"temperature": 1.0, "top_p": 0.7, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    for field, value in (dict.fromkeys(NEUTRAL, 0) | neutral | expected).items():
        assert getattr(defaults, field) == value
        assert f"{field} {value:g}" in caplog.text
    assert len(caplog.records) == 1 and all(field in caplog.text.partition("names")[2] for field in expected)


def test_a_bad_generation_config_is_named() -> None:
    with pytest.raises(ValueError, match=r"generation_config .*top_p=7"):
        sampling_defaults({"top_p": 7})


# --- banned_sequences ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level; "he" and " he" are tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġhe"]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("h", "e"), ("Ġ", "he")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def test_bad_words_are_banned_as_they_are_and_after_a_space(tokenizer: Tokenizer) -> None:
    banned = banned_sequences(SamplingParams(bad_words=["he", "hex"]), tokenizer)
    spelled = [[tokenizer.token(token_id) for token_id in sequence] for sequence in banned]
    assert spelled == [["he"], ["Ġhe"], ["he", "x"], ["Ġhe", "x"]]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("\n", [["Ċ"], ["Ġ", "Ċ"]]),
        ("\n\n", [["Ċ", "Ċ"], ["Ġ", "Ċ", "Ċ"]]),
        ("\t", [["ĉ"], ["Ġ", "ĉ"]]),
        (" ", [["Ġ"], ["Ġ", "Ġ"]]),
        (" he", [["Ġhe"]]),
        ("\nhe", [["Ċ", "he"], ["Ġ", "Ċ", "he"]]),
    ],
)
def test_whitespace_is_a_word_and_part_of_one(tokenizer: Tokenizer, word: str, expected: list[list[str]]) -> None:
    banned = banned_sequences(SamplingParams(bad_words=[word]), tokenizer)
    assert [[tokenizer.token(token_id) for token_id in sequence] for sequence in banned] == expected


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    """As Llama 2's: a space is put before every text, what has no token is spelled in bytes."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "a", "he", "▁he", "▁a"]
    merges = [("h", "e"), ("▁", "he"), ("▁", "a")]
    backend = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("he", [["he"], ["▁he"]]),
        ("\n", [["<0x0A>"], ["▁", "<0x0A>"]]),
        (" ", [["▁"], ["▁", "▁"]]),
        ("he a", [["he", "▁a"], ["▁he", "▁a"]]),
        ("</s>", [["</s>"], ["▁", "</s>"]]),
    ],
)
def test_a_space_that_the_tokenizer_puts_before_a_text_is_no_part_of_the_word(
    llama: Tokenizer, word: str, expected: list[list[str]]
) -> None:
    banned = banned_sequences(SamplingParams(bad_words=[word]), llama)
    assert [[llama.token(token_id) for token_id in sequence] for sequence in banned] == expected


def test_every_sequence_is_banned_once(tokenizer: Tokenizer) -> None:
    [he] = tokenizer.encode("he")
    params = SamplingParams(bad_words=["he", " he", "he"], bad_words_token_ids=[he, 3, 3])
    assert banned_sequences(params, tokenizer) == [(he,), (3,), tuple(tokenizer.encode(" he"))]
    assert banned_sequences(SamplingParams(), tokenizer) == []


def test_a_word_that_the_vocabulary_cannot_spell_needs_no_ban() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.BPE({"a": 0}, [])))
    assert banned_sequences(SamplingParams(bad_words=["é", "a"]), tokenizer) == [(0,)]
