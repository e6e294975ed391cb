"""The scheduler without a model: thousands of steps, blocks checked by a memory that knows what was written there."""

import random

import pytest

from fastdeploy.engine.request import INTERNAL_ERROR, UNSERVABLE, Request, TokenLogprobs
from fastdeploy.engine.scheduler import BlockManager, Scheduler, StepOutput
from tests.engine.fake_model import FakeRunner, Overlapping, expected_tokens, make_request, run_all, step


@pytest.mark.parametrize("seed", range(150))
def test_random_load_ends_with_the_right_tokens_and_no_block_lost(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 8, 64])
    num_blocks = rng.choice([1, 2, 3, 5, 10, 40])
    max_num_seqs = rng.choice([1, 2, 3, 8, 32])
    scheduler = Scheduler(num_blocks, block_size, max_num_seqs, rng.choice([1, 2, 5, 16, 100, 1000]))
    runner = FakeRunner(block_size)
    longest = max(1, num_blocks * block_size * rng.choice([1, 2, 3]) // 3)
    longest = min(longest, 500)
    requests = [
        make_request(str(index), rng.randint(1, longest), rng.randint(1, max(1, longest // 2))) for index in range(40)
    ]
    to_come = list(reversed(requests))
    started: dict[Request, None] = {}
    aborted = set()
    num_steps = 0
    while to_come or scheduler.has_requests:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if to_come:
                scheduler.add(to_come.pop())
        batch = step(scheduler, runner)
        started.update(dict.fromkeys(sorted((item.request for item in batch.items), key=requests.index)))
        if rng.random() < 0.02 and (live := [*scheduler.running, *scheduler.waiting]):
            aborted.add(victim := rng.choice(live))
            scheduler.abort(victim)
            scheduler.check_integrity()
        num_steps += 1
        assert num_steps < 50_000, "the scheduler does not come to an end"
    assert scheduler.blocks.num_free == num_blocks
    assert list(started) == sorted(started, key=requests.index), "first come, first served"
    for request in set(requests) - aborted:
        expected = expected_tokens(request)
        if request.finish_reason == "length":
            assert request.token_ids == expected
        else:
            assert request.finish_reason == "error" and request.error_code == UNSERVABLE and request.error_msg
            assert len(request.token_ids) > num_blocks * block_size
            assert request.token_ids == expected[: len(request.token_ids)]


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_blocks_for_exactly_one_request(max_tokens: int) -> None:
    """Four blocks of two hold eight tokens: the last token sampled needs no place, the one before it does."""
    scheduler, runner = Scheduler(4, 2, max_num_seqs=8, max_num_batched_tokens=3), FakeRunner(2)
    requests = [make_request(str(index), 9 - max_tokens, max_tokens) for index in range(3)]
    for request in requests:
        scheduler.add(request)
    list(run_all(scheduler, runner))
    assert [request.token_ids for request in requests] == [expected_tokens(request) for request in requests]


def test_a_request_that_never_fits_fails_alone() -> None:
    scheduler, runner = Scheduler(4, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    prompt_too_long, outgrows, fits = make_request("a", 9, 1), make_request("b", 4, 20), make_request("c", 3, 4)
    for request in (prompt_too_long, outgrows, fits):
        scheduler.add(request)
    list(run_all(scheduler, runner))
    assert (prompt_too_long.finish_reason, prompt_too_long.error_code) == ("error", UNSERVABLE)
    assert "9 tokens" in str(prompt_too_long.error_msg) and "num_gpu_blocks_override" in str(prompt_too_long.error_msg)
    assert (outgrows.finish_reason, len(outgrows.token_ids)) == ("error", 9)
    assert fits.token_ids == expected_tokens(fits)


def test_decodes_share_a_step_with_prefill_chunks() -> None:
    scheduler, runner = Scheduler(100, 4, max_num_seqs=8, max_num_batched_tokens=10), FakeRunner(4)
    short, long = make_request("short", 2, 9), make_request("long", 25, 2)
    scheduler.add(short)
    step(scheduler, runner)
    scheduler.add(long)
    shapes = [[(item.request.request_id, item.num_tokens) for item in step(scheduler, runner).items] for _ in range(4)]
    chunks = [[("short", 1), ("long", size)] for size in (9, 9, 7)]
    assert shapes == [*chunks, [("short", 1), ("long", 1)]]


def test_the_youngest_is_preempted_and_continues_where_it_was() -> None:
    scheduler, runner = Scheduler(6, 2, max_num_seqs=2, max_num_batched_tokens=100), FakeRunner(2)
    old, young, third = make_request("old", 4, 8), make_request("young", 3, 6), make_request("third", 1, 1)
    for request in (old, young, third):
        scheduler.add(request)
    steps = [[item.request.request_id for item in batch.items] for batch in run_all(scheduler, runner)]
    assert (old.metrics.preempted_count, young.metrics.preempted_count) == (0, 1)
    while_young_waits = steps[next(i for i, names in enumerate(steps) if "young" not in names) :]
    back = next(i for i, names in enumerate(while_young_waits) if "young" in names)
    assert while_young_waits[:back] == [["old"]] * back, "nobody overtakes the preempted one"
    assert all(request.token_ids == expected_tokens(request) for request in (old, young, third))


def test_scarce_blocks_do_not_make_the_same_prompts_be_computed_over_and_over() -> None:
    rng = random.Random(0)
    scheduler, runner = Scheduler(100, 16, max_num_seqs=64, max_num_batched_tokens=512), FakeRunner(16)
    requests = [make_request(str(index), rng.randint(10, 100), rng.randint(10, 100)) for index in range(100)]
    for request in requests:
        scheduler.add(request)
    list(run_all(scheduler, runner))
    needed = sum(len(request.token_ids) - 1 for request in requests)
    assert sum(request.metrics.preempted_count for request in requests) > 0
    assert needed < runner.num_computed < 1.15 * needed


def test_a_budget_below_the_number_of_decodes_serves_the_oldest_first() -> None:
    scheduler, runner = Scheduler(100, 4, max_num_seqs=4, max_num_batched_tokens=2), FakeRunner(4)
    requests = [make_request(str(index), 1, 5) for index in range(4)]
    for request in requests:
        scheduler.add(request)
    served = [[item.request.request_id for item in batch.items] for batch in run_all(scheduler, runner)]
    assert served == [["0", "1"]] * 5 + [["2", "3"]] * 5


def test_a_failed_row_fails_its_request_alone() -> None:
    scheduler = Scheduler(10, 4, max_num_seqs=4, max_num_batched_tokens=100)
    bad, good = make_request("bad", 3, 5), make_request("good", 3, 1)
    scheduler.add(bad)
    scheduler.add(good)
    scheduler.update(scheduler.schedule(), StepOutput([-1, 7]))
    assert (bad.finish_reason, bad.error_code, bad.token_ids) == ("error", INTERNAL_ERROR, bad.prompt_token_ids)
    assert (good.finish_reason, good.token_ids) == ("length", [*good.prompt_token_ids, 7])
    assert not scheduler.has_requests and scheduler.blocks.num_free == 10


def test_a_request_whose_every_token_is_banned_is_told_so() -> None:
    scheduler = Scheduler(10, 4, max_num_seqs=4, max_num_batched_tokens=100)
    request = make_request("a", 3, 5)
    scheduler.add(request)
    scheduler.update(scheduler.schedule(), StepOutput([-2]))
    assert (request.finish_reason, request.error_code) == ("error", UNSERVABLE)
    assert "every token is banned" in str(request.error_msg) and "logit_bias" in str(request.error_msg)


def test_a_forced_token_that_the_model_does_not_have_fails_its_request_with_that() -> None:
    scheduler = Scheduler(10, 4, max_num_seqs=4, max_num_batched_tokens=100)
    request = make_request("a", 3, 5)
    scheduler.add(request)
    scheduler.update(scheduler.schedule(), StepOutput([-5]))
    assert (request.finish_reason, request.error_code) == ("error", INTERNAL_ERROR)
    assert "not in the model's vocabulary" in str(request.error_msg)


def test_logprobs_go_to_the_requests_they_belong_to() -> None:
    scheduler = Scheduler(10, 4, max_num_seqs=4, max_num_batched_tokens=100)
    plain, asking = make_request("plain", 3, 5), make_request("asking", 3, 5, logprobs=1, prompt_logprobs=1)
    scheduler.add(plain)
    scheduler.add(asking)
    of_token, of_prompt = (TokenLogprobs(token, -1.0, 1, [token], [-1.0]) for token in (7, 8))
    scheduler.update(scheduler.schedule(), StepOutput([5, 7], {1: of_token}, {1: [of_prompt, of_prompt]}))
    assert (plain.logprobs, plain.prompt_logprobs) == ([], [])
    assert (asking.logprobs, asking.prompt_logprobs) == ([of_token], [of_prompt, of_prompt])


def test_abort_frees_running_and_waiting_requests_and_ignores_strangers() -> None:
    scheduler, runner = Scheduler(10, 4, max_num_seqs=1, max_num_batched_tokens=100), FakeRunner(4)
    running, waiting, stranger = (make_request(name, 5, 5) for name in ("running", "waiting", "stranger"))
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler, runner)
    for request in (stranger, waiting, running, running):
        scheduler.abort(request)
        scheduler.check_integrity()
    assert not scheduler.has_requests and scheduler.blocks.num_free == 10


def test_restart_loses_no_token_whatever_state_it_finds() -> None:
    scheduler, runner = Scheduler(10, 2, max_num_seqs=3, max_num_batched_tokens=6), FakeRunner(2)
    requests = [make_request(str(index), 3 + index, 6) for index in range(4)]
    for request in requests:
        scheduler.add(request)
    for _ in range(3):
        step(scheduler, runner)
    scheduler.schedule()  # interrupted before update
    scheduler.running.pop()  # interrupted in the middle of a statement, as it were
    scheduler.restart(requests)
    scheduler.check_integrity()
    list(run_all(scheduler, runner))
    assert [request.token_ids for request in requests] == [expected_tokens(request) for request in requests]


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda blocks, table: table.append(table[0]),
        lambda blocks, table: table.pop(),
        lambda blocks, table: blocks.release(list(table)),
    ],
)
def test_check_integrity_finds_shared_lost_and_freed_blocks(corrupt) -> None:
    blocks, table = BlockManager(4, 2), []
    assert blocks.grow(table, 4)
    blocks.check_integrity([(table, [1, 2, 3, 4], 4)])
    corrupt(blocks, table)
    with pytest.raises(RuntimeError, match="KV blocks"):
        blocks.check_integrity([(table, [1, 2, 3, 4], 4)])


def test_grow_takes_all_blocks_or_none() -> None:
    blocks, table = BlockManager(3, 2), []
    assert not blocks.grow(table, 7)
    assert table == [] and blocks.num_free == 3
    assert blocks.grow(table, 5) and len(table) == 3
    assert blocks.grow(table, 6) and len(table) == 3


# Steps ahead


@pytest.mark.parametrize("seed", range(150))
def test_random_load_in_overlapping_steps_ends_with_the_right_tokens_and_no_block_lost(seed: int) -> None:
    """Stop tokens, lengths, late arrivals, aborts, few blocks, shared prefixes, logits that are no numbers."""
    rng = random.Random(seed)
    block_size, num_blocks = rng.choice([1, 2, 3, 8]), rng.choice([2, 5, 10, 40, 100])
    scheduler = Scheduler(num_blocks, block_size, rng.choice([1, 3, 8, 32]), rng.choice([1, 5, 16, 100, 1000]))
    runner = FakeRunner(block_size)
    steps = Overlapping(scheduler, runner)
    longest = min(max(1, num_blocks * block_size * rng.choice([1, 2, 3]) // 3), 60)
    common = [rng.randrange(1000) for _ in range(longest)]
    requests = []
    for index in range(40):
        prompt = common[: rng.randint(0, longest)] + [rng.randrange(3) for _ in range(rng.randint(1, 3))]
        params = {"stop_token_ids": list(range(0, 1000, 20))} if rng.random() < 0.5 else {}
        params |= {"frequency_penalty": 1.0} if rng.random() < 0.03 else {}
        requests.append(make_request(str(index), prompt, rng.randint(1, max(1, longest // 2)), **params))
    runner.faulty.update(request for request in requests if rng.random() < 0.03)
    to_come, aborted = list(reversed(requests)), set()
    for _ in range(50_000):
        for request in to_come[len(to_come) - min(rng.choice([0, 0, 1, 3]), len(to_come)) :]:
            scheduler.add(request)
            to_come.remove(request)
        if not to_come and not scheduler.has_requests:
            break
        steps.step()
        if rng.random() < 0.05 and (live := [*scheduler.running, *scheduler.waiting]):
            aborted.add(victim := rng.choice(live))
            scheduler.abort(victim)
            scheduler.check_integrity()
            if scheduler.pending is None:
                steps.flight = None
    assert not scheduler.has_requests and scheduler.pending is None, "the scheduler does not come to an end"
    assert scheduler.blocks.num_free == num_blocks
    for request in set(requests) - aborted:
        expected = expected_tokens(request)
        if request.error_code == INTERNAL_ERROR:  # no numbers, its own or of a prefix that it shares
            assert runner.faulty
        elif request.finish_reason == "error":
            assert len(request.token_ids) > num_blocks * block_size
        else:
            assert request.token_ids == expected
        assert request.token_ids == expected[: len(request.token_ids)]


def served(overlap: bool, **limits: int) -> tuple[list[list[int]], Scheduler, int]:
    """What 30 requests say, who served them, and how many steps were launched ahead."""
    scheduler, runner = Scheduler(limits.get("blocks", 200), 4, limits.get("seqs", 8), 100), FakeRunner(4)
    stops = list(range(0, 1000, 20))
    requests = [make_request(str(index), 3 + index % 7, 5 + index, stop_token_ids=stops) for index in range(30)]
    for request in requests:
        scheduler.add(request)
    steps = Overlapping(scheduler, runner)
    while scheduler.has_requests:
        if overlap:
            steps.step()
        else:
            step(scheduler, runner)
    return [request.token_ids for request in requests], scheduler, steps.num_ahead


@pytest.mark.parametrize("limits", [{}, {"seqs": 40}, {"blocks": 20}])
def test_overlapping_steps_say_and_count_the_same_as_others(limits) -> None:
    """Dropped items count as not served."""
    tokens, scheduler, _ = served(False, **limits)
    its_tokens, overlapping, num_ahead = served(True, **limits)
    found, expected = overlapping.statistics, scheduler.statistics
    assert its_tokens == tokens
    assert found.num_prompt_tokens == expected.num_prompt_tokens and found.blocks_in_use == expected.blocks_in_use == 0
    if not found.num_preemptions:
        assert found.num_served == expected.num_served
        assert num_ahead > 0.8 * found.num_steps


def test_a_step_ahead_leaves_out_whose_last_token_is_being_computed_and_admits_in_its_place() -> None:
    scheduler, runner = Scheduler(20, 4, max_num_seqs=2, max_num_batched_tokens=100), FakeRunner(4)
    for name, max_tokens in {"a": 2, "b": 9, "c": 9}.items():
        scheduler.add(make_request(name, 3, max_tokens))
    steps = Overlapping(scheduler, runner)
    names = [[item.request.request_id for item in steps.step().items] for _ in range(4)]
    assert names == [["a", "b"], ["a", "b"], ["b", "c"], ["b", "c"]] and steps.num_ahead == 4


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 1}, {"prompt_logprobs": 1}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1},
        {"logits_processors": [lambda token_ids, row: row]},
    ],
)  # fmt: skip
def test_no_step_is_ahead_of_tokens_that_it_depends_on(params) -> None:
    scheduler, runner = Scheduler(20, 4, max_num_seqs=2, max_num_batched_tokens=100), FakeRunner(4)
    plain, special = make_request("plain", 3, 9), make_request("special", 3, 2, **params)
    scheduler.add(plain)
    steps = Overlapping(scheduler, runner)
    steps.step()
    assert scheduler.pending
    scheduler.add(special)
    steps.step()
    assert scheduler.pending is None, "it is to be admitted in the next step, which nobody foresees"
    assert [len(steps.step().items) for _ in range(2)] == [2, 2] and scheduler.pending is None
    steps.step()
    assert scheduler.pending


def test_a_block_filled_ahead_is_found_only_when_its_tokens_are_known() -> None:
    scheduler, runner = Scheduler(20, 2, max_num_seqs=2, max_num_batched_tokens=100), FakeRunner(2)
    request = make_request("a", 2, 5)
    scheduler.add(request)
    steps = Overlapping(scheduler, runner)
    found = []
    for _ in range(4):
        steps.step()
        found.append((len(request.token_ids), len(scheduler.blocks.find(expected_tokens(request)))))
    assert found == [(3, 1), (4, 2), (5, 2), (6, 3)], "computed is one token more than known"
