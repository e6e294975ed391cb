"""What an integer may be, by what it is computed from: the least and the greatest number, as signed ones.

    pairs = tl.load(weight)                        uint8: -128 ... 127, as TTIR's integers have no sign
    pairs & 15                                     0 ... 15
    (pairs & 15) | ((high >> shift & 3) << 4)      0 ... 63
    (...) - 32                                     -32 ... 31

So bytes are known to be no less than 0, and an index to stay inside of a table. What may wrap may be anything.
"""

from __future__ import annotations

from collections.abc import Callable

from .analysis import operand_index, splat_constant
from .ttir import Op, Value

Range = tuple[int, int]


def range_of(value: Value, known: dict[Value, Range] | None = None) -> Range:
    """(least, greatest) of an integer or of a tensor's elements. `known` are answers."""
    known = {} if known is None else known
    if value not in known:
        found, most = _found(value, known), everything(value)
        known[value] = found if found is not None and fits(found, most) else most
    return known[value]


def everything(value: Value) -> Range:
    """What an integer's type can hold."""
    bits = 64 if value.type.element == "index" else int(value.type.element[1:])
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def fits(inner: Range, outer: Range) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def keeps_number(op: Op) -> bool:
    """Is an integer's conversion to another width the same number?"""
    source = range_of(op.operands[0])
    return fits(source, everything(op.result)) and (op.name != "arith.extui" or source[0] >= 0)


def _found(value: Value, known: dict[Value, Range]) -> Range | None:
    """None: not known, or more than the type holds."""
    op, number = value.op, splat_constant(value)
    if number is not None:
        return number, number
    if op is None:
        return None
    if op.name == "tt.make_range":
        return op.attribute("start"), op.attribute("end") - 1
    if op.name == "tt.reshape" or operand_index(op, value.type.shape, 0) is not None:
        return range_of(op.operands[0], known)
    rule = _RULES.get(op.name)
    if rule is None:
        return None
    first, *others = [range_of(operand, known) for operand in op.operands]
    if op.name in ("arith.extui", "arith.shrui") and first[0] < 0:  # the same bits as a number without a sign
        first = (0, 2 * everything(op.operands[0])[1] + 1)
    return rule(first, *others)


def _of_ends(of: Callable[[int, int], int]) -> Callable[[Range, Range], Range]:
    """The range of a function that grows or falls throughout in each operand."""

    def rule(a: Range, b: Range) -> Range:
        ends = [of(x, y) for x in a for y in b]
        return min(ends), max(ends)

    return rule


def _where(condition: Callable[[Range, Range], bool], rule: Callable[[Range, Range], Range]):  # type: ignore[no-untyped-def]
    return lambda a, b: rule(a, b) if condition(a, b) else None


def _may_shift(a: Range, b: Range) -> bool:
    return fits(b, (0, 63))


def _may_divide(a: Range, b: Range) -> bool:
    return a[0] >= 0 and b[0] > 0


def _are_nonnegative(a: Range, b: Range) -> bool:
    return a[0] >= 0 and b[0] >= 0


def _and(a: Range, b: Range) -> Range | None:
    limits = [greatest for least, greatest in (a, b) if least >= 0]
    return (0, min(limits)) if limits else None


_all_bits = _where(_are_nonnegative, lambda a, b: (0, (1 << max(a[1], b[1]).bit_length()) - 1))
_quotient = _where(_may_divide, _of_ends(lambda x, y: x // y))
_remainder = _where(_may_divide, lambda a, b: (0, min(a[1], b[1] - 1)))
_RULES: dict[str, Callable[..., Range | None]] = {
    **dict.fromkeys(("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"), lambda a: a),
    "arith.addi": _of_ends(lambda x, y: x + y),
    "arith.subi": _of_ends(lambda x, y: x - y),
    "arith.muli": _of_ends(lambda x, y: x * y),
    "arith.andi": _and,
    "arith.ori": _all_bits,
    "arith.xori": _all_bits,
    "arith.shli": _where(_may_shift, _of_ends(lambda x, y: x << y)),
    "arith.shrsi": _where(_may_shift, _of_ends(lambda x, y: x >> y)),
    "arith.shrui": _where(_may_shift, _of_ends(lambda x, y: x >> y)),
    "arith.divsi": _quotient,
    "arith.divui": _quotient,
    "arith.remsi": _remainder,
    "arith.remui": _remainder,
    "arith.minsi": _of_ends(min),
    "arith.maxsi": _of_ends(max),
    "arith.select": lambda condition, a, b: (min(a[0], b[0]), max(a[1], b[1])),
}
