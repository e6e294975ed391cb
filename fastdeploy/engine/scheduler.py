"""Who runs this step, how many tokens of each, and in which KV blocks.

A step has a budget of tokens. Running requests are served first, oldest first, one token each or the next chunk of a
prompt; then waiting requests are admitted, first come, first served:

    max_num_batched_tokens = 8:    | A | B | C | D, its 3rd chunk | E, its 1st chunk |
                                     1   1   1          2                  3           tokens

Keys and values live in blocks of block_size tokens; a request's block table grows as its tokens are computed. When no
block is free, the request admitted last gives all of its blocks back and returns to the front of the queue, its
tokens kept: preemption by recomputation, as in vLLM (Kwon et al., 2023, arXiv:2309.06180, section 4.5).

That everything goes by age makes the rest simple:
- Only the youngest running request can be in the middle of its prompt: those behind it get no budget before it is
  through. So decodes come first in a batch, and when there is budget to admit a newcomer, everybody has the blocks of
  all known tokens.
- Blocks are handed out to the oldest first and taken from the youngest, so nobody loses the blocks of a place that
  was already given in the batch under construction.
- The oldest request can take every block there is. If that is not enough, it fails alone; else it ends some day and
  the next one is the oldest. Hence no deadlock and no starvation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fastdeploy.engine.request import INTERNAL_ERROR, UNSERVABLE, Request


class BlockManager:
    """Hands out the KV blocks 0 .. num_blocks-1, each of which holds block_size tokens, to one owner each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first, warm blocks go again soon

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Append blocks until the table holds num_tokens. False, and nothing changed, if too few are free."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block_table.append(self._free.pop())
        return True

    def release(self, block_table: list[int]) -> None:
        """Take back all blocks of a table, which is empty afterwards."""
        self._free.extend(reversed(block_table))
        block_table.clear()

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """RuntimeError unless every block is free or in one of the tables, exactly once."""
        places = [0] * self.num_blocks
        for block in self._free:
            places[block] += 1
        for table in block_tables:
            for block in table:
                places[block] += 1
        wrong = {block: count for block, count in enumerate(places) if count != 1}
        if wrong:
            raise RuntimeError(f"KV blocks not in exactly one place (block: places): {wrong}")


@dataclass(slots=True)
class ScheduledRequest:
    """Compute tokens start .. start+num_tokens-1 of a request; its block table has room for them."""

    request: Request
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether a token is to be sampled: the last known one is computed. Ask before the token is appended."""
        return self.start + self.num_tokens == len(self.request.token_ids)


@dataclass(slots=True)
class ScheduledBatch:
    """One step's work, oldest request first. The first num_decodes items are of one token; then comes a longer one."""

    items: list[ScheduledRequest] = field(default_factory=list)
    num_decodes: int = 0
    rejected: list[Request] = field(default_factory=list)  # failed while scheduling: too long for all the blocks


class Scheduler:
    """Cuts the work of all requests into steps: `schedule`, run the batch, `update`; again while `has_requests`."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.blocks = BlockManager(num_blocks, block_size)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first

    @property
    def has_requests(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> ScheduledBatch:
        """The next step. It may be empty, when all it did was to take blocks away or to reject; the next one is not."""
        batch = ScheduledBatch()
        num_running = len(self.running)
        budget = self._continue_running(batch)
        if len(self.running) == num_running:  # else blocks are short: who admits now preempts again in the next step
            self._admit_waiting(batch, budget)
        lengths = [item.num_tokens for item in batch.items]
        batch.num_decodes = next((index for index, length in enumerate(lengths) if length > 1), len(lengths))
        return batch

    def _continue_running(self, batch: ScheduledBatch) -> int:
        """Serve the running requests, oldest first. Returns the budget left."""
        budget = self.max_num_batched_tokens
        block_size = self.blocks.block_size
        position = 0
        while budget and position < len(self.running):  # not a for: preemption shortens the list from its other end
            request = self.running[position]
            start = request.num_computed
            num_tokens = min(len(request.token_ids) - start, budget)
            has_room = start + num_tokens <= len(request.block_table) * block_size
            if not has_room and not self._make_room(request, num_tokens):
                if request.finished:
                    batch.rejected.append(request)
                break
            batch.items.append(ScheduledRequest(request, start, num_tokens))
            budget -= num_tokens
            position += 1
        return budget

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Blocks for the next num_tokens of a running request, taken from the youngest ones if none is free.

        False if the request itself was the youngest and is waiting again, or has all the blocks there are and failed.
        """
        while not self.blocks.grow(request.block_table, request.num_computed + num_tokens):
            victim = self.running.pop()
            self.blocks.release(victim.block_table)
            if victim is request and not self.running:
                self._reject(request)
                return False
            victim.num_computed = 0
            victim.metrics.preempted_count += 1
            self.waiting.appendleft(victim)
            if victim is request:
                return False
        return True

    def _admit_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        """Admit in order of arrival while budget, places and blocks last.

        Blocks for all known tokens must be free, although chunks take them one by one, and one more for each running
        request to grow into: otherwise a newcomer is soon preempted and its prefill was for nothing. (256 requests of
        10-200 + 10-200 tokens in 200 blocks of 16 compute 6 % of their tokens twice; without the reserve 42 %.)
        """
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            needed = self.blocks.blocks_for(len(request.token_ids))
            if needed > self.blocks.num_blocks:
                self._reject(self.waiting.popleft())
                batch.rejected.append(request)
                continue
            if needed + len(self.running) > self.blocks.num_free:
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(len(request.token_ids), budget)
            self.blocks.grow(request.block_table, num_tokens)
            batch.items.append(ScheduledRequest(request, 0, num_tokens))
            budget -= num_tokens

    def _reject(self, request: Request) -> None:
        """Fail a request that could not be served if it had every block for itself."""
        capacity = self.blocks.num_blocks * self.blocks.block_size
        request.fail(
            UNSERVABLE,
            f"the sequence has {len(request.token_ids)} tokens; all {self.blocks.num_blocks} KV blocks of "
            f"{self.blocks.block_size} hold {capacity}: raise num_gpu_blocks_override, or shorten prompt or max_tokens",
        )

    def update(self, batch: ScheduledBatch, sampled: Sequence[int | None]) -> None:
        """Take note of what was computed and append what was sampled; finished requests give their blocks back.

        sampled: for each item its token; None in mid-prefill; -1 where the logits were no numbers (the request fails).
        """
        for item, token_id in zip(batch.items, sampled, strict=True):
            request = item.request
            request.num_computed = item.start + item.num_tokens
            if token_id is None:
                continue
            if token_id < 0:
                request.fail(INTERNAL_ERROR, f"the model gave NaN logits after {len(request.token_ids)} tokens")
            else:
                request.append(token_id)
            if request.finished:
                self.running.remove(request)
                self.blocks.release(request.block_table)

    def abort(self, request: Request) -> None:
        """Forget a request and free its blocks, wherever it is; nothing happens if it is not here any more."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.blocks.release(request.block_table)

    def restart(self, requests: Iterable[Request]) -> None:
        """Rebuild from nothing: all blocks free, `requests` waiting with the tokens they have.

        For after an exception, which may have struck between any two statements (Ctrl-C does).
        """
        self.blocks = BlockManager(self.blocks.num_blocks, self.blocks.block_size)
        self.running = []
        self.waiting = deque(requests)
        for request in self.waiting:
            request.block_table.clear()
            request.num_computed = 0

    def check_integrity(self) -> None:
        """RuntimeError unless every block is free or owned exactly once and every request has the blocks it needs.

        Call it between `update` and `schedule`.
        """
        self.blocks.check_integrity(request.block_table for request in self.running)
        for request in self.running:
            if len(request.block_table) != self.blocks.blocks_for(request.num_computed):
                raise RuntimeError(
                    f"request {request.request_id}: {len(request.block_table)} blocks hold its "
                    f"{request.num_computed} computed tokens"
                )
            if not 0 < request.num_computed < len(request.token_ids) or request.finished:
                raise RuntimeError(f"request {request.request_id} should not be running")
        for request in self.waiting:
            if request.block_table or request.num_computed or request.finished:
                raise RuntimeError(f"request {request.request_id} should not be waiting")
        if len(self.running) > self.max_num_seqs:
            raise RuntimeError(f"{len(self.running)} requests run, max_num_seqs is {self.max_num_seqs}")
