"""What a program does where something is wrong: it says what and where, and ends. Prelude.h has the C."""

from __future__ import annotations

from collections.abc import Sequence

from .context import Context
from .ttir import Op


def failed_assertion(context: Context, op: Op, text: str, *arguments: str) -> str:
    """C that ends the program and has the launcher raise a RuntimeError: the source line, the program's place in
    the grid, and `text`, a format of printf for `arguments`, which are C expressions."""
    return f"fail(ASSERTION, {_message(context, op, text, arguments)});"


def checked(context: Context, access: Op, place: str, index: Sequence[str]) -> str:
    """`place`, a C lvalue in memory, with a check that the access may touch it. `index` says for which element of the
    tile that is, in C; none: for a scalar."""
    bounds = context.unit.target.bounds
    numbers = bounds.arguments(access.operands[0]) if bounds is not None else []
    if not numbers:
        return place
    arguments = f"((const int[]){{{', '.join(map(str, numbers))}}})"
    lane = f" of element [{', '.join(['%d'] * len(index))}] of the tile" if index else ""
    message = _message(context, access, access.name.removeprefix("tt.") + lane, [f"(int)({text})" for text in index])
    text = f"CHECKED({place}, {arguments}, {message})"
    return f"*(end_if_another_failed(), &{text})" if access.name.startswith("tt.atomic") else text


def _message(context: Context, op: Op, text: str, arguments: Sequence[str]) -> str:
    location = op.location.replace("%", "%%")
    text = f"{location}: kernel {context.unit.target.kernel!r}, program (%d, %d, %d): {text}"
    return ", ".join([c_string(text), "pid_x", "pid_y", "pid_z", *arguments])


def c_string(text: str) -> str:
    plain = [chr(byte) if 32 <= byte < 127 and chr(byte) not in '"?\\' else f"\\{byte:03o}" for byte in text.encode()]
    return f'"{"".join(plain)}"'
