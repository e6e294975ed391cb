"""How a tl.dot of floats multiplies: a product at a time, or two of bf16 where the option `bf16_products` asks for it.

    VDPBF16PS:  sum = fma(a[k], b[k], fma(a[k + 1], b[k + 1], sum))        in each 32-bit lane, subnormals taken as 0

Each lane of an operand is a pair: the values k and k + 1 of a row or column, the second in the upper half. Neighbours
along k in memory are a pair as they lie. Two rows of a right operand become pairs on their way from memory, which costs
1 % of the products' time. Any other operand is evaluated into a local array of pairs.

Types and the number of dimensions decide, never the tile. All 2-D products of bf16 whose K is even add their pairs in
ascending k by the same instruction, be it in registers.py or in dot.py.
"""

from __future__ import annotations

from typing import NamedTuple

from .context import Context
from .loops import LoopNest, Term, best_order, linear
from .ttir import Op, Type, Value


class Products(NamedTuple):
    terms: int  # of a sum that one instruction adds
    element: str  # type of as many terms of an operand
    kind: str  # C type of a vector of those
    packed: str  # C for one, of its {0} (and {1})
    text: str  # C for a sum and the products of a {left} and a {right} operand


_FLOATS = Products(1, "f32", "vec", "{0}", "vec_fused({left}, {right}, {sum})")
_PAIRS = Products(2, "i32", "ivec", "pair_of({0}, {1})", "add_dot2({sum}, {left}, {right})")


def products(context: Context, dot: Op) -> Products:
    a, b, result = dot.operands[0].type, dot.operands[1].type, dot.result.type
    of_bf16 = (a.element, b.element, result.element) == ("bf16", "bf16", "f32")
    even = len(a.shape) == 2 and a.shape[1] % 2 == 0
    return _PAIRS if context.wanted.bf16_products and of_bf16 and even else _FLOATS


def copy_of(context: Context, value: Value, by: Products, axis: int, first: str = "0", rows: int | None = None) -> str:
    """The name of a local array of an operand whose terms lie along `axis`: of `rows` rows of it, or of all."""
    shape = [rows or value.type.shape[0], value.type.shape[1]]
    shape[axis] //= by.terms
    name = context.array(Type(tuple(shape), by.element), value.name)
    nest = LoopNest(context, tuple(shape), None if axis else best_order(context, [value], tuple(shape)))
    row, column = nest.index

    def term(number: int) -> str:
        place = [Term(f"({first} + {row.text})", row.level), column]
        if by.terms == 2:
            place[axis] = Term(f"(2 * {place[axis].text} + {number})", place[axis].level)
        return nest.evaluate(value, tuple(place)).text

    text = by.packed.format(*map(term, range(by.terms)))
    nest.put(f"{name}[{linear(nest.shape, nest.index).text}] = {text};")
    nest.write()
    return name
