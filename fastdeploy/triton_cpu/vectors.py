"""Tensor expressions as C vectors: LANES columns of a row at a time.

    const vec weights_1 = vec_exp2(vec_fused(scores_1, vec_splat(log2_scale), vec_splat(shift_2)));

What is the same in all columns of a row is a scalar, splat where it is used. The C compiler vectorises plain loops too,
but not into every instruction, and takes its time: this is for what kernels spend theirs on.

An expression that has no such form raises NotATile; its user has another way.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .analysis import is_lazy, is_zero, uniform
from .context import Array, Context, NotATile
from .lanes import Lanes, Unknown, lanes, row_of_lanes
from .loops import ZERO, Index, LoopNest, Term, contraction, linear
from .operations import Kind, operation, vector_form
from .ranges import fits, range_of
from .ttir import Op, Value, reachable

PREFETCH_BYTES = 4096  # ahead of the row being read


class Place(NamedTuple):
    """A vector's place in a tile: its row, its first column, and which variable of the block it is, if it is one."""

    row: Term
    column: Term
    register: tuple[int, int] | None = None


VECTOR_TYPES = dict.fromkeys(("f32", "bf16", "f16", "f8E4M3FN"), "vec") | dict.fromkeys(("i32", "i8", "i1"), "ivec")
_LOADS = {
    "f32": "vec_from_float",
    "bf16": "vec_from_bf16",
    "f16": "vec_from_f16",
    "f8E4M3FN": "vec_from_e4m3",
    "i8": "ivec_from_int8_t",
    "i32": "*(const ivec *)",
}
_SIZES = {"f32": 4, "i32": 4, "bf16": 2, "f16": 2, "f8E4M3FN": 1, "i8": 1}
TABLE = 16  # elements of a table that is kept in registers


def plus(variable: str, number: int) -> Term:
    if variable.isdigit():
        return Term(str(int(variable) + number), 0)
    return Term(f"({variable} + {number})" if number else variable, 0)


def table_of(load: Op) -> tuple[Value, Value] | None:
    """(pointers, indices) of a load from one place, plus an index that is known to be 0 ... 15: from a table. All of it
    may be read, whichever elements the kernel asks for."""
    address = load.operands[0].op
    if address is None or address.name != "tt.addptr" or len(load.operands) > 1:
        return None
    pointers, indices = address.operands
    if not uniform(pointers) or load.result.type.element not in _LOADS or not fits(range_of(indices), (0, TABLE - 1)):
        return None
    while indices.op is not None and indices.op.name in ("arith.extsi", "arith.extui"):
        indices = indices.op.operands[0]
    return pointers, indices


def has_vectors(context: Context, row: Value) -> bool:
    """Can a tensor [1, N] be evaluated vector by vector?"""
    place = Place(ZERO, ZERO)
    return context.attempt(lambda: Vectors(context, [ZERO], [ZERO], False).vector(row, place), "", keep=False)


@contextmanager
def rows_of(context: Context, value: Value, count: str | None, step: int = 1) -> Iterator[tuple[Vectors, Term]]:
    """A C loop over the first `count` rows of a tensor, or all, with what is needed to evaluate vectors in it; `step`
    rows a turn."""
    shape = value.type.shape
    if len(shape) not in (1, 2) or shape[-1] % context.lanes:
        raise NotATile(f"rows of {shape}")
    several = len(shape) == 2 and shape[0] > step
    name = context.name("i") if several else "0"
    row = Term(name, 0)
    with context.braces(f"for (int {name} = 0; {name} < {count or shape[0]}; {name} += {step})" if several else ""):
        block = Vectors(context, [row], [], read_once=False)
        if step == 1:
            block.scalars_of(value, row)
        yield block, row


def is_splat(value: Value, registers: Container[Value] = (), known: dict[Value, bool] | None = None) -> bool:
    """Are all columns of a row equal by construction? `known` are answers: an expression may use a value many times."""
    known = {} if known is None else known
    if value not in known:
        op = value.op
        if value in registers:
            known[value] = False
        elif uniform(value) or value.type.shape[-1] == 1:
            known[value] = True
        elif op is None or not (op.name == "tt.broadcast" or operation(op).kind is Kind.LANEWISE):
            known[value] = False
        else:
            known[value] = all(is_splat(operand, registers, known) for operand in op.operands)
    return known[value]


def prefetched(address: str) -> str:
    """C that asks for what lies PREFETCH_BYTES behind an address."""
    return f"__builtin_prefetch((const char *)({address}) + {PREFETCH_BYTES});"


class Vectors:
    """Writes expressions at ROWS x VECTORS places, just before their users; `registers` are tiles held in variables."""

    def __init__(self, context: Context, rows: list[Term], columns: list[Term], read_once: bool):
        self.context, self.rows, self.columns, self.read_once = context, rows, columns, read_once
        self.places = [Place(row, column, (r, v)) for r, row in enumerate(rows) for v, column in enumerate(columns)]
        self.registers: dict[Value, list[list[str]]] = {}
        self.nest = LoopNest(context)  # evaluates scalars
        self.memo: dict[tuple[Value, Term | None, Term], str] = {}

    @contextmanager
    def scope(self, opening: str) -> Iterator[None]:
        """A C block: names made in it are forgotten at its end."""
        memo, scalars = dict(self.memo), dict(self.nest.memo)
        with self.context.braces(opening):
            yield
        self.memo, self.nest.memo = memo, scalars

    def constant(self, kind: str, text: str, hint: str) -> str:
        name = self.context.name(hint)
        self.context.line(f"const {kind} {name} = {text};")
        return name

    # ---- scalars ------------------------------------------------------------------------------------------------
    def scalar(self, value: Value, index: Index) -> str:
        if self._reads_registers(value):
            raise NotATile(f"{value} is computed from sums")
        return self._written(self.nest.evaluate(value, index))

    def address(self, pointers: Value, index: Index) -> str:
        return self._written(self.nest.address(pointers, index))

    def _written(self, term: Term) -> str:
        self.context.line(*self.nest.lines[0])
        self.nest.lines[0].clear()
        return term.text

    def _reads_registers(self, value: Value) -> bool:
        return any(part in self.registers for part in self.parts(value))

    def parts(self, value: Value) -> Iterable[Value]:
        """All that is evaluated for `value`, itself too."""

        def sources(value: Value) -> list[Value]:
            op = value.op
            return op.operands if op is not None and is_lazy(op) and value not in self.context.storage else []

        return reachable(value, sources)

    def scalars_of(self, value: Value, row: Term, seen: set[Value] | None = None) -> None:
        """Evaluates here and now what `vector` will splat in this row: the loop over its columns need not."""
        seen = set() if seen is None else seen
        if value in seen:
            return
        seen.add(value)
        if value.type.element in VECTOR_TYPES and is_splat(value, self.registers):
            self.scalar(value, (row, ZERO)[2 - len(value.type.shape) :])
        elif value.op is not None and value not in self.context.storage and value.op.name != "tt.load":
            for operand in value.op.operands:
                if operand.type.is_tensor and len(operand.type.shape) == len(value.type.shape):
                    self.scalars_of(operand, row, seen)

    @contextmanager
    def columns_of(self, value: Value, step: int, row: Term) -> Iterator[list[Place]]:
        """A C loop over a row's columns, `step` at a time; yields the places of its vectors."""
        width, lane_count = value.type.shape[-1], self.context.lanes
        name = self.context.name("j") if width > step else "0"
        with self.scope(f"for (int {name} = 0; {name} < {width}; {name} += {step})" if width > step else ""):
            yield [Place(row, plus(name, number)) for number in range(0, step, lane_count)]

    # ---- vectors of columns -------------------------------------------------------------------------------------
    def vector(self, value: Value, place: Place) -> str:
        """A C expression, cheap to repeat, for the columns of `value` from a place on."""
        if value in self.registers:
            if place.register is None:
                raise NotATile(f"sums are the right operand {value} of a product")
            r, v = place.register
            return self.registers[value][r][v]
        kind = VECTOR_TYPES.get(value.type.element)
        if kind is None:
            raise NotATile(f"vectors of {value.type.element}")
        if is_splat(value, self.registers):
            index = (place.row, ZERO)[2 - len(value.type.shape) :]
            return f"{kind}_splat({'-' if value.type.element == 'i1' else ''}{self.scalar(value, index)})"
        key = (value, place.row if len(value.type.shape) == 2 and value.type.shape[0] > 1 else None, place.column)
        if key not in self.memo:
            self.memo[key] = self.constant(kind, self._vector(value, place), value.name)
        return self.memo[key]

    def _vector(self, value: Value, place: Place) -> str:
        storage, op, element = self.context.storage.get(value), value.op, value.type.element
        if storage is None and op is not None and op.name == "tt.reshape":
            storage = self.context.storage.get(op.operands[0])  # the elements are in the same order
        if isinstance(storage, Array) and element not in ("i8", "i1"):
            where = linear(value.type.shape, (place.row, place.column)[2 - len(value.type.shape) :]).text
            return f"*(const {VECTOR_TYPES[element]} *)({storage.name} + {where})"
        if op is None or storage is not None:
            raise NotATile(f"{value} lies in an array of {element}")
        if op.name == "tt.broadcast" or (op.name == "tt.expand_dims" and op.attribute("axis") == 0):
            flat = op.operands[0].type.shape[0] == 1 and len(op.operands[0].type.shape) == 2
            return self.vector(op.operands[0], place._replace(row=ZERO) if flat else place)
        if op.name == "tt.load":
            return self._load(op, place)
        if op.name == "tt.make_range":
            return f"(ivec_lane_numbers() + (int){plus(place.column.text, op.attribute('start', 0)).text})"
        if fused := contraction(self.context, op):
            return fused.text("vec_fused", *[self.vector(v, place) for v in fused.values])
        form = vector_form(op)
        if form is None:
            raise NotATile(f"{op.name} of {(op.operands or op.results)[0].type.element}")
        return form.format(*[self.vector(operand, place) for operand in op.operands])

    def _load(self, op: Op, place: Place, in_halves: bool = False) -> str:
        """in_halves: bf16 as they lie in memory, in half a vector."""
        element, shape = op.result.type.element, op.result.type.shape
        count = self.context.lanes
        try:
            self.expect_consecutive(op, row_of_lanes(count)[2 - len(shape) :])
        except NotATile:
            if in_halves or not (table := table_of(op)):
                raise
            return self._looked_up(*table, place)
        address = self.address(op.operands[0], (place.row, place.column)[2 - len(shape) :])
        if self.read_once and len(shape) == 2 and place.register is None:  # it would delay blocks that read it again
            if self.columns.index(place.column) * count * _SIZES[element] % 64 == 0:
                self.prefetch(address)
        kind, load = ("half", "half_from_bf16") if in_halves else (VECTOR_TYPES[element], _LOADS[element])
        text = f"{load}({address})"
        if len(op.operands) == 1:
            return text
        mask, *other = op.operands[1:]
        if in_halves and not (is_splat(mask, self.registers) and all(map(is_zero, other))):
            raise NotATile(f"{op.text} of some lanes only")
        otherwise = self.vector(other[0], place) if other and not in_halves else f"{kind}_splat(0)"
        if not is_splat(mask, self.registers):
            if element != "f32":
                raise NotATile(f"{op.text} of some lanes only")
            return f"vec_from_some({address}, {self.vector(mask, place)}, {otherwise})"
        return f"{self.scalar(mask, (place.row, ZERO)[2 - len(shape) :])} ? {text} : {otherwise}"

    def _looked_up(self, pointers: Value, indices: Value, place: Place) -> str:
        element = pointers.type.pointee
        parts = [f"(ivec){_LOADS[element]}({{1}} + {first})" for first in range(0, TABLE, self.context.lanes)]
        table = self.table(pointers, "ivec", f"{{0}}[] = {{{{{', '.join(parts)}}}}}")
        return f"({VECTOR_TYPES[element]})ivec_picked({table}, {self.vector(indices, place)})"

    def table(self, pointers: Value, kind: str, form: str) -> str:
        """A table in registers; `form` defines it, given its name and an address."""
        key = (pointers, None, Term(kind, 0))
        if key not in self.memo:
            address, name = self.address(pointers, (ZERO,) * len(pointers.type.shape)), self.context.name("table")
            self.context.line(f"const {kind} {form.format(name, address)};")
            self.memo[key] = name
        return self.memo[key]

    def store(self, op: Op, place: Place) -> None:
        """tl.store of a vector of floats."""
        pointers, value, *mask = op.operands
        if pointers.type.pointee != "f32":
            raise NotATile(f"a vector of floats as {pointers.type.pointee}")
        self.expect_consecutive(op, row_of_lanes(self.context.lanes))
        address, text = self.address(pointers, (place.row, place.column)), self.vector(value, place)
        if mask:
            self.context.line(f"vec_store_some({address}, {self.vector(mask[0], place)}, {text});")
        else:
            self.context.line(f"*(vec *)({address}) = {text};")

    def prefetch(self, address: str) -> None:
        if self.context.wanted.prefetch:
            self.context.line(prefetched(address))

    def expect_consecutive(self, access: Op, index: tuple[Lanes, ...]) -> None:
        """Raises NotATile unless the lanes of a load or store follow each other in memory, wherever the block is."""
        if access.name not in ("tt.load", "tt.store"):
            raise NotATile(f"{access.text} is no load or store")
        try:
            if lanes(access.operands[0], index, self.context.origins).consecutive:
                return
        except Unknown as unknown:
            raise NotATile(f"{access.text}: {unknown}") from None
        raise NotATile(f"{access.text}: lanes are not neighbours")
