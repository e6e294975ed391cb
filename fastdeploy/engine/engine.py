"""The loop: schedule -> run -> update, for the calls of all threads."""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

from fastdeploy.engine.request import Request, RequestOutput
from fastdeploy.engine.scheduler import ScheduledBatch, Scheduler, StepOutput

_CLOCK_ORIGIN = time.time() - time.perf_counter()


def now() -> float:
    """Unix time in seconds, on a clock that never goes backwards."""
    return _CLOCK_ORIGIN + time.perf_counter()


class Runner(Protocol):
    """What the engine needs of `runner.Runner`; tests have one without a model."""

    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute a batch of at least one item."""


class AsyncRunner(Runner, Protocol):
    """What the engine needs where steps overlap."""

    def launch(self, batch: ScheduledBatch) -> Callable[[], StepOutput]:
        """Have a batch computed after all that were launched before; what is returned waits for what comes of it."""


@dataclass
class Flight:
    """A step that was launched. began: when, by `now`."""

    batch: ScheduledBatch
    began: float
    wait: Callable[[], StepOutput]


@dataclass
class Call:
    """A call of `Engine.run`, and what it is to hear of."""

    partial: bool  # of every new token, not of finished requests alone
    source: Iterator[Request]  # its requests to come
    arrival: float  # when it began, by `now`
    queued: dict[Request, None] = field(default_factory=dict)  # those under way, until it has heard of their end
    news: dict[Request, None] = field(default_factory=dict)  # those that have changed since it last heard


class Engine:
    """Runs requests to their end. What one call queued goes when the call is left, however it is left.

    Several calls may be under way at once (a stream that is not read to its end, and another call): each step serves
    the requests of all of them, and each call gets to see its own. They may come from several threads: one at a time
    computes steps, the others wait and find what it has computed for them.

    overlap: launch a step before the tokens of the one before it are read, where the scheduler can foresee it. Between
    two steps one is then in flight, unless there is nobody left to profit from it.
    forkable: whether what the runner works with is there in a forked child, too: a GPU and other processes are not.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, overlap: bool = False, forkable: bool = True) -> None:
        self.scheduler = scheduler
        self.runner: Runner | None = runner  # None: closed
        self._forkable = forkable
        self._left_behind = False  # in a forked child: the parent's, and of no use here
        self._overlap = overlap
        self._flight: Flight | None = None  # of the scheduler's `pending` batch
        self._ended = 0.0  # when the latest step did
        self._calls: dict[Request, Call] = {}  # of the unfinished requests, in order of arrival
        self._lock = threading.RLock()  # held by whoever computes a step or changes what is below or in the scheduler
        # Requests that are over, and those of calls that are, to be freed: at once, but not in the middle of a change,
        # where the garbage collector may close an iterator.
        self._left: deque[Request] = deque()
        self._busy: Call | None = None  # the one that computes a step or leaves
        self._intact = True  # False: what is above and in the scheduler is being changed, or a change was cut short
        _engines.add(self)

    def run(self, requests: Iterable[Request], partial: bool = True) -> Generator[list[RequestOutput], None, None]:
        """Run the requests; step by step, yield an output of each that is finished, until all are.

        requests: taken as they are needed, so that of a call twice as many are queued as fit in a step. Made only then,
        they take no more memory, however many they are.
        partial: an output of each that has new tokens, too. The list of a step may be empty; requests that have no
        transcript appear in none.

        Closing the iterator, or an exception from a step (Ctrl-C included), frees what is left of these requests.
        Raises RuntimeError once the engine is closed.
        """
        call = Call(partial, iter(requests), now())  # before the wait for another thread's step
        try:
            with self._lock:
                self._usable_runner()
            while True:
                with self._lock:
                    self._queue(call)
                    if not call.queued:
                        return
                    while not call.news:
                        self._step(call)
                        if not partial:  # the caller may show how far it is
                            break
                    finished = [request for request in call.news if request.finish_reason is not None]
                    # Under the lock: other threads' steps change transcripts.
                    outputs = outputs_of(call.news if partial else finished)
                    call.news.clear()
                    for request in finished:
                        self._left.append(request)
                        del call.queued[request]
                yield outputs
        finally:
            self._leave(call)

    def _queue(self, call: Call) -> None:
        """Queue what a call has room for."""
        more = list(itertools.islice(call.source, 2 * self.scheduler.max_num_seqs - len(call.queued)))
        if more:
            self._usable_runner()
        for request in more:
            request.metrics.arrival_time = call.arrival
            call.queued[request] = None
            self._calls[request] = call
            self.scheduler.add(request)

    def close(self) -> None:
        """Let go of the runner, and so of model and KV cache; calls under way and later ones raise RuntimeError."""
        if self._left_behind:
            return  # the parent's memory is not this process's to free
        with self._lock:
            flight, self._flight = self._flight, None
            self.runner = None
            if flight is not None:
                flight.wait()  # it computes in the memory that will be gone

    def check_open(self) -> Runner:
        """The runner. Raises RuntimeError once the engine is closed, and in a forked child that can't have it."""
        if self._left_behind:
            raise RuntimeError(
                "this LLM was made in the parent of this forked process and can't be used here: it was generating in "
                "another thread at the time of the fork, or it has a GPU or other ranks. Make the LLM in the child, or "
                'start processes with multiprocessing.get_context("spawn")'
            )
        runner = self.runner
        if runner is None:
            raise RuntimeError("this LLM is closed and has given its memory back: make a new one to generate more")
        return runner

    def _usable_runner(self) -> Runner:
        """For whoever holds the lock: the runner, unless a step is under way, which then is a step of this thread."""
        if self._busy is not None:
            raise RuntimeError("an LLM can't be called from within its own step, by a logits processor for example")
        return self.check_open()

    def _step(self, call: Call) -> None:
        """Compute one batch, of all calls' requests, for this call, and note who changed."""
        runner = self._usable_runner()
        try:
            self._busy = call
            self._forget_left()
            self._intact = False
            flight = self._flight or self._launch(runner, self.scheduler.schedule())
            self._flight = self._launch_ahead(runner, flight.batch) if self._overlap else None
            output = flight.wait()
            began, self._ended = max(flight.began, self._ended), now()  # not before the step before it had ended
            self.scheduler.update(flight.batch, output)
            if self.scheduler.pending is None:  # the last request has ended
                self._flight = None
            self._note_step(flight.batch, output, began, self._ended)
            self._intact = True
            self._busy = None
        except BaseException:
            self._recover()
            self._busy = None
            raise

    def _launch(self, runner: Runner, batch: ScheduledBatch) -> Flight:
        if not batch.items:
            return Flight(batch, now(), lambda: StepOutput([]))
        if self._overlap:
            return Flight(batch, now(), cast(AsyncRunner, runner).launch(batch))
        return Flight(batch, now(), partial(runner.run, batch))

    def _launch_ahead(self, runner: Runner, batch: ScheduledBatch) -> Flight | None:
        """Launch the step after `batch`, if it can be foreseen."""
        following = self.scheduler.ahead(batch)
        if following is None:
            return None
        self._note(following.rejected)
        return self._launch(runner, following) if following.items else None

    def _note_step(self, batch: ScheduledBatch, output: StepOutput, began: float, ended: float) -> None:
        """Note who has changed, and measure how long it took."""
        changed = []
        for item, token_id in zip(batch.items, output.tokens, strict=True):
            if not item.dropped:
                item.request.metrics.record_step(began, ended, token_id is not None and token_id >= 0)
                if token_id is not None:
                    changed.append(item.request)
        self._note(changed)
        self._note(batch.rejected)

    def _note(self, changed: Iterable[Request]) -> None:
        """Have the calls of these requests hear of them. Who is noted as finished already is not again."""
        for request in changed:
            finished = request.finish_reason is not None  # `finished`, without a call: this is done 256 times a step
            call = self._calls.get(request)
            if call is not None and (call.partial or finished):
                call.news[request] = None
            if finished:
                self._calls.pop(request, None)

    def _leave(self, call: Call) -> None:
        """Free what is left of a call's requests."""
        self._left.extend(call.queued)  # first of all: should Ctrl-C strike below, the next step forgets them
        with self._lock:
            if self._busy is call:  # a second Ctrl-C, in the recovery from the first
                self._busy = None
            if self._busy is None:
                try:
                    self._busy = call
                    self._forget_left()
                    self._busy = None
                except BaseException:
                    self._recover()
                    self._busy = None
                    raise

    def _forget_left(self) -> None:
        if not self._intact:
            self._recover()
        self._intact = False
        while self._left:
            request = self._left[0]  # taken out last, see above
            if request in self._calls:
                self.scheduler.abort(request)
                del self._calls[request]
            # The sampler remembers a request until somebody needs its slot: not with all of this.
            request.transcript, request.logprobs, request.prompt_logprobs = None, [], []
            self._left.popleft()
        if self.scheduler.pending is None:  # nobody is left whom it is for
            self._flight = None
        self._intact = True

    def _recover(self) -> None:
        """Rebuild rather than repair: the exception may have struck between any two statements."""
        # What is in flight comes to nothing, and nobody waits for it: it writes to blocks that are handed out anew, but
        # before any step that is launched from now on does.
        self._flight = None
        for request in list(self._calls):
            if request.transcript is not None:
                request.transcript.rewind()
            request.conclude()  # its last token may have been appended and no more
            if request.finished:
                self._note([request])
        self.scheduler.restart(self._calls)
        self._intact = True

    def _after_fork(self) -> None:
        """In a forked child, which has only the thread that forked: what another one was changing stays half done."""
        at_rest = self._lock.acquire(blocking=False)
        if at_rest:
            self._lock.release()
        else:
            self._lock, self._busy = threading.RLock(), None  # nobody is here to release the lock
        self._left_behind |= not (at_rest and self._forkable)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        engine._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def outputs_of(requests: Iterable[Request]) -> list[RequestOutput]:
    """What there is by now of these requests, but for those that have no transcript."""
    return [request.transcript.output() for request in requests if request.transcript is not None]
