"""Loops, branches and early returns."""

from __future__ import annotations

import re

from .analysis import is_lazy, moves_elements
from .arrays import as_array
from .carried import assign, carry, for_header, write
from .context import Context, Scalar
from .ttir import Block, Op, Value, reachable


def for_(context: Context, op: Op) -> None:
    """Declares what the loop carries, then the C loop: its body, and at its end the new values."""
    body = op.regions[0]
    arguments = body.arguments[1:]
    yielded = _yielded(body)
    carried = [
        carry(context, argument, initial, new) for argument, initial, new in zip(arguments, op.operands[3:], yielded)
    ]
    for item, new in zip(carried, yielded):
        if _updated_in_place(item.argument, new, body):
            context.destinations[new] = item.name
    with context.braces(for_header(context, op)):
        context.block(body)
        assign(context, carried, yielded)
    for result, argument in zip(op.results, arguments):
        context.give_same_place(result, argument)


def _yielded(block: Block) -> list[Value]:
    """The new values at a block's end; MLIR prints no yield of nothing."""
    return block.ops[-1].operands if block.ops and block.ops[-1].name == "scf.yield" else []


def _updated_in_place(argument: Value, new: Value, body: Block) -> bool:
    """Is `new` a tl.dot of this loop that alone reads `argument`, as (part of) its accumulator?"""
    op = new.op
    if op is None or op.name != "tt.dot" or op.block is not body or argument.type.is_pointer:
        return False
    return _only_read_by(argument, op)


def _only_read_by(value: Value, reader: Op) -> bool:
    """Is all that is made of `value` at its own place what `reader` adds to?"""

    def users(value: Value) -> list[Op]:
        return [user for user in value.uses if user is not reader]

    read = list(reachable(value, lambda v: [result for user in users(v) for result in user.results]))
    return all(
        user.block is reader.block and is_lazy(user) and not moves_elements(user) and user.results[0].type.is_tensor
        for value in read
        for user in users(value)
    ) and all(value.uses and value not in reader.operands[:2] for value in read)


def if_(context: Context, op: Op) -> None:
    """Declares the results, which each branch writes before it ends."""
    for result in op.results:
        context.declare(result)
    for number, region in enumerate(op.regions):
        with context.braces("else" if number else f"if ({context.scalar(op.operands[0])})"):
            context.block(region)
            for result, value in zip(op.results, _yielded(region)):
                write(context, result, value)


def while_(context: Context, op: Op) -> None:
    """TTIR's loop with two regions: one that ends in the condition, and the body."""
    before, after = op.regions
    carried = [carry(context, argument, initial, None) for argument, initial in zip(before.arguments, op.operands)]
    for result in op.results:
        context.declare(result)
    condition = before.terminator
    with context.braces("for (;;)"):
        context.block(before)
        for result, value in zip(op.results, condition.operands[1:]):  # type: ignore[union-attr]
            write(context, result, value)
        context.line(f"if (!{context.scalar(condition.operands[0])}) break;")  # type: ignore[union-attr]
        for argument, result in zip(after.arguments, op.results):
            context.storage[argument] = context.storage[result]
        context.block(after)
        assign(context, carried, _yielded(after))


def map_elementwise(context: Context, op: Op) -> None:
    """A loop whose body is the mapped function, of scalars: `pack` neighbouring elements of each operand at a time."""
    pack, body = op.attribute("pack"), op.regions[0]
    sources = [as_array(context, operand) for operand in op.operands]
    targets = [context.declare(value) for value in op.results]
    first = context.name("i")
    with context.braces(f"for (int {first} = 0; {first} < {op.result.type.size}; {first} += {pack})"):
        declare_labels(context, body)
        places = [f"{name}[{first} + {number}]" for name in sources for number in range(pack)]
        for argument, place in zip(body.arguments, places, strict=True):
            context.storage[argument] = Scalar(place)
        context.block(body)
        places = [f"{name}[{first} + {number}]" for name in targets for number in range(pack)]
        for place, value in zip(places, body.terminator.operands, strict=True):  # type: ignore[union-attr]
            context.line(f"{place} = {context.scalar(value)};")


# ---- early returns: jumps, forward only, between the blocks of a function -------------------------------------------
def declare_labels(context: Context, body: Block) -> None:
    """Storage for the arguments of all blocks, which jumps write before the block is reached."""
    labels = _labels(body)
    if labels:
        context.line(f"__label__ {', '.join(text[1:] for text in labels)};")  # other regions may have the same
    for label in labels.values():
        for argument in label.results:
            context.declare(argument)


def _labels(body: Block) -> dict[str, Op]:
    return {op.text: op for op in body.ops if op.name == "cf.label"}


def label(context: Context, op: Op) -> None:
    context.forget_copies()  # a jump may have passed by them
    context.line(f"{op.text[1:]}:;")


def jump(context: Context, op: Op) -> None:
    """`cf.br ^bb1(%x : i32)` or `cf.cond_br %condition, ^bb1, ^bb2(%y : i32)`"""
    labels = _labels(op.block)
    targets = [labels[text] for text in re.findall(r"\^\w+", op.text)]
    passed = iter(op.operands)
    openings = [f"if ({context.scalar(next(passed))})", "else"] if len(targets) == 2 else [""]
    for opening, target in zip(openings, targets):
        with context.braces(opening):
            for argument in target.results:
                write(context, argument, next(passed))
            context.line(f"goto {target.text[1:]};")
