"""What LLM takes and gives, with a tokenizer that spells bytes and a model that says what it is told."""

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastdeploy.llm
from fastdeploy import LLM, CompletionOutput, RequestOutput, SamplingParams
from fastdeploy.engine.request import Request
from fastdeploy.engine.scheduler import ScheduledBatch, StepOutput
from fastdeploy.engine_config import ResolvedConfig
from tests.triton_cpu.arrays import run_python

EOS = 256
VOCAB_SIZE = 257
ANSWER = "héllo ☃!".encode()


class ByteTokenizer:
    """Token ids are bytes; 256 ends a sequence."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = (EOS,)
    special_token_ids = frozenset([EOS])
    is_byte_level = True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token_id for token_id in ids if token_id != EOS).decode(errors="replace")

    def apply_chat_template(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: object,
    ) -> str:
        if not messages or not all("role" in message for message in messages):
            raise ValueError("messages[0] has no 'role'")
        turns = "".join(f"[{message['role']}]{message['content']}" for message in messages)
        given = {name: value for name, value in variables.items() if value is not None}
        return f"{chat_template or ''}{turns}{'>' * add_generation_prompt}{given or ''}"


class AnsweringRunner:
    """Answers ANSWER, then ends; a prompt that begins with "long" gets "x" for ever, one with "bad" fails, and one
    that begins with "say " gets the rest of the prompt."""

    num_blocks, kv_cache_dtype, fast_paths = 20, "int8", ("recorded steps",)
    device, model = SimpleNamespace(name="cpu", describe=lambda: "pocket"), SimpleNamespace(dtype="bfloat16")
    overlaps, split_keys = False, 256

    def __init__(self, config: ResolvedConfig) -> None:
        self.config = config
        self.batches: list[list[int]] = []
        self.requests: list[Request] = []  # in the order of their first tokens

    @property
    def seeds(self) -> list[int | None]:
        return [request.sampling_params.seed for request in self.requests]

    def run(self, batch: ScheduledBatch) -> StepOutput:
        self.batches.append([item.num_tokens for item in batch.items])
        return StepOutput([self.answer(item.request) if item.samples else None for item in batch.items])

    def answer(self, request: Request) -> int:
        count, prompt = request.num_output_tokens, bytes(request.prompt_token_ids)
        if count == 0:
            self.requests.append(request)
        forced = request.forced_token()
        if forced is not None:
            return forced
        if prompt.startswith(b"bad"):
            return -1
        if prompt.startswith(b"long"):
            return ord("x")
        answer = prompt.removeprefix(b"say ") if prompt.startswith(b"say ") else ANSWER
        return answer[count] if count < len(answer) else EOS


@pytest.fixture
def make_llm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    def load(config: fastdeploy.llm.EngineConfig) -> fastdeploy.llm.Loaded:
        model_config = SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
        checkpoint = SimpleNamespace(config=model_config, generation_config={}, path=Path("pocket"))
        runner = AnsweringRunner(config.resolved(model_limit=1000))
        return fastdeploy.llm.Loaded(checkpoint, ByteTokenizer(), runner, leader=None)

    monkeypatch.setattr(fastdeploy.llm, "load", load)
    small = {"max_model_len": 100, "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    return lambda **keywords: LLM("some-model", **{**small, **keywords})


@pytest.fixture
def llm(make_llm: Callable[..., LLM]) -> LLM:
    return make_llm()


def assert_idle(llm: LLM) -> None:
    assert not llm.engine.scheduler.has_requests
    assert llm.engine.scheduler.blocks.num_free == llm.engine.scheduler.blocks.num_blocks


HI = [ord("h"), ord("i")]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("hi", ["hi"]),
        (["hi", "you"], ["hi", "you"]),
        (HI, [HI]),
        (tuple(HI), [HI]),
        ([np.int64(104), np.int32(105)], [HI]),
        ([HI, [1]], [HI, [1]]),
        ([HI, "you"], [HI, "you"]),
        ({"prompt": "hi"}, ["hi"]),
        ({"prompt": HI}, [HI]),
        ([{"prompt_token_ids": HI}, {"prompt": "you"}], [HI, "you"]),
        ({"prompt": "", "prompt_token_ids": HI}, [HI]),
        ({"prompt": None, "prompt_token_ids": HI}, [HI]),
        ({"prompt": "hi", "prompt_token_ids": None}, ["hi"]),
        ([], []),
        ((), []),
    ],
)
def test_generate_takes_text_ids_dicts_and_lists_of_them(llm: LLM, prompts: object, expected: list) -> None:
    outputs = llm.generate(prompts, use_tqdm=False)
    assert [output.prompt for output in outputs] == expected
    for output in outputs:
        assert output.prompt_token_ids == (
            list(output.prompt.encode()) if isinstance(output.prompt, str) else output.prompt
        )
        assert output.outputs.text == ANSWER.decode() and output.outputs.token_ids == [*ANSWER, EOS]
        assert output.finished and output.outputs.finish_reason == "stop" and output.error_code == 200
    assert_idle(llm)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("", ValueError, "prompts is empty"),
        (["hi", ""], ValueError, r"prompts\[1\] is empty"),
        (["hi", []], ValueError, r"prompts\[1\] is empty"),
        (None, TypeError, "prompts must be text.*not NoneType"),
        (5, TypeError, "prompts must be text.*not int: 5"),
        (b"hi", TypeError, "prompts must be text.*not bytes"),
        (np.array([1, 2]), TypeError, "prompts must be text.*not ndarray"),
        (["hi", 5], TypeError, r"prompts\[1\] must be text.*not int: 5"),
        (["hi", None], TypeError, r"prompts\[1\] must be text.*not NoneType"),
        ([1, "hi"], TypeError, r"prompts\[1\] must be a token id.*not str: 'hi'"),
        ([True, 1], TypeError, r"prompts\[0\] must be a token id.*not bool: True"),
        ([1.0, 2], TypeError, r"prompts\[0\] must be a token id.*not float: 1.0"),
        ([[1], [2, 2.5]], TypeError, r"prompts\[1\]\[1\] must be a token id.*not float: 2.5"),
        ([[1], [2, -1]], ValueError, r"prompts\[1\]\[1\] is -1: token ids run from 0 to 256"),
        ([257], ValueError, r"prompts\[0\] is 257: token ids run from 0 to 256"),
        (["hi", "x" * 100], ValueError, r"prompts\[1\] has 100 tokens; max_model_len=100.*99 at most"),
        ({"text": "hi"}, ValueError, r"prompts must have either the key 'prompt' or .* it has \['text'\]"),
        ([{"prompt": None}], ValueError, r"prompts\[0\] must have either"),
        ({"prompt": "hi", "prompt_token_ids": []}, ValueError, r"prompts\['prompt_token_ids'\] is empty"),
        ({"prompt": {"prompt": "hi"}}, TypeError, r"prompts\['prompt'\] must be text or a list of token ids, not dict"),
        ("x" * 25601, ValueError, "prompts has 25601 characters, far too many for max_model_len=100: shorten it"),
        ([{"prompt": 5}], TypeError, r"prompts\[0\]\['prompt'\] must be text"),
        ({"prompt": "hi", "n": 5}, ValueError, r"prompts has the key 'n': a dict prompt has 'prompt' and nothing else"),
        ({"prompt_token_ids": "hi"}, TypeError, r"prompts\['prompt_token_ids'\] must be a list of token ids, not str"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_queued(
    llm: LLM, prompts: object, error: type[Exception], message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(error, match=message):
            llm.generate(prompts, stream=stream)
    assert_idle(llm)
    assert llm.engine.runner.batches == []
    assert llm.generate("hi", use_tqdm=False)[0].finished, "the object still works"


def test_of_text_and_ids_the_ids_count_and_the_text_is_what_the_output_shows(llm: LLM) -> None:
    (output,) = llm.generate({"prompt": "say no", "prompt_token_ids": list(b"say yes")}, use_tqdm=False)
    assert (output.prompt, output.prompt_token_ids, output.outputs.text) == ("say no", list(b"say yes"), "yes")


def test_no_prompts_have_no_outputs(llm: LLM) -> None:
    assert llm.generate([], [], use_tqdm=False) == list(llm.generate([], stream=True)) == []
    assert_idle(llm)


CHAT = [{"role": "user", "content": "Hi"}]


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    assert [output.prompt for output in llm.chat(CHAT, use_tqdm=False)] == ["[user]Hi>"]
    prompts = [output.prompt for output in llm.chat([CHAT, CHAT * 2], use_tqdm=False)]
    assert prompts == ["[user]Hi>", "[user]Hi[user]Hi>"]
    assert llm.chat(CHAT, use_tqdm=False)[0].outputs.text == ANSWER.decode()


def test_chat_hands_template_and_variables_on(llm: LLM) -> None:
    output = llm.chat(CHAT, use_tqdm=False, chat_template="T:", chat_template_kwargs={"deep": 1})[0]
    assert output.prompt == "T:[user]Hi>{'deep': 1}"
    output = llm.chat(CHAT, use_tqdm=False, add_generation_prompt=False)[0]
    assert output.prompt == "[user]Hi"


def test_a_template_given_to_the_llm_is_what_chat_uses_unless_told_otherwise(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(chat_template="{{ own }}")
    assert llm.chat(CHAT, use_tqdm=False)[0].prompt == "{{ own }}[user]Hi>"
    assert llm.chat(CHAT, use_tqdm=False, chat_template="T:")[0].prompt == "T:[user]Hi>"


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ({}, "[user]Hi>"),
        ({"add_generation_prompt": None}, "[user]Hi>"),
        ({"add_generation_prompt": False}, "[user]Hi"),
        ({"continue_final_message": True}, "[user]Hi{'continue_final_message': True}"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "[user]Hi{'continue_final_message': True}"),
        ({"continue_final_message": False, "add_generation_prompt": True}, "[user]Hi>"),
    ],
)
def test_a_prompt_ends_with_the_beginning_of_an_answer_or_with_the_message_to_continue(
    llm: LLM, given: dict, prompt: str
) -> None:
    assert llm.chat(CHAT, use_tqdm=False, **given)[0].prompt == prompt


def test_a_prompt_has_one_end(llm: LLM) -> None:
    with pytest.raises(ValueError, match="add_generation_prompt and continue_final_message are both True"):
        llm.chat(CHAT, add_generation_prompt=True, continue_final_message=True)
    assert_idle(llm)


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("tools", "seen"),
    [
        (WEATHER, [WEATHER]),
        ([WEATHER, WEATHER], [WEATHER, WEATHER]),
        ({"function": {"name": "f"}}, [{"type": "function", "function": {"name": "f"}}]),
        ([], None),
        (None, None),
    ],
)
def test_chat_hands_tools_on(make_llm: Callable[..., LLM], tools: object, seen: list | None) -> None:
    output = make_llm(max_model_len=300).chat(CHAT, SamplingParams(max_tokens=1), use_tqdm=False, tools=tools)[0]
    assert output.prompt == "[user]Hi>" + (str({"tools": seen}) if seen else "")


@pytest.mark.parametrize(
    ("tools", "error", "message"),
    [
        ("weather", TypeError, "tools must be a dict .* or a list of such dicts, not str: 'weather'"),
        (["weather"], TypeError, r"tools\[0\] must be a dict .*, not str: 'weather'"),
        ([WEATHER, {}], ValueError, r"tools\[1\] must have the key 'function'"),
        ({"name": "weather"}, ValueError, "tools must have the key 'function'.* it has {'name': 'weather'}"),
        ({"type": "tool", "function": {"name": "f"}}, ValueError, r"tools\['type'\] is 'tool': it must be 'function'"),
        ([{"function": {"name": 5}}], ValueError, r"tools\[0\]\['function'\] must have a 'name', a str"),
        ({"function": {"name": "f", "parameters": "x"}}, TypeError, r"\['parameters'\] must be a dict, a JSON schema"),
        ({"function": {"name": "f", "description": 5}}, TypeError, r"\['description'\] must be a str, not int"),
    ],
)
def test_bad_tools_are_named(llm: LLM, tools: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.chat(CHAT, tools=tools)
    assert_idle(llm)


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], ValueError, "messages is an empty list"),
        ("hi", TypeError, "messages must be a conversation.*not str: 'hi'"),
        ([{"content": "Hi"}], ValueError, r"^messages\[0\] has no 'role'"),
        ([CHAT, [{"content": "Hi"}]], ValueError, r"in messages\[1\]: messages\[0\] has no 'role'"),
        ([CHAT, []], ValueError, r"in messages\[1\]"),
        ([CHAT, None], TypeError, r"^messages\[1\] must be a conversation.*not NoneType"),
        ([CHAT, CHAT[0]], TypeError, r"^messages\[1\] must be a conversation.*not dict"),
        ([CHAT, [{"role": "user", "content": "x" * 100}]], ValueError, r"messages\[1\] has 107 tokens"),
    ],
)
def test_bad_messages_are_refused_before_anything_is_queued(
    llm: LLM, messages: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.chat(messages)
    assert_idle(llm)
    assert llm.engine.runner.batches == []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["enable_thinking"], TypeError, "chat_template_kwargs must be a dict, not list"),
        ({1: 2}, TypeError, "chat_template_kwargs has the key 1"),
        ({"messages": []}, ValueError, "chat_template_kwargs has the key 'messages'"),
        ({"chat_template": "T:"}, ValueError, "chat_template_kwargs has the key 'chat_template'"),
        ({"continue_final_message": True}, ValueError, r"pass it as chat\(continue_final_message=...\)"),
        ({"tools": []}, ValueError, r"chat_template_kwargs has the key 'tools': pass it as chat\(tools=...\)"),
    ],
)
def test_bad_variables_of_the_chat_template_are_named(
    llm: LLM, given: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.chat(CHAT, chat_template_kwargs=given)


@pytest.mark.parametrize(("flag", "value"), [("stream", "no"), ("use_tqdm", 0), ("stream", 1.0)])
def test_a_flag_that_is_no_bool_is_refused_by_name(llm: LLM, flag: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{flag} must be True or False, not .*: {value!r}"):
        llm.generate("hi", **{flag: value})
    with pytest.raises(TypeError, match=f"{flag} must be True or False"):
        llm.chat(CHAT, **{flag: value})
    for name in ("add_generation_prompt", "continue_final_message"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, not .*: {value!r}"):
            llm.chat(CHAT, **{name: value})
    assert_idle(llm)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([SamplingParams()], ValueError, "sampling_params has 1 elements for 2 prompts"),
        ([], ValueError, "sampling_params has 0 elements for 2 prompts"),
        ([SamplingParams(), None], TypeError, r"sampling_params\[1\] must be a SamplingParams, not NoneType"),
        ({"temperature": 0}, TypeError, "sampling_params must be a SamplingParams .*not dict"),
        (False, TypeError, "sampling_params must be a SamplingParams .*not bool"),
        (SamplingParams(stop_token_ids=[5, 257]), ValueError, "257 never occurs, token ids run from 0 to 256"),
        (SamplingParams(bad_words_token_ids=[257]), ValueError, "bad_words_token_ids=.*257 never occurs"),
        (SamplingParams(logit_bias={300: 1.0}), ValueError, "logit_bias=.*300 never occurs"),
        (SamplingParams(logprobs=258), ValueError, r"logprobs=258\): must be at most 257, .*; -1 stands for all of it"),
        (SamplingParams(prompt_logprobs=258), ValueError, r"prompt_logprobs=258\): must be at most 257"),
        (SamplingParams(reasoning_max_tokens=5), ValueError, r"reasoning_max_tokens=5\): needs LLM\(reasoning_parser="),
    ],
)
def test_bad_sampling_params_are_refused_before_anything_is_queued(
    llm: LLM, given: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.generate(["hi", "you"], given)
    with pytest.raises(error, match=message):
        llm.chat([CHAT, CHAT], given, stream=True)
    assert_idle(llm)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": dict.fromkeys(range(1000, 2024), 1.0)}, "logit_bias=.* change 1025 token ids, at most 1024"),
        ({"bad_words_token_ids": list(range(1000, 2024))}, "bad_words_token_ids=.* change 1025 token ids"),
        ({"stop_token_ids": list(range(1000, 2012)), "bad_words": list("abcdefghijkl")}, "stop_token_ids=.* 1025 "),
    ],
)
def test_more_edits_of_logits_than_the_sampler_has_room_for_are_refused(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, fields: dict, message: str
) -> None:
    """With the end-of-sequence token, which min_tokens holds back, that is one too many."""
    monkeypatch.setattr(llm.intake, "_vocab_size", 10000)
    with pytest.raises(ValueError, match=f"{message}.* logits_processors"):
        llm.generate("hi", SamplingParams(**fields))
    assert_idle(llm)
    assert llm.generate("hi", SamplingParams(**fields, min_tokens=0), use_tqdm=False)[0].finished


def test_min_tokens_that_a_prompt_leaves_no_room_for_are_refused_before_anything_is_queued(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"^prompts\[1\]: SamplingParams\(min_tokens=90\): .*room for 80"):
        llm.generate(["hi", "x" * 20], SamplingParams(min_tokens=90))
    assert_idle(llm)
    assert llm.engine.runner.batches == []


def test_bans_reach_the_request_as_token_sequences(llm: LLM) -> None:
    llm.generate("hi", SamplingParams(bad_words=["a", "bc"], bad_words_token_ids=[7]), use_tqdm=False)
    (request,) = llm.engine.runner.requests
    assert set(request.banned) == {(97,), (32, 97), (98, 99), (32, 98, 99), (7,)}


def test_n_outputs_of_each_prompt_follow_each_other_with_seeds_of_their_own(llm: LLM) -> None:
    params = [SamplingParams(n=2, seed=7), SamplingParams(), SamplingParams(n=3)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["a", "a", "b", "c", "c", "c"]
    assert [output.outputs.index for output in outputs] == list(range(6))
    assert len({output.request_id for output in outputs}) == 6
    seeds = {request.index: request.sampling_params.seed for request in llm.engine.runner.requests}
    assert seeds[0] == 7 and len(set(seeds.values())) == 6
    assert params[0] == SamplingParams(n=2, seed=7)


def test_requests_are_made_as_they_are_needed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100,000 no more exist at a time than fit in two steps, and what is through is forgotten."""
    alive: weakref.WeakSet = weakref.WeakSet()
    make = llm.intake._request

    def counted(*arguments: object) -> Request:
        request = make(*arguments)
        alive.add(request.transcript)  # a request has no weak references
        return request

    monkeypatch.setattr(llm.intake, "_request", counted)
    stream = llm.generate(["say a"] * 10, SamplingParams(n=10_000, max_tokens=1), stream=True)
    shown = []
    for output in stream:
        shown.append(output.outputs.index)
        assert len(alive) <= 3 * 4
        if len(shown) == 200:
            break
    assert shown == list(range(200))
    del output
    stream.close()
    assert_idle(llm)


def test_a_prompt_asks_for_no_more_outputs_than_can_be_held(llm: LLM) -> None:
    params = SamplingParams()
    params.n = 10**9  # assigned later: not checked yet
    with pytest.raises(ValueError, match=r"SamplingParams\(n=1000000000\): must be an integer from 1 to 16384"):
        llm.generate("hi", params)
    assert_idle(llm)


def test_tokens_that_the_model_does_not_have_are_neither_banned_nor_forced(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(reasoning_parser="qwen3")
    llm.intake._vocab_size = ord("i")  # of which "h" is a part, "i" is none
    llm.generate("hh", SamplingParams(bad_words=["h", "i", "hi"]), use_tqdm=False)
    assert set(llm.engine.runner.requests[0].banned) == {(ord("h"),), (ord(" "), ord("h"))}
    with pytest.raises(ValueError, match="reasoning_max_tokens needs a model that has tokens for '<think>'"):
        llm.generate("hh", SamplingParams(reasoning_max_tokens=1))


def test_a_stream_of_n_outputs_tells_them_apart_by_index(llm: LLM) -> None:
    texts: dict[int, str] = {}
    for output in llm.generate(["say no", "hi"], SamplingParams(n=2), stream=True):
        texts[output.outputs.index] = texts.get(output.outputs.index, "") + output.outputs.delta
    assert texts == {0: "no", 1: "no", 2: ANSWER.decode(), 3: ANSWER.decode()}


def test_stop_texts_end_a_request_and_are_cut_off(llm: LLM) -> None:
    output = llm.generate("say one. two.", SamplingParams(stop=[". t"]), use_tqdm=False)[0]
    assert output.outputs.text == "one" and output.outputs.stop_reason == ". t"
    assert bytes(output.outputs.token_ids) == b"one. t"
    assert_idle(llm)


def test_reasoning_is_split_from_the_answer(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(reasoning_parser="qwen3")
    output = llm.generate("say <think>hm</think>yes", use_tqdm=False)[0]
    assert (output.outputs.reasoning_content, output.outputs.text) == ("hm", "yes")


def test_reasoning_max_tokens_ends_the_thinking(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(reasoning_parser="qwen3")
    params = SamplingParams(reasoning_max_tokens=3, max_tokens=16)
    for prompt in ("long <think>", list(b"long <think>")):
        output = llm.generate(prompt, params, use_tqdm=False)[0]
        assert output.outputs.reasoning_content == "xxx" and output.outputs.text == "xxxxx"
    thinking = [{"role": "assistant", "content": "<think>"}]
    output = llm.chat(thinking, params, use_tqdm=False, chat_template="long", add_generation_prompt=False)[0]
    assert output.outputs.reasoning_content == "xxx", "the template's text decides, too"


def test_sampling_params_one_for_all_or_one_for_each(llm: LLM) -> None:
    def lengths(params: object, prompts: list[str]) -> list[int]:
        return [len(output.outputs.token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]

    assert lengths(SamplingParams(max_tokens=2), ["a", "b"]) == [2, 2]
    assert lengths([SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)], ["a", "b"]) == [2, 3]
    assert lengths([SamplingParams(max_tokens=2)], ["a"]) == [2]


def test_max_tokens_is_clipped_to_max_model_len_and_the_callers_object_unchanged(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1000)
    outputs = llm.generate(["long", "long enough", "x" * 99], params, use_tqdm=False)
    assert [len(output.prompt_token_ids) + len(output.outputs.token_ids) for output in outputs] == [100, 100, 100]
    assert all(output.outputs.finish_reason == "length" for output in outputs)
    assert params == SamplingParams(max_tokens=1000)
    assert len(llm.generate("long", use_tqdm=False)[0].outputs.token_ids) == 96, "None: all there is room for"


def test_requests_without_a_seed_get_different_ones_which_follow_from_the_engines(
    llm: LLM, make_llm: Callable[..., LLM]
) -> None:
    llm.generate(["a", "b"], use_tqdm=False)
    again = make_llm(seed=0)
    again.generate(["a", "b"], use_tqdm=False)
    other = make_llm(seed=1)
    other.generate(["a", "b"], use_tqdm=False)
    first, second, third = (each.engine.runner.seeds for each in (llm, again, other))
    assert first == second and len({*first, *third}) == 4


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["long one", "short", "long", "s"] * 4
    outputs = llm.generate(prompts, SamplingParams(max_tokens=40), use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [output.outputs.index for output in outputs] == list(range(16))
    assert len({output.request_id for output in outputs}) == 16


def test_one_failing_request_does_not_spoil_the_others(llm: LLM) -> None:
    outputs = llm.generate(["hi", "bad", "you"], use_tqdm=False)
    assert [output.error_code for output in outputs] == [200, 500, 200]
    assert outputs[1].outputs.finish_reason == "error" and "NaN" in outputs[1].error_msg
    assert [output.outputs.text for output in outputs] == [ANSWER.decode(), "", ANSWER.decode()]


def test_a_stream_grows_by_whole_characters(llm: LLM) -> None:
    texts = {0: "", 1: ""}
    sent = {0: 0, 1: 0}
    last: dict[int, RequestOutput] = {}
    for output in llm.generate(["hi", "you"], stream=True):
        index = output.outputs.index
        texts[index] += output.outputs.delta
        assert texts[index] == output.outputs.text and "\ufffd" not in output.outputs.text
        assert output.outputs.send_idx == sent[index] and len(output.outputs.token_ids) == sent[index] + 1
        sent[index] += 1
        last[index] = output
    assert texts == {0: ANSWER.decode(), 1: ANSWER.decode()}
    assert all(output.finished for output in last.values())
    assert last[1].outputs == CompletionOutput(
        index=1, send_idx=len(ANSWER), token_ids=[*ANSWER, EOS], text=ANSWER.decode(), delta="", finish_reason="stop"
    )
    assert_idle(llm)


def test_leaving_a_stream_early_frees_its_requests(llm: LLM) -> None:
    for count, _ in enumerate(llm.chat([CHAT] * 9, stream=True)):
        if count == 5:
            break
    del _
    assert_idle(llm)


def test_a_generate_within_a_stream(llm: LLM) -> None:
    stream = llm.generate("long", SamplingParams(max_tokens=30), stream=True)
    assert next(stream).outputs.text == "x"
    assert llm.generate("hi", use_tqdm=False)[0].outputs.text == ANSWER.decode()
    assert list(stream)[-1].outputs.text == "x" * 30
    assert_idle(llm)


def test_an_interrupt_frees_what_was_queued_and_the_object_still_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(batch: ScheduledBatch) -> StepOutput:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hi"] * 10, use_tqdm=False)
    assert_idle(llm)
    assert llm.generate("hi", use_tqdm=False)[0].outputs.text == ANSWER.decode()


def test_a_closed_llm_says_so_and_lets_go_of_the_model(llm: LLM) -> None:
    runner = weakref.ref(llm.engine.runner)
    stream = llm.generate("long", stream=True)
    next(stream)
    llm.close()
    llm.close()
    assert runner() is None
    for call in (lambda: next(stream), lambda: llm.generate("hi"), lambda: llm.chat(CHAT, stream=True)):
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            call()


def test_a_with_block_closes_the_llm_even_after_an_exception(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(ZeroDivisionError), make_llm() as llm:
        assert llm.generate("hi", use_tqdm=False)[0].finished
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate("hi")


def test_a_run_ends_with_one_line_of_statistics(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        llm.generate(["hi", "you"], use_tqdm=False)
        list(llm.chat(CHAT, stream=True))
        assert [record.getMessage() for record in caplog.records].count(llm.statistics.describe()) == 1
        assert len(caplog.records) == 2


def test_the_progress_bar_shows_tokens_per_second_and_can_be_switched_off(
    llm: LLM, capsys: pytest.CaptureFixture
) -> None:
    llm.generate(["hi", "you"], use_tqdm=False)
    list(llm.generate(["hi"], stream=True))
    assert capsys.readouterr().err == ""
    llm.generate(["hi", "you"])
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown and "2/2" in shown
    assert "input: " in shown and "output: " in shown and "output: 0.00" not in shown.rsplit("\r", 1)[-1]


def test_one_line_of_facts_is_logged_at_start(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        facts = LLM("some-model", block_size=16, max_model_len=50).facts
    assert facts == {
        "device": "pocket",
        "dtype": "bfloat16",
        "quantization": "auto",
        "kv_cache_dtype": "int8",
        "max_model_len": 50,
        "total_block_num": 20,
        "block_size": 16,
        "fast_paths": "recorded steps",
        "attention_split": 256,
    }
    line = next(record.getMessage() for record in caplog.records if "total_block_num" in record.getMessage())
    assert all(f"{name} {value}" in line for name, value in facts.items())


def test_importing_waits_for_no_library_that_only_a_model_needs() -> None:
    done = run_python(
        "import sys, fastdeploy; assert not {'numpy', 'logging', 'dataclasses'} & set(sys.modules); "
        "from fastdeploy import LLM, RequestOutput, SamplingParams; "
        "assert not {'paddle', 'triton', 'tokenizers', 'gguf', 'jinja2', 'tqdm'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_a_bad_keyword_and_a_missing_model_are_named() -> None:
    with pytest.raises(TypeError, match="did you mean 'max_model_len'"):
        LLM("some-model", max_modl_len=5)
    with pytest.raises(TypeError, match="did you mean 'model'"):
        LLM(modle="some-model")
    with pytest.raises(TypeError, match=r"LLM\(model=None\): must be a path or a package name"):
        LLM()
    with pytest.raises(FileNotFoundError, match="model 'no-such-model'"):
        LLM("no-such-model")
