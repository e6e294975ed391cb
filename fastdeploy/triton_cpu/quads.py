"""Products of bytes, four at a time.

    sum[n] += a[k] b[k, n] + a[k + 1] b[k + 1, n] + a[k + 2] b[k + 2, n] + a[k + 3] b[k + 3, n]

    left: four bytes of a row, broadcast     k..k+3 | k..k+3 | k..k+3 | ...
    right: a vector of columns                  n   |  n+1   |  n+2   | ...    each with the bytes k..k+3

add_dot4 of prelude.h adds four products to each 32-bit lane. Its vector operand has the bytes (k..k+3, n..n+15) in the
order of 16 columns of 4, which is how packed weights lie in memory (lanes.py finds it out). One side must be unsigned,
as nibbles are on the right, and weights of a softmax on the left. Else the left one is taken as x + 128 = x ^ 128. Then
128 times the sum of the right one's column is subtracted, which costs as much as one more row. Where the kernel stores
x ^ 128 and undoes it after the load, the two cancel; else the block's rows are flipped into an array first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from .analysis import splat_constant
from .context import Context, NotATile
from .lanes import Lanes, Unknown, exactly, lanes, row_of_lanes
from .loops import Term
from .ranges import fits, range_of
from .ttir import Op, Value
from .vectors import VECTOR_TYPES, Vectors, plus, table_of

LONGEST_RUN = 64  # bytes of k, or packed rows, that are multiplied without a C loop around them

_BYTEWISE = {"arith.andi": "&", "arith.ori": "|", "arith.xori": "^"}  # of words as of their bytes
_OF_LOW_BYTES = _BYTEWISE | {"arith.addi": "+", "arith.subi": "-"}  # the result's low byte is one of low bytes
_SHIFTS = {"arith.shli": "<<", "arith.shrui": ">>", "arith.shrsi": ">>"}
_RESIZED = ("arith.extsi", "arith.extui", "arith.trunci")


Ready = Callable[[Term, Term], str]


def flips(a: Value, b: Value) -> bool:
    """Are the left operand's signs flipped, as neither side is unsigned?"""
    return range_of(a)[0] < 0 and range_of(b)[0] < 0


class Quads(Vectors):
    """Writes products of bytes for ROWS x VECTORS places, into variables."""

    longest_run = LONGEST_RUN

    def __init__(self, context: Context, rows: list[Term], columns: list[Term], read_once: bool):
        super().__init__(context, rows, columns, read_once)
        self.column_sums: dict[Value, list[str]] = {}  # of right operands, as far as products have needed them

    def variables(self, initial: Value, hint: str) -> list[list[str]]:
        """A tile in variables that may change, with their first values."""
        kind = VECTOR_TYPES[initial.type.element]
        name = self.context.name(hint)
        names = [[f"{name}_{r}x{v}" for v in range(len(self.columns))] for r in range(len(self.rows))]
        for place in self.places:
            r, v = place.register  # type: ignore[misc]
            self.context.line(f"{kind} {names[r][v]} = {self.vector(initial, place)};")
        return names

    @contextmanager
    def _words_of(self, extent: int) -> Iterator[list[Term]]:
        """A C loop over `extent` bytes of k; yields where the words of a turn begin. For few there is no loop, and
        the next product finds the bytes that this one has loaded."""
        run, name = min(extent, self.longest_run), self.context.name("k")
        if extent == run:
            yield [plus("0", number) for number in range(0, run, 4)]
            return
        with self.scope(f"for (int {name} = 0; {name} < {extent}; {name} += {run})"):
            yield [plus(name, number) for number in range(0, run, 4)]

    def dot_of_bytes(self, a: Value, b: Value, sums: list[list[str]], ready: Ready | None = None) -> None:
        """Adds the products of the block's rows and columns to `sums`.

        ready: C for the word of a row from k on, where the left operand lies in an array, its signs flipped if
            `flips(a, b)`.
        """
        unsigned = range_of(b)[0] >= 0
        columns = self.sums_of_columns(b) if flips(a, b) else []
        with self._words_of(a.type.shape[1]) as steps:
            words = self._words(a, steps, flips(a, b)) if ready is None else None
            for number, k in enumerate(steps):
                right = [self._quads(b, k, column) for column in self.columns]
                for r, total_of_row in enumerate(sums):
                    word = words[r][number] if words else ready(self.rows[r], k)  # type: ignore[misc]
                    left = self.constant("bytes", f"(bytes)ivec_splat({word})", "left")
                    for total, factor in zip(total_of_row, right):
                        pair = f"{factor}, {left}" if unsigned else f"{left}, {factor}"
                        self.context.line(f"{total} = add_dot4({total}, {pair});")
        for of_row in sums:
            for total, column in zip(of_row, columns):
                self.context.line(f"{total} -= {column};")

    def _words(self, a: Value, steps: list[Term], flipped: bool) -> list[list[str]]:
        """C for the words of each row of the left operand, with each byte's sign bit flipped if wanted."""
        words = self._flipped(a, steps) if flipped else None
        flip = " ^ 0x80808080" if flipped else ""
        return words or [[f"{self._four(a, row, k)}{flip}" for k in steps] for row in self.rows]

    def _flipped(self, a: Value, steps: list[Term]) -> list[list[str]] | None:
        """The words of all rows with each byte's sign bit flipped, in an array, if they lie in memory in order.

        From there a load broadcasts one, for nothing; from a register it takes an instruction, of those that multiply.
        """
        count, name = 4 * len(steps), self.context.name("flipped")
        if a.op is None or a in self.context.storage or a.op.name != "tt.load":
            return None
        self._expect_plain(a.op, row_of_lanes(count))
        self.context.line(f"int32_t {name}[{len(self.rows) * len(steps)}] __attribute__((aligned(64)));")
        for r, row in enumerate(self.rows):
            address = self.address(a.op.operands[0], (row, steps[0]))
            self.context.line(f"flip_bytes({name} + {r * len(steps)}, {address}, {len(steps)});")
        self.context.line(f"IN_MEMORY({name});")
        return [[f"{name}[{r * len(steps) + n}]" for n in range(len(steps))] for r in range(len(self.rows))]

    def sums_of_columns(self, b: Value) -> list[str]:
        """128 times the sum of each column of bytes."""
        if b not in self.column_sums:
            names = self.column_sums[b] = [self.context.name("column") for _ in self.columns]
            self.context.line(f"ivec {' = {0}, '.join(names)} = {{0}};")
            with self._words_of(b.type.shape[0]) as steps:
                for k in steps:
                    for total, column in zip(names, self.columns):
                        factor = self._quads(b, k, column)
                        self.context.line(f"{total} = add_dot4({total}, (bytes)ivec_splat(0x80808080), {factor});")
        return self.column_sums[b]

    def _expect_plain(self, load: Op, index: tuple[Lanes, ...]) -> None:
        if len(load.operands) > 1:
            raise NotATile(f"{load.text} has a mask")
        self.expect_consecutive(load, index)

    def _four(self, value: Value, row: Term, k: Term) -> str:
        """The bytes k to k + 3 of a row as one word."""
        op = value.op
        if op is None or value in self.context.storage:
            raise NotATile(f"bytes of {value}")
        sign = _BYTEWISE.get(op.name)
        if sign and (constant := splat_constant(op.operands[1])) is not None:
            return f"({self._four(op.operands[0], row, k)} {sign} {_repeated(constant)})"
        self._expect_plain(op, row_of_lanes(4))
        return f"four_bytes({self.address(op.operands[0], (row, k))})"

    def _quads(self, value: Value, k: Term, column: Term) -> str:
        """The bytes (k to k + 3, a vector of columns), four of a column next to each other; of wider integers the low
        bytes."""
        key = (value, k, column)
        if key not in self.memo:
            self.memo[key] = self.constant("bytes", self._quads_text(value, k, column), value.name)
        return self.memo[key]

    def _quads_text(self, value: Value, k: Term, column: Term) -> str:
        op, count = value.op, self.context.lanes
        if op is None or value in self.context.storage:
            raise NotATile(f"bytes of {value}")
        if (constant := splat_constant(value)) is not None:
            return f"(bytes)ivec_splat({_repeated(constant)})"
        if op.name in _RESIZED:
            return self._quads(op.operands[0], k, column)
        if sign := _OF_LOW_BYTES.get(op.name):
            constant = splat_constant(op.operands[1])
            other = self._quads(op.operands[1], k, column) if constant is None else constant & 255
            return f"{self._quads(op.operands[0], k, column)} {sign} {other}"
        if op.name in _SHIFTS:
            return self._shifted_quads(op, k, column)
        if op.name == "tt.load" and (table := table_of(op)):
            return self._quads_of_table(*table, k, column)
        if value.type.element != "i8":
            raise NotATile(f"{op.name} of {value.type.element} as bytes")
        lane = np.arange(4 * count)
        self._expect_plain(op, (Lanes(4, lane % 4), Lanes(count, lane // 4)))
        address = self.address(op.operands[0], (k, column))
        self.prefetch(address)  # for every block of rows: it costs little, and 32 rows of 4 bits take 13 % less time
        return f"*(const bytes *)({address})"

    def _shifted_quads(self, op: Op, k: Term, column: Term) -> str:
        """Shifts by the same number for all bytes of a vector. To the right, none comes from above."""
        source, by = op.operands
        if not fits(range_of(by), (0, 7)):
            raise NotATile(f"{op.text}: not known to shift by less than a byte")
        is_byte = op.name == "arith.shrui" and source.type.element == "i8"
        if op.name != "arith.shli" and not is_byte and not fits(range_of(source), (0, 255)):
            raise NotATile(f"{op.text}: not known to be in a byte")
        shifted = self._quads(source, k, column)
        lane = np.arange(4 * self.context.lanes)
        row = exactly(int(k.text) + lane % 4) if k.text.isdigit() else Lanes(4, lane % 4)
        try:
            number = lanes(by, (row, Lanes(self.context.lanes, lane // 4)), self.context.origins)
        except Unknown as unknown:
            raise NotATile(f"{op.text}: {unknown}") from None
        if not number.uniform:
            raise NotATile(f"{op.text}: shifts differ")
        if number.known:
            return f"{shifted} {_SHIFTS[op.name]} {number.pattern[0]}"
        name = "bytes_shifted_left" if op.name == "arith.shli" else "bytes_shifted_right"
        return f"{name}({shifted}, {self.scalar(by, (k, column))})"

    def _quads_of_table(self, pointers: Value, indices: Value, k: Term, column: Term) -> str:
        """Bytes of a table, which is kept in a register."""
        if pointers.type.pointee != "i8":
            raise NotATile(f"a table of {pointers.type.pointee} as bytes")
        table = self.table(pointers, "bytes", "{0} = bytes_of_table({1})")
        return f"bytes_picked({table}, {self._quads(indices, k, column)})"


def _repeated(byte: int) -> str:
    return f"0x{(byte & 255) * 0x01010101:08x}"
