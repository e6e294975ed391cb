"""A scheduled batch becomes flat arrays, the arrays go through the model, sampled tokens come back.

The tokens of a step lie one after the other, sequence by sequence; every array is written by NumPy into one staging
area. A step of A (one token at position 70), B (one at 5) and C (a chunk of 3 from position 64), blocks of 64:

    ids            | a70 | b5 | c64 c65 c66 |      [T]     tokens to compute
    positions      | 70  | 5  | 64  65  66  |      [T]
    slots          | block_table[position // 64] * 64 + position % 64 |   [T] where key and value are written
    cu_seqlens     | 0  1  2  5 |                  [S + 1] where each sequence begins
    context_lens   | 71 | 6 | 67 |                 [S]     keys that its last token sees
    block_tables   | one row of block numbers each |   [S, most blocks of a sequence]
    logits_rows    | 0  1  4 |                     [R]     the rows to sample from: ends of known tokens

A step in which every sequence decodes is recorded once for its shape (number of sequences, bucket of context lengths)
and replayed ever after: its Python costs no more than filling the arrays. A device says which numbers of sequences are
worth a plan; others are padded to the next one by sequences of no context, whose keys and values go nowhere:

    ids            | a70 | b5 | 0  0 |         slots, context_lens    | ... | -1 -1 |    | 71 | 6 | 0  0 |

What costs time for each request is written once and kept from step to step in its seat (seats.py): a step gathers the
block tables of its requests with one call of NumPy.

Launching a step and waiting for its tokens are two things, so that the next step can be launched in between. It finds
the tokens that the host has not seen yet where they were sampled: in `ids` stands -1 - row for the token of that row,
and the first kernel of the step puts it in its place.

Where ranks share the model (parallel.py), rank 0 does all of this and the others make the same launches on the same
inputs, as it tells them: the methods of "What every rank does".

Logprobs of prompt tokens need the logits of (nearly) all rows. They are computed in slabs of a few rows, each reduced
to logprobs before the next: never more than a slab of logits exists.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fastdeploy.device import GIB, Field, Plan
from fastdeploy.engine.logprobs import LogprobReader
from fastdeploy.engine.request import Request, TokenLogprobs
from fastdeploy.engine.sampler import Sampled, Sampler
from fastdeploy.engine.scheduler import ScheduledBatch, ScheduledRequest, StepOutput
from fastdeploy.engine.seats import Seats
from fastdeploy.engine_config import ResolvedConfig
from fastdeploy.kernels.attention import AttentionBatch, split_keys, splits_in_parallel
from fastdeploy.kernels.embedding import resolve_ids
from fastdeploy.kernels.launch import target, view
from fastdeploy.models.decoder import Decoder, StepInputs

if TYPE_CHECKING:
    from fastdeploy.engine.parallel import Leader

logger = logging.getLogger("fastdeploy")

SLAB = 64  # rows of prompt logprobs at a time: enough for a linear layer's full speed


class Runner:
    """Runs the steps of one model. Owns the KV cache and all memory that a step needs.

    Args:
        model: the decoder, its weights loaded.
        config: resolved for this model.
        leader: of the other ranks, for rank 0 where there are any.
        fit: lower max_model_len to what the KV cache has room for.

    Attributes:
        config: as given, but see `fit`.
        num_blocks: blocks in the KV cache, numbered from 0; the scheduler hands them out.
        kv_cache_dtype: what they are stored in.
        overlaps: whether a step may be launched before the tokens of the step before it are known.

    Raises ValueError if the KV cache can't be as large as `config` needs it, MemoryError if the largest step does not
    fit into memory.
    """

    def __init__(self, model: Decoder, config: ResolvedConfig, leader: Leader | None = None, fit: bool = False) -> None:
        self.model = model
        self._leader = leader
        self.device = model.device
        on_gpu = self.device.name != "cpu"
        self.overlaps = leader is None and (on_gpu if config.overlap_steps is None else config.overlap_steps)
        self.block_size = config.block_size
        self.max_tokens = min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)
        self.max_seqs = min(config.max_num_seqs, self.max_tokens)
        self._allocate_step(config)
        # Second, because a GPU's memory is what the first has left.
        self.config = config = fit_to_memory(model, config) if fit else config
        self.max_splits = -(-config.max_model_len // split_keys())
        self.num_blocks = choose_num_blocks(model, config)
        self.kv_cache_dtype = model.cache_dtype(config.kv_cache_dtype)
        self._cache = model.allocate_cache(self.num_blocks, self.block_size, config.kv_cache_dtype)
        self._plans: dict[tuple[int, int], Plan] = {}
        self._num_logits = 0
        if on_gpu and not config.enforce_eager:
            self._record_all()

    def _allocate_step(self, config: ResolvedConfig) -> None:
        """All memory that a step needs, the KV cache aside."""
        max_rows = max(self.max_seqs, min(SLAB, self.max_tokens))
        max_blocks = -(-config.max_model_len // self.block_size)  # of one sequence
        lengths = (self.max_tokens, self.max_seqs, config.max_model_len, max_rows)
        try:
            self._activations = self.model.allocate_activations(*lengths)
            self._logits = self.device.empty((max_rows, self.model.config.vocab_size), "float32")
            self._sampler = Sampler(self.device, self._logits, self.max_seqs, config.max_model_len)
            self._logprobs = LogprobReader(self.device, self._logits)
        except MemoryError:
            raise MemoryError(
                f"no memory for a step of {self.max_tokens} tokens and {self.max_seqs} sequences: lower "
                "max_num_batched_tokens or max_num_seqs"
            ) from None
        self._logits_view = view(self._logits)
        self._staging = self.device.staging(self._fields(max_blocks))
        self._inputs = {name: view(tensor) for name, tensor in self._staging.device.items()}
        self._sizes = self.device.plan_sizes(self.max_seqs)
        self._seats = Seats(self.max_seqs)
        self._tables = np.zeros((self.max_seqs, max_blocks), np.int64)  # the block table of who has the seat
        self._wants_logprobs = np.zeros(self.max_seqs, bool)  # who has the seat
        self._one_token_each = np.arange(1, self.max_seqs + 1)  # where the tokens of a step of decodes end

    @property
    def split_keys(self) -> int:
        """Keys of a context that attention sums up before it adds them to the rest."""
        return split_keys()

    @property
    def fast_paths(self) -> list[str]:
        """What is done to be fast that the configuration can switch off."""
        paths = {"recorded steps": not self.config.enforce_eager, "overlapped steps": self.overlaps}
        return [name for name, is_on in paths.items() if is_on]

    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute one step: for each item of the batch the token sampled after it, and the logprobs asked for."""
        return self.launch(batch)()

    def launch(self, batch: ScheduledBatch) -> Callable[[], StepOutput]:
        """Launch one step; what is returned, called, waits for it and says what came of it.

        A step may be launched before the one before it has been waited for, unless that one's requests want logprobs.
        Its items find their tokens there, if need be: see `ScheduledRequest.row`.
        """
        try:
            return self._launch(batch)
        except BaseException:  # Ctrl-C, say: what belongs to a seat may be half written
            self._seats.forget_all()
            raise

    def _launch(self, batch: ScheduledBatch) -> Callable[[], StepOutput]:
        items = batch.items
        due = [index for index, item in enumerate(items) if item.samples]
        seats = self._seat(batch)
        ends, contexts = self._fill_tokens(batch, seats)
        num_tokens, num_due = int(ends[-1]), len(due)
        longest_context = int(contexts[: batch.num_decodes].max(initial=1))
        output = StepOutput([None] * len(items))
        with nullcontext() if self._leader is None else self._leader.step():
            if num_tokens == num_due and not self.config.enforce_eager:
                size = self._pad(num_due)
                self._send(size, size)
                self._on_all_ranks("replay_decode", size, self._num_splits(longest_context, size))
            else:
                self._staging.host["logits_rows"][:num_due] = ends[due] - 1
                prompt_rows = self._fill_prompt_rows(items, ends)
                self._send(num_tokens, len(items), logits_rows=num_due, prompt_rows=len(prompt_rows))
                num_splits = self._num_splits(longest_context, batch.num_decodes)
                longest = max(item.num_tokens for item in items)
                self._on_all_ranks("attend", num_tokens, len(items), batch.num_decodes, longest, num_splits)
                output.prompt_logprobs = self._prompt_logprobs(items, prompt_rows)
                self._on_all_ranks("project", num_due, "logits_rows", 0)
        self._num_logits = num_due
        if not due:
            return lambda: output
        requests = [items[index].request for index in due]
        if num_due < len(items):
            seats, contexts = seats[due], contexts[due]
        sampled = self._sampler.launch(requests, seats, contexts)
        read_logprobs = bool(self._wants_logprobs[seats].any())
        return partial(self.finish, sampled, requests if read_logprobs else (), due, output)

    def last_logits(self) -> np.ndarray:
        """A copy of the last step's logits, [R, vocabulary] float32: a row for each item that was sampled, in order."""
        return self.device.to_numpy(self._logits_view.rows(self._num_logits))

    # The step's inputs

    def _fields(self, max_blocks: int) -> dict[str, Field]:
        tokens, seqs = (self.max_tokens,), (self.max_seqs,)
        return {
            "ids": Field(tokens, "int32"),
            "positions": Field(tokens, "int32"),
            "slots": Field(tokens, "int64"),
            "cu_seqlens": Field((self.max_seqs + 1,), "int32"),
            "context_lens": Field(seqs, "int32"),
            "block_tables": Field((self.max_seqs, max_blocks), "int32"),
            "logits_rows": Field(seqs, "int32"),
            "prompt_rows": Field(tokens, "int32"),
        }

    def _seat(self, batch: ScheduledBatch) -> np.ndarray:
        """The seats of the batch's requests, [items] int64; what is kept there is brought up to date."""
        seats, newcomers = self._seats.take([item.request for item in batch.items])
        for request in newcomers:
            seat = self._seats.of(request)
            assert seat is not None
            self._sampler.enter(request, seat)
            self._wants_logprobs[seat] = request.sampling_params.logprobs is not None
        for request in (*newcomers, *batch.moved):
            seat = self._seats.of(request)
            if seat is not None:  # who is not in this batch may have lost it
                self._tables[seat, : len(request.block_table)] = request.block_table
        return seats

    def _fill_tokens(self, batch: ScheduledBatch, seats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write ids, positions, slots, cu_seqlens, context_lens and block_tables.

        Returns the end of each item's tokens, cu_seqlens without its 0, and its context_len: [items] int64.
        """
        items, host = batch.items, self._staging.host
        positions = np.array([item.start for item in items])
        owners = seats  # of each token
        if batch.num_decodes == len(items):
            ends, contexts = self._one_token_each[: len(items)], positions + 1
        else:
            counts = np.array([item.num_tokens for item in items])
            ends, contexts = counts.cumsum(), positions + counts
            positions = np.arange(ends[-1]) - np.repeat(ends - contexts, counts)
            owners = np.repeat(seats, counts)
        blocks, offsets = np.divmod(positions, self.block_size)
        host["ids"][: len(positions)] = _ids(batch)
        host["positions"][: len(positions)] = positions
        host["slots"][: len(positions)] = self._tables[owners, blocks] * self.block_size + offsets
        host["cu_seqlens"][1 : len(items) + 1] = ends
        host["context_lens"][: len(items)] = contexts
        used = int(blocks.max()) + 1  # no more columns than the longest sequence has
        host["block_tables"][: len(items), :used] = self._tables[seats, :used]
        return ends, contexts

    def _pad(self, num_seqs: int) -> int:
        """Fill a step of decodes up to the next size that has plans, with sequences of no context; returns the size."""
        size = self._sizes[bisect_left(self._sizes, num_seqs)]
        if size == num_seqs:
            return size
        for name, value in {"ids": 0, "positions": 0, "slots": -1, "context_lens": 0}.items():
            self._staging.host[name][num_seqs:size] = value
        self._staging.host["cu_seqlens"][num_seqs + 1 : size + 1] = range(num_seqs + 1, size + 1)
        return size

    def _fill_prompt_rows(self, items: Sequence[ScheduledRequest], ends: np.ndarray) -> list[tuple[int, int]]:
        """Write the rows that predict prompt tokens whose logprobs are wanted; (item, position) of each."""
        places: list[tuple[int, int]] = []
        rows: list[int] = []
        for index, item in enumerate(items):
            request = item.request
            if request.wants_prompt_logprobs:
                known = len(request.prompt_logprobs)  # before a preemption: not again
                end = min(item.start + item.num_tokens, len(request.prompt_token_ids) - 1)
                positions = range(max(item.start, known), end)
                first_row = int(ends[index]) - item.num_tokens - item.start
                rows += [first_row + position for position in positions]
                places += [(index, position) for position in positions]
        self._staging.host["prompt_rows"][: len(rows)] = rows
        return places

    # The step, in common with the other ranks

    def _send(self, num_tokens: int, num_seqs: int, **rows: int) -> None:
        """Bring the step's inputs to all devices; `rows` says how many entries of other fields are used."""
        if self._leader is not None:
            used = {
                **dict.fromkeys(("ids", "positions", "slots"), num_tokens),
                **dict.fromkeys(("context_lens", "block_tables"), num_seqs),
                "cu_seqlens": num_seqs + 1,
                **rows,
            }
            self._leader.tell("receive", {name: self._staging.host[name][:count] for name, count in used.items()})
        self._staging.upload()

    def _on_all_ranks(self, method: str, *arguments: int | str) -> None:
        """Call one of the methods of "What every rank does" on every rank."""
        if self._leader is not None:
            self._leader.tell(method, *arguments)
        getattr(self, method)(*arguments)

    # What every rank does

    def receive(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Take a step's inputs, the used part of each field, from rank 0."""
        for name, values in inputs.items():
            self._staging.host[name][: len(values)] = values
        self._staging.upload()

    def replay_decode(self, num_seqs: int, num_splits: int) -> None:
        """A step of one token and one sample for each sequence, up to the logits."""
        self._plan(num_seqs, num_splits).replay()

    def _plan(self, num_seqs: int, num_splits: int) -> Plan:
        plan = self._plans.get((num_seqs, num_splits))
        if plan is None:
            plan = self.device.record(lambda: self._decode(num_seqs, num_splits))
            self._plans[num_seqs, num_splits] = plan
        return plan

    def _record_all(self) -> None:
        """Record the plans of all shapes, so that no request waits for one: on a GPU that takes a while."""
        contexts = [split_keys() << power for power in range(self.max_splits.bit_length() + 1)]
        self._staging.host["slots"][:] = -1  # a recording may run: it shall write no keys
        self._staging.upload()
        for size in reversed(self._sizes):
            for num_splits in sorted({self._num_splits(context, size) for context in contexts}, reverse=True):
                self._plan(size, num_splits)
        self._sampler.record_all()
        logger.info("%d decode steps recorded", len(self._plans))

    def _decode(self, num_seqs: int, num_splits: int) -> None:
        self.attend(num_seqs, num_seqs, num_decodes=num_seqs, longest=1, num_splits=num_splits)
        self.model.project(self._logits_view.rows(num_seqs), None, self._activations)

    def attend(self, num_tokens: int, num_seqs: int, num_decodes: int, longest: int, num_splits: int) -> None:
        """Launch the kernels of a step whose inputs have been filled in, up to the last layer's attention."""
        inputs = self._inputs
        if self.overlaps:
            resolve_ids(inputs["ids"].rows(num_tokens), self._sampler.sampled)
        attention = AttentionBatch(
            num_decodes=num_decodes,
            num_seqs=num_seqs,
            max_query_len=longest,
            cu_seqlens=inputs["cu_seqlens"].rows(num_seqs + 1),
            context_lens=inputs["context_lens"].rows(num_seqs),
            block_tables=inputs["block_tables"].rows(num_seqs),
            num_splits=num_splits,
        )
        step = StepInputs(
            ids=inputs["ids"].rows(num_tokens),
            positions=inputs["positions"].rows(num_tokens),
            slots=inputs["slots"].rows(num_tokens),
            attention=attention,
            num_tokens=num_tokens,
        )
        self.device.run(lambda: self.model.attend(step, self._cache, self._activations))

    def project(self, count: int, rows: str, start: int) -> None:
        """The logits of `count` rows of the step, listed in the input `rows` from `start` on."""
        if count:
            logits, listed = self._logits_view.rows(count), self._inputs[rows].rows(count, start)
            self.device.run(lambda: self.model.project(logits, listed, self._activations))

    # What becomes of the logits

    def finish(
        self, sampled: Callable[[], Sampled], requests: Sequence[Request], due: Sequence[int], output: StepOutput
    ) -> StepOutput:
        """Wait for the token of each item in `due`, and read the logprobs of their requests, which are empty if nobody
        wants any."""
        tokens, errors = sampled()
        for index, token in zip(due, tokens, strict=True):
            output.tokens[index] = token
        output.errors = {due[row]: error for row, error in errors.items()}
        if requests:
            numbers = [request.sampling_params.logprobs for request in requests]
            found = self._logprobs.read([max(token, 0) for token in tokens], [number or 0 for number in numbers])
            for index, token, number, logprobs in zip(due, tokens, numbers, found, strict=True):
                if number is not None and token >= 0:
                    output.logprobs[index] = logprobs
        return output

    def _prompt_logprobs(
        self, items: Sequence[ScheduledRequest], places: Sequence[tuple[int, int]]
    ) -> dict[int, list[TokenLogprobs]]:
        """The logprobs of the tokens that follow `places`, slab by slab; by item."""
        found: dict[int, list[TokenLogprobs]] = {}
        for start in range(0, len(places), SLAB):
            slab = places[start : start + SLAB]
            self._on_all_ranks("project", len(slab), "prompt_rows", start)
            requests = [items[index].request for index, _ in slab]
            tokens = [request.token_ids[position + 1] for request, (_, position) in zip(requests, slab, strict=True)]
            numbers = [request.sampling_params.prompt_logprobs or 0 for request in requests]
            for (index, _), each in zip(slab, self._logprobs.read(tokens, numbers), strict=True):
                found.setdefault(index, []).append(each)
        return found

    def _num_splits(self, context: int, num_decodes: int) -> int:
        """Into how many splits attention cuts decodes of up to this context: a power of two, or as many as
        the longest sequence has.

        Few numbers, so that few plans are recorded: a part past a sequence's end costs next to nothing. 1 for as many
        decodes as keep the processor busy uncut: each then walks over its own context, whatever this number is.
        """
        needed = -(-context // split_keys())
        num_splits = min(1 << (needed - 1).bit_length(), self.max_splits)
        return num_splits if splits_in_parallel(target(), num_decodes, self.model.heads, num_splits) else 1


def _ids(batch: ScheduledBatch) -> list[int]:
    """The ids of a step's tokens; -1 - row for one that the step before has sampled in that row, see `resolve_ids`."""
    decodes, chunks = batch.items[: batch.num_decodes], batch.items[batch.num_decodes :]
    ids = [-1 - item.row if item.row >= 0 else item.request.token_ids[item.start] for item in decodes]
    for item in chunks:
        ids += item.request.token_ids[item.start : item.start + item.num_tokens]
    return ids


def fit_to_memory(model: Decoder, config: ResolvedConfig) -> ResolvedConfig:
    """`config` with max_model_len lowered, if need be, to the longest sequence that the KV cache will have room for."""
    block_bytes = model.cache_bytes_per_block(config.block_size, config.kv_cache_dtype)
    affordable = model.device.cache_budget(config.gpu_memory_utilization) // block_bytes
    held = (config.num_gpu_blocks_override or affordable) * config.block_size
    if held >= config.max_model_len or held == 0:  # `Runner` says what to do about no memory at all
        return config
    logger.info("max_model_len is %d, not %d: the KV cache has room for no more", held, config.max_model_len)
    return replace(config, max_model_len=held)


def choose_num_blocks(model: Decoder, config: ResolvedConfig) -> int:
    """Blocks of the KV cache: the override, else as many as `max_num_seqs` sequences of full length can use and the
    device's budget affords.

    Raises ValueError if that is less than one sequence of full length, or if the override can't fit.
    """
    block_bytes = model.cache_bytes_per_block(config.block_size, config.kv_cache_dtype)
    override = config.num_gpu_blocks_override
    if override is not None:
        free = model.device.free_memory()
        if override * block_bytes > free:
            raise ValueError(
                f"num_gpu_blocks_override={override} takes {override * block_bytes / GIB:.1f} GiB of memory, "
                f"{free / GIB:.1f} GiB are free: at most {free // block_bytes} blocks fit"
            )
        return override
    per_sequence = -(-config.max_model_len // config.block_size)
    affordable = model.device.cache_budget(config.gpu_memory_utilization) // block_bytes
    if affordable < per_sequence:
        raise ValueError(
            f"max_model_len={config.max_model_len} needs {per_sequence * block_bytes / GIB:.2f} GiB of KV cache for a "
            f"single sequence, {affordable * block_bytes / GIB:.2f} GiB may be used: lower max_model_len to at most "
            f"{affordable * config.block_size}, or free memory"
        )
    return min(affordable, config.max_num_seqs * per_sequence)
