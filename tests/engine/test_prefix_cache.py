"""The prefix cache without a model: what is found, what is evicted, and that nobody reads what isn't his prefix."""

import random
from collections.abc import Callable

import pytest

from fastdeploy.engine.request import INTERNAL_ERROR, UNSERVABLE, Request
from fastdeploy.engine.scheduler import BlockManager, Scheduler, StepOutput
from tests.engine.fake_model import FakeRunner, expected_tokens, make_request, run_all, step


def serve(scheduler: Scheduler, runner: FakeRunner, *requests: Request) -> None:
    """Queue the requests and run them to their ends."""
    for request in requests:
        scheduler.add(request)
    list(run_all(scheduler, runner))


def assert_complete(*requests: Request) -> None:
    for request in requests:
        assert request.finish_reason == "length"
        assert request.token_ids == expected_tokens(request)


def prompt_of(length: int, *ending: int) -> list[int]:
    return [*range(length), *ending]


# What is found


def test_prompts_of_the_same_step_share() -> None:
    scheduler, runner = Scheduler(20, 4, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(4)
    first, second = make_request("first", prompt_of(8, 50), 3), make_request("second", prompt_of(8, 60, 61), 3)
    scheduler.add(first)
    scheduler.add(second)
    batch = step(scheduler, runner)
    assert [(item.start, item.num_tokens) for item in batch.items] == [(0, 9), (8, 2)]
    assert first.block_table[:2] == second.block_table[:2] and first.block_table[2] != second.block_table[2]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    list(run_all(scheduler, runner))
    assert_complete(first, second)


def test_a_prompt_shares_what_an_unfinished_request_has_generated() -> None:
    scheduler, runner = Scheduler(20, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    first = make_request("first", 3, 9)
    scheduler.add(first)
    for _ in range(6):
        step(scheduler, runner)
    second = make_request("second", first.token_ids + [1, 2], 3)
    serve(scheduler, runner, second)
    assert second.num_cached_tokens == 8, "the ninth token was sampled, not computed"
    assert_complete(first, second)


def test_a_conversation_computes_only_what_is_new() -> None:
    scheduler, runner = Scheduler(40, 4, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(4)
    history: list[int] = []
    for turn in range(4):
        request = make_request(f"turn {turn}", history + [turn] * 5, 6)
        serve(scheduler, runner, request)
        assert_complete(request)
        assert request.num_cached_tokens == (len(history) - 1) // 4 * 4 if history else request.num_cached_tokens == 0
        history = request.token_ids


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12])
def test_the_last_token_of_a_known_prompt_is_computed_again(length: int) -> None:
    scheduler, runner = Scheduler(20, 4, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(4)
    first, again = make_request("first", prompt_of(length), 3), make_request("again", prompt_of(length), 3)
    serve(scheduler, runner, first)
    runner.num_computed = 0
    serve(scheduler, runner, again)
    cached = length - 1 if length % 4 == 0 else length // 4 * 4
    assert again.num_cached_tokens == cached
    assert runner.num_computed == length - cached + 2
    assert_complete(first, again)


def test_the_same_tokens_after_different_ones_are_not_the_same() -> None:
    scheduler, runner = Scheduler(20, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    first, other = make_request("first", [1, 2, 5, 6, 7], 2), make_request("other", [3, 4, 5, 6, 7], 2)
    shifted = make_request("shifted", [5, 6, 7], 2)
    serve(scheduler, runner, first)
    serve(scheduler, runner, other, shifted)
    assert other.num_cached_tokens == shifted.num_cached_tokens == 0
    assert_complete(first, other, shifted)


def test_blocks_filled_with_the_same_tokens_side_by_side_become_one() -> None:
    """nano-vllm #219: of two such blocks the first must stay known when the second goes."""
    scheduler, runner = Scheduler(20, 4, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(4)
    twins = [make_request(name, prompt_of(6), length) for name, length in (("first", 8), ("second", 3))]
    for request in twins:
        scheduler.add(request)
    step(scheduler, runner)
    assert twins[0].block_table[1] != twins[1].block_table[1], "not full yet"
    step(scheduler, runner)
    batch = scheduler.schedule()
    assert twins[0].block_table == twins[1].block_table and scheduler.blocks.num_free == 18
    scheduler.update(batch, runner.run(batch))
    assert twins[1].finished and not twins[0].finished
    list(run_all(scheduler, runner))
    follow_up = make_request("follow-up", [*twins[0].token_ids, 1], 2)
    serve(scheduler, runner, follow_up)
    assert follow_up.num_cached_tokens == 12
    assert_complete(*twins, follow_up)


def test_a_request_that_wants_prompt_logprobs_computes_its_whole_prompt_for_others_to_share() -> None:
    scheduler, runner = Scheduler(20, 4, max_num_seqs=8, max_num_batched_tokens=5), FakeRunner(4)
    first, asking = make_request("first", prompt_of(10), 2), make_request("asking", prompt_of(14), 2, prompt_logprobs=0)
    third = make_request("third", prompt_of(14), 2)
    serve(scheduler, runner, first)
    runner.num_computed = 0
    serve(scheduler, runner, asking)
    assert (asking.num_cached_tokens, runner.num_computed) == (0, 15)
    serve(scheduler, runner, third)
    assert third.num_cached_tokens == 12
    assert_complete(first, asking, third)


def test_without_prefix_caching_everything_is_computed() -> None:
    scheduler, runner = Scheduler(20, 4, 8, 100, enable_prefix_caching=False), FakeRunner(4)
    requests = [make_request(str(index), prompt_of(8), 6) for index in range(3)]
    serve(scheduler, runner, requests[0])
    serve(scheduler, runner, *requests[1:])
    assert runner.num_computed == 3 * 13
    assert [request.num_cached_tokens for request in requests] == [0, 0, 0]
    assert_complete(*requests)


# What is evicted


def cached(scheduler: Scheduler, token_ids: list[int]) -> int:
    """How many of these tokens a request would find."""
    return len(scheduler.blocks.find(token_ids)) * scheduler.blocks.block_size


def test_the_least_recently_used_goes_first_and_ends_go_before_beginnings() -> None:
    scheduler, runner = Scheduler(6, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    old, new = [10, 11, 12, 13], [20, 21, 22, 23]
    serve(scheduler, runner, make_request("old", old, 1))
    serve(scheduler, runner, make_request("new", new, 1))
    serve(scheduler, runner, make_request("old again", old, 1))  # now it is the newer
    left = []
    for index in range(5):
        left.append((cached(scheduler, old), cached(scheduler, new)))
        serve(scheduler, runner, make_request(str(index), [30 + index, 0], 1))
    # Two blocks were never used; what these five leave behind is younger than all the rest.
    assert left == [(4, 4), (4, 4), (4, 4), (4, 2), (4, 0)]
    assert (cached(scheduler, old), cached(scheduler, [30, 0])) == (2, 2)


def test_blocks_that_hold_nothing_of_use_are_taken_before_cached_ones() -> None:
    scheduler, runner = Scheduler(5, 4, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(4)
    serve(scheduler, runner, make_request("first", prompt_of(8), 1))
    for index in range(10):
        serve(scheduler, runner, make_request(str(index), [100 + index], 3))  # never fills a block
    assert cached(scheduler, prompt_of(8)) == 8


def test_a_shared_block_stays_when_one_of_its_owners_goes() -> None:
    scheduler, runner = Scheduler(6, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    short, long = make_request("short", prompt_of(4), 1), make_request("long", prompt_of(4, 9), 7)
    scheduler.add(short)
    scheduler.add(long)
    step(scheduler, runner)
    assert short.finished and len(long.block_table) == 3
    serve(scheduler, runner, make_request("other", [50, 51, 52, 53], 2))  # needs all blocks that are free
    assert_complete(short, long)


def test_who_shares_needs_fewer_free_blocks() -> None:
    """Five blocks each; there are seven: the one that second has for itself, and one for first to grow into."""
    scheduler, runner = Scheduler(7, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    first, second = make_request("first", prompt_of(8, 50), 2), make_request("second", prompt_of(8, 60), 2)
    scheduler.add(first)
    scheduler.add(second)
    assert len(step(scheduler, runner).items) == 2
    list(run_all(scheduler, runner))
    assert_complete(first, second)


def test_a_prompt_may_find_its_beginning_among_the_last_free_blocks() -> None:
    """To share an idle block and to need a further one are two blocks off the free ones."""
    scheduler, runner = Scheduler(4, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    serve(scheduler, runner, make_request("first", prompt_of(6), 1))
    longer = make_request("longer", prompt_of(6, 7), 2)
    serve(scheduler, runner, longer)
    assert longer.num_cached_tokens == 6
    assert_complete(longer)


def test_idle_blocks_are_counted_once_when_admitting() -> None:
    """The prompt's beginning takes two of three free blocks: with a third for itself none is left for `running`."""
    scheduler, runner = Scheduler(5, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    serve(scheduler, runner, make_request("first", prompt_of(4), 1))
    running, waiting = make_request("running", [50, 51, 52], 2), make_request("waiting", prompt_of(4, 9), 1)
    scheduler.add(running)
    scheduler.add(waiting)
    batch = step(scheduler, runner)
    assert [item.request for item in batch.items] == [running]
    list(run_all(scheduler, runner))
    assert waiting.num_cached_tokens == 4 and running.metrics.preempted_count == 0
    assert_complete(running, waiting)


# Trouble


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    """nano-vllm #211 loses count there. What it finds again is no part of num_cached_tokens."""
    scheduler, runner = Scheduler(6, 2, max_num_seqs=2, max_num_batched_tokens=100), FakeRunner(2)
    old, young = make_request("old", 4, 5), make_request("young", 3, 6)
    serve(scheduler, runner, old, young)
    assert (old.metrics.preempted_count, young.metrics.preempted_count) == (0, 1)
    total = len(old.token_ids) + len(young.token_ids) - 2
    assert total < runner.num_computed <= total + 2, "at most a block of young's was lost"
    assert old.num_cached_tokens == young.num_cached_tokens == 0
    assert_complete(old, young)


@pytest.mark.parametrize("budget", [1, 3, 100])
@pytest.mark.parametrize("max_num_seqs", [1, 8])
def test_equal_requests_with_blocks_for_exactly_one(budget: int, max_num_seqs: int) -> None:
    scheduler, runner = Scheduler(4, 4, max_num_seqs, budget), FakeRunner(4)
    requests = [make_request(str(index), prompt_of(9), 8) for index in range(5)]
    serve(scheduler, runner, *requests)
    assert_complete(*requests)
    assert [request.num_cached_tokens for request in requests] == [0, 8, 8, 8, 8]


def test_keys_that_are_no_numbers_are_not_inherited() -> None:
    scheduler, runner = Scheduler(20, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    bad, good = make_request("bad", prompt_of(6), 4), make_request("good", prompt_of(7), 4)
    runner.faulty.add(bad)
    serve(scheduler, runner, bad)
    assert (bad.finish_reason, bad.error_code) == ("error", INTERNAL_ERROR)
    serve(scheduler, runner, good)
    assert good.num_cached_tokens == 0
    assert_complete(good)


def test_a_block_taken_out_of_the_cache_stays_with_those_who_share_it() -> None:
    """What grows below it is not found either: its beginning may have been computed from the bad one."""
    scheduler, runner = Scheduler(20, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    bad, sharing, later = (make_request(name, prompt_of(5), 6) for name in ("bad", "sharing", "later"))
    scheduler.add(bad)
    scheduler.add(sharing)
    step(scheduler, runner)
    batch = scheduler.schedule()
    output = runner.run(batch)
    scheduler.update(batch, StepOutput([-1, output.tokens[1]]))
    scheduler.check_integrity()
    assert bad.finished and cached(scheduler, prompt_of(5)) == 0
    list(run_all(scheduler, runner))
    assert cached(scheduler, sharing.token_ids[6:]) == 0, "without what was before them they mean something else"
    serve(scheduler, runner, later)
    assert later.num_cached_tokens == 0
    assert_complete(sharing, later)
    assert cached(scheduler, later.token_ids) == 10


def test_a_request_that_banned_every_token_leaves_good_keys() -> None:
    scheduler = Scheduler(20, 2, max_num_seqs=8, max_num_batched_tokens=100)
    scheduler.add(make_request("banning", prompt_of(6), 4))
    scheduler.update(scheduler.schedule(), StepOutput([-2]))
    assert cached(scheduler, prompt_of(6)) == 6


def test_restart_forgets_what_may_never_have_been_computed() -> None:
    scheduler, runner = Scheduler(20, 2, max_num_seqs=8, max_num_batched_tokens=100), FakeRunner(2)
    first, second = make_request("first", prompt_of(6), 2), make_request("second", prompt_of(6), 2)
    scheduler.add(first)
    scheduler.schedule()  # the step fails
    scheduler.restart([first])
    assert cached(scheduler, prompt_of(6)) == 0
    serve(scheduler, runner, second)
    assert_complete(first, second)


def test_an_aborted_request_leaves_what_it_has_computed() -> None:
    scheduler, runner = Scheduler(20, 2, max_num_seqs=8, max_num_batched_tokens=4), FakeRunner(2)
    gone, next_one = make_request("gone", prompt_of(9), 4), make_request("next", prompt_of(9), 4)
    scheduler.add(gone)
    step(scheduler, runner)
    scheduler.abort(gone)
    serve(scheduler, runner, next_one)
    assert next_one.num_cached_tokens == 4
    assert_complete(next_one)


# Statistics


def test_statistics_add_up() -> None:
    scheduler, runner = Scheduler(6, 2, max_num_seqs=2, max_num_batched_tokens=100), FakeRunner(2)
    serve(scheduler, runner, make_request("old", prompt_of(4), 5), make_request("young", 3, 6))
    serve(scheduler, runner, make_request("again", prompt_of(3), 1))
    found = scheduler.statistics
    assert (found.num_prompt_tokens, found.num_cached_tokens, found.hit_rate) == (10, 2, 0.2)
    assert (found.num_preemptions, found.largest_batch) == (1, 2)
    assert (found.blocks_in_use, found.peak_blocks_in_use, found.num_blocks) == (0, 6, 6)
    assert found.mean_batch == found.num_served / found.num_steps
    assert f"{found.num_steps} steps" in found.describe() and "20.0% of 10 prompt tokens" in found.describe()


def test_statistics_stay_as_they_were_read() -> None:
    scheduler, runner = Scheduler(20, 2, max_num_seqs=2, max_num_batched_tokens=100), FakeRunner(2)
    scheduler.add(make_request("a", 4, 5))
    step(scheduler, runner)
    before = scheduler.statistics
    assert (before.blocks_in_use, before.num_steps) == (2, 1)
    list(run_all(scheduler, runner))
    assert (before.blocks_in_use, before.num_steps) == (2, 1)
    assert (scheduler.statistics.blocks_in_use, scheduler.statistics.num_steps) == (0, 5)


# Everything at once


def random_prompt(rng: random.Random, earlier: list[Request], longest: int) -> list[int]:
    """Often the beginning of what an earlier request has, its output included; then something new."""
    beginning: list[int] = []
    if earlier and rng.random() < 0.8:
        tokens = rng.choice(earlier[-20:]).token_ids
        beginning = tokens[: rng.choice([len(tokens), rng.randint(0, len(tokens))])]
    ending = [rng.randrange(3) for _ in range(rng.randint(0, 10))]
    return (beginning + ending)[:longest] or [0]


class Load:
    """1,000 requests that come, share, are aborted, crash and fail at random."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        block_size, num_blocks = rng.choice([1, 2, 4, 7]), rng.choice([4, 8, 20, 60])
        self.runner = FakeRunner(block_size)
        self.scheduler = Scheduler(num_blocks, block_size, rng.choice([1, 3, 16]), rng.choice([3, 10, 100]))
        self.longest = min(60, num_blocks * block_size)
        self.has_faults = seed % 2 == 1
        self.requests: list[Request] = []
        self.aborted: set[Request] = set()

    def run(self, num_requests: int) -> None:
        rng, scheduler = self.rng, self.scheduler
        while len(self.requests) < num_requests or scheduler.has_requests:
            for _ in range(rng.choice([0, 0, 1, 2])):
                if len(self.requests) < num_requests and len(scheduler.waiting) < 10:
                    self.add()
            step(scheduler, self.runner)
            live = [*scheduler.running, *scheduler.waiting]
            if live and rng.random() < 0.01:
                victim = rng.choice(live)
                self.aborted.add(victim)
                scheduler.abort(victim)
            elif live and rng.random() < 0.002:
                scheduler.schedule()  # and then the step fails
                scheduler.restart([request for request in live if not request.finished])
            scheduler.check_integrity()

    def add(self) -> None:
        prompt = random_prompt(self.rng, self.requests, self.longest)
        params = {"prompt_logprobs": 0} if self.rng.random() < 0.05 else {}
        request = make_request(str(len(self.requests)), prompt, self.rng.randint(1, 12), **params)
        if self.has_faults and self.rng.random() < 0.01:
            self.runner.faulty.add(request)
        self.requests.append(request)
        self.scheduler.add(request)


@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_requests(seed: int) -> None:
    load = Load(seed)
    load.run(1000)
    blocks = load.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    num_failed = 0
    for request in set(load.requests) - load.aborted:
        expected = expected_tokens(request)
        assert request.token_ids == expected[: len(request.token_ids)]
        if request.finish_reason == "length":
            assert len(request.token_ids) == len(expected)
        elif request.error_code == UNSERVABLE:
            assert len(request.token_ids) > blocks.num_blocks * blocks.block_size
        else:
            assert request.error_code == INTERNAL_ERROR
            num_failed += 1
    assert (num_failed > 0) == bool(load.runner.faulty)
    assert num_failed < 100, "a fault spreads"
    assert load.scheduler.statistics.hit_rate > 0.1


@pytest.mark.parametrize("seed", range(20))
def test_the_cache_changes_no_token(seed: int) -> None:
    rng = random.Random(seed)
    block_size, max_num_seqs, budget = rng.choice([1, 4, 7]), rng.choice([1, 3, 16]), rng.choice([1, 10, 100])
    prompts = [prompt_of(rng.randint(1, 20), index) for index in range(7)]
    outputs, costs = [], []
    for enable_prefix_caching in (True, False):
        scheduler = Scheduler(-(-30 // block_size), block_size, max_num_seqs, budget, enable_prefix_caching)
        runner = FakeRunner(block_size)
        requests = [make_request(str(index), prompt, 9) for index, prompt in enumerate(prompts * 5)]
        serve(scheduler, runner, *requests)
        assert_complete(*requests)
        outputs.append([request.token_ids for request in requests])
        costs.append(runner.num_computed)
    assert outputs[0] == outputs[1] and costs[0] < costs[1]


# check_integrity


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (lambda blocks, tokens: tokens.__setitem__(1, 9), "does not hold tokens 0 to 1"),
        (lambda blocks, tokens: blocks._root.children.clear(), "not in its place"),
        (lambda blocks, tokens: blocks._nodes.__setitem__(0, None), "not in its place"),
        (lambda blocks, tokens: blocks._num_owners.__setitem__(0, 2), "1 counted as 2"),
        (lambda blocks, tokens: blocks._idle.move_to_end(next(iter(blocks._idle))), "before its children"),
    ],
)
def test_check_integrity_finds_a_wrong_tree(corrupt: Callable, complaint: str) -> None:
    blocks, owned, idle = BlockManager(8, 2), [], []
    tokens, idle_tokens = [1, 2, 3, 4], [5, 6, 7, 8]
    for table, token_ids in ((owned, tokens), (idle, idle_tokens)):
        assert blocks.grow(table, 4)
        blocks.enter(table, token_ids, 0, 4)
    blocks.release(idle)
    blocks.check_integrity([(owned, tokens, 4)])
    corrupt(blocks, tokens)
    with pytest.raises(RuntimeError, match=complaint):
        blocks.check_integrity([(owned, tokens, 4)])
