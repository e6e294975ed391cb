"""Rows that nobody stores are not computed, and those that are zeros by a mask are not multiplied.

    tl.store(y + m[:, None] * N + n[None, :], sums, mask=(m < rows)[:, None] & (n < N)[None, :])

A program's tile has as many rows as the kernel's author gave it; of the last program along m, or of a small batch, few
exist. The masks of the stores say which: where all that becomes of a tile is stored under a mask that excludes its last
rows, loops over its rows end before them. (33 rows in a tile of 64 cost half as much as 64.)
"""

from __future__ import annotations

from .analysis import is_expensive, is_lazy, is_zero, row_masks
from .context import Context
from .loops import ZERO, LoopNest, Term
from .ttir import Op, Value, reachable


def number_of_live_rows(context: Context, value: Value) -> str | None:
    """C for how many rows of `value` are of use, the first ones; None for all, or if that is not known here."""
    conditions = context.unit.live_rows.conditions(value) if context.wanted.live_rows else []
    for mask in sorted(conditions, key=lambda mask: mask.name):
        if mask not in context.row_counts and (count := _count(context, mask)):
            context.row_counts[mask] = count
        if mask in context.row_counts:
            return context.row_counts[mask]
    return None


def rows_let_through(context: Context, load: Op) -> str | None:
    """C for how many rows of a masked load are not zeros throughout, the first ones; None for all, or if that is not
    known here. What the mask depends on may change in the block being written: the count is written here and now."""
    _, *masked = load.operands
    if not masked or not all(map(is_zero, masked[1:])) or not context.wanted.live_rows:
        return None
    counts = (_count(context, mask) for mask in sorted(row_masks(masked[0]), key=lambda mask: mask.name))
    return next(filter(None, counts), None)


def columns_let_through(context: Context, mask: Value) -> str | None:
    """The same of columns, by a mask [1, N]."""
    return _count(context, mask) if context.wanted.live_rows else None


def _can_be_evaluated(context: Context, mask: Value) -> bool:
    """Are the scalars known that a mask depends on, and is it cheap?"""

    def is_open(value: Value) -> bool:
        return value not in context.storage and value.op is not None and is_lazy(value.op)

    parts = list(reachable(mask, lambda v: v.op.operands if is_open(v) else ()))  # type: ignore[union-attr]
    if any(value.type.is_tensor or value not in context.storage for value in parts if not is_open(value)):
        return False
    return not any(is_expensive(value, context.unit.plan) for value in parts if is_open(value))


def _count(context: Context, mask: Value) -> str | None:
    """Writes a search, from the last row on, for one that the mask lets through."""
    if not _can_be_evaluated(context, mask):
        return None
    name = context.name("live")
    context.line(f"int {name} = {mask.type.shape[-1]};")
    nest = LoopNest(context)
    last = (ZERO, Term(f"({name} - 1)", 0))[2 - len(mask.type.shape) :]
    holds = nest.evaluate(mask, last).text
    with context.braces(f"for (; {name} > 0; {name}--)"):
        context.line(*nest.lines[0], f"if ({holds}) break;")
    return name
