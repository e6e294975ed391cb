"""Tensor expressions as C vectors: LANES columns of a row at a time.

    const vec weights_1 = vec_exp2(vec_fused(scores_1, vec_splat(log2_scale), vec_splat(shift_2)));

What is the same in all columns of a row is a scalar, splat where it is used. The C compiler vectorises plain loops too,
but not into every instruction, and takes its time: this is for what kernels spend theirs on.

An expression that has no such form raises NotATile; its user has another way.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import expressions as c
from .analysis import is_lazy, uniform
from .lanes import Lanes, Unknown, lanes
from .live_rows import number_of_live_rows
from .loops import ZERO, Array, Index, LoopNest, Term, linear
from .ttir import Op, Value

if TYPE_CHECKING:
    from .emitter import KernelEmitter


PREFETCH_BYTES = 4096  # ahead of the row being read


class NotATile(Exception):
    """Why an expression or a loop is left to the general path."""


class Place(NamedTuple):
    """A vector's place in a tile: its row, its first column, and which variable of the block it is, if it is one."""

    row: Term
    column: Term
    register: tuple[int, int] | None = None


VECTOR_TYPES = {"f32": "vec", "bf16": "vec", "f16": "vec", "i32": "ivec", "i8": "ivec", "i1": "ivec"}
_LOADS = {
    "f32": "vec_from_float",
    "bf16": "vec_from_bf16",
    "f16": "vec_from_f16",
    "i8": "ivec_from_int8_t",
    "i32": "*(const ivec *)",
}
# Lane by lane, by operation and the element type of its operands. An i8 is held in 32 bits with its sign, an i1 as 0 or
# -1.
_INFIX = {
    "f32": {"addf": "+", "subf": "-", "mulf": "*", "divf": "/"},
    "i32": {"addi": "+", "subi": "-", "muli": "*", "andi": "&", "ori": "|", "xori": "^", "shli": "<<", "shrsi": ">>"},
    "i8": {"andi": "&", "ori": "|", "xori": "^", "shrsi": ">>"},
    "i1": {"andi": "&", "ori": "|", "xori": "^"},
}
_LANEWISE = {
    ("sitofp", "i32"): "vec_from_ivec({0})",
    ("sitofp", "i8"): "vec_from_ivec({0})",
    ("uitofp", "i8"): "vec_from_ivec({0} & 255)",
    ("extsi", "i8"): "{0}",
    ("extui", "i8"): "({0} & 255)",
    ("trunci", "i32"): "({0} << 24 >> 24)",
    ("shrui", "i8"): "((({0} & 255) >> {1}) << 24 >> 24)",
    ("extf", "bf16"): "{0}",
    ("extf", "f16"): "{0}",
    ("fptosi", "f32"): "ivec_from_vec({0})",
    ("fma", "f32"): "vec_fused({0}, {1}, {2})",
    ("negf", "f32"): "(-{0})",
    ("absf", "f32"): "vec_abs({0})",
    ("exp", "f32"): "vec_exp({0})",
    ("exp2", "f32"): "vec_exp2({0})",
    ("bitcast", "f32"): "(ivec){0}",
    ("bitcast", "i32"): "(vec){0}",
    ("maxsi", "i32"): "ivec_max({0}, {1})",
    ("maxnumf", "f32"): "vec_max_num({0}, {1})",
    ("minnumf", "f32"): "vec_min_num({0}, {1})",
}
_SIZES = {"f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i8": 1}


def plus(variable: str, number: int) -> Term:
    if variable.isdigit():
        return Term(str(int(variable) + number), 0)
    return Term(f"({variable} + {number})" if number else variable, 0)


def attempt(emitter: KernelEmitter, write: Callable[[], object], keep: bool = True) -> bool:
    """Runs `write`; the answer is False if it raises NotATile. What it has written is forgotten then, and unless `keep`
    in any case."""
    kept = ("lines", "depth", "names", "storage", "origins", "destinations", "copies", "row_counts", "written")
    before = {name: copy(getattr(emitter, name)) for name in kept}
    try:
        write()
        done = True
    except NotATile:
        done = False
    if not (done and keep):
        vars(emitter).update(before)
    return done


def has_vectors(emitter: KernelEmitter, row: Value) -> bool:
    """Can a tensor [1, N] be evaluated vector by vector?"""
    place = Place(ZERO, ZERO)
    return attempt(emitter, lambda: Vectors(emitter, [ZERO], [ZERO], False).vector(row, place), keep=False)


def materialise(emitter: KernelEmitter, value: Value, name: str) -> None:
    """The loops that evaluate a tensor into an array, row by row and vector by vector."""
    if value.type.element not in ("f32", "i32"):
        raise NotATile(f"an array of {value.type.element}")
    with _rows(emitter, value, number_of_live_rows(emitter, value)) as (block, row):
        kind = VECTOR_TYPES[value.type.element]
        with block.columns_of(value, emitter.lanes, row) as places:
            for place in places:
                where = linear(value.type.shape, (row, place.column)[2 - len(value.type.shape) :]).text
                text = block.vector(value, place)
                emitter.line(f"*({kind} *)({name} + {where}) = {text};")


_COMBINERS = {
    ("arith.addf", "f32"): "({0} + {1})",
    ("arith.maxnumf", "f32"): "vec_max_num({0}, {1})",
    ("arith.addi", "i32"): "({0} + {1})",
    ("arith.maxsi", "i32"): "ivec_max({0}, {1})",
}


def reduce_last_axis(emitter: KernelEmitter, op: Op, identity: str, count: int, result: str) -> None:
    """tt.reduce along the last axis: `count` partial results, combined in the order reductions.py tells."""
    value, combiner = op.operands[0], op.regions[0].ops[0]
    form = _COMBINERS.get((combiner.name, value.type.element))
    if form is None or combiner.operands != op.regions[0].arguments:
        raise NotATile(f"{combiner.name} of {value.type.element}")
    if value.type.shape[-1] < count:
        raise NotATile("less than one element for each partial result")
    kind = VECTOR_TYPES[value.type.element]
    with _rows(emitter, value, number_of_live_rows(emitter, op.result)) as (block, row):
        partial = [emitter.name("lane") for _ in range(count // emitter.lanes)]
        for name in partial:
            emitter.line(f"{kind} {name} = {kind}_splat({identity});")
        with block.columns_of(value, count, row) as places:
            for name, place in zip(partial, places):
                emitter.line(f"{name} = {form.format(name, block.vector(value, place))};")
        while len(partial) > 1:
            half = len(partial) // 2
            for left, right in zip(partial[:half], partial[half:]):
                emitter.line(f"{left} = {form.format(left, right)};")
            partial = partial[:half]
        for bit in (emitter.lanes >> shift for shift in range(1, emitter.lanes.bit_length())):
            emitter.line(f"{partial[0]} = {form.format(partial[0], f'{kind}_exchanged({partial[0]}, {bit})')};")
        target = f"{result}[{row.text}]" if len(value.type.shape) == 2 else result
        emitter.line(f"{target} = {partial[0]}[0];")


@contextmanager
def _rows(emitter: KernelEmitter, value: Value, count: str | None) -> Iterator[tuple[Vectors, Term]]:
    """A C loop over the first `count` rows of a tensor, or all, with what is needed to evaluate vectors in it."""
    shape = value.type.shape
    if len(shape) not in (1, 2) or shape[-1] % emitter.lanes:
        raise NotATile(f"rows of {shape}")
    several = len(shape) == 2 and shape[0] > 1
    name = emitter.name("i") if several else "0"
    row = Term(name, 0)
    with emitter.braces(f"for (int {name} = 0; {name} < {count or shape[0]}; {name}++)" if several else ""):
        block = Vectors(emitter, [row], [], read_once=False)
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
        elif op is None or not (op.name == "tt.broadcast" or op.name.startswith(("arith.", "math."))):
            known[value] = False
        else:
            known[value] = all(is_splat(operand, registers, known) for operand in op.operands)
    return known[value]


class Vectors:
    """Writes expressions at ROWS x VECTORS places, just before their users; `registers` are tiles held in variables."""

    def __init__(self, emitter: KernelEmitter, rows: list[Term], columns: list[Term], read_once: bool):
        self.emitter, self.rows, self.columns, self.read_once = emitter, rows, columns, read_once
        self.places = [Place(row, column, (r, v)) for r, row in enumerate(rows) for v, column in enumerate(columns)]
        self.registers: dict[Value, list[list[str]]] = {}
        self.nest = LoopNest(emitter, (), [])  # evaluates scalars
        self.memo: dict[tuple[Value, Term | None, Term], str] = {}

    @contextmanager
    def scope(self, opening: str) -> Iterator[None]:
        """A C block: names made in it are forgotten at its end."""
        memo, scalars = dict(self.memo), dict(self.nest.memo)
        with self.emitter.braces(opening):
            yield
        self.memo, self.nest.memo = memo, scalars

    def constant(self, kind: str, text: str, hint: str) -> str:
        name = self.emitter.name(hint)
        self.emitter.line(f"const {kind} {name} = {text};")
        return name

    # ---- scalars ------------------------------------------------------------------------------------------------
    def scalar(self, value: Value, index: Index) -> str:
        if self._reads_registers(value):
            raise NotATile(f"{value} is computed from sums")
        return self._written(self.nest.evaluate(value, index))

    def address(self, pointers: Value, index: Index) -> str:
        return self._written(self.nest.address(pointers, index))

    def _written(self, term: Term) -> str:
        for text in self.nest.lines[0]:
            self.emitter.line(text)
        self.nest.lines[0].clear()
        return term.text

    def _reads_registers(self, value: Value, seen: set[Value] | None = None) -> bool:
        seen = set() if seen is None else seen
        if value in self.registers:
            return True
        if value in seen or value in self.emitter.storage or value.op is None or not is_lazy(value.op):
            return False
        seen.add(value)
        return any(self._reads_registers(operand, seen) for operand in value.op.operands)

    def scalars_of(self, value: Value, row: Term, seen: set[Value] | None = None) -> None:
        """Evaluates here and now what `vector` will splat in this row: the loop over its columns need not."""
        seen = set() if seen is None else seen
        if value in seen:
            return
        seen.add(value)
        if value.type.element in VECTOR_TYPES and is_splat(value, self.registers):
            self.scalar(value, (row, ZERO)[2 - len(value.type.shape) :])
        elif value.op is not None and value not in self.emitter.storage and value.op.name != "tt.load":
            for operand in value.op.operands:
                if operand.type.is_tensor and len(operand.type.shape) == len(value.type.shape):
                    self.scalars_of(operand, row, seen)

    @contextmanager
    def columns_of(self, value: Value, step: int, row: Term) -> Iterator[list[Place]]:
        """A C loop over a row's columns, `step` at a time; yields the places of its vectors."""
        width, lane_count = value.type.shape[-1], self.emitter.lanes
        name = self.emitter.name("j") if width > step else "0"
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
        storage, op, element = self.emitter.storage.get(value), value.op, value.type.element
        if storage is None and op is not None and op.name == "tt.reshape":
            storage = self.emitter.storage.get(op.operands[0])  # the elements are in the same order
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
            return f"(ivec_lane_numbers() + {plus(place.column.text, op.attribute('start', 0)).text})"
        if op.name in ("arith.cmpi", "arith.cmpf"):
            return self._comparison(op, place)
        if op.name == "arith.select" and element in ("f32", "i32"):
            return f"{VECTOR_TYPES[element]}_select({', '.join(self.vector(v, place) for v in op.operands)})"
        if fused := self.emitter.contraction(op):
            return fused.text("vec_fused", *[self.vector(v, place) for v in fused.values])
        return self._lanewise(op, place)

    def _comparison(self, op: Op, place: Place) -> str:
        source, predicate = op.operands[0].type.element, op.text.split()[1].rstrip(",")
        form = {"i32": c.COMPARE, "f32": c.COMPARE_FLOAT}.get(source, {}).get(predicate, "!")
        form = f"{{0}} {form} {{1}}" if source == "i32" else form
        if "{1}" not in form or "!(" in form or "! " in form:
            raise NotATile(f"{op.name} {predicate} of {source}")
        return f"(ivec)({form.format(*[self.vector(v, place) for v in op.operands])})"

    def _lanewise(self, op: Op, place: Place) -> str:
        name = op.name.partition(".")[2]
        source, target = (op.operands or op.results)[0].type.element, op.result.type.element
        sign = _INFIX.get(source, {}).get(name)
        form = f"({{0}} {sign} {{1}})" if sign else _LANEWISE.get((name, source))
        lanewise = op.name.startswith(("arith.", "math.", "tt.bitcast"))
        if form is None or target not in ("f32", "i32", "i8", "i1") or not lanewise:
            raise NotATile(f"{op.name} of {source}")
        return form.format(*[self.vector(operand, place) for operand in op.operands])

    def _load(self, op: Op, place: Place) -> str:
        element, shape = op.result.type.element, op.result.type.shape
        count = self.emitter.lanes
        row, column = Lanes(1, np.zeros(count, np.int64)), Lanes(count, np.arange(count))
        self.expect_consecutive(op, (row, column)[2 - len(shape) :])
        address = self.address(op.operands[0], (place.row, place.column)[2 - len(shape) :])
        if self.read_once and len(shape) == 2 and place.register is None:  # it would delay blocks that read it again
            if self.columns.index(place.column) * count * _SIZES[element] % 64 == 0:
                self.prefetch(address)
        text = f"{_LOADS[element]}({address})"
        if len(op.operands) == 1:
            return text
        mask, *other = op.operands[1:]
        otherwise = self.vector(other[0], place) if other else f"{VECTOR_TYPES[element]}_splat(0)"
        if not is_splat(mask, self.registers):
            if element != "f32":
                raise NotATile(f"{op.text} of some lanes only")
            return f"vec_from_some({address}, {self.vector(mask, place)}, {otherwise})"
        return f"{self.scalar(mask, (place.row, ZERO)[2 - len(shape) :])} ? {text} : {otherwise}"

    def store(self, op: Op, place: Place) -> None:
        """tl.store of a vector of floats."""
        pointers, value, *mask = op.operands
        if pointers.type.pointee != "f32":
            raise NotATile(f"a vector of floats as {pointers.type.pointee}")
        count = self.emitter.lanes
        self.expect_consecutive(op, (Lanes(1, np.zeros(count, np.int64)), Lanes(count, np.arange(count))))
        address, text = self.address(pointers, (place.row, place.column)), self.vector(value, place)
        if mask:
            self.emitter.line(f"vec_store_some({address}, {self.vector(mask[0], place)}, {text});")
        else:
            self.emitter.line(f"*(vec *)({address}) = {text};")

    def prefetch(self, address: str) -> None:
        if self.emitter.wanted.prefetch:
            self.emitter.line(f"__builtin_prefetch((const char *)({address}) + {PREFETCH_BYTES});")

    def expect_consecutive(self, access: Op, index: tuple[Lanes, ...]) -> None:
        """Raises NotATile unless the lanes of a load or store follow each other in memory, wherever the block is."""
        if access.name not in ("tt.load", "tt.store"):
            raise NotATile(f"{access.text} is no load or store")
        try:
            if lanes(access.operands[0], index, self.emitter.origins).consecutive:
                return
        except Unknown as unknown:
            raise NotATile(f"{access.text}: {unknown}") from None
        raise NotATile(f"{access.text}: lanes are not neighbours")
