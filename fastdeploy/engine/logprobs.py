"""The host's side of logprobs: from rows of logits on the device to a `TokenLogprobs` for each.

The kernels reduce a row of logits to a few numbers: its normaliser, the token's own logprob and rank, and the most
probable tokens. A row comes to the host only for who wants (nearly) the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdeploy.device import Device, Field
from fastdeploy.engine.request import TokenLogprobs
from fastdeploy.kernels.launch import view
from fastdeploy.kernels.logprobs import (
    LogprobOutputs,
    LogprobWorkspace,
    output_fields,
    token_logprobs,
    workspace_fields,
)

MOST_TOP = 128  # logprobs of a row that the kernels pick out; more are picked on the host


class LogprobReader:
    """Reads logprobs off the first rows of `logits`, [rows, vocabulary] float32, a tensor of the device."""

    def __init__(self, device: Device, logits: Any) -> None:
        self._logits_view = view(logits)
        rows, vocabulary = self._logits_view.shape
        self._device = device
        self._most_top = min(MOST_TOP, vocabulary)
        self._tokens = device.staging({"tokens": Field((rows,), "int32")})
        self._tokens_view = view(self._tokens.device["tokens"])
        buffers = workspace_fields(rows, vocabulary).items()
        self._workspace = LogprobWorkspace(**{name: view(device.empty(*field)) for name, field in buffers})
        self._found = {name: view(device.empty(*field)) for name, field in output_fields(rows, self._most_top).items()}
        self._outputs = LogprobOutputs(**self._found)

    def read(self, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
        """For each row i the logprob and rank of tokens[i] and its num_top[i] most probable tokens, -1 for all."""
        count = len(tokens)
        self._tokens.host["tokens"][:count] = tokens
        self._tokens.upload()
        picked = max((number for number in num_top if 0 <= number <= self._most_top), default=0)
        logits, rows = self._logits_view.rows(count), self._tokens_view.rows(count)
        token_logprobs(self._outputs, logits, rows, picked, self._workspace)
        found = {name: self._device.to_numpy(tensor.rows(count)) for name, tensor in self._found.items()}
        order = np.argsort(-found["top_logits"][:, :picked], axis=1, kind="stable")  # ids ascend: ties by lower id
        top_ids = np.take_along_axis(found["top_ids"], order, axis=1)
        top_logprobs = np.take_along_axis(found["top_logits"], order, axis=1) - found["normaliser"][:, None]
        results = []
        for row, (token, number) in enumerate(zip(tokens, num_top, strict=True)):
            if 0 <= number <= self._most_top:
                ids, logprobs = top_ids[row, :number], top_logprobs[row, :number]
            else:
                ids, logprobs = self._whole_row(row, number, found["normaliser"][row])
            logprob, rank = float(found["logprob"][row]), int(found["rank"][row])
            results.append(TokenLogprobs(token, logprob, rank, ids, logprobs))
        return results

    def _whole_row(self, row: int, number: int, normaliser: np.float32) -> tuple[np.ndarray, np.ndarray]:
        """The `number` most probable tokens, or all, picked on the host."""
        logits = self._device.to_numpy(self._logits_view.rows(1, row))[0]
        order = np.argsort(-logits, kind="stable")  # ties by lower id
        order = order if number < 0 else order[:number]
        return order, logits[order] - normaliser
