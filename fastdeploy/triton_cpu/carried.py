"""Values that change: what a loop carries from turn to turn, and results that several blocks write.

A tensor that a loop carries lives in one local array: the body reads it, and at the end of a turn the new value is
evaluated into it, element by element. Two cases need care:

* One new value may read the array that another is about to overwrite (a swap): such readers go to a temporary first.
* A pointer tensor that moves as a whole (`ptrs += BLOCK_K * stride`) is not an array at all but a number: how far it
  has moved. That keeps its addresses simple enough for vector loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .analysis import is_lazy, rearranges, uniform
from .arrays import materialise
from .context import Array, Context, MovingPointers, Scalar
from .elements import constant_declaration, value_type
from .loops import ZERO, LoopNest, best_order, linear
from .operations import operation
from .ttir import Block, Op, Value, walk


@dataclass
class Carried:
    """A loop-carried variable: its C name, and for moving pointers the step that the loop adds."""

    name: str
    argument: Value
    step: Value | None = None


def for_header(context: Context, op: Op) -> str:
    """`for (int i = ...)`, and the loop's variable gets its name."""
    lower, upper, step = (context.scalar(v) for v in op.operands[:3])
    variable = op.regions[0].arguments[0]
    name = context.name(variable.name)
    context.storage[variable] = Scalar(name)
    kind = ("u" if op.text.startswith("scf.for unsigned") else "") + value_type(variable.type.element)
    return f"for ({kind} {name} = {lower}; {name} < ({kind}){upper}; {name} += {step})"


def carry(context: Context, argument: Value, initial: Value, new: Value | None) -> Carried:
    """The variable of a loop-carried value, declared with its first value; pointers that move as a whole are one."""
    type_ = argument.type
    if not type_.is_tensor:
        name = context.name(argument.name)
        context.line(f"{value_type(type_.element)} {name} = {context.scalar(initial)};")
        context.storage[argument] = Scalar(name)
        return Carried(name, argument)
    step = uniform_step(argument, new)
    if type_.is_pointer and step is not None and not context.holds_addresses(initial):
        name = context.name("moved")
        context.line(f"int64_t {name} = 0;")
        context.storage[argument] = MovingPointers(initial, name)
        context.origins[argument] = context.origins.get(initial, initial)
        return Carried(name, argument, step)
    name = context.array(type_, argument.name)
    materialise(context, initial, into=name)
    context.storage[argument] = Array(name)
    return Carried(name, argument)


def uniform_step(argument: Value, new: Value | None) -> Value | None:
    """The offset by which the loop moves a pointer tensor, if all elements move alike."""
    op = new.op if new is not None else None
    if op is None or op.name != "tt.addptr" or op.operands[0] is not argument or not uniform(op.operands[1]):
        return None
    return op.operands[1]


def assign(context: Context, carried: list[Carried], yielded: list[Value]) -> None:
    """The end of a turn: every carried variable takes its new value, all at once."""
    late: list[str] = []
    pending: list[tuple[str, Value]] = []
    for item, new in zip(carried, yielded):
        if item.step is not None:
            name = context.name("step")
            context.line(f"const int64_t {name} = {_uniform_text(context, item.step)};")
            late.append(f"{item.name} += {name};")
        elif not new.type.is_tensor:
            name = context.name("next")
            context.line(f"{constant_declaration(new.type.element, name)} = {context.scalar(new)};")
            late.append(f"{item.name} = {name};")
        elif context.storage.get(new) != Array(item.name):
            pending.append((item.name, new))
    late += _assign_tensors(context, pending)
    for text in late:
        context.line(text)


def _assign_tensors(context: Context, pending: list[tuple[str, Value]]) -> list[str]:
    """New tensors of one shape share a loop nest, which reads an element of all before it writes one of any.

    A value that reads an array of another shape, or elements at other indices, of those to be overwritten is computed
    into a copy before any array changes; returns the lines that move the copies.
    """
    copies: list[str] = []
    groups: dict[tuple[int, ...], list[tuple[str, Value]]] = {}
    for name, new in pending:
        same_shape = {other for other, value in pending if value.type.shape == new.type.shape}
        others = {other for other, _ in pending} - same_shape
        stored = context.storage.items()
        held = {value for value, place in stored if isinstance(place, Array) and place.name in same_shape}
        if _arrays_read(context, new) & others or rearranges(new, held, context.storage):
            copy = context.array(new.type, "held")
            materialise(context, new, into=copy)
            copies.append(f"memcpy({name}, {copy}, sizeof {copy});")
        else:
            groups.setdefault(new.type.shape, []).append((name, new))
    for shape, members in groups.items():
        nest = LoopNest(context, shape, best_order(context, [new for _, new in members], shape))
        elements = [nest.evaluate(new).text for _, new in members]
        for (name, _), element in zip(members, elements):
            nest.put(f"{name}[{linear(shape, nest.index).text}] = {element};")
        nest.write()
    return copies


def _uniform_text(context: Context, value: Value) -> str:
    nest = LoopNest(context, (), [])
    term = nest.evaluate(value, (ZERO,) * len(value.type.shape))
    for text in nest.lines[0]:
        context.line(text)
    return term.text


def _arrays_read(context: Context, value: Value, seen: set[Value] | None = None) -> set[str]:
    seen = set() if seen is None else seen
    if value in seen:
        return set()
    seen.add(value)
    storage = context.storage.get(value)
    if isinstance(storage, Array):
        return {storage.name}
    if isinstance(storage, MovingPointers):
        return {storage.moved} | _arrays_read(context, storage.origin, seen)
    if storage is not None or value.op is None:
        return set()
    return set().union(*[_arrays_read(context, operand, seen) for operand in value.op.operands])


def publish(context: Context, results: list[Value], carried: list[Carried]) -> None:
    for result, item in zip(results, carried):
        context.storage[result] = context.storage[item.argument]
        if item.argument in context.origins:
            context.origins[result] = context.origins[item.argument]


def declare(context: Context, value: Value) -> None:
    """Storage for a result that different blocks write."""
    if value.type.is_tensor:
        context.storage[value] = Array(context.array(value.type, value.name))
    else:
        name = context.name(value.name)
        context.line(f"{value_type(value.type.element)} {name};")
        context.storage[value] = Scalar(name)


def write(context: Context, target: Value, source: Value) -> None:
    storage = context.storage[target]
    if isinstance(storage, Array):
        materialise(context, source, into=storage.name)
    else:
        context.line(f"{context.scalar(target)} = {context.scalar(source)};")


def in_next_turn(context: Context, pointers: Value, evaluate: Callable[[], str]) -> str | None:
    """`evaluate()`, an address computed from `pointers`, as it will be in the next turn of the loop around: to prefetch
    from. In the last turn it is that turn's own.

    None unless it follows from the loop's variable by scalars alone: a block's number, looked up in a table, say.
    """
    loop = pointers.block.parent
    scalars: set[Op] = set()
    if loop is None or loop.name != "scf.for" or loop.text.startswith("scf.for unsigned"):
        return None
    body = loop.regions[0]
    if not _follows_from_variable(context, pointers, body, scalars) or not scalars:
        return None
    here, upper, step = (context.scalar(v) for v in (body.arguments[0], *loop.operands[1:3]))
    name, kind = context.name("next"), value_type(body.arguments[0].type.element)
    context.line(f"const {kind} {name} = {upper} - {here} > {step} ? {here} + {step} : {here};")
    kept = dict(context.storage)
    context.storage[body.arguments[0]] = Scalar(name)
    for op in body.ops:
        if op in scalars:
            context.op(op)
    text = evaluate()
    context.storage = kept
    return text


def _follows_from_variable(
    context: Context, value: Value, body: Block, scalars: set[Op], seen: set[Value] | None = None
) -> bool:
    """Is `value` computed from the variable of the loop and what is known before it? Collects the loop's scalars."""
    seen = set() if seen is None else seen
    if value in seen:  # and has been found to be so, or the search would be over
        return True
    seen.add(value)
    op = value.op
    if op is None or op.block is not body:
        return value not in body.arguments[1:]
    if not is_lazy(op) or isinstance(context.storage.get(value), Array) or _writes_memory(body):
        return False
    if not value.type.is_tensor:
        scalars.add(op)
    return all(_follows_from_variable(context, operand, body, scalars, seen) for operand in op.operands)


def _writes_memory(block: Block) -> bool:
    return any(operation(op).writes and not op.regions for op in walk(block))
