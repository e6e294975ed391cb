"""Rows that nobody stores are not computed, and those that are zeros by a mask are not multiplied.

    tl.store(y + m[:, None] * N + n[None, :], sums, mask=(m < rows)[:, None] & (n < N)[None, :])

A program's tile has as many rows as the kernel's author gave it; of the last program along m, or of a small batch, few
exist. The masks of the stores say which: where all that becomes of a tile is stored under a mask that excludes its last
rows, loops over its rows end before them. (33 rows in a tile of 64 cost half as much as 64.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .analysis import is_expensive, is_lazy, is_zero
from .loops import ZERO, LoopNest, Term
from .ttir import Op, Value

if TYPE_CHECKING:
    from .emitter import KernelEmitter

_REARRANGE = {"tt.trans", "tt.reshape", "tt.join", "tt.split", "tt.cat", "tt.gather"}


class LiveRows:
    """Answers, for one function, which rows of a tensor end up in memory."""

    def __init__(self) -> None:
        self._known: dict[Value, frozenset[Value]] = {}

    def conditions(self, value: Value) -> frozenset[Value]:
        """Masks [M], one element for each row of `value`: a row is of use only where all of them hold."""
        if value not in self._known:
            self._known[value] = frozenset()  # of a value that is reached again on its own way: a loop's
            uses = [self._of_use(user, value) for user in value.uses]
            self._known[value] = frozenset.intersection(*uses) if uses else frozenset()
        return self._known[value]

    def _of_use(self, user: Op, value: Value) -> frozenset[Value]:
        if user.name == "tt.store":
            return _row_masks(user.operands[2]) if len(user.operands) > 2 else frozenset()
        keeps_rows = is_lazy(user) and user.name not in _REARRANGE
        if user.name in ("tt.expand_dims", "tt.reduce"):
            keeps_rows = user.attribute("axis") > 0
        if not keeps_rows or any(result.type.shape[:1] != value.type.shape[:1] for result in user.results):
            return frozenset()
        return frozenset.intersection(*map(self.conditions, user.results))


def _row_masks(mask: Value) -> frozenset[Value]:
    """The parts of a conjunction that are the same in a whole row, as masks [M]."""
    op = mask.op
    if op is not None and op.name == "arith.andi":
        return frozenset.union(*map(_row_masks, op.operands))
    if op is not None and op.name == "tt.broadcast" and op.operands[0].type.shape[1:] == (1,):
        return _row_masks(op.operands[0])
    if op is not None and op.name == "tt.expand_dims" and op.attribute("axis") == 1:
        return _row_masks(op.operands[0])
    return frozenset([mask]) if len(mask.type.shape) == 1 else frozenset()


def number_of_live_rows(emitter: KernelEmitter, value: Value) -> str | None:
    """C for how many rows of `value` are of use, the first ones; None for all, or if that is not known here."""
    conditions = emitter.live_rows.conditions(value) if emitter.wanted.live_rows else []
    for mask in sorted(conditions, key=lambda mask: mask.name):
        if mask not in emitter.row_counts and _can_be_evaluated(emitter, mask):
            emitter.row_counts[mask] = _count(emitter, mask)
        if mask in emitter.row_counts:
            return emitter.row_counts[mask]
    return None


def rows_let_through(emitter: KernelEmitter, load: Op) -> str | None:
    """C for how many rows of a masked load are not zeros throughout, the first ones; None for all, or if that is not
    known here. What the mask depends on may change in the block being written: the count is written here and now."""
    _, *masked = load.operands
    if not masked or not all(map(is_zero, masked[1:])) or not emitter.wanted.live_rows:
        return None
    for mask in sorted(_row_masks(masked[0]), key=lambda mask: mask.name):
        if _can_be_evaluated(emitter, mask):
            return _count(emitter, mask)
    return None


def columns_let_through(emitter: KernelEmitter, mask: Value) -> str | None:
    """The same of columns, by a mask [1, N]."""
    return _count(emitter, mask) if _can_be_evaluated(emitter, mask) and emitter.wanted.live_rows else None


def _can_be_evaluated(emitter: KernelEmitter, value: Value) -> bool:
    """Are the scalars known that a mask depends on, and is it cheap?"""
    if value in emitter.storage:
        return not value.type.is_tensor
    if value.op is None or not is_lazy(value.op) or is_expensive(value, emitter.plan):
        return False
    return all(_can_be_evaluated(emitter, operand) for operand in value.op.operands)


def _count(emitter: KernelEmitter, mask: Value) -> str:
    """Writes a search, from the last row on, for one that the mask lets through."""
    name = emitter.name("live")
    emitter.line(f"int {name} = {mask.type.shape[-1]};")
    nest = LoopNest(emitter, (), [])
    last = (ZERO, Term(f"({name} - 1)", 0))[2 - len(mask.type.shape) :]
    holds = nest.evaluate(mask, last).text
    with emitter.braces(f"for (; {name} > 0; {name}--)"):
        for text in nest.lines[0]:
            emitter.line(text)
        emitter.line(f"if ({holds}) break;")
    return name
