"""tt.reduce and tt.scan.

The order in which a reduction adds is part of its result, so it may depend on the length of the reduced axis and on
nothing else: not on the tile's other extents, the vector width or the C compiler's taste.

* Along the last axis, LANES_OF_A_SUM partial results: lane l takes elements l, l + 16, l + 32, ...; the lanes are then
  combined as a tree (l with l + 8, l + 4, l + 2, l + 1). The loop over lanes is one vector instruction.
* Along another axis, one element after the other, for all columns at once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from . import expressions as c
from . import vectors
from .live_rows import number_of_live_rows
from .loops import Array, LoopNest, Scalar, Term, best_order, linear
from .ttir import Op

if TYPE_CHECKING:
    from .emitter import KernelEmitter

LANES_OF_A_SUM = 16

# Combiners with an identity need no first element to start from: lanes begin with it. max and min ignore NaN (so NaN is
# their identity) unless they are the propagating kind. Adding -0.0 changes nothing, not even the sign of zero.
_IDENTITIES = {
    "arith.addf": "-0.0f",
    "arith.addi": "0",
    "arith.ori": "0",
    "arith.xori": "0",
    "arith.andi": "-1",
    "arith.maxnumf": "NAN",
    "arith.minnumf": "NAN",
    "arith.maximumf": "-INFINITY",
    "arith.minimumf": "INFINITY",
}


def emit_reduce(emitter: KernelEmitter, op: Op) -> None:
    """Declares the results and writes the loops that fill them."""
    axis, shape = op.attribute("axis"), op.operands[0].type.shape
    identity = _identity(op)
    if identity is None:  # a combiner we know nothing of reads its operands twice: give it arrays
        for operand in op.operands:
            emitter.as_array(operand)
    if axis == len(shape) - 1:
        _reduce_last_axis(emitter, op, identity)
    else:
        _reduce_outer_axis(emitter, op, axis, identity)


def _identity(op: Op) -> str | None:
    """What a combiner of one operation leaves unchanged; None for a combiner that we know nothing of."""
    body = op.regions[0].ops
    if len(op.operands) != 1 or len(body) != 2 or set(body[0].operands) != set(op.regions[0].arguments):
        return None
    element = body[0].operands[0].type.element
    if element in ("i8", "i16", "i32", "i64"):
        extremes = {
            "arith.maxsi": f"INT{element[1:]}_MIN",
            "arith.minsi": f"INT{element[1:]}_MAX",
            "arith.maxui": "0",
            "arith.minui": "-1",
        }
        return extremes.get(body[0].name) or _IDENTITIES.get(body[0].name)
    return _IDENTITIES.get(body[0].name) if element != "i1" else None


def _combine(emitter: KernelEmitter, op: Op, left: list[str], right: list[str]) -> tuple[list[str], list[str]]:
    """The combiner on C expressions: (lines of code, the results)."""
    region = op.regions[0]
    for argument, text in zip(region.arguments, left + right):
        emitter.storage[argument] = Scalar(text)
    outer, depth = emitter.lines, emitter.depth
    emitter.lines, emitter.depth = [], 0
    emitter.block(region, skip_terminator=True)
    lines, emitter.lines, emitter.depth = emitter.lines, outer, depth
    return lines, [emitter.scalar(value) for value in region.terminator.operands]  # type: ignore[union-attr]


def _update(emitter: KernelEmitter, op: Op, targets: list[str], operands: list[str]) -> list[str]:
    """C lines for targets = combine(targets, operands)."""
    lines, results = _combine(emitter, op, targets, operands)
    if len(targets) == 1:
        return [*lines, f"{targets[0]} = {results[0]};"]
    fresh = [emitter.name("next") for _ in targets]
    kinds = [c.value_type(v.type.element) for v in op.operands]
    return (
        lines
        + [f"const {kind} {name} = {text};" for kind, name, text in zip(kinds, fresh, results)]
        + [f"{target} = {name};" for target, name in zip(targets, fresh)]
    )


def _declare_results(emitter: KernelEmitter, op: Op) -> list[str]:
    """Names of the results: a scalar each, or an array without the reduced axis."""
    names = []
    for value in op.results:
        if value.type.is_tensor:
            name = emitter.array(value.type, value.name)
            emitter.storage[value] = Array(name)
        else:
            name = emitter.name(value.name)
            emitter.line(f"{c.value_type(value.type.element)} {name};")
            emitter.storage[value] = Scalar(name)
        names.append(name)
    return names


def _reduce_last_axis(emitter: KernelEmitter, op: Op, identity: str | None) -> None:
    results = _declare_results(emitter, op)
    if identity is not None and emitter.vectors:
        write = functools.partial(vectors.reduce_last_axis, emitter, op, identity, LANES_OF_A_SUM, results[0])
        if vectors.attempt(emitter, write):
            return
    lanes = _Lanes(emitter, op)
    nest = lanes.nest
    lines = lanes.start(identity) + lanes.steps(0 if identity is not None else lanes.count) + lanes.tree()
    for value, name, lane in zip(op.results, results, lanes.partial):
        target = f"{name}[{linear(value.type.shape, lanes.row).text}]" if value.type.is_tensor else name
        lines.append(f"{target} = {lane}[0];")
    for text in lines:
        nest.put(text, nest.depth - 1)
    nest.shape = (*nest.shape[:-1], 1)  # the last axis has its own loops, among the lines
    with emitter.braces(""):
        nest.write(vectorise=False)


class _Lanes:
    """Code that reduces one row of a tensor: partial results side by side, then a tree over them."""

    def __init__(self, emitter: KernelEmitter, op: Op):
        shape = op.operands[0].type.shape
        self.emitter, self.op, self.shape = emitter, op, shape
        self.count = min(LANES_OF_A_SUM, shape[-1])
        self.nest = LoopNest(emitter, shape, list(range(len(shape))))
        self.nest.rows = number_of_live_rows(emitter, op.result) if len(shape) > 1 else None
        self.row = self.nest.index[:-1]
        self.partial = [emitter.name("lane") for _ in op.operands]
        self.block, self.lane = emitter.name("block"), emitter.name("l")

    def start(self, identity: str | None) -> list[str]:
        """The lanes, holding the identity or, of a combiner without one, the row's first elements."""
        lines = [
            f"{c.value_type(operand.type.element)} {name}[{self.count}];"
            for operand, name in zip(self.op.operands, self.partial)
        ]
        first = linear(self.shape, (*self.row, Term(self.lane, self.nest.depth))).text
        for operand, name in zip(self.op.operands, self.partial):
            initial = identity or f"{self.emitter.as_array(operand)}[{first}]"
            lines.append(
                f"for (int {self.lane} = 0; {self.lane} < {self.count}; {self.lane}++) {name}[{self.lane}] = {initial};"
            )
        return lines

    def steps(self, first: int) -> list[str]:
        """Every lane takes in its elements from `first` on, one per block."""
        length = self.shape[-1]
        if first == length:
            return []
        several = length > self.count
        place = Term(f"({self.block} + {self.lane})" if several else self.lane, self.nest.depth)
        elements = [self.nest.evaluate(operand, (*self.row, place)).text for operand in self.op.operands]
        update = self._update(self.lane, elements)
        inner, self.nest.lines[self.nest.depth] = self.nest.lines[self.nest.depth], []  # what the elements need
        loop = self._over_lanes(self.count, inner + update)
        if not several:
            return loop
        opening = f"for (int {self.block} = {first}; {self.block} < {length}; {self.block} += {self.count}) {{"
        return [opening, *loop, "}"]

    def tree(self) -> list[str]:
        """Combines lane l with lane l + half, for half the lanes, a quarter, ... until lane 0 holds all."""
        lines: list[str] = []
        half = self.count // 2
        while half:
            others = [f"{name}[{self.lane} + {half}]" for name in self.partial]
            lines += self._over_lanes(half, self._update(self.lane, others))
            half //= 2
        return lines

    def _update(self, lane: str, elements: list[str]) -> list[str]:
        return _update(self.emitter, self.op, [f"{name}[{lane}]" for name in self.partial], elements)

    def _over_lanes(self, count: int, body: list[str]) -> list[str]:
        opening = f"for (int {self.lane} = 0; {self.lane} < {count}; {self.lane}++) {{"
        return ["#pragma omp simd", opening, *body, "}"]


def _reduce_outer_axis(emitter: KernelEmitter, op: Op, axis: int, identity: str | None) -> None:
    shape = op.operands[0].type.shape
    results = _declare_results(emitter, op)
    kept = [d for d in range(len(shape)) if d != axis]
    if identity is not None:
        emitter.line(f"for (int i = 0; i < {op.result.type.size}; i++) {results[0]}[i] = {identity};")
        start = 0
    else:
        _copy_first(emitter, op, axis, results)
        start = 1
    inner = [d for d in best_order(emitter, op.operands, shape) if d != axis]
    nest = LoopNest(emitter, shape, [axis, *inner])
    target = linear(op.result.type.shape, tuple(nest.index[d] for d in kept)).text
    if start:
        step = Term(f"({nest.index[axis].text} + 1)", nest.index[axis].level)
        nest.index = (*nest.index[:axis], step, *nest.index[axis + 1 :])
        nest.shape = (*shape[:axis], shape[axis] - 1, *shape[axis + 1 :])
        if nest.shape[axis] == 0:
            return
        if nest.shape[axis] == 1:  # a loop of one turn has no variable
            one = Term("1", 0)
            nest.index = (*nest.index[:axis], one, *nest.index[axis + 1 :])
    elements = [nest.evaluate(operand, nest.index).text for operand in op.operands]
    for text in _update(emitter, op, [f"{name}[{target}]" for name in results], elements):
        nest.put(text)
    nest.write()


def _copy_first(emitter: KernelEmitter, op: Op, axis: int, results: list[str]) -> None:
    shape = op.operands[0].type.shape
    for operand, value, name in zip(op.operands, op.results, results):
        nest = LoopNest(emitter, (*shape[:axis], 1, *shape[axis + 1 :]), list(range(len(shape))))
        element = nest.evaluate(operand, nest.index).text
        kept = tuple(term for d, term in enumerate(nest.index) if d != axis)
        nest.put(f"{name}[{linear(value.type.shape, kept).text}] = {element};")
        nest.write()


def emit_scan(emitter: KernelEmitter, op: Op) -> None:
    """Each element becomes the combination of all up to it, one after the other along the axis."""
    axis, shape = op.attribute("axis"), op.operands[0].type.shape
    reverse = "reverse = true" in op.text
    sources = [emitter.as_array(operand) for operand in op.operands]
    targets = [emitter.array(value.type, value.name) for value in op.results]
    order = [d for d in range(len(shape)) if d != axis] + [axis]
    nest = LoopNest(emitter, shape, order)
    step = nest.index[axis].text
    here = f"({shape[axis] - 1} - {step})" if reverse else step
    running = [emitter.name("running") for _ in sources]
    position = linear(shape, (*nest.index[:axis], Term(here, nest.depth), *nest.index[axis + 1 :])).text
    for value, name in zip(op.operands, running):
        nest.put(f"{c.value_type(value.type.element)} {name} = 0;", nest.depth - 1)
    updates = _update(emitter, op, running, [f"{source}[{position}]" for source in sources])
    nest.put(f"if ({step} == 0) {{")
    for name, source in zip(running, sources):
        nest.put(f"{name} = {source}[{position}];")
    nest.put("} else {")
    for text in updates:
        nest.put(text)
    nest.put("}")
    for target, name, value in zip(targets, running, op.results):
        nest.put(f"{target}[{position}] = {name};")
        emitter.storage[value] = Array(target)
    nest.write(vectorise=False)


def emit_unsplat(emitter: KernelEmitter, op: Op) -> None:
    """The only element of a one-element tensor."""
    name = emitter.name(op.result.name)
    emitter.line(f"const {c.value_type(op.result.type.element)} {name} = {emitter.as_array(op.operands[0])}[0];")
    emitter.storage[op.result] = Scalar(name)
