"""Turns of a loop that change nothing in a block of rows, left out.

    for group in range(0, K // 32):
        more = sums + tl.dot(low, weights).to(tl.float32) * scales
        sums = tl.where(has_low[:, None], more, sums)               has_low: [M], read for each group

Where `tl.where` keeps the old sums in all rows of a block, a turn is nothing but the pointers' move. First the C makes
a list of the other turns, and then it walks the list. (512 rows, K = 1024, Q4_0: the list costs 6 % of a loop without.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .analysis import splat_constant
from .carried import uniform_step
from .context import Context, MovingPointers, Scalar
from .elements import value_type
from .loops import ZERO
from .ttir import Op, Value
from .vectors import Vectors, is_splat

RUN = 256  # turns that are looked at before any is taken

Other = tuple[Value, Value, Value]  # what a loop carries besides sums: (argument, first value, new value)


def mask_of_rows(context: Context, loop: Op, sums: Iterable[tuple[Value, Value]], others: list[Other]) -> Value | None:
    """What says in which rows a turn changes the sums, given by (argument, new value).

    None if that isn't known, or something else that the loop carries doesn't move by the same in each turn.
    """
    if loop.text.startswith("scf.for unsigned"):
        return None
    masks = set()
    for argument, new in sums:
        if new.op is None or new.op.name != "arith.select" or new.op.operands[2] is not argument:
            return None
        masks.add(new.op.operands[0])
    if any(_step(argument, new) is None or context.holds_addresses(first) for argument, first, new in others):
        return None
    return masks.pop() if len(masks) == 1 and all(map(is_splat, masks)) else None


def _step(argument: Value, new: Value) -> int | None:
    step = uniform_step(argument, new) if argument.type.is_pointer else None
    return None if step is None else splat_constant(step)


@contextmanager
def turns_taken(block: Vectors, loop: Op, others: list[Other], mask: Value) -> Iterator[None]:
    """C loops over the turns in which the mask holds in a row of the block: RUN turns are looked at, then taken."""
    context = block.context
    begin, turns, count, number = map(context.name, ("begin", "turns", "count", "number"))
    lower, upper, step = (context.scalar(value) for value in loop.operands[:3])
    total = block.constant(
        "int64_t", f"{upper} > {lower} ? ((int64_t){upper} - {lower} + {step} - 1) / {step} : 0", "total"
    )
    with block.scope(f"for (int64_t {begin} = 0; {begin} < {total}; {begin} += {RUN})"):
        context.line(f"int64_t {turns}[{RUN}];", f"int {count} = 0;")
        turn = context.name("turn")
        with block.scope(f"for (int64_t {turn} = {begin}; {turn} < {total} && {turn} < {begin} + {RUN}; {turn}++)"):
            _place(block, loop, others, turn)
            in_rows = " | ".join(block.scalar(mask, (row, ZERO)) for row in block.rows)
            context.line(f"{turns}[{count}] = {turn};", f"{count} += {in_rows};")
        with block.scope(f"for (int {number} = 0; {number} < {count}; {number}++)"):
            _place(block, loop, others, block.constant("int64_t", f"{turns}[{number}]", "turn"))
            yield


def _place(block: Vectors, loop: Op, others: list[Other], turn: str) -> None:
    """The loop's variable, pointers and scalars in a turn."""
    context, variable = block.context, loop.regions[0].arguments[0]
    lower, step = (context.scalar(value) for value in (loop.operands[0], loop.operands[2]))
    here = block.constant(value_type(variable.type.element), f"{lower} + {turn} * {step}", variable.name)
    context.storage[variable] = Scalar(here)
    for argument, first, new in others:
        moved = block.constant("int64_t", f"{turn} * {_step(argument, new)}", "moved")
        context.storage[argument] = MovingPointers(first, moved)
        context.origins[argument] = context.origins.get(first, first)
    write_scalars(context, loop)


def write_scalars(context: Context, loop: Op) -> None:
    """What a turn computes besides tensors."""
    for op in loop.regions[0].ops[:-1]:
        if op.name != "tt.dot" and not op.result.type.is_tensor:
            context.op(op)
