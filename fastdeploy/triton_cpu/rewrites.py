"""What is changed in a function's operations before anything is decided about its C.

* Sums of small floats are rounded once. A running sum in bf16 would stagnate at 256 times its terms; a GPU adds in
  another order, as a tree. So a combiner that rounds computes in f32, and its result is rounded:

      %s = "tt.scan"(%x) ({ addf : bf16 }) -> bf16         %t = "tt.scan"(%x) ({ addf : f32 }) -> f32
                                                           %s = arith.truncf %t : f32 to bf16

* No expression is deeper than DEEPEST operations: what is, is evaluated and kept where it stands. All that walks
  expressions may do so by recursion, and a loop that the C compiler sees has some hundred lines.
"""

from __future__ import annotations

from .operations import operation
from .ttir import Block, Function, Op, Type, Value, walk

# A level takes up to four of Python's frames, of which it has 1,000.
DEEPEST = 128


def rewrite(function: Function) -> None:
    for op in list(walk(function.body)):
        if op.name in ("tt.reduce", "tt.scan"):
            _round_once(op)
    _cut(function.body, {})


def _round_once(op: Op) -> None:
    combiner = list(walk(op.regions[0]))
    small = {value.type.element for value in op.operands} & {"bf16", "f16"}
    if not any(operation(inner).rounds for inner in combiner) or any("bitcast" in inner.name for inner in combiner):
        return
    for inner in combiner:
        for value in inner.results if inner.name != "arith.constant" else []:  # its text is of its type
            _widen(value, small)
    for value in op.regions[0].arguments:
        _widen(value, small)
    for value in op.results:
        if value.type.element in small:
            _insert_behind(op, "arith.truncf", value)
            _widen(value, small)


def _widen(value: Value, small: set[str]) -> None:
    if value.type.element in small:
        value.type = Type(value.type.shape, "f32")


def _cut(block: Block, depths: dict[Value, int]) -> None:
    """Keeps each value that is computed by DEEPEST operations in a row."""
    for op in list(block.ops):
        depth = 1 + max((depths.get(operand, 0) for operand in op.operands), default=0)
        for region in op.regions:
            _cut(region, depths)
        if not operation(op).lazy and op.name not in ("tt.reduce", "scf.for"):
            continue
        for value in op.results:
            depths[value] = depth
            if depth >= DEEPEST:
                _insert_behind(op, "cpu.keep", value)


def _insert_behind(op: Op, name: str, value: Value) -> None:
    """A new operation on a result of `op`, of the same type; what used that now uses its result."""
    new = Op(name, [value], name, op.location, op.block)
    result = Value(value.name, value.type, op.block, new)
    new.results = [result]
    op.block.ops.insert(op.block.ops.index(op) + 1, new)
    for user in value.uses:
        user.operands = [result if operand is value else operand for operand in user.operands]
    result.uses, value.uses = value.uses, [new]
