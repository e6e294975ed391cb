"""The loop: schedule -> run -> update, and what users get to see of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Protocol

from fastdeploy.engine.request import CompletionOutput, Request, RequestOutput
from fastdeploy.engine.scheduler import ScheduledBatch, Scheduler

_CLOCK_ORIGIN = time.time() - time.perf_counter()


def now() -> float:
    """Unix time in seconds, on a clock that never goes backwards."""
    return _CLOCK_ORIGIN + time.perf_counter()


class Runner(Protocol):
    """What the engine needs of `runner.Runner`; tests have one without a model."""

    def run(self, batch: ScheduledBatch) -> Sequence[int | None]:
        """For each item of the batch its sampled token; None in mid-prefill; -1 where the logits were no numbers."""


class Detokenizer(Protocol):
    """Turns the tokens of one request into text as they come."""

    def add(self, token_id: int) -> str:
        """The text that is complete with this token; incomplete UTF-8 is held back."""

    def finish(self) -> str:
        """What was held back."""


class Transcript:
    """The outputs of one request, made when somebody asks: text costs more than all other bookkeeping of a token."""

    def __init__(self, request: Request, detokenizer: Detokenizer) -> None:
        self.request = request
        self._detokenizer = detokenizer
        self._text = ""
        self._num_written = 0  # output tokens whose text is in _text
        self._num_outputs = 0

    def output(self) -> RequestOutput:
        """What there is by now; its delta is what the output before did not have."""
        request = self.request
        delta = self._write()
        completion = CompletionOutput(
            index=request.index,
            send_idx=self._num_outputs,
            token_ids=request.token_ids[len(request.prompt_token_ids) :],
            text=self._text,
            delta=delta,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )
        self._num_outputs += 1
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=completion,
            finished=request.finished,
            metrics=replace(request.metrics),
            error_code=request.error_code,
            error_msg=request.error_msg,
        )

    def _write(self) -> str:
        """Add the text of the new tokens and return it. The token that stopped a request has no text."""
        request = self.request
        num_tokens = request.num_output_tokens - (request.finish_reason == "stop")
        start = len(request.prompt_token_ids)
        new = request.token_ids[start + self._num_written : start + num_tokens]
        delta = "".join([self._detokenizer.add(token_id) for token_id in new])
        if request.finished:
            delta += self._detokenizer.finish()
        self._num_written = num_tokens
        self._text += delta
        return delta


class Engine:
    """Runs requests to their end. What one call queued goes when the call is left, however it is left.

    Several calls may be under way at once (a stream that is not read to its end, and another call): each step serves
    the requests of all of them, and each call gets to see its own. They may come from several threads: one at a time
    computes steps, the others wait and find what it has computed for them.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        # Unfinished requests in order of arrival, and where to note their changes: one dict (an ordered set) a call.
        self._news: dict[Request, dict[Request, None]] = {}
        self._lock = threading.RLock()  # held by whoever computes a step or changes what is below or in the scheduler
        # Requests of calls that are over, to be freed: at once, but not in the middle of a step, where the garbage
        # collector may close an iterator.
        self._left: deque[Request] = deque()
        self._stepping = False

    def run(self, requests: Sequence[Request]) -> Generator[list[Request], None, None]:
        """Queue the requests; yield those that have new tokens or are finished, step by step, until all are finished.

        Closing the iterator, or an exception from a step (Ctrl-C included), frees what is left of these requests.
        """
        news: dict[Request, None] = {}
        num_unfinished = len(requests)
        try:
            with self._lock:
                for request in requests:
                    request.metrics.arrival_time = now()
                    self._news[request] = news
                    self.scheduler.add(request)
            while num_unfinished:
                with self._lock:
                    while not news:
                        self._step()
                    changed = list(news)
                    news.clear()
                num_unfinished -= sum(request.finished for request in changed)
                yield changed
        finally:
            self._leave(requests)

    def _step(self) -> None:
        """Compute one batch, of all calls' requests, and note who changed."""
        try:
            self._stepping = True
            self._forget_left()
            batch = self.scheduler.schedule()
            started = now()
            sampled = self.runner.run(batch) if batch.items else []
            ended = now()
            self.scheduler.update(batch, sampled)
            for item, token_id in zip(batch.items, sampled, strict=True):
                item.request.metrics.record_step(started, ended, sampled=token_id is not None and token_id >= 0)
                if token_id is not None:
                    self._note(item.request)
            for request in batch.rejected:
                self._note(request)
            self._stepping = False
        except BaseException:
            self._recover()
            raise

    def _leave(self, requests: Sequence[Request]) -> None:
        """Free what is left of a call's requests."""
        self._left.extend(requests)  # first of all: should Ctrl-C strike below, the next step forgets them
        with self._lock:
            if not self._stepping:
                try:
                    self._forget_left()
                except BaseException:
                    self._recover()
                    raise

    def _forget_left(self) -> None:
        while self._left:
            request = self._left[0]  # taken out last, see above
            if request in self._news:
                self.scheduler.abort(request)
                del self._news[request]
            self._left.popleft()

    def _note(self, request: Request) -> None:
        self._news[request][request] = None
        if request.finished:
            del self._news[request]

    def _recover(self) -> None:
        """Rebuild rather than repair: the exception may have struck between any two statements."""
        for request in list(self._news):
            if request.num_output_tokens and not request.finished:
                request.conclude()  # its last token may have been appended and no more
            if request.finished:
                self._note(request)
        self.scheduler.restart(self._news)
        self._stepping = False
