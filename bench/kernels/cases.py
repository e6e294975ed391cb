"""What a case of the benchmark is: an operation at one size of a model, its cost, its inputs and what must come out.

A case draws its inputs on a machine, as a dictionary of tensors by name that every provider takes; what a provider
returns is compared with a float64 reference, for a few rows: the whole of it would take longer than the benchmark.

Bytes and FLOPs are those of the mathematics: each input read once, each output written once. What is kept between
launches (attention's partial sums, a mixture's intermediate rows) does not count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bench.kernels.machine import Machine
from fastdeploy.kernels.launch import ITEM_SIZES
from fastdeploy.kernels.rope import HeadLayout

TOLERANCES = {"bfloat16": 1e-2, "float32": 1e-3}  # of a relative error; bfloat16 rounds to 2^-9
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The sizes of a model, as its config.json has them. experts, expert_width, top_k: of a mixture, else 0."""

    name: str
    hidden: int
    intermediate: int
    heads: HeadLayout
    vocabulary: int
    theta: float
    normalises_heads: bool = False
    experts: int = 0
    expert_width: int = 0
    top_k: int = 0

    def layers(self) -> dict[str, tuple[int, int]]:
        """Output and input features of its linear layers, by name."""
        attended = self.heads.num_heads * self.heads.head_dim
        return {
            "qkv": (self.heads.qkv_width, self.hidden),
            "o": (self.hidden, attended),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "lm_head": (self.vocabulary, self.hidden),
        }


class Work(NamedTuple):
    """What a case costs."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Reference:
    """Some rows of the right output, and the columns of them that were computed (None where a row is one number)."""

    rows: tuple[int, ...]
    columns: slice | None
    values: np.ndarray

    def error(self, output: Any, float64: Callable[[Any], np.ndarray]) -> float:
        """||output - values|| / ||values||; NaN if there is NaN in the output."""
        found = _picked(output, self.rows, self.columns, float64)
        if found.shape != self.values.shape:
            raise ValueError(f"rows of shape {found.shape[1:]} instead of {self.values.shape[1:]}")
        return float(np.linalg.norm(found - self.values) / np.linalg.norm(self.values))


@dataclass(frozen=True)
class TokenReference:
    """Some rows of sampled ids, and which tokens may have come out: [rows, vocabulary] bool."""

    rows: tuple[int, ...]
    allowed: np.ndarray

    def error(self, output: Any, float64: Callable[[Any], np.ndarray]) -> float:
        """The share of the rows with a token that may not come out."""
        found = _picked(output, self.rows, None, float64).ravel().astype(np.int64)
        inside = (found >= 0) & (found < self.allowed.shape[1])
        right = self.allowed[np.arange(len(found)), np.where(inside, found, 0)] & inside
        return float(1 - right.mean())


def _picked(output: Any, rows: tuple[int, ...], columns: slice | None, float64: Callable) -> np.ndarray:
    output = output[0] if isinstance(output, tuple) else output
    return np.stack([float64(output[row] if columns is None else output[row][columns]) for row in rows])


@dataclass(frozen=True)
class Case(ABC):
    """One operation at one size.

    dtype: of activations, "bfloat16" or "float32". operation: the name that the command line and providers know it by.
    mutates: names of the tensors that a call changes.
    """

    operation: ClassVar[str]
    mutates: ClassVar[tuple[str, ...]] = ()
    model: Model
    dtype: str

    @property
    def shape(self) -> str:
        """Model and size in words."""
        return f"{self.model.name} {self.size()}"

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return ITEM_SIZES[self.dtype]

    @property
    def tolerance(self) -> float:
        """The greatest relative error that passes."""
        return TOLERANCES[self.dtype]

    @abstractmethod
    def size(self) -> str:
        """The size in words, such as "tokens=64"."""

    @abstractmethod
    def work(self) -> Work:
        """What it costs."""

    @abstractmethod
    def tensors(self, machine: Machine) -> Tensors:
        """Inputs, drawn at random."""

    @abstractmethod
    def reference(self, machine: Machine, tensors: Tensors) -> Reference | TokenReference:
        """What must come out, for some rows."""


def some_rows(count: int) -> tuple[int, ...]:
    """The first row, the last one and two between."""
    return tuple(sorted({0, count // 3, 2 * count // 3, count - 1}))


def rows_of(tensor: Any, rows: tuple[int, ...], machine: Machine) -> np.ndarray:
    """[rows, ...] float64."""
    return np.stack([machine.float64(tensor[row]) for row in rows])


@dataclass(frozen=True)
class ByToken(Case):
    """An operation whose size is a number of tokens (or rows)."""

    tokens: int

    def size(self) -> str:
        return f"tokens={self.tokens}"
