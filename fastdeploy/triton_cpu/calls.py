"""Functions that are not inlined (noinline=True): C functions.

Scalars are passed and returned by value, several results as a struct. Tensors lie in local arrays of the caller: a
callee reads its arguments there, and writes its results into arrays passed behind them (`into0`, `into1`, ...).
"""

from __future__ import annotations

import re

from .arrays import as_array, materialise
from .context import Array, Context, Scalar
from .elements import array_type, value_type
from .ttir import SYMBOL, Function, Op, Type, Value

_PLACE = ("pid_x", "pid_y", "pid_z", "num_x", "num_y", "num_z")


def function_name(name: str) -> str:
    return "kernel_" + re.sub(r"\W", "_", name)


def signature(context: Context) -> str:
    """The C of a function's head; its parameters get their names."""
    function, declared = context.unit.function, []
    for parameter in function.parameters:
        name, type_ = context.name("arg_" + parameter.name.lstrip("%")), parameter.type
        context.storage[parameter] = Array(name) if type_.is_tensor else Scalar(name)
        declared.append(f"{_passed_type(type_)} {name}")
    tensors = [type_ for type_ in function.result_types if type_.is_tensor]
    declared += [f"{_passed_type(type_)} into{number}" for number, type_ in enumerate(tensors)]
    declared += [f"int {name}" for name in _PLACE]
    result = _returned_type(function.name, function.result_types)
    return f"static {result} {function_name(function.name)}({', '.join(declared)})"


def _passed_type(type_: Type) -> str:
    return f"{array_type(type_.element)} *" if type_.is_tensor else value_type(type_.element)


def _returned_type(function: str, results: list[Type]) -> str:
    scalars = [type_ for type_ in results if not type_.is_tensor]
    if not scalars:
        return "void"
    return value_type(scalars[0].element) if len(scalars) == 1 else f"struct {_struct_name(function)}"


def result_struct(function: Function) -> str:
    """Several scalars are returned as a struct."""
    scalars = [type_ for type_ in function.result_types if not type_.is_tensor]
    if len(scalars) < 2:
        return ""
    fields = " ".join(f"{value_type(t.element)} r{i};" for i, t in enumerate(scalars))
    return f"struct {_struct_name(function.name)} {{ {fields} }};"


def _struct_name(name: str) -> str:
    return f"{function_name(name)}_results"


def call(context: Context, op: Op) -> None:
    """A C call; a callee learns the program's place in the grid from its last six arguments."""
    callee = SYMBOL.search(op.text).group(1).strip('"')  # type: ignore[union-attr]
    arguments = [as_array(context, v) if v.type.is_tensor else context.scalar(v) for v in op.operands]
    scalars: list[Value] = []
    for value in op.results:
        if value.type.is_tensor:
            arguments.append(context.array(value.type, value.name))
            context.storage[value] = Array(arguments[-1])
        else:
            scalars.append(value)
    call = f"{function_name(callee)}({', '.join([*arguments, *_PLACE])})"
    if not scalars:
        context.line(f"{call};")
        return
    name = context.name("result")
    context.line(f"{_returned_type(callee, [value.type for value in scalars])} {name} = {call};")
    for number, value in enumerate(scalars):
        context.storage[value] = Scalar(name if len(scalars) == 1 else f"{name}.r{number}")


def return_(context: Context, op: Op) -> None:
    """Tensors into the caller's arrays, scalars by value."""
    tensors = [value for value in op.operands if value.type.is_tensor]
    for number, value in enumerate(tensors):
        materialise(context, value, into=f"into{number}")
    scalars = [context.scalar(value) for value in op.operands if not value.type.is_tensor]
    if len(scalars) > 1:
        context.line(f"return (struct {_struct_name(context.unit.function.name)}){{{', '.join(scalars)}}};")
    else:
        context.line(f"return {scalars[0]};" if scalars else "return;")
