"""What a loop around tl.dot computes for its columns alone, done once for all blocks of rows.

Each block of rows that registers.py writes would unpack the same weights and convert the same scales. So, where a tile
has several blocks, the kernel's loop is cut into runs of TURNS turns:

    for each run:
        for each turn:                  panel[turn] <- unpacked bytes, sums of columns, scales as floats
        for each block of rows:
            sums <- their first values, or what the run before has kept
            for each turn:              sums += ..., with the vectors of panel[turn]
            kept <- sums                or, in the last run, what the kernel does with them

A panel of 32 columns takes 1.2 kB a turn: it stays in the first-level cache. (64 rows, K = 1024, on a core of Zen 5
whose vpdpbusd reaches 1,080 GOP/s: Q8_0 690 GOP/s instead of 550, Q6_K 610 and 360, Q4_0 as before, 700.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from .analysis import is_lazy
from .carried import Carried, assign, carry
from .context import Context, MovingPointers, Scalar
from .elements import value_type
from .loops import Term
from .ranges import range_of
from .ttir import Op, Value, reachable
from .vectors import VECTOR_TYPES, is_splat

TURNS = 18  # of a run, a row of 576 in groups of 32: runs of 16 and 2 turns take 10 % longer there, 32 do not fit

CHEAP_COLUMNS = 4  # operations of a turn
_INTEGER_WORK = ("andi", "ori", "xori", "addi", "subi", "shli", "shrui", "shrsi", "sitofp", "uitofp")
_COLUMN_WORK = {f"arith.{name}" for name in (*_INTEGER_WORK, "mulf")}

Key = tuple[Value, Term | None, Term]  # what a vector is known as: see `Vectors.memo`


class Slot(NamedTuple):
    """A vector of the panel: its key among vectors, its C type, and what writes C that computes it."""

    key: Key
    kind: str
    text: Callable[[], str]


def rows_of_columns(context: Context, loop: Op) -> list[Value]:
    """The tensors [1, N] that the loop computes its sums from."""
    found: list[Value] = []

    def sources(value: Value) -> list[Value]:
        if value.op is None or value in context.storage or not is_lazy(value.op):
            return []
        if len(value.type.shape) == 2 and value.type.shape[0] == 1 and not is_splat(value):
            found.append(value)
            return []
        return value.op.operands

    body = loop.regions[0]
    first_sums = [op.operands[2] for op in body.ops if op.name == "tt.dot"]
    for start in (*body.terminator.operands, *first_sums):  # type: ignore[union-attr]
        list(reachable(start, sources))
    return [row for row in dict.fromkeys(found) if row.type.element in VECTOR_TYPES]


def panel_pays(context: Context, loop: Op) -> bool:
    """Do columns take more than a block of rows reads from a panel in as much time? (M = 48, K = 1024, 6 rows a block:
    Q4_0 and Q4_1 without a panel 715 and 730 GOP/s, with one 675 and 645; Q8_0 530, 642.)"""
    dots = [op for op in loop.regions[0].ops if op.name == "tt.dot"]
    if any(dot.result.type.element != "i32" for dot in dots):
        return False
    rights = [dot.operands[1] for dot in dots]
    if context.lanes < 16 or any(range_of(right)[0] < 0 for right in rights):
        return True

    def sources(value: Value) -> list[Value]:
        return value.op.operands if value.op is not None and is_lazy(value.op) and not value.type.is_pointer else []

    values = {value for start in (*rights, *rows_of_columns(context, loop)) for value in reachable(start, sources)}
    computed = [value for value in values if value.op is not None and value.op.name in _COLUMN_WORK]
    return sum(value.type.element in ("i8", "f32") for value in computed) > CHEAP_COLUMNS


class Panel:
    """The panel of a loop. In C it makes two arrays, of vectors and of kept sums, and what the loop carries."""

    def __init__(
        self, context: Context, loop: Op, others: list[tuple[Value, Value, Value]], slots: list[Slot], kept: int
    ):
        """others: what the loop carries besides sums.  kept: how many vectors of sums."""
        self.context, self.loop, self.slots = context, loop, slots
        self.vector = 4 * context.lanes  # bytes
        self.size = len(slots) * self.vector
        self.run, self.end, self.turn, self.of_block = map(context.name, ("run", "end", "turn", "of_block"))
        self.lower, self.upper, self.step = (context.scalar(value) for value in loop.operands[:3])
        self.array = context.local_array("char", TURNS * self.size, 1, "panel")
        self.kept = context.local_array("char", kept * self.vector, 1, "kept")
        self.new = [new for *_, new in others]
        self.carried = [carry(context, *other) for other in others]
        self.starts = [context.name("start") for _ in others]

    @contextmanager
    def runs(self) -> Iterator[None]:
        """A C loop over runs, of which there is one at least. It begins with filling the panel."""
        context, kind, length = self.context, self._kind, f"{TURNS} * {self.step}"
        opening = f"for ({kind} {self.run} = {self.lower}; {self.run} == {self.lower} || {self.run} < {self.upper};"
        with context.braces(f"{opening} {self.run} += {length})"):
            rest = f"{self.upper} - {self.run}"
            context.line(f"const {kind} {self.end} = {rest} > {length} ? {self.run} + {length} : {self.upper};")
            for item, start in zip(self.carried, self.starts):
                context.line(f"const {_type(item)} {start} = {item.name};")
            self._fill()
            yield

    def _fill(self) -> None:
        context = self.context
        with context.braces(self.header(const="")):
            for op in self.loop.regions[0].ops[:-1]:
                if op.name != "tt.dot" and not op.result.type.is_tensor:
                    context.op(op)
            for number, slot in enumerate(self.slots):
                text = slot.text()
                context.line(f"*({slot.kind} *)({self.turn} + {number * self.vector}) = {text};")
            assign(context, self.carried, self.new)

    @property
    def _kind(self) -> str:
        return value_type(self.loop.regions[0].arguments[0].type.element)

    def header(self, const: str = "const ") -> str:
        """C of a loop over the turns of a run; its variable gets its name."""
        variable = self.loop.regions[0].arguments[0]
        name = self.context.name(variable.name)
        self.context.storage[variable] = Scalar(name)
        self.context.line(f"{const}char *{self.turn} = {self.array};")
        moves = f"{name} += {self.step}, {self.turn} += {self.size}"
        return f"for ({self._kind} {name} = {self.run}; {name} < {self.end}; {moves})"

    def vectors(self) -> dict[Key, str]:
        """C for the vectors of a turn."""
        return {
            slot.key: f"*(const {slot.kind} *)({self.turn} + {n * self.vector})" for n, slot in enumerate(self.slots)
        }

    def again(self) -> list[Carried]:
        """What the loop carries, in variables of a block of rows, which takes the run's turns from the first one on."""
        return [self._continued(item, start) for item, start in zip(self.carried, self.starts)]

    def _continued(self, item: Carried, start: str) -> Carried:
        name, stored = self.context.name(item.argument.name), self.context.storage[item.argument]
        self.context.line(f"{_type(item)} {name} = {start};")
        again = MovingPointers(stored.origin, name) if isinstance(stored, MovingPointers) else Scalar(name)
        self.context.storage[item.argument] = again
        return replace(item, name=name)

    # ---- sums, from run to run ----------------------------------------------------------------------------------
    def find_kept(self, block: str, sums: int) -> None:
        """block: C for the number of a block of rows, which has so many vectors of sums."""
        self.context.line(f"char *{self.of_block} = {self.kept} + {block} * {sums * self.vector};")

    def resume(self, sums: list[tuple[str, str]]) -> None:
        """Variables, by name and type, take what has been kept."""
        with self.context.braces(f"if ({self.run} != {self.lower})"):
            for number, (name, kind) in enumerate(sums):
                self.context.line(f"{name} = *(const {kind} *)({self.of_block} + {number * self.vector});")

    @contextmanager
    def in_last_run(self, sums: list[tuple[str, str]]) -> Iterator[None]:
        """What is written inside is done in the last run; in others variables are kept."""
        with self.context.braces(f"if ({self.end} == {self.upper})"):
            yield
        with self.context.braces("else"):
            for number, (name, kind) in enumerate(sums):
                self.context.line(f"*({kind} *)({self.of_block} + {number * self.vector}) = {name};")


def _type(item: Carried) -> str:
    return "int64_t" if item.step is not None else value_type(item.argument.type.element)
