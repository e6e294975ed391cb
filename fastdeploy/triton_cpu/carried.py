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

from .analysis import is_lazy, rearranges, splat_constant, uniform
from .arrays import materialise
from .context import Array, Context, MovingPointers, Scalar
from .elements import constant_declaration, value_type
from .loops import ZERO, LoopNest, best_order, evaluated, linear
from .operations import operation
from .ttir import Block, Op, Value, reachable, walk


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
    context.line(*late)


def _assign_tensors(context: Context, pending: list[tuple[str, Value]]) -> list[str]:
    """New tensors of one shape share a loop nest, which reads an element of all before it writes one of any.

    A value may read what is to be overwritten: an array of another shape, or elements at other indices. It is computed
    into a copy before any array changes. Returns the lines that move the copies.
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
    return evaluated(context, lambda nest: nest.evaluate(value, (ZERO,) * len(value.type.shape)))


def _arrays_read(context: Context, value: Value) -> set[str]:
    def sources(value: Value) -> list[Value]:
        storage = context.storage.get(value)
        if isinstance(storage, MovingPointers):
            return [storage.origin]
        return value.op.operands if storage is None and value.op is not None else []

    read = [context.storage.get(value) for value in reachable(value, sources)]
    return {storage.name for storage in read if isinstance(storage, Array)}


def write(context: Context, target: Value, source: Value) -> None:
    storage = context.storage[target]
    if isinstance(storage, Array):
        materialise(context, source, into=storage.name)
    else:
        context.line(f"{context.scalar(target)} = {context.scalar(source)};")


def in_next_turn(context: Context, pointers: Value, evaluate: Callable[[], str]) -> str | None:
    """`evaluate()`, an address computed from `pointers`, as it will be in the next turn of the loop around: to prefetch
    from. In the last turn it is that turn's own, unless turns follow in the loop around (`_end_of_turns`).

    None unless it follows from the loop's variable by scalars alone: a block's number, looked up in a table, say.
    """
    loop = pointers.block.parent
    if loop is None or loop.name != "scf.for" or loop.text.startswith("scf.for unsigned"):
        return None
    body = loop.regions[0]
    if not (scalars := _scalars_to_repeat(context, pointers, body)):
        return None
    here, upper, step = (context.scalar(v) for v in (body.arguments[0], _end_of_turns(loop), loop.operands[2]))
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


def _end_of_turns(loop: Op) -> Value:
    """Where turns like this loop's end. Where it is a part of the loop around, as in

        for start in range(0, end, 256):
            for key in range(start, min(start + 256, end), 64):

    that is the end of the loop around.
    """
    lower, upper, step = loop.operands[:3]
    around, least = loop.block.parent, upper.op
    if around is None or around.name != "scf.for" or least is None or least.name != "arith.minsi":
        return upper
    first, end = least.operands
    sizes = [splat_constant(value) for value in (around.operands[2], step)]
    is_part = lower is around.regions[0].arguments[0] and end is around.operands[1] and None not in sizes
    if not is_part or sizes[0] % sizes[1] or first.op is None or first.op.name != "arith.addi":  # type: ignore[operator]
        return upper
    start, size = first.op.operands
    return end if start is lower and splat_constant(size) == sizes[0] else upper


def _scalars_to_repeat(context: Context, value: Value, body: Block) -> set[Op]:
    """The body's scalars that `value` is computed from; none unless all it needs is those, the loop's variable and what
    is known before the loop."""
    scalars: set[Op] = set()
    writes = any(operation(op).writes and not op.regions for op in walk(body))
    for part in reachable(value, lambda v: v.op.operands if v.op is not None and v.op.block is body else ()):
        op = part.op
        if op is None or op.block is not body:
            if part in body.arguments[1:]:
                return set()
        elif not is_lazy(op) or isinstance(context.storage.get(part), Array) or writes:
            return set()
        elif not part.type.is_tensor:
            scalars.add(op)
    return scalars
