"""LLM with a real model, SmolLM2-135M: what every parameter does to its words, and what a call leaves behind."""

import _thread
import gc
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastdeploy import LLM, RequestOutput, SamplingParams
from fastdeploy.engine.request import TokenLogprobs
from fastdeploy.engine.transcript import Transcript
from tests.smollm2 import MODEL, needs_smollm2

pytestmark = needs_smollm2

PROMPT = "The capital of France is"
GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module", params=[False, True], ids=["", "overlapping"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Every test runs with steps one after the other, and with steps that overlap."""
    limits = {"max_model_len": 512, "max_num_seqs": 4}
    with LLM(MODEL, reasoning_parser="qwen3", overlap_steps=request.param, **limits) as llm:
        yield llm


@pytest.fixture(autouse=True)
def idle_afterwards(llm: LLM) -> Iterator[None]:
    """Every test leaves the engine empty."""
    yield
    scheduler = llm.engine.scheduler
    scheduler.check_integrity()
    assert not scheduler.has_requests and llm.statistics.blocks_in_use == 0
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def answer(llm: LLM, prompt: str | list[int] = PROMPT, **params: object) -> RequestOutput:
    (output,) = llm.generate(prompt, SamplingParams(**{**GREEDY, **params}), use_tqdm=False)
    return output


@pytest.fixture(scope="module")
def plain(llm: LLM) -> RequestOutput:
    """What the model says greedily, which the other tests change."""
    return answer(llm)


def words(output: RequestOutput) -> tuple[list[int], str]:
    return output.outputs.token_ids, output.outputs.text


def test_a_step_has_as_many_tokens_as_suit_the_device(llm: LLM) -> None:
    tokens = llm.engine.runner.device.step_tokens
    assert llm.config.max_num_batched_tokens == llm.engine.scheduler.max_num_batched_tokens == tokens


# What ends an output


def test_a_stop_text_is_found_across_tokens_and_cut_off(llm: LLM, plain: RequestOutput) -> None:
    text, ids = plain.outputs.text, plain.outputs.token_ids
    first_two = len(llm.tokenizer.decode(ids[:2]))
    stop = text[first_two - 1 : first_two + 1]  # the last character of one token and the first of the next
    end = text.index(stop)
    output = answer(llm, stop=[stop, "never said"])
    assert output.outputs.text == text[:end]
    assert (output.outputs.finish_reason, output.outputs.stop_reason) == ("stop", stop)
    assert output.outputs.token_ids == ids[: len(output.outputs.token_ids)]
    assert stop in llm.tokenizer.decode(output.outputs.token_ids)
    included = answer(llm, stop=stop, include_stop_str_in_output=True)
    assert included.outputs.text == text[: end + len(stop)]


def test_a_stop_token_ends_the_output_but_not_before_min_tokens(llm: LLM, plain: RequestOutput) -> None:
    ids = plain.outputs.token_ids
    output = answer(llm, stop_token_ids=[ids[1]])
    assert (output.outputs.token_ids, output.outputs.stop_reason) == (ids[:2], ids[1])
    held_back = answer(llm, stop_token_ids=[ids[1]], min_tokens=6)
    assert ids[1] not in held_back.outputs.token_ids[:6] and len(held_back.outputs.token_ids) >= 6


def test_end_of_sequence_ends_the_output_unless_held_back_or_ignored(llm: LLM) -> None:
    chat = [{"role": "user", "content": "Say yes."}]
    eos = set(llm.tokenizer.eos_token_ids)

    def ids(**params: object) -> list[int]:
        (output,) = llm.chat(chat, SamplingParams(temperature=0, max_tokens=24, **params), use_tqdm=False)
        return output.outputs.token_ids

    ended = ids(logit_bias=dict.fromkeys(eos, 30.0))
    assert len(ended) < 24 and ended[-1] in eos
    held_back = ids(logit_bias=dict.fromkeys(eos, 30.0), min_tokens=9)
    assert not eos & set(held_back[:9]) and held_back[-1] in eos
    ignored = ids(logit_bias=dict.fromkeys(eos, 30.0), ignore_eos=True)
    assert len(ignored) == 24 and eos & set(ignored[:-1])


# What changes the tokens


def test_banned_words_are_never_said(llm: LLM, plain: RequestOutput) -> None:
    ids = plain.outputs.token_ids
    word = llm.tokenizer.decode(ids[:1]).strip()
    pair = llm.tokenizer.decode(ids[1:3])
    assert len(llm.tokenizer.encode(pair)) == 2, "a sequence of two tokens"
    for params in ({"bad_words": [word, pair]}, {"bad_words": [pair]}, {"bad_words_token_ids": [ids[0]]}):
        outputs = llm.generate(
            [PROMPT] * 2,
            [SamplingParams(**GREEDY, **params), SamplingParams(temperature=1.0, seed=1, max_tokens=12, **params)],
            use_tqdm=False,
        )
        for output in outputs:
            banned = [llm.tokenizer.encode(text) for bad in params.get("bad_words", []) for text in (bad, f" {bad}")]
            said = output.outputs.token_ids
            for sequence in [*banned, *([token_id] for token_id in params.get("bad_words_token_ids", []))]:
                starts = range(len(said) - len(sequence) + 1)
                assert not any(said[start : start + len(sequence)] == sequence for start in starts)
        assert words(outputs[0]) != words(plain)


def test_a_banned_pair_leaves_its_tokens_free_by_themselves(llm: LLM, plain: RequestOutput) -> None:
    ids = plain.outputs.token_ids
    pair = llm.tokenizer.decode(ids[1:3])
    output = answer(llm, bad_words=[pair])
    assert output.outputs.token_ids[:2] == ids[:2] and output.outputs.token_ids[2] != ids[2]


def test_logit_bias_forces_and_forbids(llm: LLM, plain: RequestOutput) -> None:
    (forced,) = llm.tokenizer.encode(" cheese")
    assert answer(llm, logit_bias={forced: 100.0}).outputs.token_ids == [forced] * 12
    first = plain.outputs.token_ids[0]
    assert first not in answer(llm, logit_bias={first: -math.inf}).outputs.token_ids


def test_a_logits_processor_sees_all_tokens_and_decides(llm: LLM, plain: RequestOutput) -> None:
    seen: list[list[int]] = []
    (forced,) = llm.tokenizer.encode(" cheese")

    def only_cheese(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        seen.append(list(token_ids))
        assert logits.shape == (49152,) and logits.dtype == np.float32
        changed = np.full_like(logits, -np.inf)
        changed[forced] = 0.0
        return changed

    def in_place(token_ids: list[int], logits: np.ndarray) -> None:
        logits[forced] += 100.0

    output = answer(llm, logits_processors=[only_cheese], max_tokens=3)
    assert output.outputs.token_ids == [forced] * 3
    assert seen == [output.prompt_token_ids + [forced] * count for count in range(3)]
    assert answer(llm, logits_processors=[in_place], max_tokens=2).outputs.token_ids == [forced] * 2
    assert words(answer(llm)) == words(plain), "nothing of it stays"


def test_a_logits_processor_that_raises_fails_its_request_and_no_other(llm: LLM) -> None:
    def failing(token_ids: list[int], logits: np.ndarray) -> None:
        raise LookupError("no grammar")

    params = [SamplingParams(temperature=0, max_tokens=3), SamplingParams(logits_processors=[failing])]
    good, bad = llm.generate(["Cheese is", "Milk is"], params, use_tqdm=False)
    assert (good.error_code, len(good.outputs.token_ids)) == (200, 3)
    assert (bad.error_code, bad.outputs.finish_reason, bad.outputs.token_ids) == (400, "error", [])
    assert bad.error_msg == "a logits processor raised LookupError: no grammar"


def test_penalties_keep_the_model_from_repeating_itself(llm: LLM) -> None:
    (cheese,) = llm.tokenizer.encode(" cheese")
    fond = {"logit_bias": {cheese: 30.0}, "max_tokens": 24, "ignore_eos": True}
    assert answer(llm, **fond).outputs.token_ids == [cheese] * 24
    assert answer(llm, **fond, frequency_penalty=2.0).outputs.token_ids.count(cheese) < 24
    assert answer(llm, **fond, repetition_penalty=1e6).outputs.token_ids.count(cheese) == 1


def test_a_seed_draws_the_same_tokens_again_and_each_of_n_others(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=8, n=3, seed=5)
    first = llm.generate([PROMPT, "Once upon a time"], params, use_tqdm=False)
    assert [output.outputs.index for output in first] == list(range(6))
    assert [output.prompt for output in first] == [PROMPT] * 3 + ["Once upon a time"] * 3
    assert len({tuple(output.outputs.token_ids) for output in first}) == 6
    second = llm.generate(["Once upon a time", PROMPT], params, use_tqdm=False)
    assert [words(output) for output in second] == [words(output) for output in [*first[3:], *first[:3]]]
    alone = answer(llm, temperature=1.0, top_p=1.0, max_tokens=8, seed=5)
    assert words(alone) == words(first[0])


# Logprobs


def test_logprobs_have_the_sampled_token_its_rank_and_the_most_probable(llm: LLM) -> None:
    output = answer(llm, temperature=1.5, top_p=1.0, seed=3, logprobs=2)
    assert len(output.outputs.logprobs) == len(output.outputs.token_ids)
    ranks = []
    for token_id, entry in zip(output.outputs.token_ids, output.outputs.logprobs, strict=True):
        assert [one.rank for one in entry.values()][:2] == [1, 2]
        assert len(entry) == (2 if entry[token_id].rank <= 2 else 3)
        assert all(one.logprob <= 0 for one in entry.values())
        assert entry[token_id].decoded_token == llm.tokenizer.token_text(token_id)
        ranks.append(entry[token_id].rank)
    assert max(ranks) > 2, "hot enough for improbable tokens"


def test_logprobs_of_the_whole_vocabulary_sum_to_one(llm: LLM, plain: RequestOutput) -> None:
    output = answer(llm, logprobs=-1, max_tokens=2)
    assert output.outputs.token_ids == plain.outputs.token_ids[:2]
    for token_id, entry in zip(output.outputs.token_ids, output.outputs.logprobs, strict=True):
        assert sorted(entry) == list(range(49152))
        assert sorted(one.rank for one in entry.values()) == list(range(1, 49153))
        assert sum(math.exp(one.logprob) for one in entry.values()) == pytest.approx(1, abs=1e-4)
        assert entry[token_id].rank == 1


def test_logprobs_are_the_models_own_whatever_the_sampling(llm: LLM) -> None:
    expected = answer(llm, logprobs=0, max_tokens=1).outputs.logprobs[0]
    (token_id,) = expected
    biased = answer(llm, logprobs=0, max_tokens=1, temperature=0.3, seed=1, top_k=1, logit_bias={token_id: 9.0})
    assert biased.outputs.logprobs[0] == expected


def test_prompt_logprobs_are_those_of_the_same_tokens_as_an_output(llm: LLM) -> None:
    written = answer(llm, logprobs=1, max_tokens=6)
    ids = written.prompt_token_ids + written.outputs.token_ids
    output = answer(llm, ids, prompt_logprobs=1, max_tokens=1)
    assert len(output.prompt_logprobs) == len(ids) and output.prompt_logprobs[0] is None
    assert all(token_id in entry for token_id, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True))
    assert output.prompt_logprobs[-6:] == written.outputs.logprobs


# Reasoning


def test_thinking_is_split_off_and_ended_when_its_tokens_are_used_up(llm: LLM) -> None:
    params = SamplingParams(**GREEDY, reasoning_max_tokens=4, ignore_eos=True)
    chat = [{"role": "user", "content": "Hi"}]
    stream = list(llm.chat(chat, params, chat_template="{{ messages[0].content }}\n<think>\n", stream=True))
    output = stream[-1].outputs
    thought = llm.tokenizer.decode(output.token_ids[:4])
    assert llm.tokenizer.decode(output.token_ids).startswith(f"{thought}</think>")
    assert output.reasoning_content.strip() == thought.strip()
    assert output.text and "</think>" not in output.text
    assert "".join(each.outputs.delta for each in stream) == output.text
    assert "".join(each.outputs.reasoning_delta for each in stream) == output.reasoning_content


# Streams


def test_the_deltas_of_a_stream_join_to_the_text(llm: LLM) -> None:
    prompts = [PROMPT, "Ein Wort auf Deutsch: „", "日本語の"]
    params = SamplingParams(**{**GREEDY, "max_tokens": 20}, stop=["\n\n"])
    whole = llm.generate(prompts, params, use_tqdm=False)
    texts = [""] * 3
    last: dict[int, RequestOutput] = {}
    for output in llm.generate(prompts, params, stream=True):
        index = output.outputs.index
        texts[index] += output.outputs.delta
        assert texts[index] == output.outputs.text
        last[index] = output
    assert texts == [output.outputs.text for output in whole]
    assert [words(last[index]) for index in range(3)] == [words(output) for output in whole]


def test_leaving_a_stream_early_frees_its_blocks(llm: LLM) -> None:
    stream = llm.generate([PROMPT] * 6, SamplingParams(ignore_eos=True), stream=True)
    for _ in range(10):
        next(stream)
    assert llm.statistics.blocks_in_use > 0
    stream.close()
    assert llm.engine.scheduler.blocks.num_free == llm.engine.scheduler.blocks.num_blocks


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.3])
def test_ctrl_c_in_a_long_generate_frees_what_was_queued_and_the_llm_goes_on(
    llm: LLM, plain: RequestOutput, delay: float, ctrl_c: None
) -> None:
    timer = threading.Timer(delay, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 20, SamplingParams(ignore_eos=True), use_tqdm=False)
    timer.join()
    assert not llm.engine.scheduler.has_requests
    assert words(answer(llm)) == words(plain)


# The cache, and others


def test_a_second_call_finds_the_prompt_in_the_cache_and_says_the_same(llm: LLM) -> None:
    prompt = np.random.default_rng(1).integers(0, 49152, 200).tolist()
    cold, warm = answer(llm, prompt, logprobs=3), answer(llm, prompt, logprobs=3)
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 192)
    assert words(cold) == words(warm) and cold.outputs.logprobs == warm.outputs.logprobs
    whole = answer(llm, prompt[:192])
    assert whole.num_cached_tokens > 0, "a full hit: at least the last token is computed again"
    assert answer(llm, prompt, prompt_logprobs=0).num_cached_tokens == 0, "these come from a computation only"


def test_statistics_tell_of_the_run(llm: LLM) -> None:
    before = llm.statistics.num_steps, llm.statistics.num_cached_tokens, llm.statistics.num_prompt_tokens
    outputs = llm.generate(["a " * 100] * 2, SamplingParams(**GREEDY, ignore_eos=True), use_tqdm=False)
    statistics = llm.statistics
    assert statistics.num_steps - before[0] == 12
    assert statistics.num_cached_tokens - before[1] == sum(output.num_cached_tokens for output in outputs) > 0
    assert statistics.num_prompt_tokens - before[2] == sum(len(output.prompt_token_ids) for output in outputs)
    assert statistics.largest_batch >= 2 and statistics.peak_blocks_in_use > 0
    assert f"{statistics.num_steps} steps" in statistics.describe()


def test_two_llms_used_by_four_threads_say_what_one_says_until_one_is_closed(llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=2, max_tokens=10)
    prompts = [PROMPT, "Once upon a time", "2 + 2 ="]
    expected = [words(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    with LLM(MODEL, max_model_len=256, max_num_seqs=2) as other, ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(each.generate, prompts, params, use_tqdm=False) for each in (llm, other, llm, other)]
        for call in calls:
            assert [words(output) for output in call.result()] == expected
        runner, model = weakref.ref(other.engine.runner), weakref.ref(other.engine.runner.model)
        stream = other.generate(PROMPT, stream=True)
        next(stream)
    gc.collect()
    assert runner() is None and model() is None, "nothing holds weights and KV cache any more"
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    with pytest.raises(RuntimeError, match="closed"):
        other.generate(PROMPT)
    assert [words(output) for output in llm.generate(prompts, params, use_tqdm=False)] == expected


def test_closing_gives_the_memory_back_to_the_system(llm: LLM) -> None:
    def resident() -> int:
        """MiB of this process's own memory."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

    for _ in range(2):  # what the first one has freed, the second takes from glibc's heap
        with LLM(MODEL, max_model_len=256, max_num_seqs=2) as other:
            answer(other)
            full = resident()
        assert resident() < full - 50


def test_nothing_of_a_call_stays_in_memory_after_it(llm: LLM) -> None:
    """Logprobs of a whole vocabulary are megabytes a token: the sampler must not remember them with its requests."""

    def kept() -> list[object]:
        gc.collect()
        return [each for each in gc.get_objects() if isinstance(each, (Transcript, TokenLogprobs))]

    before = kept()  # other tests' engines may be alive in this process
    llm.generate([PROMPT] * 2, SamplingParams(max_tokens=2, logprobs=5), use_tqdm=False)
    for _ in llm.generate([PROMPT] * 2, SamplingParams(max_tokens=9, logprobs=5), stream=True):
        break
    assert not [each for each in kept() if not any(each is other for other in before)]


SPEAK = """
import json, sys
from fastdeploy import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=256)
outputs = llm.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0.9, seed=2, max_tokens=10), use_tqdm=False)
print(json.dumps([output.outputs.token_ids for output in outputs]))
"""


def test_two_processes_at_once_say_what_one_says(llm: LLM) -> None:
    prompts = [PROMPT, "Once upon a time"]
    command = [sys.executable, "-c", SPEAK, MODEL, json.dumps(prompts)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ.copy()) for _ in range(2)]
    expected = llm.generate(prompts, SamplingParams(temperature=0.9, seed=2, max_tokens=10), use_tqdm=False)
    for process in processes:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert json.loads(said) == [output.outputs.token_ids for output in expected]


def test_a_quantisation_that_the_checkpoint_has_not_is_refused_before_anything_is_loaded() -> None:
    message = r"quantization='awq'\): .*SmolLM2.*gguf is quantised by gguf; leave it out, or"
    with pytest.raises(ValueError, match=message):
        LLM(MODEL, quantization="awq")
