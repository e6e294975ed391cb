"""A model for tests of the scheduler: its next token depends on all tokens before, read back from a fake KV cache."""

import random
from collections.abc import Iterator
from itertools import accumulate

from fastdeploy.engine.request import Request
from fastdeploy.engine.scheduler import ScheduledBatch, ScheduledRequest, Scheduler, StepOutput
from fastdeploy.sampling_params import SamplingParams

NAN = -1  # in the memory: no prefix has this fingerprint


def make_request(name: str, prompt: int | list[int], max_tokens: int, **params: object) -> Request:
    """prompt: the tokens, or how many random ones."""
    rng = random.Random(name)
    ids = [rng.randrange(1000) for _ in range(prompt)] if isinstance(prompt, int) else prompt
    sampling = SamplingParams(temperature=0.0, top_p=1.0, max_tokens=max_tokens, seed=0, **params)
    return Request(name, ids, ids, sampling)


def next_token(token_ids: list[int]) -> int:
    """What the fake model says after these tokens."""
    return hash(tuple(token_ids)) % 1000


def expected_tokens(request: Request) -> list[int]:
    """Prompt and output of a request that runs to its end."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.sampling_params.max_tokens or 0):
        tokens.append(next_token(tokens))
    return tokens


def fingerprints(token_ids: list[int]) -> list[int]:
    """For each position a number that stands for all tokens up to it, as key and value of a real model do."""
    return list(accumulate(token_ids, lambda before, token: hash((before, token)) >> 1, initial=0))[1:]


class FakeRunner:
    """Writes a fingerprint for each token of a step to its slot, then reads back the whole sequence of each request.

    faulty: requests whose fingerprints come out as NaN; whoever reads one has no logits.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.memory: dict[int, int] = {}  # slot -> fingerprint
        self.faulty: set[Request] = set()
        self.num_computed = 0

    def run(self, batch: ScheduledBatch) -> StepOutput:
        for item in batch.items:
            self.write(item)
        return StepOutput([self.sample(item) for item in batch.items])

    def write(self, item: ScheduledRequest) -> None:
        request, end = item.request, item.start + item.num_tokens
        values = fingerprints(request.token_ids[:end])
        for position in range(item.start, end):
            value = NAN if request in self.faulty else values[position]
            self.memory[self.slot(request, position)] = value
        self.num_computed += item.num_tokens

    def sample(self, item: ScheduledRequest) -> int | None:
        request, end = item.request, item.start + item.num_tokens
        read = [self.memory.get(self.slot(request, position)) for position in range(end)]
        if NAN in read:
            return -1 if item.samples else None
        assert read == fingerprints(request.token_ids[:end]), "somebody else's keys and values"
        return next_token(request.token_ids) if item.samples else None

    def slot(self, request: Request, position: int) -> int:
        return request.block_table[position // self.block_size] * self.block_size + position % self.block_size


def check_batch(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    lengths = [item.num_tokens for item in batch.items]
    assert all(length > 0 for length in lengths)
    assert sum(lengths) <= scheduler.max_num_batched_tokens
    assert len({id(item.request) for item in batch.items}) == len(lengths) <= scheduler.max_num_seqs
    assert all(length == 1 for length in lengths[: batch.num_decodes])
    assert all(length > 1 for length in lengths[batch.num_decodes :][:1])
    for item in batch.items:
        assert item.start == item.request.num_computed
        assert item.samples == (item.start + item.num_tokens == len(item.request.token_ids))


def step(scheduler: Scheduler, runner: FakeRunner) -> ScheduledBatch:
    batch = scheduler.schedule()
    check_batch(scheduler, batch)
    scheduler.update(batch, runner.run(batch))
    scheduler.check_integrity()
    return batch


def run_all(scheduler: Scheduler, runner: FakeRunner, max_steps: int = 100_000) -> Iterator[ScheduledBatch]:
    for _ in range(max_steps):
        if not scheduler.has_requests:
            return
        yield step(scheduler, runner)
    raise AssertionError("the scheduler does not come to an end")
