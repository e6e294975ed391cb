"""The runner on tiny random models, driven by the real scheduler: tokens, bits, recorded steps, memory."""

from __future__ import annotations

import contextlib
import logging
import random
from dataclasses import replace

import numpy as np
import pytest

from fastdeploy.device import open_device
from fastdeploy.device.cpu import CPUDevice
from fastdeploy.engine.engine import Engine
from fastdeploy.engine.request import Request
from fastdeploy.engine.runner import SLAB, Runner, fit_to_memory
from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.engine_config import EngineConfig
from fastdeploy.kernels.launch import target
from fastdeploy.models import load_model
from fastdeploy.models.decoder import Decoder
from fastdeploy.sampling_params import SamplingParams, sampling_defaults
from tests.engine.fake_model import Overlapping
from tests.engine.lazy_device import LazyDevice, LazyRunner
from tests.models import reference
from tests.models.tiny import BIASED, TIED, UNTIED, checkpoint, random_tensors

MAX_MODEL_LEN = 320


def load(config=TIED, dtype="float32", device=None) -> Decoder:
    tensors, device = random_tensors(config), device or open_device()
    return load_model(checkpoint(config, tensors), device, dtype, MAX_MODEL_LEN, progress=False)


def new_runner(model: Decoder, cls: type[Runner] = Runner, **keywords) -> Runner:
    keywords = {"max_model_len": MAX_MODEL_LEN, "block_size": 16, "num_gpu_blocks_override": 200, **keywords}
    return cls(model, EngineConfig(model="tiny", **keywords).resolved(TIED.max_position_embeddings))


def new_request(length: int, seed: int = 0, max_tokens: int = 8, temperature: float = 0.0, **params) -> Request:
    prompt = np.random.default_rng(seed).integers(0, TIED.vocab_size, length).tolist()
    given = SamplingParams(temperature=temperature, top_p=0.9, max_tokens=max_tokens, seed=seed, **params)
    return Request(f"request {seed}", prompt, prompt, given.resolved(sampling_defaults({}), max_tokens, seed))


def serve(runner: Runner, requests: list[Request], max_num_batched_tokens: int = 2048) -> list[np.ndarray]:
    """Run the requests, all there from the start, to their end. Each one's logits, [samples, vocabulary]."""
    scheduler = Scheduler(runner.num_blocks, runner.block_size, runner.max_seqs, max_num_batched_tokens)
    logits: dict[Request, list[np.ndarray]] = {request: [] for request in requests}
    for request in requests:
        scheduler.add(request)
    while scheduler.has_requests:
        batch = scheduler.schedule()
        if not batch.items:
            continue
        output = runner.run(batch)
        rows = iter(runner.last_logits())
        for item, token in zip(batch.items, output.tokens, strict=True):
            assert (token is not None) == item.samples
            if token is not None:
                logits[item.request].append(next(rows))
        scheduler.update(batch, output)
    assert all(request.error_code == 200 for request in requests), [request.error_msg for request in requests]
    return [np.array(rows) for rows in logits.values()]


def several(**keywords) -> list[Request]:
    lengths = (40, 3, 17, 64, 1, 90, 33, 16)
    return [new_request(length, seed, max_tokens=6 + 3 * seed, **keywords) for seed, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def biased_runner() -> Runner:
    return new_runner(load(BIASED, "bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_tokens_of_a_batch_are_the_reference_decoders(dtype):
    requests = several()
    serve(new_runner(load(UNTIED, dtype)), requests)
    tensors = random_tensors(UNTIED)
    for request in requests:
        length = len(request.prompt_token_ids)
        logits = reference.logits(UNTIED, tensors, dtype, request.token_ids)[length - 1 : -1]
        chosen = logits[np.arange(len(logits)), request.token_ids[length:]]
        assert (chosen >= logits.max(axis=1) - (1e-4 if dtype == "float32" else 0.1)).all()


def test_logits_alone_and_in_a_batch_have_the_same_bits(biased_runner):
    together = several()
    in_batch = serve(biased_runner, together)
    for request, logits in zip(several(), in_batch, strict=True):
        np.testing.assert_array_equal(serve(biased_runner, [request])[0], logits)


@pytest.mark.parametrize("budget", [8, 13, 50])
def test_logits_of_prompts_cut_into_chunks_have_the_same_bits(biased_runner, budget):
    whole = serve(biased_runner, several())
    for chunked, logits in zip(serve(biased_runner, several(), budget), whole, strict=True):
        np.testing.assert_array_equal(chunked, logits)


def growing() -> list[Request]:
    return [new_request(length, seed, max_tokens=50) for seed, length in enumerate((14, 30, 3))]


def test_logits_after_preemptions_have_the_same_bits(biased_runner):
    undisturbed, requests = serve(biased_runner, growing()), growing()
    disturbed = serve(new_runner(biased_runner.model, num_gpu_blocks_override=8), requests)
    assert sum(request.metrics.preempted_count for request in requests) > 0
    for logits, expected in zip(disturbed, undisturbed, strict=True):
        np.testing.assert_array_equal(logits, expected)


def test_contexts_past_a_split_of_attention_have_the_same_bits_alone_and_in_a_batch(biased_runner):
    def long_and_short():
        return [new_request(length, length, max_tokens=20) for length in (250, 5, 262)]

    in_batch = serve(biased_runner, long_and_short())
    for request, logits in zip(long_and_short(), in_batch, strict=True):
        np.testing.assert_array_equal(serve(biased_runner, [request])[0], logits)


@pytest.fixture(scope="module")
def int8_runner(biased_runner) -> Runner:
    return new_runner(biased_runner.model, kv_cache_dtype="int8")


def test_logits_with_an_int8_cache_have_the_same_bits_alone_in_chunks_and_after_preemptions(int8_runner):
    in_batch = serve(int8_runner, growing())
    for request, logits in zip(growing(), in_batch, strict=True):
        np.testing.assert_array_equal(serve(int8_runner, [request], 13)[0], logits)
    requests = growing()
    disturbed = serve(new_runner(int8_runner.model, num_gpu_blocks_override=8, kv_cache_dtype="int8"), requests)
    assert sum(request.metrics.preempted_count for request in requests) > 0
    for logits, expected in zip(disturbed, in_batch, strict=True):
        np.testing.assert_array_equal(logits, expected)


def serve_overlapping(runner: Runner, requests: list[Request], budget: int = 2048) -> Scheduler:
    """As `serve`, each step launched before the tokens of the one before are known, where that can be."""
    scheduler = Scheduler(runner.num_blocks, runner.block_size, runner.max_seqs, budget)
    for request in requests:
        scheduler.add(request)
    steps = Overlapping(scheduler, runner)
    while scheduler.has_requests:
        steps.step()
    assert steps.num_ahead > 0.5 * scheduler.statistics.num_steps
    return scheduler


@pytest.mark.parametrize(
    "limits", [{}, {"num_gpu_blocks_override": 22}, {"enforce_eager": True}, {"kv_cache_dtype": "int8"}]
)
@pytest.mark.parametrize("device", [CPUDevice, LazyDevice])
def test_overlapping_steps_say_the_same_as_others(limits, device):
    """Greedy and drawn; ends by stop tokens and by length; in chunks; with blocks that are short and shared."""

    def some():
        stops = list(range(0, TIED.vocab_size, 4))
        drawn = [new_request(5 + seed, seed, 40, 9.0, stop_token_ids=stops, min_tokens=4 * seed) for seed in range(9)]
        again = [new_request(40, 3, 12), new_request(40, 3, 30), new_request(250, 4, 25)]
        growing = [new_request(3, 20 + index, 100) for index in range(4)]
        return [*growing, *several(), *drawn, *again]

    alone, overlapping = some(), some()
    serve(new_runner(load(BIASED, "bfloat16"), **limits), alone, 77)
    model = load(BIASED, "bfloat16", device())
    runner = new_runner(model, LazyRunner if device is LazyDevice else Runner, overlap_steps=True, **limits)
    scheduler = serve_overlapping(runner, overlapping, 77)
    assert [request.token_ids for request in overlapping] == [request.token_ids for request in alone]
    assert (scheduler.statistics.num_preemptions > 0) == ("num_gpu_blocks_override" in limits)
    assert {request.finish_reason for request in overlapping} == {"stop", "length"}


@pytest.fixture(scope="module")
def lazy_runner() -> Runner:
    model = load(BIASED, "bfloat16", LazyDevice())
    return new_runner(model, LazyRunner, overlap_steps=True, num_gpu_blocks_override=30, max_num_seqs=6)


def test_a_step_is_launched_without_anything_being_computed(lazy_runner):
    scheduler = Scheduler(30, 16, 6, 100)
    scheduler.add(new_request(5, 1, max_tokens=3))
    batch = scheduler.schedule()
    first, second = lazy_runner.launch(batch), lazy_runner.launch(scheduler.ahead(batch))
    assert lazy_runner.device.stream
    tokens = first().tokens + second().tokens
    serve(new_runner(load(BIASED, "bfloat16")), [alone := new_request(5, 1, max_tokens=3)])
    assert tokens == alone.token_ids[5:7]


@pytest.mark.parametrize("seed", range(8))
def test_calls_that_are_left_interrupted_or_late_change_no_token_of_others(lazy_runner, biased_runner, seed):
    """Steps in flight meanwhile; what they write goes to blocks that others have by then."""
    rng = random.Random(seed)
    engine = Engine(Scheduler(30, 16, 6, 64), lazy_runner, overlap=True)
    outer = [new_request(5 + 20 * index, 100 + index, 60, 1.3 * index) for index in range(3)]
    stream = engine.run(outer)
    next(stream)
    for _ in range(6):
        stops = list(range(0, TIED.vocab_size, 7))
        inner = [new_request(rng.randint(1, 40), rng.randint(0, 9), 20, 2.0, stop_token_ids=stops) for _ in range(4)]
        steps, ends = engine.run(inner), rng.choice(["read", "left", "interrupted"])
        with pytest.MonkeyPatch.context() as patch:
            if ends == "interrupted":
                launch, countdown = lazy_runner.launch, iter(range(rng.randint(1, 6), -1, -1))

                def interrupting(batch, launch=launch, countdown=countdown):
                    output = launch(batch)
                    if next(countdown) == 0:
                        raise KeyboardInterrupt
                    return output

                patch.setattr(lazy_runner, "launch", interrupting)
            with contextlib.suppress(KeyboardInterrupt):
                for number, _ in enumerate(steps):
                    engine.scheduler.check_integrity()
                    if ends == "left" and number == 5:
                        break
            steps.close()
        if not all(request.finished for request in outer):
            next(stream)
    list(stream)
    alone = [new_request(5 + 20 * index, 100 + index, 60, 1.3 * index) for index in range(3)]
    serve(biased_runner, alone)
    assert [request.token_ids for request in outer] == [request.token_ids for request in alone]
    assert not engine.scheduler.has_requests and engine.scheduler.blocks.num_free == 30


def test_a_row_without_numbers_fails_alone_in_overlapping_steps():
    """It said the token whose embedding is NaN, and the step after it was launched before that was known."""
    tensors = random_tensors(UNTIED)
    requests = [new_request(5, seed, 12) for seed in range(4)]
    model = load_model(checkpoint(UNTIED, tensors), open_device(), "float32", MAX_MODEL_LEN, progress=False)
    serve(new_runner(model), requests)
    outputs = [request.token_ids[5:] for request in requests]
    said = {token for request in requests for token in request.token_ids}
    poison = next(token for token in outputs[1][:-3] if sum(token in request.token_ids for request in requests) == 1)
    assert poison in said
    tensors["model.embed_tokens.weight"][poison] = np.nan
    model = load_model(checkpoint(UNTIED, tensors), open_device(), "float32", MAX_MODEL_LEN, progress=False)
    again = [new_request(5, seed, 12) for seed in range(4)]
    serve_overlapping(new_runner(model, overlap_steps=True), again)
    assert [request.error_code for request in again] == [200, 500, 200, 200]
    assert again[1].token_ids == requests[1].token_ids[: len(again[1].token_ids)] and again[1].token_ids[-1] == poison
    assert [again[i].token_ids for i in (0, 2, 3)] == [requests[i].token_ids for i in (0, 2, 3)]


class Coarse(CPUDevice):
    """Records steps of few sizes only, as a GPU does."""

    def plan_sizes(self, most):
        return [2, 5, most]


def test_padded_steps_have_the_bits_of_others(biased_runner):
    """Past a split of attention, too; and a row of padding leaves every slot of the cache as it was."""

    def some():
        return [*several(temperature=1.3), new_request(250, 8, max_tokens=20)]

    unpadded, padded = some(), some()
    expected = serve(biased_runner, unpadded)
    runner = new_runner(load(BIASED, "bfloat16", Coarse()))
    for logits, wanted in zip(serve(runner, padded), expected, strict=True):
        np.testing.assert_array_equal(logits, wanted)
    assert [request.token_ids for request in padded] == [request.token_ids for request in unpadded]
    assert {size for size, _ in runner._plans} == {2, 5, 8}


def test_decodes_that_keep_the_processor_busy_have_one_plan_for_all_contexts(monkeypatch):
    runner = new_runner(load(), max_num_seqs=2)
    serve(runner, [new_request(250, 1, 20), new_request(250, 2, 20)])
    busy = target().parallelism * 4 <= 2 * TIED.num_kv_heads
    assert set(runner._plans) == ({(2, 1)} if busy else {(2, 1), (2, 2)})
    monkeypatch.setattr("fastdeploy.engine.runner.splits_in_parallel", lambda *_: False)
    runner = new_runner(runner.model, max_num_seqs=2)
    serve(runner, [new_request(250, 1, 20), new_request(250, 2, 20)])
    assert set(runner._plans) == {(2, 1)}


def test_all_plans_of_a_gpu_are_recorded_when_the_runner_is_made(caplog):
    device = Coarse()
    device.name = "pocket GPU"
    model = load(TIED, device=device)
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        runner = new_runner(model)
    assert {size for size, _ in runner._plans} == {2, 5, 8} and list(runner._sampler._plans) == [8, 5, 2]
    assert f"{len(runner._plans)} decode steps recorded" in caplog.messages
    recorded, requests = dict(runner._plans), several()
    expected = serve(new_runner(load()), several())
    for logits, wanted in zip(serve(runner, requests), expected, strict=True):
        np.testing.assert_array_equal(logits, wanted)
    assert runner._plans == recorded
    assert new_runner(model, enforce_eager=True)._plans == {}


class Unrecorded(Runner):
    """Launches decode steps one kernel at a time."""

    def replay_decode(self, num_seqs: int, num_splits: int) -> None:
        self._decode(num_seqs, num_splits)


def test_recorded_steps_have_the_bits_of_direct_launches():
    model = load(TIED, "bfloat16")
    config = EngineConfig(model="tiny", max_model_len=MAX_MODEL_LEN, block_size=16).resolved(2048)
    recorded, direct = serve(Runner(model, config), several()), serve(Unrecorded(model, config), several())
    for logits, expected in zip(recorded, direct, strict=True):
        np.testing.assert_array_equal(logits, expected)


def test_a_recorded_step_is_recorded_once_and_reads_new_inputs_each_time():
    runner = new_runner(load())
    first, second = new_request(5, 1), new_request(9, 2)
    logits = [serve(runner, [request])[0] for request in (first, second)]
    plans = dict(runner._plans)
    again = [serve(runner, [request])[0] for request in (new_request(5, 1), new_request(9, 2))]
    assert runner._plans == plans and len(plans) == 1
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(logits))


def test_seeded_draws_are_the_same_alone_and_in_a_batch(biased_runner):
    together = several(temperature=1.3)
    serve(biased_runner, together)
    assert len({tuple(request.token_ids) for request in together}) == len(together)
    for request, expected in zip(several(temperature=1.3), together, strict=True):
        serve(biased_runner, [request])
        assert request.token_ids == expected.token_ids


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "int8"])
def test_a_row_without_numbers_fails_alone(kv_cache_dtype):
    tensors = random_tensors(UNTIED)
    tensors["model.embed_tokens.weight"][7] = np.nan
    model = load_model(checkpoint(UNTIED, tensors), open_device(), "float32", MAX_MODEL_LEN, progress=False)
    runner = new_runner(model, kv_cache_dtype=kv_cache_dtype)
    scheduler = Scheduler(runner.num_blocks, runner.block_size, runner.max_seqs, 2048)
    for prompt in ([1, 2, 3], [4, 7, 5], [6]):
        params = SamplingParams(temperature=0.0, max_tokens=4, seed=0).resolved(sampling_defaults({}), 4, seed=0)
        scheduler.add(Request("", prompt, prompt, params))
    batch = scheduler.schedule()
    failed = [token == -1 for token in runner.run(batch).tokens]
    assert failed == [7 in item.request.token_ids for item in batch.items]


# Logprobs


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("number", [0, 3, 130, -1])
def test_logprobs_are_those_of_the_logits_that_the_token_came_from(biased_runner, number):
    """Of the model's own logits, whatever bias and penalties made of them: -1 is the whole vocabulary of 131."""
    requests = several(temperature=1.0, logprobs=number, logit_bias={5: 3.0}, frequency_penalty=1.0)
    for request, logits in zip(requests, serve(biased_runner, requests), strict=True):
        output = request.token_ids[len(request.prompt_token_ids) :]
        assert [each.token_id for each in request.logprobs] == output
        for each, expected, row in zip(request.logprobs, log_softmax(logits), logits, strict=True):
            order = np.argsort(-row, kind="stable")
            assert each.rank == list(order).index(each.token_id) + 1
            assert list(each.top_ids) == order[: number if number >= 0 else None].tolist()
            np.testing.assert_allclose(each.logprob, expected[each.token_id], atol=1e-5)
            np.testing.assert_allclose(each.top_logprobs, expected[each.top_ids], atol=1e-5)


def test_requests_without_logprobs_get_none_beside_one_that_wants_them(biased_runner):
    requests = [*several(), new_request(9, 9, logprobs=2)]
    serve(biased_runner, requests)
    assert [len(request.logprobs) for request in requests] == [0] * 8 + [8]


def test_prompt_logprobs_are_those_of_the_reference_decoder():
    """150 tokens: more than two slabs."""
    request = new_request(150, prompt_logprobs=2)
    serve(new_runner(load(UNTIED)), [request])
    expected = log_softmax(reference.logits(UNTIED, random_tensors(UNTIED), "float32", request.prompt_token_ids))
    assert [each.token_id for each in request.prompt_logprobs] == request.prompt_token_ids[1:]
    for each, row in zip(request.prompt_logprobs, expected[:-1], strict=True):
        np.testing.assert_allclose(each.logprob, row[each.token_id], atol=1e-3)
        np.testing.assert_allclose(each.top_logprobs, np.sort(row)[::-1][:2], atol=1e-3)


def test_prompt_logprobs_of_a_long_prompt_take_no_more_logits_than_a_slab():
    runner = new_runner(load(), max_num_seqs=2)
    serve(runner, [new_request(300, prompt_logprobs=2)])
    assert tuple(runner._logits.shape) == (SLAB, TIED.vocab_size)


@pytest.mark.parametrize(("budget", "blocks"), [(8, 200), (50, 200), (77, 12), (2048, 12)])
def test_prompt_logprobs_have_the_same_bits_whole_in_chunks_and_after_preemptions(biased_runner, budget, blocks):
    def some():
        return [new_request(length, seed, 40, prompt_logprobs=seed) for seed, length in enumerate((70, 1, 2, 66))]

    whole, requests = some(), some()
    serve(biased_runner, whole)
    serve(new_runner(biased_runner.model, num_gpu_blocks_override=blocks), requests, budget)
    assert blocks == 200 or sum(request.metrics.preempted_count for request in requests) > 0
    for request, expected in zip(requests, whole, strict=True):
        assert len(request.prompt_logprobs) == len(request.prompt_token_ids) - 1
        for found, wanted in zip(request.prompt_logprobs, expected.prompt_logprobs, strict=True):
            assert found[:3] == wanted[:3]
            np.testing.assert_array_equal(found.top_ids, wanted.top_ids)
            np.testing.assert_array_equal(found.top_logprobs, wanted.top_logprobs)


# The size of the KV cache


def test_blocks_are_enough_for_all_sequences_of_full_length():
    runner = new_runner(load(), num_gpu_blocks_override=None, max_num_seqs=3)
    assert runner.num_blocks == 3 * MAX_MODEL_LEN // 16


def test_blocks_take_no_more_than_the_devices_budget(monkeypatch):
    model = load()
    monkeypatch.setattr(model.device, "cache_budget", lambda utilization: 21 * model.cache_bytes_per_block(16) + 1)
    assert new_runner(model, num_gpu_blocks_override=None).num_blocks == 21


def test_a_budget_holds_more_blocks_of_int8(monkeypatch):
    """Heads of 8: 12 bytes a token in int8, 32 in float32."""
    model = load()
    monkeypatch.setattr(
        model.device, "cache_budget", lambda utilization: 60 * 12 * model.cache_bytes_per_block(16) // 32
    )
    assert new_runner(model, num_gpu_blocks_override=None, kv_cache_dtype="int8").num_blocks == 60
    config = EngineConfig(model="tiny", block_size=16, kv_cache_dtype="int8").resolved(model_limit=2048)
    assert fit_to_memory(model, config).max_model_len == 60 * 16


def test_a_budget_below_one_full_sequence_is_an_error_that_names_the_length_that_fits(monkeypatch):
    model = load()
    monkeypatch.setattr(model.device, "cache_budget", lambda utilization: 19 * model.cache_bytes_per_block(16))
    with pytest.raises(ValueError, match=r"max_model_len=320 .* lower max_model_len to at most 304"):
        new_runner(model, num_gpu_blocks_override=None)


def test_the_longest_sequence_is_what_the_budget_or_the_override_holds(monkeypatch, caplog):
    model = load()
    monkeypatch.setattr(model.device, "cache_budget", lambda utilization: 19 * model.cache_bytes_per_block(16))
    config = EngineConfig(model="tiny", block_size=16).resolved(model_limit=320)
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        assert fit_to_memory(model, config).max_model_len == 304
        assert fit_to_memory(model, replace(config, num_gpu_blocks_override=3)).max_model_len == 48
        assert caplog.messages == [
            f"max_model_len is {n}, not 320: the KV cache has room for no more" for n in (304, 48)
        ]
        assert fit_to_memory(model, replace(config, max_model_len=304)).max_model_len == 304
        assert fit_to_memory(model, replace(config, num_gpu_blocks_override=20)).max_model_len == 320
        assert len(caplog.messages) == 2


def test_the_cache_and_the_longest_sequence_get_what_a_steps_memory_has_left(monkeypatch):
    model = load()
    free = [40 * model.cache_bytes_per_block(16)]
    allocate = model.allocate_activations

    def taking(*lengths):
        free[0] = 19 * model.cache_bytes_per_block(16)
        return allocate(*lengths)

    monkeypatch.setattr(model, "allocate_activations", taking)
    monkeypatch.setattr(model.device, "cache_budget", lambda utilization: free[0])
    runner = Runner(model, EngineConfig(model="tiny", block_size=16).resolved(MAX_MODEL_LEN), fit=True)
    assert (runner.num_blocks, runner.config.max_model_len) == (19, 304)


def test_an_override_that_does_not_fit_is_an_error_that_names_how_many_do(monkeypatch):
    model = load()
    monkeypatch.setattr(model.device, "free_memory", lambda: 50 * model.cache_bytes_per_block(16))
    with pytest.raises(ValueError, match=r"num_gpu_blocks_override=51 .* at most 50 blocks fit"):
        new_runner(model, num_gpu_blocks_override=51)
    assert new_runner(model, num_gpu_blocks_override=50).num_blocks == 50


def test_a_step_that_does_not_fit_is_an_error_that_names_the_keywords(monkeypatch):
    def refuse(*sizes):
        raise MemoryError("ResourceExhausted")

    model = load()
    monkeypatch.setattr(model, "allocate_activations", refuse)
    with pytest.raises(MemoryError, match="a step of 2048 tokens and 8 sequences: lower max_num_batched_tokens or"):
        new_runner(model)


def test_an_override_below_one_full_sequence_is_the_users_choice():
    assert new_runner(load(), num_gpu_blocks_override=1).num_blocks == 1
