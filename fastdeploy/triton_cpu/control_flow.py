"""Loops, branches and calls.

A tensor that a loop carries lives in one local array: the body reads it, and at the end of a turn the new value is
evaluated into it, element by element. Two cases need care:

* One new value may read the array that another is about to overwrite (a swap): such readers go to a temporary first.
* A pointer tensor that moves as a whole (`ptrs += BLOCK_K * stride`) is not an array at all but a number: how far it
  has moved. That keeps its addresses simple enough for vector loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import expressions as c
from .analysis import is_lazy, moves_elements, rearranges, uniform
from .loops import ZERO, Array, LoopNest, MovingPointers, Scalar, best_order, linear
from .ttir import SYMBOL, Block, Function, Op, Value

if TYPE_CHECKING:
    from .emitter import KernelEmitter


@dataclass
class _Carried:
    """A loop-carried variable: its C name, and for moving pointers the step that the loop adds."""

    name: str
    argument: Value
    step: Value | None = None


def emit_for(emitter: KernelEmitter, op: Op) -> None:
    """Declares what the loop carries, then the C loop: its body, and at its end the new values."""
    body = op.regions[0]
    arguments = body.arguments[1:]
    yielded = body.terminator.operands if _ends_in_yield(body) else []  # type: ignore[union-attr]
    carried = [
        carry(emitter, argument, initial, new) for argument, initial, new in zip(arguments, op.operands[3:], yielded)
    ]
    for item, new in zip(carried, yielded):
        if _updated_in_place(item.argument, new, body):
            emitter.destinations[new] = item.name
    with emitter.braces(for_header(emitter, op)):
        emitter.block(body, skip_terminator=_ends_in_yield(body))
        assign(emitter, carried, yielded)
    _publish(emitter, op.results, carried)


def for_header(emitter: KernelEmitter, op: Op) -> str:
    """`for (int i = ...)`, and the loop's variable gets its name."""
    lower, upper, step = (emitter.scalar(v) for v in op.operands[:3])
    variable = op.regions[0].arguments[0]
    name = emitter.name(variable.name)
    emitter.storage[variable] = Scalar(name)
    kind = ("u" if op.text.startswith("scf.for unsigned") else "") + c.value_type(variable.type.element)
    return f"for ({kind} {name} = {lower}; {name} < ({kind}){upper}; {name} += {step})"


def in_next_turn(emitter: KernelEmitter, pointers: Value, evaluate: Callable[[], str]) -> str | None:
    """`evaluate()`, an address computed from `pointers`, as it will be in the next turn of the loop around: to prefetch
    from. In the last turn it is that turn's own.

    None unless it follows from the loop's variable by scalars alone: a block's number, looked up in a table, say.
    """
    loop = pointers.block.parent
    scalars: set[Op] = set()
    if loop is None or loop.name != "scf.for" or loop.text.startswith("scf.for unsigned"):
        return None
    body = loop.regions[0]
    if not _follows_from_variable(emitter, pointers, body, scalars) or not scalars:
        return None
    here, upper, step = (emitter.scalar(v) for v in (body.arguments[0], *loop.operands[1:3]))
    name, kind = emitter.name("next"), c.value_type(body.arguments[0].type.element)
    emitter.line(f"const {kind} {name} = {upper} - {here} > {step} ? {here} + {step} : {here};")
    kept = dict(emitter.storage)
    emitter.storage[body.arguments[0]] = Scalar(name)
    for op in body.ops:
        if op in scalars:
            emitter.op(op)
    text = evaluate()
    emitter.storage = kept
    return text


def _follows_from_variable(
    emitter: KernelEmitter, value: Value, body: Block, scalars: set[Op], seen: set[Value] | None = None
) -> bool:
    """Is `value` computed from the variable of the loop and what is known before it? Collects the loop's scalars."""
    seen = set() if seen is None else seen
    if value in seen:  # and has been found to be so, or the search would be over
        return True
    seen.add(value)
    op = value.op
    if op is None or op.block is not body:
        return value not in body.arguments[1:]
    if not is_lazy(op) or isinstance(emitter.storage.get(value), Array) or any(map(_writes, body.ops)):
        return False
    if not value.type.is_tensor:
        scalars.add(op)
    return all(_follows_from_variable(emitter, operand, body, scalars, seen) for operand in op.operands)


def _writes(op: Op) -> bool:
    return op.name.startswith(("tt.store", "tt.atomic", "tt.call")) or any(
        _writes(inner) for region in op.regions for inner in region.ops
    )


def _ends_in_yield(block: Block) -> bool:
    return block.terminator is not None and block.terminator.name == "scf.yield"


def carry(emitter: KernelEmitter, argument: Value, initial: Value, new: Value | None) -> _Carried:
    """The variable of a loop-carried value, declared with its first value; pointers that move as a whole are one."""
    type_ = argument.type
    if not type_.is_tensor:
        name = emitter.name(argument.name)
        emitter.line(f"{c.value_type(type_.element)} {name} = {emitter.scalar(initial)};")
        emitter.storage[argument] = Scalar(name)
        return _Carried(name, argument)
    step = uniform_step(argument, new)
    if type_.is_pointer and step is not None and not emitter.holds_addresses(initial):
        name = emitter.name("moved")
        emitter.line(f"int64_t {name} = 0;")
        emitter.storage[argument] = MovingPointers(initial, name)
        emitter.origins[argument] = emitter.origins.get(initial, initial)
        return _Carried(name, argument, step)
    name = emitter.array(type_, argument.name)
    emitter.materialise(initial, into=name)
    emitter.storage[argument] = Array(name)
    return _Carried(name, argument)


def uniform_step(argument: Value, new: Value | None) -> Value | None:
    """The offset by which the loop moves a pointer tensor, if all elements move alike."""
    op = new.op if new is not None else None
    if op is None or op.name != "tt.addptr" or op.operands[0] is not argument or not uniform(op.operands[1]):
        return None
    return op.operands[1]


def _updated_in_place(argument: Value, new: Value, body: Block) -> bool:
    """Is `new` a tl.dot of this loop that alone reads `argument`, as (part of) its accumulator?"""
    op = new.op
    return (
        op is not None
        and op.name == "tt.dot"
        and op.block is body
        and not argument.type.is_pointer
        and _only_read_by(argument, op)
    )


def _only_read_by(value: Value, reader: Op) -> bool:
    for user in value.uses:
        if user is reader:
            if any(operand is value for operand in reader.operands[:2]):
                return False
        elif (
            user.block is not reader.block
            or not is_lazy(user)
            or moves_elements(user)
            or not user.results[0].type.is_tensor
            or not all(_only_read_by(result, reader) for result in user.results)
        ):
            return False
    return bool(value.uses)


def assign(emitter: KernelEmitter, carried: list[_Carried], yielded: list[Value]) -> None:
    """The end of a turn: every carried variable takes its new value, all at once."""
    late: list[str] = []
    pending: list[tuple[str, Value]] = []
    for item, new in zip(carried, yielded):
        if item.step is not None:
            name = emitter.name("step")
            emitter.line(f"const int64_t {name} = {_uniform_text(emitter, item.step)};")
            late.append(f"{item.name} += {name};")
        elif not new.type.is_tensor:
            name = emitter.name("next")
            emitter.line(f"{c.constant_declaration(new.type.element, name)} = {emitter.scalar(new)};")
            late.append(f"{item.name} = {name};")
        elif emitter.storage.get(new) != Array(item.name):
            pending.append((item.name, new))
    late += _assign_tensors(emitter, pending)
    for text in late:
        emitter.line(text)


def _assign_tensors(emitter: KernelEmitter, pending: list[tuple[str, Value]]) -> list[str]:
    """New tensors of one shape share a loop nest, which reads an element of all before it writes one of any.

    A value that reads an array of another shape, or elements at other indices, of those to be overwritten is computed
    into a copy before any array changes; returns the lines that move the copies.
    """
    copies: list[str] = []
    groups: dict[tuple[int, ...], list[tuple[str, Value]]] = {}
    for name, new in pending:
        same_shape = {other for other, value in pending if value.type.shape == new.type.shape}
        others = {other for other, _ in pending} - same_shape
        stored = emitter.storage.items()
        held = {value for value, place in stored if isinstance(place, Array) and place.name in same_shape}
        if _arrays_read(emitter, new) & others or rearranges(new, held, emitter.storage):
            copy = emitter.array(new.type, "held")
            emitter.materialise(new, into=copy)
            copies.append(f"memcpy({name}, {copy}, sizeof {copy});")
        else:
            groups.setdefault(new.type.shape, []).append((name, new))
    for shape, members in groups.items():
        nest = LoopNest(emitter, shape, best_order(emitter, [new for _, new in members], shape))
        elements = [nest.evaluate(new).text for _, new in members]
        for (name, _), element in zip(members, elements):
            nest.put(f"{name}[{linear(shape, nest.index).text}] = {element};")
        nest.write()
    return copies


def _uniform_text(emitter: KernelEmitter, value: Value) -> str:
    nest = LoopNest(emitter, (), [])
    term = nest.evaluate(value, (ZERO,) * len(value.type.shape))
    for text in nest.lines[0]:
        emitter.line(text)
    return term.text


def _arrays_read(emitter: KernelEmitter, value: Value, seen: set[Value] | None = None) -> set[str]:
    seen = set() if seen is None else seen
    if value in seen:
        return set()
    seen.add(value)
    storage = emitter.storage.get(value)
    if isinstance(storage, Array):
        return {storage.name}
    if isinstance(storage, MovingPointers):
        return {storage.moved} | _arrays_read(emitter, storage.origin, seen)
    if storage is not None or value.op is None:
        return set()
    return set().union(*[_arrays_read(emitter, operand, seen) for operand in value.op.operands])


def _publish(emitter: KernelEmitter, results: list[Value], carried: list[_Carried]) -> None:
    for result, item in zip(results, carried):
        emitter.storage[result] = emitter.storage[item.argument]
        if item.argument in emitter.origins:
            emitter.origins[result] = emitter.origins[item.argument]


def _declare(emitter: KernelEmitter, value: Value) -> None:
    """Storage for a result that different blocks write."""
    if value.type.is_tensor:
        emitter.storage[value] = Array(emitter.array(value.type, value.name))
    else:
        name = emitter.name(value.name)
        emitter.line(f"{c.value_type(value.type.element)} {name};")
        emitter.storage[value] = Scalar(name)


def _write(emitter: KernelEmitter, target: Value, source: Value) -> None:
    storage = emitter.storage[target]
    if isinstance(storage, Array):
        emitter.materialise(source, into=storage.name)
    else:
        emitter.line(f"{emitter.scalar(target)} = {emitter.scalar(source)};")


def emit_if(emitter: KernelEmitter, op: Op) -> None:
    """Declares the results, which each branch writes before it ends."""
    for result in op.results:
        _declare(emitter, result)
    for number, region in enumerate(op.regions):
        with emitter.braces("else" if number else f"if ({emitter.scalar(op.operands[0])})"):
            emitter.block(region, skip_terminator=_ends_in_yield(region))
            if _ends_in_yield(region):
                for result, value in zip(op.results, region.terminator.operands):  # type: ignore[union-attr]
                    _write(emitter, result, value)


def emit_while(emitter: KernelEmitter, op: Op) -> None:
    """TTIR's loop with two regions: one that ends in the condition, and the body."""
    before, after = op.regions
    carried = [carry(emitter, argument, initial, None) for argument, initial in zip(before.arguments, op.operands)]
    for result in op.results:
        _declare(emitter, result)
    condition = before.terminator
    with emitter.braces("for (;;)"):
        emitter.block(before, skip_terminator=True)
        for result, value in zip(op.results, condition.operands[1:]):  # type: ignore[union-attr]
            _write(emitter, result, value)
        emitter.line(f"if (!{emitter.scalar(condition.operands[0])}) break;")  # type: ignore[union-attr]
        for argument, result in zip(after.arguments, op.results):
            emitter.storage[argument] = emitter.storage[result]
        emitter.block(after, skip_terminator=True)
        assign(emitter, carried, after.terminator.operands)  # type: ignore[union-attr]


# ---- early returns: jumps, forward only, between the blocks of a function -------------------------------------------
def declare_labels(emitter: KernelEmitter) -> None:
    """Storage for the arguments of all blocks, which jumps write before the block is reached."""
    for op in emitter.function.body.ops:
        for argument in op.results if op.name == "cf.label" else []:
            _declare(emitter, argument)


def emit_label(emitter: KernelEmitter, op: Op) -> None:
    emitter.forget_copies()  # a jump may have passed by them
    emitter.line(f"{op.text[1:]}:;")


def emit_jump(emitter: KernelEmitter, op: Op) -> None:
    """`cf.br ^bb1(%x : i32)` or `cf.cond_br %condition, ^bb1, ^bb2(%y : i32)`"""
    labels = {label.text: label for label in emitter.function.body.ops if label.name == "cf.label"}
    targets = [labels[text] for text in re.findall(r"\^\w+", op.text)]
    passed = iter(op.operands)
    openings = [f"if ({emitter.scalar(next(passed))})", "else"] if len(targets) == 2 else [""]
    for opening, target in zip(openings, targets):
        with emitter.braces(opening):
            for argument in target.results:
                _write(emitter, argument, next(passed))
            emitter.line(f"goto {target.text[1:]};")


# ---- functions that are not inlined (noinline=True): Triton passes them scalars only ---------------------------------
def result_type(function: Function) -> str:
    types = function.result_types
    if not types:
        return "void"
    return c.value_type(types[0].element) if len(types) == 1 else f"struct {_struct_name(function.name)}"


def result_struct(function: Function) -> str:
    """Several results are returned as a struct."""
    if len(function.result_types) < 2:
        return ""
    fields = " ".join(f"{c.value_type(t.element)} r{i};" for i, t in enumerate(function.result_types))
    return f"struct {_struct_name(function.name)} {{ {fields} }};"


def _struct_name(name: str) -> str:
    from .emitter import c_function_name

    return f"{c_function_name(name)}_results"


def emit_call(emitter: KernelEmitter, op: Op) -> None:
    """A C call; a callee learns the program's place in the grid from its last six arguments."""
    from .emitter import c_function_name

    callee = SYMBOL.search(op.text).group(1).strip('"')  # type: ignore[union-attr]
    if any(value.type.is_tensor for value in [*op.operands, *op.results]):
        raise emitter.unsupported(op, "with a tensor")
    arguments = [emitter.scalar(v) for v in op.operands] + ["pid_x", "pid_y", "pid_z", "num_x", "num_y", "num_z"]
    call = f"{c_function_name(callee)}({', '.join(arguments)})"
    if not op.results:
        emitter.line(f"{call};")
        return
    name = emitter.name("result")
    kind = c.value_type(op.result.type.element) if len(op.results) == 1 else f"struct {_struct_name(callee)}"
    emitter.line(f"{kind} {name} = {call};")
    for number, value in enumerate(op.results):
        emitter.storage[value] = Scalar(name if len(op.results) == 1 else f"{name}.r{number}")


def emit_return(emitter: KernelEmitter, op: Op) -> None:
    values = [emitter.scalar(v) for v in op.operands]
    if len(values) > 1:
        emitter.line(f"return (struct {_struct_name(emitter.function.name)}){{{', '.join(values)}}};")
    else:
        emitter.line(f"return {values[0]};" if values else "return;")
