"""Tensors in local C arrays: the values that the storage plan stores, and operands that a lowering wants as arrays."""

from __future__ import annotations

import functools

from .context import Array, Context, NotATile
from .live_rows import number_of_live_rows
from .loops import LoopNest, best_order, linear
from .ttir import Value
from .vectors import VECTOR_TYPES, rows_of


def as_array(context: Context, value: Value) -> str:
    """The name of the array that holds `value`, which is evaluated into one if there is none."""
    storage = context.storage.get(value)
    if isinstance(storage, Array):
        return storage.name
    context.copies.append(value)
    return materialise(context, value)


def materialise(context: Context, value: Value, into: str | None = None) -> str:
    """Evaluates a tensor into a local array; returns its name."""
    name = into or context.array(value.type, value.name)
    as_vectors = functools.partial(_as_vectors, context, value, name)
    if not (context.vectors and context.attempt(as_vectors, f"{name} has no vectors")):
        nest = LoopNest(context, value.type.shape, best_order(context, [value], value.type.shape))
        nest.rows = number_of_live_rows(context, value)
        element = nest.evaluate(value)
        nest.put(f"{name}[{linear(value.type.shape, nest.index).text}] = {element.text};")
        nest.write()
    if into is None:
        context.storage[value] = Array(name)
    return name


def _as_vectors(context: Context, value: Value, name: str) -> None:
    """The loops that evaluate a tensor into an array, row by row and vector by vector."""
    element, op = value.type.element, value.op
    if element == "i8" and op is not None and op.name == "arith.trunci" and value not in context.storage:
        value = op.operands[0]  # its low bytes
    if element not in ("f32", "i32", "i8"):
        raise NotATile(f"an array of {element}")
    with rows_of(context, value, number_of_live_rows(context, value)) as (block, row):
        put = "ivec_to_int8_t({0}, {1});" if element == "i8" else f"*({VECTOR_TYPES[element]} *)({{0}}) = {{1}};"
        with block.columns_of(value, context.lanes, row) as places:
            for place in places:
                where = linear(value.type.shape, (row, place.column)[2 - len(value.type.shape) :]).text
                text = block.vector(value, place)
                context.line(put.format(f"{name} + {where}", text))
