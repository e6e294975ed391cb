"""The loop: schedule -> run -> update, for the calls of all threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import Protocol

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


class Engine:
    """Runs requests to their end. What one call queued goes when the call is left, however it is left.

    Several calls may be under way at once (a stream that is not read to its end, and another call): each step serves
    the requests of all of them, and each call gets to see its own. They may come from several threads: one at a time
    computes steps, the others wait and find what it has computed for them.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner: Runner | None = runner  # None: closed
        # Unfinished requests in order of arrival, and where to note their changes: one dict (an ordered set) a call.
        self._news: dict[Request, dict[Request, None]] = {}
        self._lock = threading.RLock()  # held by whoever computes a step or changes what is below or in the scheduler
        # Requests of calls that are over, to be freed: at once, but not in the middle of a change, where the garbage
        # collector may close an iterator.
        self._left: deque[Request] = deque()
        self._busy: dict[Request, None] | None = None  # the news of the call that computes a step or leaves
        self._intact = True  # False: what is above and in the scheduler is being changed, or a change was cut short

    def run(self, requests: Sequence[Request], partial: bool = True) -> Generator[list[RequestOutput], None, None]:
        """Queue the requests; step by step, yield an output of each that is finished, until all are.

        partial: an output of each that has new tokens, too. The list of a step may be empty; requests that have no
        transcript appear in none.

        Closing the iterator, or an exception from a step (Ctrl-C included), frees what is left of these requests.
        Raises RuntimeError once the engine is closed.
        """
        news: dict[Request, None] = {}
        num_unfinished = len(requests)
        arrival = now()  # before the wait for another thread's step
        try:
            with self._lock:
                self._usable_runner()
                for request in requests:
                    request.metrics.arrival_time = arrival
                    self._news[request] = news
                    self.scheduler.add(request)
            while num_unfinished:
                with self._lock:
                    while not news:
                        self._step(news)
                    num_unfinished -= sum([request.finish_reason is not None for request in news])
                    outputs = outputs_of(news, partial)  # under the lock: other threads' steps change transcripts
                    news.clear()
                yield outputs
        finally:
            self._leave(requests, news)

    def close(self) -> None:
        """Let go of the runner, and so of model and KV cache; calls under way and later ones raise RuntimeError."""
        with self._lock:
            self.runner = None

    def check_open(self) -> Runner:
        """The runner. Raises RuntimeError once the engine is closed."""
        runner = self.runner
        if runner is None:
            raise RuntimeError("this LLM is closed and has given its memory back: make a new one to generate more")
        return runner

    def _usable_runner(self) -> Runner:
        """For whoever holds the lock: the runner, unless a step is under way, which then is a step of this thread."""
        if self._busy is not None:
            raise RuntimeError("an LLM can't be called from within its own step, by a logits processor for example")
        return self.check_open()

    def _step(self, news: dict[Request, None]) -> None:
        """Compute one batch, of all calls' requests, for the call with these news, and note who changed."""
        runner = self._usable_runner()
        try:
            self._busy = news
            self._forget_left()
            self._intact = False
            batch = self.scheduler.schedule()
            started = now()
            output = runner.run(batch) if batch.items else StepOutput([])
            ended = now()
            self.scheduler.update(batch, output)
            for item, token_id in zip(batch.items, output.tokens, strict=True):
                request = item.request
                request.metrics.record_step(started, ended, token_id is not None and token_id >= 0)
                if token_id is not None:
                    self._note(request)
            for request in batch.rejected:
                self._note(request)
            self._intact = True
            self._busy = None
        except BaseException:
            self._recover()
            self._busy = None
            raise

    def _leave(self, requests: Sequence[Request], news: dict[Request, None]) -> None:
        """Free what is left of a call's requests."""
        self._left.extend(requests)  # first of all: should Ctrl-C strike below, the next step forgets them
        with self._lock:
            if self._busy is news:  # a second Ctrl-C, in the recovery from the first
                self._busy = None
            if self._busy is None:
                try:
                    self._busy = news
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
            if request in self._news:
                self.scheduler.abort(request)
                del self._news[request]
            # The sampler remembers a request until somebody needs its slot: not with all of this.
            request.transcript, request.logprobs, request.prompt_logprobs = None, [], []
            self._left.popleft()
        self._intact = True

    def _note(self, request: Request) -> None:
        self._news[request][request] = None
        if request.finish_reason is not None:  # `finished`, without a call: this is done 256 times a step
            del self._news[request]

    def _recover(self) -> None:
        """Rebuild rather than repair: the exception may have struck between any two statements."""
        for request in list(self._news):
            if request.transcript is not None:
                request.transcript.rewind()
            request.conclude()  # its last token may have been appended and no more
            if request.finished:
                self._note(request)
        self.scheduler.restart(self._news)
        self._intact = True


def outputs_of(changed: Iterable[Request], partial: bool) -> list[RequestOutput]:
    """What there is by now of the finished requests, with `partial` of the others, too."""
    wanted = (request for request in changed if partial or request.finished)
    return [request.transcript.output() for request in wanted if request.transcript is not None]
