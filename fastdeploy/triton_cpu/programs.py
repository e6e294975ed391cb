"""What a program asks and tells: its place in the grid, assertions, printing."""

from __future__ import annotations

import re
from math import prod

from .arrays import as_array
from .context import Context, Scalar
from .elements import bytes_in_array, is_float, unsigned_type
from .failures import c_string, failed_assertion
from .ttir import Op


def place(context: Context, op: Op) -> None:
    context.storage[op.result] = Scalar(f"pid_{op.text.split()[1]}")


def number(context: Context, op: Op) -> None:
    context.storage[op.result] = Scalar(f"num_{op.text.split()[1]}")


def nothing(context: Context, op: Op) -> None:
    """Barriers, hints, and the ends of regions."""


def assertion(context: Context, op: Op) -> None:
    """tl.device_assert: of a tensor, the first element that is False is named."""
    condition, text = op.operands[0], "device-side assertion failed: " + _quoted(op).replace("%", "%%")
    if not condition.type.is_tensor:
        context.line(f"if (!{context.scalar(condition)}) {failed_assertion(context, op, text)}")
        return
    holds, shape = as_array(context, condition), condition.type.shape
    text = text.replace(":", f" at [{', '.join(['%d'] * len(shape))}]:", 1)
    report = failed_assertion(context, op, text, *_index_of("i", shape))
    context.line(f"for (int i = 0; i < {condition.type.size}; i++) if (!{holds}[i]) {report}")


def print_values(context: Context, op: Op) -> None:
    """tl.device_print, a line for each element, as on a GPU: `pid (0, 0, 0) idx (1, 12) prefix: (operand 0) value`."""
    prefix = _quoted(op).replace("%", "%%")
    signed = re.findall(r"isSigned = array<i32(?:: ([\d, ]+))?>", op.text)[-1].split(", ")
    if not op.operands:
        alone = c_string(f"pid (%d, %d, %d){prefix}\n")
        context.line(f"printf({alone}, pid_x, pid_y, pid_z);")
    for number, value in enumerate(op.operands):
        shape = value.type.shape
        code, cast = _format(value.type.element, "hex = true" in op.text, signed[number] == "1")
        index = ", ".join(f"%{len(str(extent - 1))}d" for extent in shape)
        operand = f"(operand {number}) " if len(op.operands) > 1 else ""
        line = f"pid (%d, %d, %d) idx ({index}){prefix}{operand}{code}\n"
        call = f"printf({c_string(line)}, pid_x, pid_y, pid_z, "
        if value.type.is_tensor:
            call = f"for (int i = 0; i < {value.type.size}; i++) {call}{', '.join(_index_of('i', shape))}, "
        text = f"{as_array(context, value)}[i]" if value.type.is_tensor else context.scalar(value)
        context.line(f"{call}{cast}({text}));")
    context.line("fflush(stdout);")


def _index_of(position: str, shape: tuple[int, ...]) -> list[str]:
    return [f"{position} / {prod(shape[d + 1 :])} % {extent}" for d, extent in enumerate(shape)]


def _format(element: str, hexadecimal: bool, signed: bool) -> tuple[str, str]:
    """The conversion of printf, and the cast that it needs."""
    if element.startswith("*"):
        return "0x%llx", "(unsigned long long)"
    if is_float(element):
        return "%a" if hexadecimal else "%f", "(double)"
    if signed and not hexadecimal:
        return "%lld", "(long long)"
    digits = f"0x%0{bytes_in_array(element) * 2}llx"
    return digits if hexadecimal else "%llu", f"(unsigned long long)({unsigned_type(element)})"


def _quoted(op: Op) -> str:
    """The text of a message, in which MLIR writes some characters as a backslash and two hexadecimal digits."""
    found = re.search(r'"([^"]*)"', op.text)
    shown = (found.group(1) if found else "").encode()
    plain = re.sub(rb"\\(\\|[0-9A-F]{2})", lambda m: b"\\" if m[1] == b"\\" else bytes.fromhex(m[1].decode()), shown)
    return plain.decode(errors="replace")
