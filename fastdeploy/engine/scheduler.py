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

The prefix cache. A full block holds the keys and values of its tokens after all the tokens before them, whoever
computed them. So full blocks, of prompts and of outputs, are kept in a tree whose edges are the tokens of a block, and
a newcomer walks down the tree as far as its own tokens lead and shares the blocks it passes (blocks of 2 tokens):

    (a b) block 3 --- (c d) block 0 --- (e f) block 7         a b c d e f g    finds 3 0 7
                  `-- (x y) block 4                           a b x z          finds 3

Python's dict finds an edge by a 64-bit hash of the tokens and then compares the tokens, so nothing can collide.
- A block counts its owners, the requests that have it in their tables. One without owners is free; while it is in the
  tree it is also *idle*: it can be shared again, and is handed out to hold something else only after all free blocks
  outside the tree, the least recently used first.
- A content is in one block: whoever fills a block with a content that is in the tree already (computed side by side,
  in different requests) changes to the block there and gives its own back.
- Hence whoever owns a block owns its parents in the tree too, and gives them back after it: the least recently used
  idle block is always a leaf.
- A block enters the tree as soon as the step that fills it is scheduled, so that requests of the same step share: in
  each layer all keys and values of a step are written before any are read. Nobody in that step loses blocks before it
  is computed (see above), and if it fails with an exception, `restart` forgets the whole tree.
- Of a prompt found as a whole, the last token is computed again: somebody must make its logits. Its key and value are
  written again too, into a block that others may be reading: the same bits (tokens don't depend on their neighbours).
- A request whose logits were no numbers takes its blocks out of the tree: nobody is to inherit NaN keys. What hangs
  below is cut off with them, unreachable, and falls to whoever needs a block. A request that already shares them goes
  on: if there are NaNs in them, its own next logits say so.


Steps ahead. On a GPU the host would have nothing to do while a step is computed, and the GPU nothing while the host
prepares the next one. So `ahead` says what the step after the one under way is, before its tokens are known:

    host      schedule 1, launch 1 | ahead 2, launch 2 | wait 1, update 1 | ahead 3, launch 3 | wait 2, update 2 | ...
    device                           step 1 ........................ step 2 ........................ step 3 ......

All that is not known of step 2 are ids, which it finds on the device. Whoever has one token left is not in it. Whoever
turns out to be at an end, by a stop token say, when step 1 has been read, or whose caller has gone, is in it in vain:
its item is dropped, and nothing is made of what it samples.
- Blocks given up meanwhile may be handed out at once, although step 2 writes a key and a value to one of them: who gets
  it writes in step 3 or later, and the device computes one step after the other. What step 2 writes is no part of a
  full block in the tree, since the token is one that is not known yet.
- For the same reason a block that step 2 fills enters the tree only when its last token is known: in update 1.
- Nobody is preempted and nobody waits in favour of a step ahead. Where blocks are short, or a request's next step can't
  be foreseen (`Request.next_step_is_foreseeable`), there is no step ahead: the host waits, and schedules as ever.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fastdeploy.engine.request import INTERNAL_ERROR, UNSERVABLE, Request, TokenLogprobs

Edges = dict[tuple[int, ...], "Node"]


@dataclass(slots=True, eq=False)
class Node:
    """A block's place in the tree. `siblings` are the edges among which `tokens` leads to it."""

    block: int
    tokens: tuple[int, ...]
    siblings: Edges
    children: Edges = field(default_factory=dict)


class BlockManager:
    """Hands out the KV blocks 0 .. num_blocks-1, each of which holds block_size tokens, and knows what is in them."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first, warm blocks go again soon
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the tree, without owners; least recently used first
        self._num_owners = [0] * num_blocks
        self._nodes: list[Node | None] = [None] * num_blocks  # the place of each block in the tree
        self._root = Node(-1, (), siblings={})

    @property
    def num_free(self) -> int:
        """Blocks without owners, whether or not they hold something that could be found again."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, token_ids: list[int]) -> list[int]:
        """The blocks that hold the longest known beginning of these tokens. Nobody's yet: see `share`."""
        found: list[int] = []
        size = self.block_size
        edges = self._root.children
        for end in range(size, len(token_ids) + 1, size):
            node = edges.get(tuple(token_ids[end - size : end]))
            if node is None:
                break
            found.append(node.block)
            edges = node.children
        return found

    def num_idle(self, blocks: list[int]) -> int:
        """How many of these blocks in the tree count as free: to share them takes them from the free ones."""
        return sum(block in self._idle for block in blocks)

    def share(self, block_table: list[int], blocks: list[int]) -> None:
        """Append blocks that `find` has found."""
        for block in blocks:
            self._own(block)
        block_table.extend(blocks)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Append blocks until the table holds num_tokens. False, and nothing changed, if too few are free."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._num_owners[block] = 1
            block_table.append(block)
        return True

    def enter(self, block_table: list[int], token_ids: list[int], start: int, end: int) -> None:
        """Put the blocks that tokens start .. end-1 fill into the tree.

        Where the tree has the content already, its block replaces the one in the table. Below a parent that is not in
        the tree nothing can be found, and nothing is entered.
        """
        if not self.enable_prefix_caching:
            return
        size = self.block_size
        for index in range(start // size, end // size):
            parent = self._nodes[block_table[index - 1]] if index else self._root
            if parent is None:
                return
            block = block_table[index]
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            node = parent.children.get(tokens)
            if node is None:
                self._nodes[block] = parent.children[tokens] = Node(block, tokens, siblings=parent.children)
            elif node.block != block:
                self._own(node.block)
                block_table[index] = node.block
                self._disown(block)

    def release(self, block_table: list[int]) -> None:
        """Give up all blocks of a table, which is empty afterwards. The last goes first, so it is evicted first."""
        for block in reversed(block_table):
            self._disown(block)
        block_table.clear()

    def forget(self, block_table: list[int]) -> None:
        """Take the blocks of a table out of the tree: what is in them is no good. They keep their owners."""
        for block in block_table:
            self._cut(block)

    def _own(self, block: int) -> None:
        """One more owner for a block in the tree."""
        if self._num_owners[block] == 0:
            del self._idle[block]
        self._num_owners[block] += 1

    def _disown(self, block: int) -> None:
        self._num_owners[block] -= 1
        if self._num_owners[block] == 0:
            if self._nodes[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._cut(block)
        return block

    def _cut(self, block: int) -> None:
        node = self._nodes[block]
        if node is not None:
            del node.siblings[node.tokens]
            self._nodes[block] = None

    def check_integrity(self, owners: Iterable[tuple[list[int], list[int], int]]) -> None:
        """RuntimeError unless every block is free, idle or owned, has as many owners as it counts, and holds what the
        tree says.

        owners: block table, token ids and number of computed tokens of every request that has blocks.
        """
        counted = [0] * self.num_blocks
        for block_table, token_ids, num_computed in owners:
            for block in block_table:
                counted[block] += 1
            self._check_contents(block_table, token_ids, num_computed)
        pairs = enumerate(zip(counted, self._num_owners))
        wrong = {block: f"{owners} counted as {count}" for block, (owners, count) in pairs if owners != count}
        unowned = [block for block, count in enumerate(counted) if count == 0]
        if wrong or sorted([*self._free, *self._idle]) != unowned:
            raise RuntimeError(f"KV blocks: owners {wrong}; free {self._free}, idle {list(self._idle)}, not {unowned}")
        nodes = [node for node in self._nodes if node]
        placed = all(node.siblings.get(node.tokens) is node for node in nodes)
        children = [child for node in (self._root, *nodes) for child in node.children.values()]
        if not placed or any(self._nodes[child.block] is not child for child in children):
            raise RuntimeError("KV blocks: one is not in its place in the tree")
        if any(self._nodes[block] for block in self._free) or not all(self._nodes[block] for block in self._idle):
            raise RuntimeError("KV blocks: idle are those without owners in the tree, free those outside it")
        gone: set[int] = set()
        for block in self._idle:
            node = self._nodes[block]
            if node and not gone.issuperset(child.block for child in node.children.values()):
                raise RuntimeError(f"KV blocks: {block} would be evicted before its children in the tree")
            gone.add(block)

    def _check_contents(self, block_table: list[int], token_ids: list[int], num_computed: int) -> None:
        parent: Node | None = self._root
        for index, block in enumerate(block_table):
            begin, end = index * self.block_size, (index + 1) * self.block_size
            node = self._nodes[block]
            if node:
                if end > num_computed or node.tokens != tuple(token_ids[begin:end]):
                    raise RuntimeError(f"KV blocks: {block} does not hold tokens {begin} to {end - 1} of its owner")
                if parent and node.siblings is not parent.children:
                    raise RuntimeError(f"KV blocks: {block} is not below the block before it in the tree")
            parent = node


@dataclass(slots=True)
class ScheduledRequest:
    """Compute tokens start .. start+num_tokens-1 of a request; its block table has room for them.

    samples: whether a token is to be sampled: the last one that there is is computed.
    row: of the token to compute among those that the step before has sampled, where it is not known yet; else -1.
    dropped: the request has ended since the step was launched: nothing is made of what it samples.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    row: int = -1
    dropped: bool = False


@dataclass(slots=True)
class ScheduledBatch:
    """One step's work, oldest request first. The first num_decodes items are of one token; then comes a longer one.

    moved: requests whose block tables have changed since the batch before; they need not be in this one.
    rejected: requests that failed while scheduling: too long for all the blocks.
    filling: items of a step ahead that fill a block with a token that is not known yet.
    """

    items: list[ScheduledRequest] = field(default_factory=list)
    num_decodes: int = 0
    moved: list[Request] = field(default_factory=list)
    rejected: list[Request] = field(default_factory=list)
    filling: list[ScheduledRequest] = field(default_factory=list)


NO_NUMBERS, ALL_BANNED, FAILED = -1, -2, -3  # instead of a token; the first two as kernels/sampling.py has them
FORCED_OUTSIDE = -5  # as there, too


@dataclass(slots=True)
class StepOutput:
    """What a runner made of a batch.

    tokens: for each item its token; None in mid-prefill; NO_NUMBERS where the logits had NaN or +inf; ALL_BANNED where
        nothing but -inf was left of them; FAILED where `errors` says why there is none.
    logprobs: of the sampled tokens, by item index, where they were asked for.
    prompt_logprobs: by item index, of the prompt tokens that the item's rows predict, in order: of positions start+1 to
        start+num_tokens, as far as there are prompt tokens and the request does not have them yet.
    errors: by item index, what a request is to fail with.
    """

    tokens: list[int | None]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class Statistics:
    """What a scheduler has done since it was made.

    num_steps: batches computed. num_served: their sizes, summed up: requests served, each once a step.
    largest_batch: most requests in one step.
    num_prompt_tokens: of all requests at their first admission. num_cached_tokens: those of them that were in the
        prefix cache; what is found again after a preemption counts in neither.
    blocks_in_use, peak_blocks_in_use: KV blocks that requests own now, and at most. num_blocks: all there are.
    num_preemptions: how often a request lost its blocks to an older one.
    """

    num_blocks: int
    num_steps: int = 0
    num_served: int = 0
    largest_batch: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    blocks_in_use: int = 0
    peak_blocks_in_use: int = 0
    num_preemptions: int = 0

    @property
    def mean_batch(self) -> float:
        """Requests in a step, on average."""
        return self.num_served / max(1, self.num_steps)

    @property
    def hit_rate(self) -> float:
        """The share of all prompt tokens that was found in the prefix cache, 0 to 1."""
        return self.num_cached_tokens / max(1, self.num_prompt_tokens)

    def describe(self) -> str:
        """All of it in one line."""
        return (
            f"since the start: {self.num_steps} steps of {self.mean_batch:.1f} requests on average, "
            f"{self.largest_batch} at most; "
            f"{self.hit_rate:.1%} of {self.num_prompt_tokens} prompt tokens from the prefix cache; "
            f"{self.blocks_in_use} of {self.num_blocks} KV blocks in use, {self.peak_blocks_in_use} at most; "
            f"{self.num_preemptions} preemptions"
        )


class Scheduler:
    """Cuts the work of all requests into steps: `schedule`, run the batch, `update`; again while `has_requests`.

    pending: what `ahead` has proposed, until `update` has seen it or none of it is of use any more. Meanwhile there is
        nothing to `schedule`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.pending: ScheduledBatch | None = None
        self._moved: list[Request] = []  # block tables that have changed since the latest batch
        self._statistics = Statistics(num_blocks)

    @property
    def has_requests(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def statistics(self) -> Statistics:
        """As of now; it does not change later."""
        return replace(self._statistics, blocks_in_use=self.blocks.num_blocks - self.blocks.num_free)

    def add(self, request: Request) -> None:
        request.foreseeable = request.next_step_is_foreseeable()
        self.waiting.append(request)

    def schedule(self) -> ScheduledBatch:
        """The next step. It may be empty, when all it did was to take blocks away or to reject; the next one is not."""
        batch = ScheduledBatch()
        num_running = len(self.running)
        budget = self._continue_running(batch)
        if len(self.running) == num_running:  # else blocks are short: who admits now preempts again in the next step
            self._admit_waiting(batch, budget, self.max_num_seqs - num_running)
        self._complete(batch)
        return batch

    def _complete(self, batch: ScheduledBatch) -> None:
        """Add what follows from the items of a batch."""
        batch.num_decodes = next((i for i, item in enumerate(batch.items) if item.num_tokens > 1), len(batch.items))
        if batch.items:
            batch.moved, self._moved = self._moved, []
        in_use = self.blocks.num_blocks - self.blocks.num_free
        self._statistics.peak_blocks_in_use = max(self._statistics.peak_blocks_in_use, in_use)

    def _continue_running(self, batch: ScheduledBatch) -> int:
        """Serve the running requests, oldest first. Returns the budget left."""
        budget = self.max_num_batched_tokens
        block_size = self.blocks.block_size
        for request in self.running:  # preemption shortens the list from its other end
            if not budget:
                break
            start = request.num_computed
            num_tokens = len(request.token_ids) - start
            if num_tokens > budget:  # min() takes as long as all the rest of this loop's arithmetic
                num_tokens = budget
            end = start + num_tokens
            if end > len(request.block_table) * block_size:
                if not self._make_room(request, end):
                    if request.finished:
                        batch.rejected.append(request)
                    break
                self._moved.append(request)
            batch.items.append(ScheduledRequest(request, start, num_tokens, end == len(request.token_ids)))
            if end // block_size > start // block_size:
                self.blocks.enter(request.block_table, request.token_ids, start, end)
                self._moved.append(request)
            budget -= num_tokens
        return budget

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Blocks for the first num_tokens of a running request, taken from the youngest ones if none is free.

        False if the request itself was the youngest and is waiting again, or has all the blocks there are and failed.
        """
        while not self.blocks.grow(request.block_table, num_tokens):
            victim = self.running.pop()
            self.blocks.release(victim.block_table)
            if victim is request and not self.running:
                self._reject(request)
                return False
            victim.num_computed = 0
            victim.metrics.preempted_count += 1
            self._statistics.num_preemptions += 1
            self.waiting.appendleft(victim)
            if victim is request:
                return False
        return True

    def ahead(self, batch: ScheduledBatch) -> ScheduledBatch | None:
        """The step after `batch`, which is being computed, as if no token of it ended a request; then it is `pending`,
        unless it is empty. None if it has to wait for these tokens.

        Launch it, then `update` with the output of `batch`; with its own when it has been computed.
        """
        following, changing = ScheduledBatch(), []
        budget, size = self.max_num_batched_tokens, self.blocks.block_size
        row = num_running = missing = 0
        for item in batch.items:
            request, start, samples = item.request, item.start + item.num_tokens, item.samples
            if not request.foreseeable:
                return None
            num_tokens = 1 if samples else min(len(request.token_ids) - start, budget)  # 1, or more of its prompt
            end = start + num_tokens
            if not item.dropped:
                num_running += 1
                if not samples or end < request.most_tokens:
                    is_sampled = samples or end == len(request.token_ids)
                    next_item = ScheduledRequest(request, start, num_tokens, is_sampled, row if samples else -1)
                    following.items.append(next_item)
                    budget -= num_tokens
                    if end % size < 2 or num_tokens > 1:  # begins or fills a block
                        changing.append(next_item)
                        missing += self.blocks.blocks_for(end) - len(request.block_table)
            row += samples
        places = self.max_num_seqs - len(following.items)
        is_stuck = places and budget and self.waiting and not self.waiting[0].foreseeable
        if num_running < len(self.running) or missing > self.blocks.num_free or is_stuck:
            return None
        for item in changing:
            self._make_ready(item, following)
        self._admit_waiting(following, budget, places, ahead=True)
        self._complete(following)
        if following.items:
            self.pending = following
        return following

    def _make_ready(self, item: ScheduledRequest, batch: ScheduledBatch) -> None:
        """Do what scheduling an item of a step ahead changes: blocks, which are there, and the prefix cache."""
        request, end = item.request, item.start + item.num_tokens
        size = self.blocks.block_size
        if end > len(request.block_table) * size:
            self.blocks.grow(request.block_table, end)
            self._moved.append(request)
        if item.row >= 0:
            if end % size == 0:
                batch.filling.append(item)
        elif end // size > item.start // size:
            self.blocks.enter(request.block_table, request.token_ids, item.start, end)
            self._moved.append(request)

    def _admit_waiting(self, batch: ScheduledBatch, budget: int, places: int, ahead: bool = False) -> None:
        """Admit in order of arrival while budget, places and blocks last; in a step ahead, whom one more may follow.

        Blocks for all known tokens must be free, although chunks take them one by one, and one more for each running
        request to grow into: otherwise a newcomer is soon preempted and its prefill was for nothing. (256 requests of
        10-200 + 10-200 tokens in 200 blocks of 16 compute 3 % of their tokens twice; without the reserve 24 %.)
        Blocks that the newcomer shares with running requests need not be free.
        """
        blocks = self.blocks
        while self.waiting and budget and places:
            request = self.waiting[0]
            if ahead and not request.foreseeable:
                break
            needed = blocks.blocks_for(len(request.token_ids))
            if needed > blocks.num_blocks:
                self._reject(self.waiting.popleft())
                batch.rejected.append(request)
                continue
            found = [] if request.wants_prompt_logprobs else blocks.find(request.token_ids)
            if needed - len(found) + blocks.num_idle(found) + len(self.running) > blocks.num_free:
                break
            self.running.append(self.waiting.popleft())
            blocks.share(request.block_table, found)
            start = min(len(found) * blocks.block_size, len(request.token_ids) - 1)  # somebody must make the logits
            end = min(len(request.token_ids), start + budget)
            blocks.grow(request.block_table, end)
            blocks.enter(request.block_table, request.token_ids, start, end)
            batch.items.append(ScheduledRequest(request, start, end - start, end == len(request.token_ids)))
            self._moved.append(request)
            budget -= end - start
            places -= 1
            request.num_computed = start
            self._count_hit(request)

    def _count_hit(self, request: Request) -> None:
        """Note what the prefix cache had of a prompt. When a request comes back, its own blocks don't count as that."""
        if request.num_output_tokens == request.metrics.preempted_count == 0:
            request.num_cached_tokens = request.num_computed
            self._statistics.num_prompt_tokens += len(request.prompt_token_ids)
            self._statistics.num_cached_tokens += request.num_computed

    def _reject(self, request: Request) -> None:
        """Fail a request that could not be served if it had every block for itself."""
        capacity = self.blocks.num_blocks * self.blocks.block_size
        request.fail(
            UNSERVABLE,
            f"the sequence has {len(request.token_ids)} tokens; all {self.blocks.num_blocks} KV blocks of "
            f"{self.blocks.block_size} hold {capacity}: raise num_gpu_blocks_override, or shorten prompt or max_tokens",
        )

    def update(self, batch: ScheduledBatch, output: StepOutput) -> None:
        """Take note of what was computed and append what was sampled; finished requests give their blocks back.

        Items of requests that have ended since the batch was made are marked as dropped.
        """
        items = batch.items
        if self.pending is batch:
            self.pending = None
        for index, found in output.prompt_logprobs.items():
            items[index].request.prompt_logprobs.extend(found)
        logprobs = output.logprobs
        num_dropped = 0
        any_finished = False
        for index, (item, token_id) in enumerate(zip(items, output.tokens, strict=True)):
            request = item.request
            if item.dropped:
                num_dropped += 1
                continue
            request.num_computed = item.start + item.num_tokens
            if token_id is None:
                continue
            if token_id >= 0:
                request.append(token_id, logprobs.get(index) if logprobs else None)
            else:
                self._fail(request, token_id, output.errors.get(index, ""))
            if request.finish_reason is not None:
                self.blocks.release(request.block_table)
                any_finished = True
        self._count_step(len(items) - num_dropped)
        if any_finished:
            self.running = [request for request in self.running if not request.finished]
        self._settle_pending(any_finished)

    def _settle_pending(self, any_finished: bool) -> None:
        """Now that the tokens before the step ahead are known: drop its items that are in vain, and let blocks that it
        fills enter the prefix cache."""
        if self.pending is None:
            return
        if any_finished:
            for item in self.pending.items:
                item.dropped = item.dropped or item.request.finish_reason is not None
        for item in self.pending.filling:
            if not item.dropped:
                request, end = item.request, item.start + item.num_tokens
                self.blocks.enter(request.block_table, request.token_ids, item.start, end)
                self._moved.append(request)
        if not self.running:
            self.pending = None

    def _count_step(self, num_requests: int) -> None:
        if num_requests:
            self._statistics.num_steps += 1
            self._statistics.num_served += num_requests
            self._statistics.largest_batch = max(self._statistics.largest_batch, num_requests)

    def _fail(self, request: Request, what: int, error: str) -> None:
        """Fail a request for which there was no token: `what` stands in its place in StepOutput.tokens."""
        if what == FAILED:
            request.fail(UNSERVABLE, error)
        elif what == NO_NUMBERS:
            self.blocks.forget(request.block_table)
            request.fail(INTERNAL_ERROR, f"the model gave NaN logits after {len(request.token_ids)} tokens")
        elif what == FORCED_OUTSIDE:
            request.fail(INTERNAL_ERROR, "the token that had to come next is not in the model's vocabulary")
        else:
            request.fail(
                UNSERVABLE,
                f"every token is banned after {len(request.token_ids)} tokens: see logits_processors, logit_bias, "
                "bad_words and min_tokens",
            )

    def abort(self, request: Request) -> None:
        """Forget a request and free its blocks, wherever it is; nothing happens if it is not here any more.

        Not between `schedule` and `update`: blocks that the batch was to fill are in the prefix cache already. A step
        ahead that was launched will fill them.
        """
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.blocks.release(request.block_table)
        if self.pending is not None:
            for item in self.pending.items:
                item.dropped = item.dropped or item.request is request
            if not self.running:
                self.pending = None

    def restart(self, requests: Iterable[Request]) -> None:
        """Rebuild from nothing: all blocks free, nothing cached, `requests` waiting with the tokens they have.

        For after an exception, which may have struck between any two statements (Ctrl-C does).
        """
        old = self.blocks
        self.blocks = BlockManager(old.num_blocks, old.block_size, old.enable_prefix_caching)
        self.running = []
        self.pending, self._moved = None, []
        self.waiting = deque(requests)
        for request in self.waiting:
            request.block_table.clear()
            request.num_computed = 0

    def check_integrity(self) -> None:
        """RuntimeError unless every block is free, cached or owned, the counts are right, the cache holds what it says,
        and every request has the blocks it needs.

        Call it between `update` and `schedule` or `ahead`. What a step ahead is computing counts as computed.
        """
        computed = {request: request.num_computed for request in self.running}
        for item in () if self.pending is None else self.pending.items:
            if not item.dropped:
                if computed.get(item.request) != item.start:
                    raise RuntimeError(f"request {item.request.request_id} is not where the step ahead takes it from")
                computed[item.request] = item.start + item.num_tokens
        self.blocks.check_integrity((each.block_table, each.token_ids, end) for each, end in computed.items())
        for request, end in computed.items():
            if len(request.block_table) != self.blocks.blocks_for(end):
                raise RuntimeError(
                    f"request {request.request_id}: {len(request.block_table)} blocks hold its {end} computed tokens"
                )
            too_far = request.num_computed >= len(request.token_ids) or end > len(request.token_ids)
            if end == 0 or too_far or request.finished:
                raise RuntimeError(f"request {request.request_id} should not be running")
        for request in self.waiting:
            if request.block_table or request.num_computed or request.finished:
                raise RuntimeError(f"request {request.request_id} should not be waiting")
        if len(self.running) > self.max_num_seqs:
            raise RuntimeError(f"{len(self.running)} requests run, max_num_seqs is {self.max_num_seqs}")
