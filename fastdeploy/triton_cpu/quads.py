"""Products of bytes, four at a time.

    sum[n] += a[k] b[k, n] + a[k + 1] b[k + 1, n] + a[k + 2] b[k + 2, n] + a[k + 3] b[k + 3, n]

    left: four bytes of a row, broadcast     k..k+3 | k..k+3 | k..k+3 | ...
    right: a vector of columns                  n   |  n+1   |  n+2   | ...    each with the bytes k..k+3

add_dot4 of prelude.h adds four products to each 32-bit lane. Its vector operand has the bytes (k..k+3, n..n+15) in the
order of 16 columns of 4, which is how packed weights lie in memory (lanes.py finds it out). One side must be unsigned,
as nibbles are on the right, and weights of a softmax on the left. Else the left one is taken as x + 128 = x ^ 128. Then
128 times the sum of the right one's column is subtracted, which costs as much as one more row. Where the kernel stores
x ^ 128 and undoes it after the load, the two cancel.

Without VNNI it takes two instructions, with 16 bits in between (8 products of 4 bits and 8 fit, of 5 bits 4, ...):

    word of bytes    | u0 s0 | u1 s1 | u2 s2 | u3 s3 |      vpmaddubsw, and additions of as many products as are known
    its halves       | u0 s0 + u1 s1 | u2 s2 + u3 s3 |      to fit, by the ranges of both operands
    sum              |        u0 s0 + ... + u3 s3    |      vpmaddwd by ones
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from .analysis import splat_constant
from .carried import uniform_step
from .context import Context, NotATile
from .lanes import Lanes, Unknown, exactly, lanes, row_of_lanes
from .loops import Term
from .ranges import fits, range_of
from .ttir import Op, Value
from .vectors import VECTOR_TYPES, Vectors, plus, table_of

LARGEST_HALF = 2**15 - 1  # a sum of products in 16 bits
RUN = 16  # turns of a loop whose left operands are rewritten at once
LONGEST_RUN = 64  # bytes of k, or packed rows, that are multiplied without a C loop around them

_BYTEWISE = {"arith.andi": "&", "arith.ori": "|", "arith.xori": "^"}  # of words as of their bytes
_OF_LOW_BYTES = _BYTEWISE | {"arith.addi": "+", "arith.subi": "-"}  # the result's low byte is one of low bytes
_SHIFTS = {"arith.shli": "<<", "arith.shrui": ">>", "arith.shrsi": ">>"}
_RESIZED = ("arith.extsi", "arith.extui", "arith.trunci")


Ready = Callable[[Term, Term], str]


def flips(a: Value, b: Value) -> bool:
    """Are the left operand's signs flipped, as neither side is unsigned?"""
    return range_of(a)[0] < 0 and range_of(b)[0] < 0


def largest_pair(a: Value, b: Value) -> int:
    """What the sum of two products may come to, the left operand flipped if its signs are."""
    (a_least, a_greatest), (b_least, b_greatest) = range_of(a), range_of(b)
    if b_least >= 0:
        return 2 * max(-a_least, a_greatest) * b_greatest
    return 2 * (255 if a_least < 0 else a_greatest) * max(-b_least, b_greatest)


class Quads(Vectors):
    """Writes products of bytes for ROWS x VECTORS places, into variables."""

    longest_run = LONGEST_RUN

    def __init__(self, context: Context, rows: list[Term], columns: list[Term], read_once: bool):
        super().__init__(context, rows, columns, read_once)
        self.start, self.has_panel = 0, False  # where the loop begins, among the context's lines
        self.skips = False  # some turns of the loop
        self.halves: dict[Value, tuple[list[list[str]], int]] = {}  # of products that others go on with

    def variables(self, initial: Value, hint: str) -> list[list[str]]:
        """A tile in variables that may change, with their first values."""
        kind = VECTOR_TYPES[initial.type.element]
        name = self.context.name(hint)
        names = [[f"{name}_{r}x{v}" for v in range(len(self.columns))] for r in range(len(self.rows))]
        for place in self.places:
            r, v = place.register  # type: ignore[misc]
            self.context.line(f"{kind} {names[r][v]} = {self.vector(initial, place)};")
        return names

    def outside(self, declaration: str) -> None:
        """A line before the loop."""
        self.context.lines.insert(self.start, declaration)

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

    def dot_of_bytes(
        self, a: Value, b: Value, sums: list[list[str]], ready: Ready | None = None, op: Op | None = None
    ) -> None:
        """Adds the products of the block's rows and columns to `sums`.

        By add_dot4, or in two steps or, where not even two products fit, of halves.

        ready: C for the word of a row from k on, where the left operand lies in an array, its signs flipped if
            `flips(a, b)`.
        op: the tl.dot, if the block writes those, too, that add to its result.
        """
        in_two_steps = self.context.dots_in_two_steps
        if in_two_steps and largest_pair(a, b) > LARGEST_HALF:
            self._dot_of_halves(a, b, sums, ready)
            return
        at_hand = (b, None, self.columns[0]) in self.memo  # else they come last: nothing waits for them
        columns = self.sums_of_columns(b) if flips(a, b) else []
        if at_hand:
            self._add_to_rows(sums, columns)
        if in_two_steps:
            self._dot_in_halves(a, b, sums, ready, op)
        else:
            self._dot_in_words(a, b, sums, ready)
        if not at_hand:
            self._add_to_rows(sums, columns)

    def _dot_in_words(self, a: Value, b: Value, sums: list[list[str]], ready: Ready | None) -> None:
        """By the instruction that adds four products to a word."""
        with self._words_of(a.type.shape[1]) as steps:
            words = self._left_words(a, steps, flips(a, b), ready)
            for number, k in enumerate(steps):
                right = [self._quads(b, k, column) for column in self.columns]
                for of_row, total_of_row in zip(words, sums):
                    left = self.constant("bytes", f"(bytes)ivec_splat({of_row[number]})", "left")
                    for total, factor in zip(total_of_row, right):
                        pair = f"{factor}, {left}" if range_of(b)[0] >= 0 else f"{left}, {factor}"
                        self.context.line(f"{total} = add_dot4({total}, {pair});")

    def _add_to_rows(self, sums: list[list[str]], columns: list[str]) -> None:
        for of_row in sums:
            for total, column in zip(of_row, columns):
                self.context.line(f"{total} += {column};")

    def _left_words(self, a: Value, steps: list[Term], flipped: bool, ready: Ready | None) -> list[list[str]]:
        """C for the words of the block's rows, with each byte's sign bit flipped or not."""
        if ready is not None:
            return [[ready(row, k) for k in steps] for row in self.rows]
        often = self.has_panel and not self.context.dots_in_two_steps  # it takes less: a word meets two vectors
        if flipped and not often and (in_memory := self._rewritten(a, steps, "flip_bytes", "flipped")):
            return in_memory[0]
        flip = " ^ 0x80808080" if flipped else ""
        return [[f"{self._four(a, row, k)}{flip}" for k in steps] for row in self.rows]

    def _dot_in_halves(self, a: Value, b: Value, sums: list[list[str]], ready: Ready | None, op: Op | None) -> None:
        """By bytes of a small range. Halves of words add up products as long as they can hold any sum of them."""
        in_a_loop, largest = a.type.shape[1] > self.longest_run, largest_pair(a, b)
        initial = op.operands[2] if op else None
        names, most = self.halves.pop(initial) if initial in self.halves else (self._undefined("halves"), 0)
        if in_a_loop and most:
            most = self._add_halves(names, sums)
        with self._words_of(a.type.shape[1]) as steps:
            words = self._left_words(a, steps, flips(a, b), ready)
            for number, k in enumerate(steps):
                if most + largest > LARGEST_HALF:
                    most = self._add_halves(names, sums)
                right = [self._quads(b, k, column) for column in self.columns]
                form = "{0} = add_dot2_of_bytes({0}, {1}, {2});" if most else "{0} = dot2_of_bytes({1}, {2});"
                for of_row, names_of_row in zip(words, names):
                    left = self.constant("bytes", f"(bytes)ivec_splat({of_row[number]})", "left")
                    for name, factor in zip(names_of_row, right):
                        pair = (factor, left) if range_of(b)[0] >= 0 else (left, factor)
                        self.context.line(form.format(name, *pair))
                most += largest
            if in_a_loop:
                most = self._add_halves(names, sums)
        users = op.result.uses if op else []
        if len(users) == 1 and users[0].name == "tt.dot" and users[0].operands[2] is op.result and most:  # type: ignore[union-attr]
            self.halves[op.result] = names, most  # type: ignore[union-attr]  # it goes on from here
        elif most:
            self._add_halves(names, sums)

    def _undefined(self, hint: str) -> list[list[str]]:
        """Variables for sums of halves, which the first product defines."""
        name = self.context.name(hint)
        names = [[f"{name}_{r}x{v}" for v in range(len(self.columns))] for r in range(len(self.rows))]
        self.context.line(*(f"halves {', '.join(of_row)};" for of_row in names))
        return names

    def _add_halves(self, names: list[list[str]], sums: list[list[str]]) -> int:
        """Halves into the sums; returns what they come to from now on."""
        for of_row, totals in zip(names, sums):
            for name, total in zip(of_row, totals):
                self.context.line(f"{total} = add_halves({total}, {name});")
        return 0

    def _dot_of_halves(self, a: Value, b: Value, sums: list[list[str]], ready: Ready | None) -> None:
        """By signed bytes, which become halves, as those of the left operand do."""
        flip = " ^ 0x80808080" if flips(a, b) and ready else ""
        of_left, of_right = ("unsigned_" if range_of(value)[0] >= 0 else "" for value in (a, b))
        with self._words_of(a.type.shape[1]) as steps:
            plain = ready is None and range_of(a)[0] < 0 and len(steps) % 4 == 0
            in_memory = self._rewritten(a, steps, "widen_bytes", "even", "odd") if plain else None
            for number, k in enumerate(steps):
                quads = [self._quads(b, k, column) for column in self.columns]
                for part, parity in enumerate(("even", "odd")):
                    right = [self.constant("halves", f"{of_right}{parity}_bytes({quad})", parity) for quad in quads]
                    for r, (row, of_row) in enumerate(zip(self.rows, sums)):
                        if in_memory:
                            text = f"(halves)ivec_splat({in_memory[part][r][number]})"
                        else:
                            word = f"{ready(row, k)}{flip}" if ready else self._four(a, row, k)
                            text = f"{of_left}{parity}_bytes((bytes)ivec_splat({word}))"
                        left = self.constant("halves", text, "left")
                        for total, factor in zip(of_row, right):
                            self.context.line(f"{total} = add_dot2_of_halves({total}, {factor}, {left});")

    def _rewritten(self, a: Value, steps: list[Term], function: str, *arrays: str) -> list[list[list[str]]] | None:
        """What a function of prelude.h makes of the words of all rows, in arrays, if they lie in memory in order.

        From there a load broadcasts one, for nothing; from a register it takes an instruction, of those that multiply.
        A load has to wait for words that were written just before. So where it is known where the next turns of the
        loop will read, those of RUN turns are rewritten at once. (8 rows, Q8_0: 417 GOP/s on a core, then 505.)
        """
        count, names = len(steps), [self.context.name(array) for array in arrays]
        if a.op is None or a in self.context.storage or a.op.name != "tt.load":
            return None
        self._expect_plain(a.op, row_of_lanes(4 * count))
        ahead = steps[0].text == "0" and not (self.has_panel or self.skips)
        run = self._turns_ahead(a.op.operands[0]) if ahead else None
        turn, turns, stride = run or ("0", "1", 0)
        of_row = count * (RUN if run else 1)
        for name in names:
            self.outside(f"int32_t {name}[{len(self.rows) * of_row}] __attribute__((aligned(64)));")
        with self.scope(f"if ({turn} == 0)"):
            addresses = [self.address(a.op.operands[0], (row, steps[0])) for row in self.rows]
            with self.context.braces(f"for (long t = 0; t < {turns}; t++)"):
                for r, address in enumerate(addresses):
                    places = ", ".join(f"{name} + {r * of_row} + {count} * t" for name in names)
                    self.context.line(f"{function}({places}, (const char *)({address}) + {stride} * t, {count});")
        if run is None:
            self.context.line(*(f"IN_MEMORY({name});" for name in names))
        here = [self.constant("int32_t *const", f"{name} + {count} * {turn}", "words") for name in names]
        rows = range(len(self.rows))
        return [[[f"{name}[{r * of_row + n}]" for n in range(count)] for r in rows] for name in here]

    def _turns_ahead(self, pointers: Value) -> tuple[str, str, int] | None:
        """C for the number of the loop's turn in a run of RUN, and for how many the run has from there on; by how many
        bytes the pointers move in a turn. None unless they do nothing else in the loop."""
        loop = pointers.block.parent
        if loop is None or loop.name != "scf.for" or loop.text.startswith("scf.for unsigned"):
            return None
        body = loop.regions[0]
        moving = [part for part in self.parts(pointers) if part in body.arguments]
        new = dict(zip(body.arguments[1:], body.terminator.operands))  # type: ignore[union-attr]
        step = uniform_step(moving[0], new.get(moving[0])) if len(moving) == 1 else None
        distance = None if step is None else splat_constant(step)
        if distance is None:
            return None
        here, first, last, by = (self.context.scalar(v) for v in (body.arguments[0], *loop.operands[:3]))
        turn = self.constant("long", f"((long){here} - {first}) / {by} % {RUN}", "turn")
        left = f"((long){last} - {here} + {by} - 1) / {by}"
        return turn, f"({left} < {RUN} ? {left} : {RUN})", distance

    def sums_of_columns(self, b: Value) -> list[str]:
        """-128 times the sums of the columns of bytes."""
        return [self.sum_of_column(b, column) for column in self.columns]

    def sum_of_column(self, b: Value, column: Term) -> str:
        """-128 times the sums of a vector of columns of bytes."""
        key = (b, None, column)
        if key not in self.memo:
            name = self.context.name("column")
            self.context.line(f"ivec {name} = {{0}};")
            form = "add_dot4({0}, (bytes)ivec_splat(0x80808080), {1})"
            if self.context.dots_in_two_steps:  # 128 times two bytes fit
                form = "add_halves({0}, dot2_of_bytes((bytes)ivec_splat(0x80808080), {1}))"
            with self._words_of(b.type.shape[0]) as steps:
                for k in steps:
                    factor = self._quads(b, k, column)
                    self.context.line(f"{name} = {form.format(name, factor)};")
            self.memo[key] = f"(-{name})"
        return self.memo[key]

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
        if self.columns.index(column) * 4 * count % 64 == 0:
            self.prefetch(address)
        return f"*(const bytes *)({address})"

    def _shifted_quads(self, op: Op, k: Term, column: Term) -> str:
        """Shifts by the same number for all bytes of a vector. To the right, none comes from above."""
        source, by = op.operands
        is_byte = op.name == "arith.shrui" and source.type.element == "i8"
        if op.name != "arith.shli" and not is_byte and not fits(range_of(source), (0, 255)):
            raise NotATile(f"{op.text}: not known to be in a byte")
        number = self._shift_number(op, k)
        if op.name == "arith.shli" and number.known and (moved := self._moved_bits(source, number, k, column)):
            return moved
        shifted = self._quads(source, k, column)
        if number.known and op.name != "arith.shli":  # to the left gcc would double them, one time for each bit
            return f"{shifted} {_SHIFTS[op.name]} {number.pattern[0]}"
        name = "bytes_shifted_left" if op.name == "arith.shli" else "bytes_shifted_right"
        return f"{name}({shifted}, {number.pattern[0] if number.known else self.scalar(by, (k, column))})"

    def _moved_bits(self, value: Value, left: Lanes, k: Term, column: Term) -> str | None:
        """(x >> right & mask) << left as one shift of x and one mask, where `value` is what it shifts to the left."""
        masked = value.op
        shift = masked.operands[0].op if masked is not None and masked.name == "arith.andi" else None
        if masked is None or shift is None or shift.name != "arith.shrui" or value.type.element != "i8":
            return None
        mask, right = splat_constant(masked.operands[1]), self._shift_number(shift, k)
        if mask is None or not right.known:
            return None
        down, up = int(right.pattern[0]), int(left.pattern[0])
        moved = f"(halves){self._quads(shift.operands[0], k, column)} {'<<' if up > down else '>>'} {abs(up - down)}"
        return f"(bytes)({moved}) & {(mask & 255 >> down) << up & 255}"

    def _shift_number(self, op: Op, k: Term) -> Lanes:
        """By what number all bytes of a vector are shifted."""
        by = op.operands[1]
        if not fits(range_of(by), (0, 7)):
            raise NotATile(f"{op.text}: not known to shift by less than a byte")
        lane = np.arange(4 * self.context.lanes)
        row = exactly(int(k.text) + lane % 4) if k.text.isdigit() else Lanes(4, lane % 4)
        try:
            number = lanes(by, (row, Lanes(self.context.lanes, lane // 4)), self.context.origins)
        except Unknown as unknown:
            raise NotATile(f"{op.text}: {unknown}") from None
        if not number.uniform:
            raise NotATile(f"{op.text}: shifts differ")
        return number

    def _quads_of_table(self, pointers: Value, indices: Value, k: Term, column: Term) -> str:
        """Bytes of a table, which is kept in a register."""
        if pointers.type.pointee != "i8":
            raise NotATile(f"a table of {pointers.type.pointee} as bytes")
        table = self.table(pointers, "bytes", "{0} = bytes_of_table({1})")
        return f"bytes_picked({table}, {self._quads(indices, k, column)})"


def _repeated(byte: int) -> str:
    return f"0x{(byte & 255) * 0x01010101:08x}"
