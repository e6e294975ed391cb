"""tt.reduce and tt.scan.

The order in which a reduction adds is part of its result. So it depends on the length of the reduced axis alone, not on
the tile's other extents, the vector width or the C compiler's taste.

* Along the last axis, LANES_OF_A_SUM partial results: lane l takes elements l, l + 16, l + 32, ...; the lanes are then
  combined as a tree (l with l + 8, l + 4, l + 2, l + 1). The loop over lanes is one vector instruction.
* Along another axis, one element after the other, for all columns at once.

So a combiner of tl.reduce has to be commutative, as on a GPU, whose threads take turns too. Scans keep the order.
"""

from __future__ import annotations

from .arrays import as_array
from .context import Context, NotATile, Scalar
from .elements import value_type
from .live_rows import number_of_live_rows
from .loops import LoopNest, Term, best_order, linear
from .operations import operation, vector_form
from .ttir import Op, Value, reachable
from .vectors import VECTOR_TYPES, Vectors, plus, rows_of

LANES_OF_A_SUM = 16


def _along_last_axis(op: Op) -> bool:
    return op.attribute("axis") == len(op.operands[0].type.shape) - 1


def _identity(op: Op) -> str | None:
    """What a combiner of one operation leaves unchanged; None for a combiner that we know nothing of.

    Lanes begin with it, so they need no first element. max and min ignore NaN (so NaN is their identity) unless they
    are the propagating kind. Adding -0.0 changes nothing, not even the sign of zero.
    """
    body = op.regions[0].ops
    if len(op.operands) != 1 or len(body) != 2 or set(body[0].operands) != set(op.regions[0].arguments):
        return None
    element = body[0].operands[0].type.element
    return operation(body[0]).identity.format(bits=element[1:]) or None if element != "i1" else None


def _update(context: Context, op: Op, targets: list[str], operands: list[str]) -> list[str]:
    """C lines for targets = combine(targets, operands)."""
    region = op.regions[0]
    for argument, text in zip(region.arguments, targets + operands):
        context.storage[argument] = Scalar(text)
    with context.aside() as lines:
        context.block(region)
    results = [context.scalar(value) for value in region.terminator.operands]  # type: ignore[union-attr]
    if len(targets) == 1:
        return [*lines, f"{targets[0]} = {results[0]};"]
    fresh = [context.name("next") for _ in targets]
    kinds = [value_type(v.type.element) for v in op.operands]
    return (
        lines
        + [f"const {kind} {name} = {text};" for kind, name, text in zip(kinds, fresh, results)]
        + [f"{target} = {name};" for target, name in zip(targets, fresh)]
    )


def vectors(context: Context, op: Op) -> None:
    """tt.reduce along the last axis whose partial results are C vectors."""
    identity, count = _identity(op), LANES_OF_A_SUM
    if identity is None or not _along_last_axis(op) or not context.vectors:
        raise NotATile
    value, combiner = op.operands[0], op.regions[0].ops[0]
    form = vector_form(combiner)
    if form is None or combiner.operands != op.regions[0].arguments:
        raise NotATile(f"{combiner.name} of {value.type.element}")
    if value.type.shape[-1] < count:
        raise NotATile("less than one element for each partial result")
    result, live = context.declare(op.result), number_of_live_rows(context, op.result)
    kind, together = VECTOR_TYPES[value.type.element], _rows_together(context, value, live)

    def combined(left: str, right: str) -> str:
        name = context.name("lane")
        context.line(f"const {kind} {name} = {form.format(left, right)};")
        return name

    with rows_of(context, value, live, together) as (block, first):
        rows = [first if together == 1 else plus(first.text, r) for r in range(together)]
        partial = [_lanes_of_row(block, value, row, f"{kind}_splat({identity})", form) for row in rows]
        bit = context.lanes // 2
        while len(partial) > 1:
            half = len(partial) // 2
            pairs = list(zip(partial[:half], partial[half:]))
            partial = [combined(*(f"{kind}_{side}({a}, {b}, {bit})" for side in ("lower", "upper"))) for a, b in pairs]
            bit //= 2
        while bit:
            partial = [combined(partial[0], f"{kind}_exchanged({partial[0]}, {bit})")]
            bit //= 2
        if together > 1:
            context.line(f"*({kind} *)({result} + {first.text}) = {partial[0]};")
        else:
            target = f"{result}[{first.text}]" if len(value.type.shape) == 2 else result
            context.line(f"{target} = {partial[0]}[0];")


def _rows_together(context: Context, value: Value, live: str | None) -> int:
    """How many rows are reduced at once: as many as a vector has lanes, if they are at hand, or one.

    rows    0: a b c d | 1: e f g h | 2: i j k l | 3: m n o p       4 lanes
    0, 2    a+c b+d i+k j+l         | 1, 3: e+g f+h m+o n+p         the same sums as of a row alone, but a step
    0 ... 3 a+c+(b+d) e+g+(f+h) i+k+(j+l) m+o+(n+p)                 takes three instructions for two vectors
    """
    if live or len(value.type.shape) != 2 or value.type.shape[0] % context.lanes:
        return 1
    parts = reachable(value, lambda part: part.op.operands if part.op and part not in context.storage else [])
    if any(part.op is not None and part not in context.storage and part.op.name == "tt.load" for part in parts):
        return 1
    return context.lanes


def _lanes_of_row(block: Vectors, value: Value, row: Term, identity: str, form: str) -> str:
    """The name of a vector with the partial results of a row; those of 16 lanes are combined if it has fewer."""
    context, kind = block.context, VECTOR_TYPES[value.type.element]
    partial = [context.name("lane") for _ in range(LANES_OF_A_SUM // context.lanes)]
    for name in partial:
        context.line(f"{kind} {name} = {identity};")
    with block.columns_of(value, LANES_OF_A_SUM, row) as places:
        for name, place in zip(partial, places):
            context.line(f"{name} = {form.format(name, block.vector(value, place))};")
    while len(partial) > 1:
        half = len(partial) // 2
        for left, right in zip(partial[:half], partial[half:]):
            context.line(f"{left} = {form.format(left, right)};")
        partial = partial[:half]
    return partial[0]


def last_axis(context: Context, op: Op) -> None:
    """tt.reduce along the last axis whose partial results are elements of small arrays."""
    if not _along_last_axis(op):
        raise NotATile
    identity = _arrays_or_identity(context, op)
    results = [context.declare(value) for value in op.results]
    lanes = _Lanes(context, op)
    nest = lanes.nest
    lines = lanes.start(identity) + lanes.steps(0 if identity is not None else lanes.count) + lanes.tree()
    for value, name, lane in zip(op.results, results, lanes.partial):
        target = f"{name}[{linear(value.type.shape, lanes.row).text}]" if value.type.is_tensor else name
        lines.append(f"{target} = {lane}[0];")
    nest.put(*lines, level=nest.depth - 1)
    nest.shape = (*nest.shape[:-1], 1)  # the last axis has its own loops, among the lines
    with context.braces(""):
        nest.write(vectorise=False)


def _arrays_or_identity(context: Context, op: Op) -> str | None:
    """The combiner's identity. One that we know nothing of reads its operands twice: they go into arrays."""
    identity = _identity(op)
    for operand in op.operands if identity is None else []:
        as_array(context, operand)
    return identity


class _Lanes:
    """Code that reduces one row of a tensor: partial results side by side, then a tree over them."""

    def __init__(self, context: Context, op: Op):
        shape = op.operands[0].type.shape
        self.context, self.op, self.shape = context, op, shape
        self.count = min(LANES_OF_A_SUM, shape[-1])
        self.nest = LoopNest(context, shape)
        self.nest.rows = number_of_live_rows(context, op.result) if len(shape) > 1 else None
        self.row = self.nest.index[:-1]
        self.partial = [context.name("lane") for _ in op.operands]
        self.block, self.lane = context.name("block"), context.name("l")

    def start(self, identity: str | None) -> list[str]:
        """The lanes, holding the identity or, of a combiner without one, the row's first elements."""
        lines = [
            f"{value_type(operand.type.element)} {name}[{self.count}];"
            for operand, name in zip(self.op.operands, self.partial)
        ]
        first = linear(self.shape, (*self.row, Term(self.lane, self.nest.depth))).text
        for operand, name in zip(self.op.operands, self.partial):
            initial = identity or f"{as_array(self.context, operand)}[{first}]"
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
        return _update(self.context, self.op, [f"{name}[{lane}]" for name in self.partial], elements)

    def _over_lanes(self, count: int, body: list[str]) -> list[str]:
        opening = f"for (int {self.lane} = 0; {self.lane} < {count}; {self.lane}++) {{"
        return ["#pragma omp simd", opening, *body, "}"]


def outer_axis(context: Context, op: Op) -> None:
    """tt.reduce along any axis, one element after the other, for all columns at once."""
    axis, shape, identity = op.attribute("axis"), op.operands[0].type.shape, _arrays_or_identity(context, op)
    results = [context.declare(value) for value in op.results]
    kept = [d for d in range(len(shape)) if d != axis]
    if identity is not None:
        context.line(f"for (int i = 0; i < {op.result.type.size}; i++) {results[0]}[i] = {identity};")
    else:
        _copy_first(context, op, axis, results)
    inner = [d for d in best_order(context, op.operands, shape) if d != axis]
    nest = LoopNest(context, shape, [axis, *inner])
    target = linear(op.result.type.shape, tuple(nest.index[d] for d in kept)).text
    if identity is None:  # from the second element on
        if shape[axis] == 1:
            return
        here = nest.index[axis]
        second = Term(f"({here.text} + 1)", here.level) if shape[axis] > 2 else Term("1", 0)  # one turn has no variable
        nest.index = (*nest.index[:axis], second, *nest.index[axis + 1 :])
        nest.shape = (*shape[:axis], shape[axis] - 1, *shape[axis + 1 :])
    elements = [nest.evaluate(operand, nest.index).text for operand in op.operands]
    nest.put(*_update(context, op, [f"{name}[{target}]" for name in results], elements))
    nest.write()


def _copy_first(context: Context, op: Op, axis: int, results: list[str]) -> None:
    shape = op.operands[0].type.shape
    for operand, value, name in zip(op.operands, op.results, results):
        nest = LoopNest(context, (*shape[:axis], 1, *shape[axis + 1 :]))
        element = nest.evaluate(operand, nest.index).text
        kept = tuple(term for d, term in enumerate(nest.index) if d != axis)
        nest.put(f"{name}[{linear(value.type.shape, kept).text}] = {element};")
        nest.write()


def scan(context: Context, op: Op) -> None:
    """Each element becomes the combination of all up to it, one after the other along the axis."""
    axis, shape = op.attribute("axis"), op.operands[0].type.shape
    reverse = "reverse = true" in op.text
    sources = [as_array(context, operand) for operand in op.operands]
    targets = [context.declare(value) for value in op.results]
    order = [d for d in range(len(shape)) if d != axis] + [axis]
    nest = LoopNest(context, shape, order)
    step = nest.index[axis].text
    here = f"({shape[axis] - 1} - {step})" if reverse else step
    running = [context.name("running") for _ in sources]
    position = linear(shape, (*nest.index[:axis], Term(here, nest.depth), *nest.index[axis + 1 :])).text
    for value, name in zip(op.operands, running):
        nest.put(f"{value_type(value.type.element)} {name} = 0;", level=nest.depth - 1)
    updates = _update(context, op, running, [f"{source}[{position}]" for source in sources])
    begin = [f"{name} = {source}[{position}];" for name, source in zip(running, sources)]
    nest.put(f"if ({step} == 0) {{", *begin, "} else {", *updates, "}")
    nest.put(*[f"{target}[{position}] = {name};" for target, name in zip(targets, running)])
    nest.write(vectorise=False)


def unsplat(context: Context, op: Op) -> None:
    """The only element of a one-element tensor."""
    name = context.name(op.result.name)
    context.line(f"const {value_type(op.result.type.element)} {name} = {as_array(context, op.operands[0])}[0];")
    context.storage[op.result] = Scalar(name)
