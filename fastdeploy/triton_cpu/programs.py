"""What a program asks and tells: its place in the grid, assertions, printing."""

from __future__ import annotations

import re
from math import prod

from .arrays import as_array
from .context import Context, Scalar
from .elements import SMALL_FLOATS
from .failures import c_string, failed_assertion
from .ttir import Op


def place(context: Context, op: Op) -> None:
    context.storage[op.result] = Scalar(f"pid_{op.text.split()[1]}")


def number(context: Context, op: Op) -> None:
    context.storage[op.result] = Scalar(f"num_{op.text.split()[1]}")


def nothing(context: Context, op: Op) -> None:
    """Barriers and hints: a program is one thread here."""


def assertion(context: Context, op: Op) -> None:
    """tl.device_assert: of a tensor, the first element that is False is named."""
    condition, text = op.operands[0], "device-side assertion failed: " + _quoted(op).replace("%", "%%")
    if not condition.type.is_tensor:
        context.line(f"if (!{context.scalar(condition)}) {failed_assertion(context, op, text)}")
        return
    holds, shape = as_array(context, condition), condition.type.shape
    index = [f"i / {prod(shape[d + 1 :])} % {extent}" for d, extent in enumerate(shape)]
    text = text.replace(":", f" at [{', '.join(['%d'] * len(shape))}]:", 1)
    report = failed_assertion(context, op, text, *index)
    context.line(f"for (int i = 0; i < {condition.type.size}; i++) if (!{holds}[i]) {report}")


def print_values(context: Context, op: Op) -> None:
    """tl.device_print: a line for each element, behind the program's place in the grid."""
    head = "printf(" + c_string("pid (%d, %d, %d)" + _quoted(op).replace("%", "%%"))[:-1]
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
    """The text of a message, in which MLIR writes some characters as a backslash and two hexadecimal digits."""
    found = re.search(r'"([^"]*)"', op.text)
    shown = (found.group(1) if found else "").encode()
    plain = re.sub(rb"\\(\\|[0-9A-F]{2})", lambda m: b"\\" if m[1] == b"\\" else bytes.fromhex(m[1].decode()), shown)
    return plain.decode(errors="replace")
