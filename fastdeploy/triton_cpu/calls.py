"""Functions that are not inlined (noinline=True): C functions, to which Triton passes scalars."""

from __future__ import annotations

import re

from .context import Context, Scalar
from .elements import value_type
from .ttir import SYMBOL, Function, Op


def function_name(name: str) -> str:
    return "kernel_" + re.sub(r"\W", "_", name)


def result_type(function: Function) -> str:
    types = function.result_types
    if not types:
        return "void"
    return value_type(types[0].element) if len(types) == 1 else f"struct {_struct_name(function.name)}"


def result_struct(function: Function) -> str:
    """Several results are returned as a struct."""
    if len(function.result_types) < 2:
        return ""
    fields = " ".join(f"{value_type(t.element)} r{i};" for i, t in enumerate(function.result_types))
    return f"struct {_struct_name(function.name)} {{ {fields} }};"


def _struct_name(name: str) -> str:
    return f"{function_name(name)}_results"


def call(context: Context, op: Op) -> None:
    """A C call; a callee learns the program's place in the grid from its last six arguments."""
    callee = SYMBOL.search(op.text).group(1).strip('"')  # type: ignore[union-attr]
    if any(value.type.is_tensor for value in [*op.operands, *op.results]):
        raise context.unsupported(op, "with a tensor")
    arguments = [context.scalar(v) for v in op.operands] + ["pid_x", "pid_y", "pid_z", "num_x", "num_y", "num_z"]
    call = f"{function_name(callee)}({', '.join(arguments)})"
    if not op.results:
        context.line(f"{call};")
        return
    name = context.name("result")
    kind = value_type(op.result.type.element) if len(op.results) == 1 else f"struct {_struct_name(callee)}"
    context.line(f"{kind} {name} = {call};")
    for number, value in enumerate(op.results):
        context.storage[value] = Scalar(name if len(op.results) == 1 else f"{name}.r{number}")


def return_(context: Context, op: Op) -> None:
    values = [context.scalar(v) for v in op.operands]
    if len(values) > 1:
        context.line(f"return (struct {_struct_name(context.unit.function.name)}){{{', '.join(values)}}};")
    else:
        context.line(f"return {values[0]};" if values else "return;")
