"""The host's side of sampling: which request samples how, and what the kernels have to know of it.

A request that samples gets a slot: a row of the arrays from which the kernels read its parameters
(`kernels.sampling.SamplingState`). It keeps the slot while it runs, so that a step writes no more than which slots its
rows have and what the newest tokens changed. Of the slot's arrays three are its edit list, the tokens whose logits are
not to be taken as the model gave them:

    edit_ids    | 17 | 4    | 2    | 905                       |    a biased and a banned token, one that is held back
    edit_bias   | .5 | -inf | 0    | 0                         |    until min_tokens are there, and a penalised one,
    edit_seen   | 0  | 0    | HELD | IN_PROMPT + 3 (in output) |    which occurred
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
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
    SamplingWorkspace,
    sample,
    workspace_fields,
)
from fastdeploy.sampling_params import SamplingParams

logger = logging.getLogger("fastdeploy")

HELD, IN_PROMPT = HELD_BACK.value, SEEN_IN_PROMPT.value  # of edit_seen

MAX_EXTRA_EDITS = 1024  # tokens that a request may bias, ban and hold back; its own tokens come on top
ROWS = ("sampled", "slots", "positions", "forced")  # what a step has for each row, the first written by the kernels
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
        max_seqs: most requests of a step.
        max_model_len: most tokens of a request.
    """

    def __init__(self, device: Device, logits: Any, max_seqs: int, max_model_len: int) -> None:
        vocabulary = logits.shape[1]
        max_edits = min(vocabulary, max_model_len + MAX_EXTRA_EDITS)
        self._device = device
        self._logits_view = view(logits)
        self._slots = device.staging(_slot_fields(max_seqs, max_edits))
        self._state = SamplingState(**{name: view(tensor) for name, tensor in self._slots.device.items()})
        self._rows = device.staging({name: Field((max_seqs,), "int32") for name in ROWS})
        self._row_views = [view(self._rows.device[name]) for name in ROWS]
        buffers = workspace_fields(max_seqs, vocabulary, max_edits)
        self._workspace = SamplingWorkspace(**{name: view(device.empty(*field)) for name, field in buffers.items()})
        self._slot_of: dict[Request, int] = {}
        self._free = list(range(max_seqs))
        self._following: dict[Request, EditList] = {}  # the edit lists that new tokens change
        self._plans: dict[int, Plan] = {}

    def sample(self, requests: Sequence[Request]) -> tuple[list[int], dict[int, str]]:
        """The next token of each request, whose logits are row i for requests[i]. Leaves the logits as they were.

        Returns the tokens, as in `StepOutput`: NO_NUMBERS, ALL_BANNED or FAILED where there is none; and by row what a
        logits processor raised.
        """
        try:
            self._prepare(requests)
        except BaseException:  # Ctrl-C, say: a slot may be half written
            self._forget_all()
            raise
        raw: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        for row, request in enumerate(requests):
            if request.sampling_params.logits_processors:
                raw[row] = self._device.to_numpy(self._row(row))
                try:
                    self._device.write(self._row(row), processed(request, raw[row]))
                except (Exception, SystemExit) as error:  # a user's function: it fails its request alone
                    logger.warning("a logits processor failed", exc_info=True)
                    errors[row] = f"a logits processor raised {type(error).__name__}: {error}"
        plan = self._plans.get(len(requests))
        if plan is None:
            plan = self._device.record(lambda: self._launch(len(requests)))
            self._plans[len(requests)] = plan
        plan.replay()
        tokens = self._rows.fetch("sampled")()[: len(requests)].tolist()
        for row, logits in raw.items():
            self._device.write(self._row(row), logits)
        for row in errors:
            tokens[row] = FAILED
        return tokens, errors

    def _row(self, row: int) -> TensorView:
        """A row of logits, [V]."""
        return self._logits_view.rows(1, row).reshape(self._logits_view.shape[1])

    def _launch(self, count: int) -> None:
        sampled, slots, positions, forced = (each.rows(count) for each in self._row_views)
        sample(sampled, self._logits_view.rows(count), slots, positions, forced, self._state, self._workspace)

    def _prepare(self, requests: Sequence[Request]) -> None:
        """Write what the kernels read."""
        dirty = False
        slots = self._slot_of
        for request in requests:
            edits = self._following.get(request)
            if edits is not None:
                edits.update(request)
                self._slots.host["num_edits"][slots[request]] = len(edits)
                dirty = True
            elif request not in slots:
                self._enter(request, requests)
                dirty = True
        if dirty:
            self._slots.upload()  # all of it: free where host and device share their memory, as on a CPU
        host, count = self._rows.host, len(requests)
        host["slots"][:count] = [slots[request] for request in requests]
        host["positions"][:count] = [len(request.token_ids) for request in requests]
        host["forced"][:count] = [-1 if token is None else token for token in (r.forced_token() for r in requests)]
        self._rows.upload()

    def _enter(self, request: Request, requests: Sequence[Request]) -> None:
        """Give a request a slot and write its parameters there."""
        leavers = [each for each in self._slot_of if each.finished]
        if not self._free and not leavers:  # the others may come back: they sit out this step
            leavers = [each for each in self._slot_of if each not in requests]
        for leaver in leavers:
            self._free.append(self._slot_of.pop(leaver))
            self._following.pop(leaver, None)
        slot = self._free.pop()
        host, params = self._slots.host, request.sampling_params
        for name in PARAMETERS:
            host[name][slot] = getattr(params, name)
        host["hold_until"][slot] = len(request.prompt_token_ids) + params.min_tokens
        edits = EditList(request, host["edit_ids"][slot], host["edit_bias"][slot], host["edit_seen"][slot])
        host["num_edits"][slot] = len(edits)
        if edits.follows_output:
            self._following[request] = edits
        self._slot_of[request] = slot

    def _forget_all(self) -> None:
        self._slot_of.clear()
        self._following.clear()
        self._free = list(range(self._slots.host["seed"].shape[0]))


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


def _slot_fields(max_seqs: int, max_edits: int) -> dict[str, Field]:
    """The arrays of SamplingState, a row per slot."""
    return {
        **{name: Field((max_seqs,), dtype) for name, dtype in PARAMETERS.items()},
        "hold_until": Field((max_seqs,), "int32"),
        "num_edits": Field((max_seqs,), "int32"),
        "edit_ids": Field((max_seqs, max_edits), "int32"),
        "edit_bias": Field((max_seqs, max_edits), "float32"),
        "edit_seen": Field((max_seqs, max_edits), "int32"),
    }
