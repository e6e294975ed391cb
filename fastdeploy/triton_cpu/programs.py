"""What a program asks and tells: its place in the grid, assertions, printing."""

from __future__ import annotations

import re

from .arrays import as_array
from .context import Context, Scalar
from .elements import SMALL_FLOATS
from .ttir import Op


def place(context: Context, op: Op) -> None:
    context.storage[op.result] = Scalar(f"pid_{op.text.split()[1]}")


def number(context: Context, op: Op) -> None:
    context.storage[op.result] = Scalar(f"num_{op.text.split()[1]}")


def nothing(context: Context, op: Op) -> None:
    """Barriers and hints: a program is one thread here."""


def assertion(context: Context, op: Op) -> None:
    """tl.device_assert: a message with the source line, then abort(), which would lose what was printed before."""
    message = f"{op.location}: assertion failed in a Triton kernel: {_quoted(op)}"
    report = f'{{ fflush(stdout); fprintf(stderr, "%s\\n", "{message}"); abort(); }}'
    condition = op.operands[0]
    if not condition.type.is_tensor:
        context.line(f"if (!{context.scalar(condition)}) {report}")
        return
    holds = as_array(context, condition)
    context.line(f"for (int i = 0; i < {condition.type.size}; i++) if (!{holds}[i]) {report}")


def print_values(context: Context, op: Op) -> None:
    """tl.device_print: a line for each element, behind the program's place in the grid."""
    prefix = _quoted(op)
    head = r'printf("pid (%d, %d, %d)' + prefix.replace("%", "%%")
    for value in op.operands:
        code, cast = (
            ("%g", "(double)")
            if value.type.element in SMALL_FLOATS or value.type.element in ("f32", "f64")
            else ("%lld", "(long long)")
        )
        if not value.type.is_tensor:
            context.line(f'{head}{code}\\n", pid_x, pid_y, pid_z, {cast}{context.scalar(value)});')
            continue
        array = as_array(context, value)
        context.line(
            f"for (int i = 0; i < {value.type.size}; i++) "
            f'{head}[%d] {code}\\n", pid_x, pid_y, pid_z, i, {cast}{array}[i]);'
        )


def _quoted(op: Op) -> str:
    found = re.search(r'"([^"]*)"', op.text)
    return found.group(1) if found else ""
