"""The host's side of sampling: which request samples how, and what the kernels have to know of it.

A request's seat (seats.py) is its slot here: a row of the arrays from which the kernels read its parameters
(`kernels.sampling.SamplingState`). They are written once, so that a step writes no more than which slots its rows have
and what the newest tokens changed. Of the slot's arrays three are its edit list, the tokens whose logits are not to be
taken as the model gave them:

    edit_ids    | 17 | 4    | 2    | 905                       |    a biased and a banned token, one that is held back
    edit_bias   | .5 | -inf | 0    | 0                         |    until min_tokens are there, and a penalised one,
    edit_seen   | 0  | 0    | HELD | IN_PROMPT + 3 (in output) |    which occurred
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastdeploy.device import Device, Field, Plan
from fastdeploy.engine.request import Request
from fastdeploy.engine.scheduler import FAILED
from fastdeploy.kernels.launch import TensorView, view
from fastdeploy.kernels.sampling import (
    HELD_BACK,
    SEEN_IN_PROMPT,
    SamplingState,
    allocate_workspace,
    sample,
)
from fastdeploy.sampling_params import SamplingParams

logger = logging.getLogger("fastdeploy")

HELD, IN_PROMPT = HELD_BACK.value, SEEN_IN_PROMPT.value  # of edit_seen

MAX_EXTRA_EDITS = 1024  # tokens that a request may bias, ban and hold back; its own tokens come on top
ROWS = ("slots", "positions", "forced")  # what a step has for each row
PARAMETERS = {  # that a slot takes from SamplingParams as they are
    "temperature": "float32",
    "top_p": "float32",
    "min_p": "float32",
    "repetition_penalty": "float32",
    "presence_penalty": "float32",
    "frequency_penalty": "float32",
    "top_k": "int32",
    "seed": "int64",
}
EDITS = {"edit_ids": "int32", "edit_bias": "float32", "edit_seen": "int32"}  # of a slot, an element per edit

Sampled = tuple[list[int], dict[int, str]]  # tokens as in `StepOutput`; by row, what a logits processor raised


class EditList:
    """One request's edit list, kept up to date in its slot's rows of `edit_ids`, `edit_bias` and `edit_seen`."""

    def __init__(self, request: Request, ids: np.ndarray, bias: np.ndarray, seen: np.ndarray) -> None:
        self._ids, self._bias, self._seen = ids, bias, seen
        self._places: dict[int, int] = {}  # token id -> its place in the list
        self._num_prompt = self._num_read = len(request.prompt_token_ids)
        self._penalised = has_penalties(request.sampling_params)
        self._sequences: list[tuple[list[int], int, float]] = []  # a banned sequence: head, place of its last, bias
        for token_id, value in (request.sampling_params.logit_bias or {}).items():
            bias[self._place(token_id)] = value
        for *head, last in sorted(request.banned, key=len):  # whole bans first: they are the bias of longer ones' ends
            place = self._place(last)
            if head:
                self._sequences.append((head, place, float(bias[place])))
            else:
                bias[place] = -math.inf
        if request.sampling_params.min_tokens:
            for token_id in request.eos_token_ids | request.stop_token_ids:
                seen[self._place(token_id)] |= HELD
        if self._penalised:
            for token_id in set(request.prompt_token_ids):
                seen[self._place(token_id)] |= IN_PROMPT
        self.update(request)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def follows_output(self) -> bool:
        """Whether new tokens change the list."""
        return self._penalised or bool(self._sequences)

    def update(self, request: Request) -> None:
        """Take note of the output tokens that came since the last time."""
        if self._penalised:
            for token_id in request.token_ids[self._num_read :]:
                self._seen[self._place(token_id)] += 1
        self._num_read = len(request.token_ids)
        for _, place, bias in self._sequences:
            self._bias[place] = bias
        for head, place, _ in self._sequences:
            start = self._num_read - len(head)
            if start >= self._num_prompt and request.token_ids[start:] == head:
                self._bias[place] = -math.inf

    def _place(self, token_id: int) -> int:
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = len(self._places)
            self._ids[place], self._bias[place], self._seen[place] = token_id, 0.0, 0
        return place


def has_penalties(params: SamplingParams) -> bool:
    """Whether tokens that occurred are to become more or less probable."""
    return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)


class Sampler:
    """Chooses tokens for the first rows of `logits`.

    Args:
        device: where the kernels run.
        logits: [rows, vocabulary] float32, a tensor of the device.
        max_seqs: most requests of a step, and the number of slots.
        max_model_len: most tokens of a request.

    Attributes:
        sampled: [max_seqs] int32, a view of what the latest launch has sampled.
    """

    def __init__(self, device: Device, logits: Any, max_seqs: int, max_model_len: int) -> None:
        self._logits_view = view(logits)
        vocabulary = self._logits_view.shape[1]
        max_edits = min(vocabulary, max_model_len + MAX_EXTRA_EDITS)
        self._device = device
        self._null = max_seqs  # a slot for padding: greedy, without edits, as zeros say
        self._parameters = device.staging(_parameter_fields(max_seqs + 1))
        self._edits = device.staging(_edit_fields(max_seqs + 1, max_edits))
        given = {**self._parameters.device, **self._edits.device}
        self._state = SamplingState(**{name: view(tensor) for name, tensor in given.items()})
        self._rows = device.staging({name: Field((max_seqs,), "int32") for name in ROWS})
        self._row_views = [view(self._rows.device[name]) for name in ROWS]
        self._results = device.staging({"sampled": Field((max_seqs,), "int32")})
        self.sampled = view(self._results.device["sampled"])
        self._workspace = allocate_workspace(device.empty, max_seqs, vocabulary, max_edits)
        self._sizes = device.plan_sizes(max_seqs)
        self._plans: dict[int, Plan] = {}
        self._written = False  # parameters, since their last upload
        self._edited: set[int] = set()  # slots with edits written since their last upload
        # The slots whose requests need the host at every step.
        self._following: dict[int, EditList] = {}  # new tokens change the list
        self._thinking: dict[int, Request] = {}  # a token may be forced
        self._processing: dict[int, Request] = {}  # have logits processors

    def record_all(self) -> None:
        """Record the plans of all sizes, the largest first: the memory that graphs share is then large enough."""
        for size in reversed(self._sizes):
            self._plan(size)

    def enter(self, request: Request, slot: int) -> None:
        """Write a request's parameters to a slot, whoever had it before."""
        for special in (self._following, self._thinking, self._processing):
            special.pop(slot, None)
        self._written = True
        params, host = request.sampling_params, self._parameters.host
        for name in PARAMETERS:
            host[name][slot] = getattr(params, name)
        host["hold_until"][slot] = len(request.prompt_token_ids) + params.min_tokens
        edits = EditList(request, *(self._edits.host[name][slot] for name in EDITS))
        host["num_edits"][slot] = len(edits)
        if len(edits):
            self._edited.add(slot)
        if edits.follows_output:
            self._following[slot] = edits
        if request.thinking is not None:
            self._thinking[slot] = request
        if params.logits_processors:
            self._processing[slot] = request

    def launch(self, requests: Sequence[Request], slots: np.ndarray, positions: np.ndarray) -> Callable[[], Sampled]:
        """Sample the next token of each request, whose logits are row i for requests[i]. They are the same afterwards.

        slots: [requests], whose parameters were written by `enter`. positions: [requests], of the tokens to be sampled.
        What is returned, called, waits for the tokens.
        """
        count, places = len(requests), slots.tolist()
        size = self._sizes[bisect_left(self._sizes, count)]
        self._follow(requests, places)
        self._upload_slots()
        host = self._rows.host
        for name, values, padding in (("slots", slots, self._null), ("positions", positions, 0)):
            host[name][:count] = values
            host[name][count:size] = padding
        host["forced"][:size] = -1
        if self._thinking:
            tokens = (request.forced_token() for request in requests)
            host["forced"][:count] = [-1 if token is None else token for token in tokens]
        self._rows.upload()
        raw, errors = self._process(places)
        self._plan(size).replay()
        fetched = self._results.fetch("sampled")
        for row, logits in raw.items():
            self._device.write(self._row(row), logits)

        def tokens_and_errors() -> Sampled:
            tokens = fetched()[:count].tolist()
            for row in errors:
                tokens[row] = FAILED
            return tokens, errors

        return tokens_and_errors

    def _follow(self, requests: Sequence[Request], slots: Sequence[int]) -> None:
        """Bring the edit lists that new tokens change up to date."""
        if not self._following:
            return
        for slot, request in zip(slots, requests, strict=True):
            edits = self._following.get(slot)
            if edits is not None:
                self._written = True
                self._edited.add(slot)
                edits.update(request)
                self._parameters.host["num_edits"][slot] = len(edits)

    def _upload_slots(self) -> None:
        """Of the edit lists, which are most of the memory, only those that have changed."""
        if self._written:
            self._parameters.upload()
            self._written = False
        if self._edited:
            self._edits.upload(sorted(self._edited))
            self._edited.clear()

    def _process(self, slots: Sequence[int]) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Call the logits processors. By row: the logits before, and what a processor raised."""
        raw: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        if not self._processing:
            return raw, errors
        for row, slot in enumerate(slots):
            request = self._processing.get(slot)
            if request is not None:
                raw[row] = self._device.to_numpy(self._row(row))
                try:
                    self._device.write(self._row(row), processed(request, raw[row]))
                except (Exception, SystemExit) as error:  # a user's function: it fails its request alone
                    logger.warning("a logits processor failed", exc_info=True)
                    errors[row] = f"a logits processor raised {type(error).__name__}: {error}"
        return raw, errors

    def _row(self, row: int) -> TensorView:
        """A row of logits, [V]."""
        return self._logits_view.rows(1, row).reshape(self._logits_view.shape[1])

    def _plan(self, size: int) -> Plan:
        """The launches for this many rows, recorded."""
        plan = self._plans.get(size)
        if plan is None:
            plan = self._plans[size] = self._device.record(lambda: self._sample(size))
        return plan

    def _sample(self, size: int) -> None:
        slots, positions, forced = (each.rows(size) for each in self._row_views)
        logits = self._logits_view.rows(size)
        sample(self.sampled.rows(size), logits, slots, positions, forced, self._state, self._workspace)


def processed(request: Request, logits: np.ndarray) -> np.ndarray:
    """What a request's logits processors make of its row of logits, [V] float32, which stays as it is.

    Raises whatever they raise, and ValueError if one returns another shape, or NaN or +inf where there was none.
    """
    result = logits.copy()
    for processor in request.sampling_params.logits_processors or ():
        returned = processor(list(request.token_ids), result)
        if returned is not None:
            with np.errstate(over="ignore"):  # found below
                result = np.array(returned, np.float32)
        if result.shape != logits.shape:
            raise ValueError(f"{processor!r} returned shape {result.shape}, expected {logits.shape}")
    if not (result < np.inf).all() and (logits < np.inf).all():  # NaN is not less than anything
        raise ValueError("a logit became NaN or +inf as a float32")
    return result


def _parameter_fields(num_slots: int) -> dict[str, Field]:
    """The arrays of SamplingState that have a number per slot."""
    dtypes = {**PARAMETERS, "hold_until": "int32", "num_edits": "int32"}
    return {name: Field((num_slots,), dtype) for name, dtype in dtypes.items()}


def _edit_fields(num_slots: int, max_edits: int) -> dict[str, Field]:
    """The arrays of SamplingState that have a list per slot."""
    return {name: Field((num_slots, max_edits), dtype) for name, dtype in EDITS.items()}
