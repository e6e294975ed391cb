"""A model for tests of the scheduler: its next token depends on all tokens before, read back from a fake KV cache."""

import random
from collections.abc import Callable, Iterator
from itertools import accumulate

from fastdeploy.engine.request import Request
from fastdeploy.engine.scheduler import ScheduledBatch, ScheduledRequest, Scheduler, StepOutput
from fastdeploy.sampling_params import NEUTRAL, SamplingParams

NAN = -1  # in the memory: no prefix has this fingerprint


def make_request(name: str, prompt: int | list[int], max_tokens: int, **params: object) -> Request:
    """prompt: the tokens, or how many random ones."""
    rng = random.Random(name)
    ids = [rng.randrange(1000) for _ in range(prompt)] if isinstance(prompt, int) else prompt
    sampling = SamplingParams(temperature=0.0, top_p=1.0, max_tokens=max_tokens, seed=0, **params)
    return Request(name, ids, ids, sampling.resolved(SamplingParams(**NEUTRAL), room=max_tokens, seed=0))


def next_token(token_ids: list[int]) -> int:
    """What the fake model says after these tokens."""
    return hash(tuple(token_ids)) % 1000


def expected_tokens(request: Request) -> list[int]:
    """Prompt and output of a request that runs to its end."""
    tokens = list(request.prompt_token_ids)
    while len(tokens) < request.most_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.stop_token_ids:
            break
    return tokens


def fingerprints(token_ids: list[int]) -> list[int]:
    """For each position a number that stands for all tokens up to it, as key and value of a real model do."""
    return list(accumulate(token_ids, lambda before, token: hash((before, token)) >> 1, initial=0))[1:]


class FakeRunner:
    """Writes a fingerprint for each token of a step to its slot, then reads back the whole sequence of each request.

    faulty: requests whose fingerprints come out as NaN; whoever reads one has no logits.
    sampled: what the latest step has, where the next one may look it up.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.sampled: list[int] = []
        self.memory: dict[int, int] = {}  # slot -> fingerprint
        self.tables: dict[Request, list[int]] = {}  # what it was told of block tables
        self.faulty: set[Request] = set()
        self.num_computed = 0

    def run(self, batch: ScheduledBatch) -> StepOutput:
        return self.launch(batch)()

    def launch(self, batch: ScheduledBatch) -> Callable[[], StepOutput]:
        """Computes at once, as if all before had been computed; nobody sees it before the output is called for."""
        self.tables.update({request: request.block_table.copy() for request in batch.moved})
        assert all(self.tables[item.request] == item.request.block_table for item in batch.items)
        known = [self.tokens(item) for item in batch.items]
        for item, tokens in zip(batch.items, known):
            self.write(item, tokens)
        output = StepOutput([self.sample(item, tokens) for item, tokens in zip(batch.items, known)])
        self.sampled = [token for token in output.tokens if token is not None]
        return lambda: output

    def tokens(self, item: ScheduledRequest) -> list[int]:
        """All tokens of a request up to the last that is computed."""
        late = [] if item.row < 0 else [self.sampled[item.row]]
        assert not late or item.start == len(item.request.token_ids)
        return (item.request.token_ids + late)[: item.start + item.num_tokens]

    def write(self, item: ScheduledRequest, tokens: list[int]) -> None:
        request = item.request
        values = fingerprints(tokens)
        for position in range(item.start, len(tokens)):
            value = NAN if request in self.faulty else values[position]
            self.memory[self.slot(request, position)] = value
        self.num_computed += item.num_tokens

    def sample(self, item: ScheduledRequest, tokens: list[int]) -> int | None:
        read = [self.memory.get(self.slot(item.request, position)) for position in range(len(tokens))]
        if NAN in read:
            return -1 if item.samples else None
        assert read == fingerprints(tokens), "somebody else's keys and values"
        return next_token(tokens) if item.samples else None

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
        num_known = len(item.request.token_ids) + (item.row >= 0)
        assert item.samples == (item.start + item.num_tokens == num_known)


def step(scheduler: Scheduler, runner: FakeRunner) -> ScheduledBatch:
    batch = scheduler.schedule()
    check_batch(scheduler, batch)
    assert all(item.start == item.request.num_computed and item.row < 0 for item in batch.items)
    scheduler.update(batch, runner.run(batch))
    scheduler.check_integrity()
    return batch


class Overlapping:
    """Steps of a scheduler, each launched before the tokens of the one before it are known, where that can be."""

    def __init__(self, scheduler: Scheduler, runner: FakeRunner) -> None:
        self.scheduler, self.runner = scheduler, runner
        self.flight: tuple[ScheduledBatch, Callable[[], StepOutput]] | None = None
        self.num_ahead = 0

    def step(self) -> ScheduledBatch:
        """Returns the batch that was updated with its tokens."""
        scheduler = self.scheduler
        batch, output = self.flight or self.launch(scheduler.schedule())
        following = scheduler.ahead(batch)
        self.flight = self.launch(following) if following and following.items else None
        self.num_ahead += self.flight is not None
        scheduler.update(batch, output())
        scheduler.check_integrity()
        if scheduler.pending is None:
            self.flight = None
        return batch

    def launch(self, batch: ScheduledBatch) -> tuple[ScheduledBatch, Callable[[], StepOutput]]:
        check_batch(self.scheduler, batch)
        return batch, self.runner.launch(batch)


def run_all(scheduler: Scheduler, runner: FakeRunner, max_steps: int = 100_000) -> Iterator[ScheduledBatch]:
    for _ in range(max_steps):
        if not scheduler.has_requests:
            return
        yield step(scheduler, runner)
    raise AssertionError("the scheduler does not come to an end")
