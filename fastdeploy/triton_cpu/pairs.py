"""Products of bf16 two at a time, by the instruction of AVX512-BF16, where the option `bf16_products` asks for it.

    VDPBF16PS:  sum = fma(a[k], b[k], fma(a[k + 1], b[k + 1], sum))        in each 32-bit lane, subnormals taken as 0

Each lane of an operand is a pair: the values k and k + 1 of a column, the second in the upper half. Neighbours along k
in memory are a pair as they lie; of two rows in memory, pairs are made on the way (that costs 2 % of a product), and
any other operand is evaluated into a local array of pairs.

An operand's type and the product's shape decide, never its tile: all 2-D products of bf16 whose K is even add their
pairs in ascending k, by the same instruction, in registers.py, in dot.py's blocks and in its plain loops.
"""

from __future__ import annotations

from typing import NamedTuple

from .context import Context
from .loops import LoopNest, Term, best_order, linear
from .ttir import Op, Type, Value


class Products(NamedTuple):
    """How a tl.dot of floats multiplies."""

    terms: int  # of a sum that one instruction adds
    kind: str  # C type of a vector of operands
    text: str  # C for a sum with the products of a {left} and a {right} operand


_FLOATS = Products(1, "vec", "vec_fused({left}, {right}, {sum})")
_PAIRS = Products(2, "ivec", "add_dot2({sum}, {left}, {right})")


def products(context: Context, dot: Op) -> Products:
    a, b, result = dot.operands[0].type, dot.operands[1].type, dot.result.type
    of_bf16 = (a.element, b.element, result.element) == ("bf16", "bf16", "f32")
    even = len(a.shape) == 2 and a.shape[1] % 2 == 0
    return _PAIRS if context.wanted.bf16_products and of_bf16 and even else _FLOATS


def array_of_pairs(context: Context, value: Value, axis: int, first: str = "0", rows: int | None = None) -> str:
    """The name of a local array of 32-bit pairs along `axis`, row-major, of `rows` rows of an operand, or all."""
    shape = [rows or value.type.shape[0], value.type.shape[1]]
    shape[axis] //= 2
    name = context.array(Type(tuple(shape), "i32"), value.name)
    nest = LoopNest(context, tuple(shape), best_order(context, [value], value.type.shape))
    row, column = nest.index
    if first != "0":
        row = Term(f"({first} + {row.text})", row.level)

    def half(number: int) -> str:
        place = [row, column]
        place[axis] = Term(f"(2 * {place[axis].text} + {number})", place[axis].level)
        return nest.evaluate(value, tuple(place)).text

    nest.put(f"{name}[{linear(tuple(shape), nest.index).text}] = pair_of({half(0)}, {half(1)});")
    nest.write()
    return name
