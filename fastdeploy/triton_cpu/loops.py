"""Loop nests: a lazy tensor expression, evaluated at every index of a tile.

A nest over a tile (16, 64) has three levels of code. Each temporary is put at the outermost level that its indices
allow: `x / row_sum[:, None]` divides per element but reads row_sum once per row.

    level 0
    for (int i = 0; i < 16; i++) {
      level 1
      for (int j = 0; j < 64; j++) {      <- the innermost loop is the one that the C compiler vectorises
        level 2
      }
    }
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .analysis import is_lazy, operand_index, scatters, stride, uniform
from .context import Array, Context, MovingPointers, Scalar
from .elements import FUSED, constant, constant_declaration, from_memory, value_type
from .failures import checked
from .operations import element
from .ttir import Op, Value


class Term(NamedTuple):
    """A C expression without side effects, and the nest level from which on it is known."""

    text: str
    level: int


ZERO = Term("0", 0)
Index = tuple[Term, ...]


class Contraction(NamedTuple):
    """a * b + c in one rounding; `signs` go before a and c."""

    values: tuple[Value, Value, Value]
    signs: tuple[str, str]

    def text(self, call: str, a: str, b: str, x: str) -> str:
        return f"{call}({self.signs[0]}{a}, {b}, {self.signs[1]}{x})"


def contraction(context: Context, op: Op) -> Contraction | None:
    """How `op`, an addition, takes in a product beside it: by one rule, the left one first, not at gcc's taste."""
    adds = op.name in ("arith.addf", "arith.subf") and op.result.type.element in FUSED
    if not adds or not context.unit.target.contract:
        return None

    def is_open_product(value: Value) -> bool:
        multiplies = value.op is not None and value.op.name == "arith.mulf"
        return multiplies and value.block is op.block and value not in context.unit.plan

    minus = "-" if op.name == "arith.subf" else ""
    left, right = op.operands
    if is_open_product(left):
        a, b = left.op.operands  # type: ignore[union-attr]
        return Contraction((a, b, right), ("", minus))
    if is_open_product(right):
        a, b = right.op.operands  # type: ignore[union-attr]
        return Contraction((a, b, left), (minus, ""))
    return None


class LoopNest:
    """Collects the code of one nest. `order` lists the tile's dimensions from the outermost loop to the innermost.

    A nest of no loops, for scalars, has no shape.
    """

    def __init__(self, context: Context, shape: tuple[int, ...] = (), order: list[int] | None = None):
        order = list(range(len(shape))) if order is None else order
        self.context, self.shape, self.order = context, shape, order
        self.lines: list[list[str]] = [[] for _ in range(len(order) + 1)]
        self.variables = [context.name("i") for _ in order]
        self.index: Index = tuple(
            Term(self.variables[order.index(d)], order.index(d) + 1) if extent > 1 else ZERO
            for d, extent in enumerate(shape)
        )
        self.memo: dict[tuple[Value, Index], Term] = {}
        self.rows: str | None = None  # C for how many rows of the tile are wanted, if not all

    @property
    def depth(self) -> int:
        return len(self.order)

    def put(self, *lines: str, level: int | None = None) -> None:
        self.lines[self.depth if level is None else level] += lines

    def write(self, vectorise: bool = True) -> None:
        """Writes the nest into the kernel."""
        emit = self.context.line
        loops = [level for level, d in enumerate(self.order) if self.shape[d] > 1]
        emit(*self.lines[0])
        for level, dimension in enumerate(self.order):
            if level in loops:
                if vectorise and level == loops[-1] and self.context.unit.target.bounds is None:
                    emit("#pragma omp simd")
                variable = self.variables[level]
                end = self.rows if self.rows and dimension == 0 else self.shape[dimension]
                emit(f"for (int {variable} = 0; {variable} < {end}; {variable}++) {{")
            emit(*self.lines[level + 1])
        emit(*["}"] * len(loops))

    def temporary(self, element: str, text: str, level: int, hint: str = "t") -> Term:
        name = self.context.name(hint)
        self.put(f"{constant_declaration(element, name)} = {text};", level=level)
        return Term(name, level)

    # ---- evaluation ---------------------------------------------------------------------------------------------
    def evaluate(self, value: Value, index: Index | None = None) -> Term:
        """The element of `value` at `index` (default: the nest's own)."""
        index = self.index if index is None else index
        index = tuple(ZERO if extent == 1 else term for extent, term in zip(value.type.shape, index))
        key = (value, index)
        if key not in self.memo:
            self.memo[key] = self._evaluate(value, index)
        return self.memo[key]

    def _evaluate(self, value: Value, index: Index) -> Term:
        storage = self.context.storage.get(value)
        if isinstance(storage, Scalar):
            return Term(storage.text, 0)
        if isinstance(storage, Array):
            position = linear(value.type.shape, index)
            return self.temporary(value.type.element, f"{storage.name}[{position.text}]", position.level, storage.name)
        if value.type.is_pointer and not self.context.holds_addresses(value):
            return self.address(value, index)
        if value.op is None or not is_lazy(value.op):
            raise AssertionError(f"{value} has neither storage nor an expression")  # a bug here, not a user's error
        return self.computed(value, value.op, index)

    def computed(self, value: Value, op: Op, index: Index) -> Term:
        """The element of a result of a lazy operation, whether or not it is stored."""
        if op.name == "arith.constant":
            return Term(constant(op, value.type.element), 0)
        moved = self._index_map(op, value, index)
        if moved is not None:
            return moved
        if op.name == "tt.load":
            return self._load(op, index)
        arguments = [self.evaluate(operand, index) for operand in op.operands]
        if fused := contraction(self.context, op):
            arguments = [self.evaluate(operand, index) for operand in fused.values]
            text = fused.text(FUSED[value.type.element], *[term.text for term in arguments])
        else:
            text = self._element(op, [term.text for term in arguments])
        level = max([term.level for term in arguments], default=0)
        return self.temporary(value.type.element, text, level, value.name)

    def _element(self, op: Op, arguments: list[str]) -> str:
        """C for one element of an operation that computes."""
        target = op.results[0].type.element
        source = op.operands[1 if op.name == "arith.select" else 0].type.element if op.operands else target
        try:
            return element(op, arguments, source, target)
        except NotImplementedError as error:
            raise self.context.unsupported(op, f"({error})") from None

    def _index_map(self, op: Op, value: Value, index: Index) -> Term | None:
        """Operations that only move elements: evaluate the operand at another index."""
        first = op.operands[0] if op.operands else None
        if op.name == "tt.splat":
            return self.evaluate(first, ())  # type: ignore[arg-type]
        if op.name == "tt.make_range":
            start = op.attribute("start", 0)
            return Term(f"({index[0].text} + {start})", index[0].level) if start else index[0]
        stored = self.context.storage.get(first) if first is not None else None
        if op.name == "tt.reshape" and isinstance(stored, Array):  # its elements are in the same order
            position = linear(value.type.shape, index)
            return self.temporary(value.type.element, f"{stored.name}[{position.text}]", position.level, stored.name)
        if op.name in ("tt.broadcast", "tt.expand_dims", "tt.trans", "tt.reshape", "tt.split"):
            return self.evaluate(first, self.source_index(op, value, index))  # type: ignore[arg-type]
        if op.name == "tt.join":
            return self._second_or_first(op, index[-1], index[:-1])
        if op.name == "tt.cat":
            (place, level), extent = index[0], op.operands[0].type.shape[0]
            inner = Term(f"({place} % {extent})", level)
            return self._second_or_first(op, Term(f"{place} >= {extent}", level), (inner, *index[1:]))
        if op.name == "tt.gather":
            axis = op.attribute("axis", 0)
            chosen = self.evaluate(op.operands[1], index)
            return self.evaluate(first, (*index[:axis], chosen, *index[axis + 1 :]))  # type: ignore[arg-type]
        return None

    def source_index(self, op: Op, value: Value, index: Index) -> Index:
        """Where in the operand of a broadcast, expand_dims, trans, reshape or split the element `index` comes from."""
        source = operand_index(op, index, ZERO)
        if source is not None:
            return source
        if op.name == "tt.split":
            return (*index, Term(str(op.results.index(value)), 0))
        return self._delinearised(linear(value.type.shape, index), op.operands[0].type.shape)

    def _delinearised(self, position: Term, shape: tuple[int, ...]) -> Index:
        if len(shape) == 1:
            return (Term(f"({position.text})", position.level),)
        position = self.temporary("i32", position.text, position.level)
        terms, step = [], 1
        for extent in reversed(shape):
            quotient = f"{position.text} / {step}" if step > 1 else position.text
            terms.append(Term(f"({quotient} % {extent})", position.level))
            step *= extent
        return tuple(reversed(terms))

    def _second_or_first(self, op: Op, condition: Term, index: Index) -> Term:
        """An element of the second operand if the condition holds, of the first one if not."""
        second, first = self.evaluate(op.operands[1], index), self.evaluate(op.operands[0], index)
        text = f"{condition.text} ? {second.text} : {first.text}"
        return self.temporary(op.result.type.element, text, max(condition.level, second.level, first.level))

    # ---- memory -------------------------------------------------------------------------------------------------
    def _load(self, op: Op, index: Index) -> Term:
        value, element = op.result, op.result.type.element
        place = self.place(op, index)
        text, level = from_memory(element, place.text), place.level
        if len(op.operands) > 1:
            mask = self.evaluate(op.operands[1], index)
            other = self.evaluate(op.operands[2], index) if len(op.operands) > 2 else ZERO
            text, level = f"{mask.text} ? {text} : {other.text}", max(level, mask.level, other.level)
        return self.temporary(element, text, level, value.name)

    def place(self, access: Op, index: Index) -> Term:
        """The C lvalue that a load, store or atomic operation accesses for element `index` of its tile."""
        place = self._place(access.operands[0], index)
        text = checked(self.context, access, place.text, [term.text for term in index])
        return place if text == place.text else Term(text, max([place.level, *[term.level for term in index]]))

    def _place(self, pointers: Value, index: Index) -> Term:
        """The C lvalue that element `index` of a pointer tensor points at.

        Along the innermost loop a constant stride is made visible (`row[3 * j]`): the C compiler could not see
        through 32-bit index arithmetic that may wrap, and would gather.
        """
        inner = self._innermost_dimension(pointers, index)
        if inner is not None:
            step = stride(pointers, inner, self.context.origins)
            if step is not None:
                start = (*index[:inner], ZERO, *index[inner + 1 :])
                row = self.address(pointers, start)
                variable = index[inner]
                offset = variable.text if step == 1 else f"{step} * {variable.text}"
                return Term(
                    f"{row.text}[{offset}]" if step else f"*{row.text}", max(row.level, variable.level if step else 0)
                )
        row = self.address(pointers, index, named=False)
        return Term(f"*{row.text}", row.level)

    def _innermost_dimension(self, pointers: Value, index: Index) -> int | None:
        deepest = [d for d, term in enumerate(index) if term.level == self.depth and self.depth]
        return deepest[0] if len(deepest) == 1 else None

    def address(self, pointers: Value, index: Index, named: bool = True) -> Term:
        """A C pointer to what element `index` of a pointer tensor points at."""
        if self.context.holds_addresses(pointers):
            return self.evaluate(pointers, index)
        base, offset = self._base_and_offset(pointers, index)
        if offset is None:
            return base
        text, level = f"({base.text} + {offset.text})", max(base.level, offset.level)
        return self.temporary(pointers.type.element, text, level, "p") if named else Term(text, level)

    def _base_and_offset(self, pointers: Value, index: Index) -> tuple[Term, Term | None]:
        """Follows a pointer tensor to the scalar pointer that it is based on, adding up offsets in 64 bits."""
        storage = self.context.storage.get(pointers)
        if isinstance(storage, MovingPointers):
            base, offset = self._base_and_offset(storage.origin, index)
            return base, _sum(offset, Term(storage.moved, 0))
        op = pointers.op
        if isinstance(storage, Scalar) or not pointers.type.is_tensor or self.context.holds_addresses(pointers):
            return self.evaluate(pointers, index), None
        if op.name == "tt.splat":  # type: ignore[union-attr]
            return self._base_and_offset(op.operands[0], ())  # type: ignore[union-attr]
        if op.name == "tt.addptr":  # type: ignore[union-attr]
            base, offset = self._base_and_offset(op.operands[0], index)  # type: ignore[union-attr]
            step = self.evaluate(op.operands[1], index)  # type: ignore[union-attr]
            return base, _sum(offset, Term(f"(int64_t){step.text}", step.level))
        if op.name == "tt.bitcast":  # type: ignore[union-attr]
            base = self.address(op.operands[0], index)  # type: ignore[union-attr]
            return Term(f"(({value_type(pointers.type.element)}){base.text})", base.level), None
        return self._base_and_offset(op.operands[0], self.source_index(op, pointers, index))  # type: ignore


def evaluated(context: Context, evaluate: Callable[[LoopNest], Term]) -> str:
    """C for what `evaluate` finds without a loop; the temporaries that it needs are written here and now."""
    nest = LoopNest(context)
    term = evaluate(nest)
    context.line(*nest.lines[0])
    return term.text


def _sum(left: Term | None, right: Term) -> Term:
    return right if left is None else Term(f"{left.text} + {right.text}", max(left.level, right.level))


def linear(shape: tuple[int, ...], index: Index) -> Term:
    """The row-major position of `index` in a tensor of `shape`.

    As a sum of longs: an int may wrap, and where gcc fears so it gathers lanes that lie next to each other.
    """
    parts, step = [], 1
    for extent, term in zip(reversed(shape), reversed(index)):
        if extent > 1 and term.text != "0":
            parts.append(term.text if step == 1 else f"(long){term.text} * {step}")
        step *= extent
    return Term(" + ".join(reversed(parts)) or "0", max([term.level for term in index], default=0))


def best_order(context: Context, values: list[Value], shape: tuple[int, ...]) -> list[int]:
    """Loop order for evaluating `values`: innermost the dimension along which most loads and stores are contiguous."""
    votes = [0.0] * len(shape)
    if shape:
        votes[-1] += 0.5
    seen: set[Value] = set()
    for value in values:
        _vote(context, value, list(range(len(shape))), votes, seen)
    candidates = [d for d in range(len(shape)) if shape[d] > 1] or list(range(len(shape)))
    inner = max(candidates, key=lambda d: votes[d]) if shape else None
    return [d for d in range(len(shape)) if d != inner] + ([inner] if inner is not None else [])


def _vote(context: Context, value: Value, dimensions: list[int | None], votes: list[float], seen: set[Value]) -> None:
    """Walks an expression; dimensions[d] is the nest's dimension that the value's dimension d runs along."""
    if value in seen or uniform(value):
        return
    seen.add(value)
    op = value.op
    if isinstance(context.storage.get(value), Array):
        if value.type.shape[-1] > 1 and dimensions[-1] is not None:
            votes[dimensions[-1]] += value.type.size
        return
    if op is None or not is_lazy(op):
        return
    if op.name == "tt.load":
        for d, along in enumerate(dimensions):
            if along is not None and value.type.shape[d] > 1 and stride(op.operands[0], d, context.origins) == 1:
                votes[along] += value.type.size
    if scatters(op):
        return
    inner = operand_index(op, dimensions, None)
    for operand in op.operands:
        if operand.type.is_tensor:
            _vote(context, operand, dimensions if inner is None else list(inner), votes, seen)
