"""Stores, atomics and histograms: the loop nests in which most of a kernel's lazy expressions end up."""

from __future__ import annotations

from .analysis import stride
from .arrays import as_array, materialise
from .context import Context, Scalar
from .elements import to_memory, value_type
from .live_rows import number_of_live_rows
from .loops import LoopNest, best_order, linear
from .ttir import Op, Value

# The atomic updates of prelude.h
_INTEGER_ATOMICS = ("add", "max", "min", "umax", "umin", "and", "or", "xor", "exch", "cas", "poll")
_ATOMICS = {"i32": _INTEGER_ATOMICS, "i64": _INTEGER_ATOMICS, "f32": ("fadd", "max", "min", "exch", "cas")}
_ATOMICS |= {
    "f64": _ATOMICS["f32"],
    "f16": ("fadd", "exch", "cas"),
    "bf16": ("fadd", "exch", "cas"),
    "i16": ("cas", "poll"),
}


def store(context: Context, op: Op) -> None:
    """tl.store: the loop nest in which most of a kernel's lazy expressions end up."""
    pointers, value = op.operands[:2]
    mask = op.operands[2] if len(op.operands) > 2 else None
    element = pointers.type.pointee
    nest = LoopNest(context, value.type.shape, _store_order(context, pointers, value))
    nest.rows = number_of_live_rows(context, pointers)
    text = to_memory(element, nest.evaluate(value).text)
    condition = f"if ({nest.evaluate(mask).text}) " if mask else ""
    nest.put(f"{condition}{nest.place(op, nest.index).text} = {text};")
    nest.write()


def _store_order(context: Context, pointers: Value, value: Value) -> list[int]:
    """Innermost the dimension along which the store is contiguous: scattered stores cost more than loads."""
    shape = value.type.shape
    contiguous = [d for d in range(len(shape)) if shape[d] > 1 and stride(pointers, d, context.origins) == 1]
    if contiguous:
        inner = contiguous[-1]
        return [d for d in range(len(shape)) if d != inner] + [inner]
    return best_order(context, [value], shape)


def atomic_update(context: Context, op: Op) -> None:
    """Read-modify-write by compare-and-swap, which serves every operation and type alike; the result is the old value.
    Or tl.atomic_poll, whose elements share the time that they may wait.

    Elements of a tensor take their turns in order, so that of those at one address each sees the one before.
    """
    kind = op.name.removeprefix("tt.atomic_") if op.name != "tt.atomic_rmw" else op.text.split()[1].rstrip(",")
    values = op.operands[1:]
    mask = values.pop() if len(values) > 1 and op.name == "tt.atomic_rmw" else None
    timeout = values.pop() if len(values) > 1 and kind == "poll" else None
    result, element, shape = op.result, op.operands[0].type.pointee, op.result.type.shape
    update = f"atomic_{kind}_{element}"
    if kind not in _ATOMICS.get(element, ()):
        raise context.unsupported(op, f"{kind} of {element}")
    target, deadline, nest = "", [], LoopNest(context, shape)
    if kind == "poll":
        deadline.append(context.name("deadline"))
        text = f"deadline_after({context.scalar(timeout)})" if timeout is not None else "INT64_MAX"
        context.line(f"const int64_t {deadline[0]} = {text};")
    if not result.type.is_tensor:
        name = context.name(result.name)
        context.line(f"{value_type(result.type.element)} {name} = 0;")
        target = f"{name} = "
        context.storage[result] = Scalar(name)
    elif result.uses:
        target = f"{context.declare(result)}[{linear(shape, nest.index).text}] = "
    arguments = [f"&{nest.place(op, nest.index).text}", *[nest.evaluate(value).text for value in values], *deadline]
    condition = f"if ({nest.evaluate(mask).text}) " if mask else ""
    nest.put(f"{condition}{target}{update}({', '.join(arguments)});")
    nest.write(vectorise=False)


def keep(context: Context, op: Op) -> None:
    """The operand, evaluated here into an array unless it has a place already."""
    value = op.operands[0]
    if value not in context.storage:
        materialise(context, value)
    context.give_same_place(op.result, value)


def histogram(context: Context, op: Op) -> None:
    values, *mask = op.operands
    source, counts = as_array(context, values), context.declare(op.result)
    chosen = f" && {as_array(context, mask[0])}[i]" if mask else ""
    condition = f"if ((uint64_t){source}[i] < {op.result.type.size}{chosen}) "
    context.line(f"memset({counts}, 0, sizeof {counts});")
    context.line(f"for (int i = 0; i < {values.type.size}; i++) {condition}{counts}[{source}[i]]++;")
