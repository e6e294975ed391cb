"""tl.dot_scaled: both operands are decoded into arrays of floats, and multiplied by tl.dot.

    element = code's value * scale     16 or 32 neighbours along k share a scale: 2^(byte - 127), or an e4m3 number
    e2m1                               two elements a byte, the lower bits first, which follow each other along k or,
                                       where `k_pack` is false, along m or n

Nothing is rounded before the sums, which are tl.dot's.
"""

from __future__ import annotations

import re

from .arrays import as_array
from .context import Array, Context
from .ttir import Op, Type, Value

_OPERANDS = re.compile(r"tt\.dot_scaled %[\w$.#\-]+( scale %\S+)?, %[\w$.#\-]+( scale %\S+)?, ")


def decoded(context: Context, op: Op) -> None:
    """The operands as arrays of floats, and a tl.dot of them."""
    scaled = _OPERANDS.match(op.text).groups()  # type: ignore[union-attr]
    operands = iter(op.operands)
    factors = []
    for side, has_scale in zip(("lhs", "rhs"), scaled):
        codes = next(operands)
        factors.append(_floats(context, op, side, codes, next(operands) if has_scale else None))
    product = Op("tt.dot", [*factors, next(operands)], op.text, op.location, op.block, op.results)
    context.op(product)


def _floats(context: Context, op: Op, side: str, codes: Value, scale: Value | None) -> Value:
    """The operand [..., M, K] or [..., K, N] as a value in an array of floats."""
    *batch, rows, columns = codes.type.shape
    element = f"{as_array(context, codes)}[r * {columns} + c]"
    if f"{side} = e2m1" in op.text:
        along_rows = (side == "lhs") == (f"{side}_k_pack = false" in op.text)
        place, half = (f"r / 2 * {columns} + c", "r") if along_rows else (f"r * {columns} + c / 2", "c")
        element = f"mx_e2m1_to_float({as_array(context, codes)}[{place}] >> {half} % 2 * 4 & 15)"
        rows, columns = (rows * 2, columns) if along_rows else (rows, columns * 2)
    if scale is not None:
        groups = scale.type.shape[-1]
        group = columns // groups if side == "lhs" else rows // groups
        place = f"r * {groups} + c / {group}"
        if side == "rhs":  # scales are [..., N, K / group]
            place = f"(r / {rows} * {columns} + c) * {groups} + r % {rows} / {group}"
        shared = f"{as_array(context, scale)}[{place}]"
        element += f" * {f'mx_e8m0_to_float({shared})' if scale.type.element == 'i8' else shared}"
    value = Value(side, Type((*batch, rows, columns), "f32"), op.block)
    name = context.array(value.type, value.name)
    with context.braces(f"for (int r = 0; r < {value.type.size // columns}; r++)"):
        context.line("#pragma omp simd")
        context.line(f"for (int c = 0; c < {columns}; c++) {name}[r * {columns} + c] = {element};")
    context.storage[value] = Array(name)
    return value
