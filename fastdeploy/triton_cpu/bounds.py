"""Which memory an access may touch, for the debug mode that checks each one (launch option `check`).

A pointer is bounded by the tensor that it was computed from, whatever the offset: x_ptr + 1000 does not reach into y,
even if y lies there. Where it may be one of several (`a if n > 0 else b`), it is bounded by them all. The launcher
tells each tensor's extent, from the lowest address of its elements to the highest: the gaps between the rows of a view
belong to it, the memory around the view does not.

Not checked are pointers that nobody can trace: loaded from memory, computed from integers, returned by a function that
is not inlined; and those into what came as an address (an int) or as an object without a shape.
"""

from __future__ import annotations

from .analysis import bases
from .ttir import SYMBOL, Function, Value, reachable, walk


class Bounds:
    """Says which of a kernel's arguments bound a pointer, in the kernel or in a function that it calls."""

    def __init__(self, functions: list[Function]):
        self.pointers = [parameter for parameter in functions[0].parameters if parameter.type.is_pointer]
        self._passed: dict[Value | None, list[Value]] = {}  # parameters of called functions -> what they are given
        parameters = {function.name: function.parameters for function in functions}
        for call in (op for function in functions for op in walk(function.body) if op.name == "tt.call"):
            callee = SYMBOL.search(call.text).group(1).strip('"')  # type: ignore[union-attr]
            for parameter, operand in zip(parameters[callee], call.operands):
                self._passed.setdefault(parameter, []).append(operand)

    def arguments(self, pointer: Value) -> list[int]:
        """Numbers of the pointer arguments, any of which may bound `pointer`; none: it can't be checked."""
        given = reachable(pointer, lambda v: [value for base in bases(v) for value in self._passed.get(base, [])])
        found = set().union(*map(bases, given)) - self._passed.keys()
        return [] if None in found else sorted(self.pointers.index(base) for base in found if base is not None)
