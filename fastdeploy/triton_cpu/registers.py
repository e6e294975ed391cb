"""Loops around tl.dot whose sums stay in registers from the first turn to the last.

    for k0 in range(0, K, BLOCK_K):                       the kernel: a loop that carries a tile of sums,
        sums = tl.dot(a, b, sums)                         pointers and scalars, and does nothing but compute
        ...                                               or: sums += tl.dot(a8, b8).to(tl.float32) * scales

    for each block of ROWS x VECTORS of the tile:         the C:     n       n + 16
        sum0x0 ... sum1x1 = the initial sums                     m   sum0x0  sum0x1     a variable is a vector
        for k0 ...                                               m+1 sum1x0  sum1x1     of 16 columns in a row
            for each k of the tile:
                sum<r>x<v> += a[m + r][k] * b[k][n + 16 v ...]
            anything else, row by row and vector by vector
        the tile <- sum0x0 ... sum1x1                     or, endings.py, where the kernel stores it

Integer products, conversions and scales live in such variables too. So a loop that multiplies bytes and scales the sums
of each group of 32 touches no memory but its operands; as tiles, every 32-bit sum would go through a cache five times.

Bytes are multiplied four at a time: add_dot4 of prelude.h adds four products to each 32-bit lane. Its vector operand
has the bytes (k..k+3, n..n+15) in the order of 16 columns of 4, which is how packed weights lie in memory (lanes.py
finds it out). One side must be unsigned, as nibbles are on the right. Else the left one is taken as x + 128 = x ^ 128.
Then 128 times the sum of the right one's column is subtracted, which costs as much as one more row. Where the kernel
stores x ^ 128 and undoes it after the load, the two cancel.

Where a tile has several blocks of rows, what its columns need is computed once for all of them: panels.py.

Without VNNI it takes two instructions, with 16 bits in between (8 products of 4 bits and 8 fit, of 5 bits 4, ...):

    word of bytes    | u0 s0 | u1 s1 | u2 s2 | u3 s3 |      vpmaddubsw, and additions of as many products as are known
    its halves       | u0 s0 + u1 s1 | u2 s2 + u3 s3 |      to fit, by the range of the right operand
    sum              |        u0 s0 + ... + u3 s3    |      vpmaddwd by ones

The arithmetic is that of the general path (control_flow.py, dot.py), bit by bit: a sum takes its terms in ascending k,
one FMA each, and the same additions are contracted. Loops that do not fit are left to that path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np

from .analysis import is_lazy, splat_constant, stride
from .carried import assign, carry, for_header, uniform_step
from .context import Array, Context, NotATile
from .endings import Ending, ending_of
from .lanes import Lanes, Unknown, exactly, lanes, row_of_lanes
from .live_rows import number_of_live_rows
from .loops import ZERO, Term, linear
from .pairs import Products, copy_of, products
from .panels import Panel, Slot, panel_pays, rows_of_columns
from .ranges import fits, range_of
from .ttir import Op, Value
from .vectors import VECTOR_TYPES, Place, Vectors, plus, table_of

MOST_VECTORS = 8  # of a row in a block
LARGEST_HALF = 2**15 - 1  # a sum of products in 16 bits
RUN = 16  # turns of a loop whose left operands are rewritten at once
LONGEST_RUN = 64  # bytes of k, or packed rows, that are multiplied without a C loop around them


class _Sums(NamedTuple):
    """A tile that the loop carries."""

    argument: Value
    initial: Value
    new: Value
    result: Value


def loop_to_memory(context: Context, loop: Op) -> None:
    """Writes an scf.for in registers, and the store of its sums."""
    if not (context.wanted.register_tiles and context.wanted.direct_stores and context.unit.plan.disjoint):
        raise NotATile
    ending = ending_of(loop)
    if ending is None:
        raise NotATile
    _emit(context, loop, ending)
    context.unit.plan.apart.update(ending.apart)


def loop(context: Context, loop: Op) -> None:
    """Writes an scf.for in registers; its sums go into arrays at the end."""
    if not context.wanted.register_tiles:
        raise NotATile
    _emit(context, loop)


def _emit(context: Context, loop: Op, ending: Ending | None = None) -> None:
    """The loop and, where it is given, what follows up to the store of the sums."""
    tiles = _carried_tiles(loop)
    if ending is not None:
        for op in ending.before:
            context.op(op)
        context.written |= {*ending.before, *ending.after}
    (m, n), dots = tiles[0].argument.type.shape, [op for op in loop.regions[0].ops if op.name == "tt.dot"]
    pays = panel_pays(context, loop)
    rows, vectors = _block_size(context, m, n, dots, tiles, pays)
    arrays = [] if ending else [context.declare(tile.result) for tile in tiles]
    row, column = context.name("m"), context.name("n")
    width = vectors * context.lanes
    counts = {number_of_live_rows(context, tile.result) for tile in tiles}
    live = counts.pop() if len(counts) == 1 else None
    with context.braces(f"for (int {column} = 0; {column} < {n}; {column} += {width})"):
        columns = [plus(column if n > width else "0", v * context.lanes) for v in range(vectors)]
        panel = _panel(context, loop, tiles, columns, m, rows) if pays and m > 3 * rows else None
        with (
            panel.runs() if panel else nullcontext(),
            context.braces(f"for (int {row} = 0; {row} < {live or m}; {row} += {rows})"),
        ):
            if panel:
                panel.find_kept(f"{row} / {rows}", rows * vectors * len(tiles))
            if m % rows:  # the last block begins earlier and computes some rows again
                context.line(f"{row} = {row} < {m - rows} ? {row} : {m - rows};")
            here = [plus(row if m > rows else "0", r) for r in range(rows)]
            block = _Block(context, here, columns, read_once=m == rows)
            _emit_block(block, loop, tiles, panel)
            with panel.in_last_run(block.sums(tiles)) if panel else nullcontext():
                if ending is None:
                    _to_arrays(block, tiles, arrays)
                else:
                    block.registers |= {tile.result: block.registers[tile.argument] for tile in tiles}
                    for place in block.places:
                        block.store(ending.store, place)


def _carried_tiles(loop: Op) -> list[_Sums]:
    """The tiles of sums. Raises NotATile unless all else that the loop has are pointers, scalars and lazy tensors."""
    body = loop.regions[0]
    if body.terminator is None or body.terminator.name != "scf.yield":
        raise NotATile("the loop carries nothing")
    tiles = []
    for sums in map(_Sums, body.arguments[1:], loop.operands[3:], body.terminator.operands, loop.results):
        if sums.argument.type.is_tensor and not sums.argument.type.is_pointer:
            tiles.append(sums)
        elif sums.result.uses:
            raise NotATile("a pointer or scalar is used behind the loop")
        elif sums.argument.type.is_tensor and uniform_step(sums.argument, sums.new) is None:
            raise NotATile("pointers that do not move as a whole")
    for op in body.ops[:-1]:
        if op.name != "tt.dot" and not _only_computes(op):
            raise NotATile(f"{op.name} in the loop")
    shapes = {tile.argument.type.shape for tile in tiles}
    shapes |= {op.result.type.shape for op in body.ops if op.name == "tt.dot"}
    types = {tile.argument.type.element for tile in tiles}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or not types <= {"f32", "i32"} or not tiles:
        raise NotATile("not one shape of sums")
    if all(op.name != "tt.dot" for op in body.ops):
        raise NotATile(f"no tl.dot in a loop over a tile of {shape}")
    return tiles


def _only_computes(op: Op) -> bool:
    """Tensors that are evaluated where they are used, and scalars from scalars."""
    return is_lazy(op) and (op.result.type.is_tensor or not any(operand.type.is_tensor for operand in op.operands))


def _block_size(context: Context, m: int, n: int, dots: list[Op], tiles: list[_Sums], panel: bool) -> tuple[int, int]:
    """(rows, vectors) of a block, for 32 AVX-512 registers or 16 of its elders.

    16 sums hide an FMA's latency (4 cycles, one or two per cycle) and leave room for operands. Floats are multiplied in
    8 x 2 blocks, in which a broadcast serves two FMAs; many rows on 16 registers in 6 x 2 ones (AVX2, M = 512, of 133
    GFLOP/s: 117, in 4 x 2 blocks 108). Rows a multiple of 4 KB apart share one set of the first cache: the 16 of a
    16 x 1 block drive each other out (bf16, M = 512, K = 2048: 136 GFLOP/s of 265, in 8 x 2 blocks 250; K = 576: 208,
    250). Few rows that convert their weights do that least often in 16 x 1 blocks, and so does a right operand that is
    computed (4 bits).

    Packed bytes are read in tiles of one vector, because that is their order in memory: with two (M = 1, 4 bits) a
    program jumps between two tiles and takes 42 us instead of 24. With a float sum beside each integer sum there is
    room for 11 rows. Many rows are taken in 6 x 2 blocks, which broadcast a word for two products (M = 512, K = 576,
    N = 3072, on a core: 296 GOP/s, with 11 x 1 blocks 230; 32 rows: 268, because 36 are computed, and 300). With a
    panel (panels.py) gcc spills some of 6 x 2 sums, so there are 5 x 2 (64 rows, K = 1024: 65 % of the peak, 62).

    Of 8 lanes a packed tile's line is two vectors: 4 x 2 blocks (AVX2, M = 64, K = 1024, 4 bits: 300 GOP/s; 3 rows 284,
    6 rows 280. With VNNI 371, 332 and 370).
    """
    lane_count = context.lanes
    if n < lane_count:
        raise NotATile("narrower than a vector")
    most = 16 if lane_count == 16 else 8
    if any(dot.result.type.element == "i32" for dot in dots):
        if lane_count == 8:
            blocks = -(-m // 4)
            return -(-m // blocks), min(2, n // lane_count)
        floats = any(tile.argument.type.element == "f32" for tile in tiles)
        if floats and n > lane_count and m > (most if panel else 2 * most):
            return most // 3 if panel else most * 3 // 8, 2
        blocks = -(-m // (most * 11 // 16 if floats else most))
        return -(-m // blocks), 1
    converts = any(_converts(context, dot, may_widen=m > most) for dot in dots)
    vectors = 1 if converts or n == lane_count else 2
    rows = min(m, most // max(len(tiles) - 1, vectors))
    if most == 8 and m > 32 and (len(tiles), vectors) == (1, 2):
        return 6, 2
    if not rows:
        raise NotATile(f"{len(tiles)} tiles of sums")
    return rows, min(n // lane_count, MOST_VECTORS, max(1, most // (rows * len(tiles))))


def _converts(context: Context, dot: Op, may_widen: bool) -> bool:
    """Are the right operand's elements converted on their way from memory? may_widen: by more than a widening."""
    load = dot.operands[1].op
    as_they_lie = "f32" if products(context, dot).terms == 1 else "bf16"
    if may_widen and load is not None and load.name == "arith.extf":
        load = load.operands[0].op
        return load is None or load.name != "tt.load"
    return load is None or load.name != "tt.load" or load.result.type.element != as_they_lie


def _others(loop: Op, tiles: list[_Sums]) -> list[tuple[Value, Value, Value]]:
    """What else the loop carries: (argument, first value, new value)."""
    body, sums = loop.regions[0], [tile.argument for tile in tiles]
    everything = zip(body.arguments[1:], loop.operands[3:], body.terminator.operands)  # type: ignore[union-attr]
    return [other for other in everything if other[0] not in sums]


def _panel(context: Context, loop: Op, tiles: list[_Sums], columns: list[Term], m: int, rows: int) -> Panel | None:
    """A filled panel for the loop, if that pays and can be."""
    dots, others = [op for op in loop.regions[0].ops if op.name == "tt.dot"], _others(loop, tiles)
    if any(dot.result.type.element != "i32" or dot.operands[1].type.shape[0] > LONGEST_RUN for dot in dots):
        return None
    if loop.text.startswith("scf.for unsigned") or any(context.holds_addresses(first) for _, first, _ in others):
        return None
    block = _Block(context, [ZERO], columns, read_once=True)
    kept = -(-m // rows) * rows * len(columns) * len(tiles)
    return Panel(context, loop, others, block.slots(loop), kept)


def _emit_block(block: _Block, loop: Op, tiles: list[_Sums], panel: Panel | None) -> None:
    """The kernel's whole loop for one block of registers, or a run of its turns."""
    context, body, others = block.context, loop.regions[0], _others(loop, tiles)
    for tile in tiles:
        block.registers[tile.argument] = block.variables(tile.initial, tile.argument.name)
    if panel:
        panel.resume(block.sums(tiles))
    carried = panel.again() if panel else [carry(context, *other) for other in others]
    block.start, block.has_panel = len(context.lines), panel is not None
    with block.scope(panel.header() if panel else for_header(context, loop)):
        if panel:
            block.memo |= panel.vectors()
        for op in body.ops[:-1]:
            if op.name == "tt.dot":
                block.dot(op)
            elif not op.result.type.is_tensor:
                context.op(op)
        for place in block.places:
            new = [block.vector(tile.new, place) for tile in tiles]
            if len(tiles) > 1:  # one may be another's old sums
                kinds = [VECTOR_TYPES[tile.new.type.element] for tile in tiles]
                new = [block.constant(kind, text, "next") for kind, text in zip(kinds, new)]
            for tile, text in zip(tiles, new):
                context.line(f"{block.vector(tile.argument, place)} = {text};")
        assign(context, carried, [new for *_, new in others])


def _to_arrays(block: _Block, tiles: list[_Sums], arrays: list[str]) -> None:
    for tile, name in zip(tiles, arrays):
        for place in block.places:
            where = linear(tile.result.type.shape, (place.row, place.column)).text
            kind = VECTOR_TYPES[tile.result.type.element]
            block.context.line(f"*({kind} *)({name} + {where}) = {block.vector(tile.argument, place)};")


_BYTEWISE = {"arith.andi": "&", "arith.ori": "|", "arith.xori": "^"}  # of words as of their bytes
_OF_LOW_BYTES = _BYTEWISE | {"arith.addi": "+", "arith.subi": "-"}  # the result's low byte is one of low bytes
_SHIFTS = {"arith.shli": "<<", "arith.shrui": ">>", "arith.shrsi": ">>"}
_RESIZED = ("arith.extsi", "arith.extui", "arith.trunci")


class _Block(Vectors):
    """Writes the products of a loop for ROWS x VECTORS places, into variables."""

    def __init__(self, context: Context, rows: list[Term], columns: list[Term], read_once: bool):
        super().__init__(context, rows, columns, read_once)
        self.start, self.has_panel = 0, False  # where the loop begins, among the context's lines
        self.halves: dict[Value, tuple[list[list[str]], int]] = {}  # of products that others go on with

    def _undefined(self, hint: str) -> list[list[str]]:
        """Variables for sums of halves, which the first product defines."""
        name = self.context.name(hint)
        names = [[f"{name}_{r}x{v}" for v in range(len(self.columns))] for r in range(len(self.rows))]
        self.context.line(*(f"halves {', '.join(of_row)};" for of_row in names))
        return names

    def outside(self, declaration: str) -> None:
        """A line before the loop."""
        self.context.lines.insert(self.start, declaration)

    def variables(self, initial: Value, hint: str) -> list[list[str]]:
        """A tile in variables that may change, with their first values."""
        kind = VECTOR_TYPES[initial.type.element]
        name = self.context.name(hint)
        names = [[f"{name}_{r}x{v}" for v in range(len(self.columns))] for r in range(len(self.rows))]
        for place in self.places:
            r, v = place.register  # type: ignore[misc]
            self.context.line(f"{kind} {names[r][v]} = {self.vector(initial, place)};")
        return names

    def sums(self, tiles: list[_Sums]) -> list[tuple[str, str]]:
        """The variables of the tiles, with their types."""
        kinds = {tile.argument: VECTOR_TYPES[tile.argument.type.element] for tile in tiles}
        return [(name, kinds[tile]) for tile in kinds for of_row in self.registers[tile] for name in of_row]

    def slots(self, loop: Op) -> list[Slot]:
        """What a turn of the loop computes for columns alone."""
        found = []
        for b in [op.operands[1] for op in loop.regions[0].ops if op.name == "tt.dot"]:
            for column in self.columns:
                for k in [plus("0", number) for number in range(0, b.type.shape[0], 4)]:
                    found.append(Slot((b, k, column), "bytes", partial(self._quads, b, k, column)))
                if range_of(b)[0] < 0:
                    found.append(Slot((b, None, column), "ivec", partial(self._column_sum, b, column)))
        for row in rows_of_columns(self.context, loop):
            for column in self.columns:
                kind, place = VECTOR_TYPES[row.type.element], Place(ZERO, column)
                found.append(Slot((row, None, column), kind, partial(self.vector, row, place)))
        return found

    # ---- products -----------------------------------------------------------------------------------------------
    def dot(self, op: Op) -> None:
        """The tile `op` adds its products to, in variables of its own."""
        a, b, initial = op.operands[:3]
        types = {a.type.element, b.type.element}
        sums = self.variables(initial, op.result.name)
        if types <= {"f32", "bf16", "f16"} and op.result.type.element == "f32":
            self._dot_of_floats(a, b, sums, products(self.context, op))
        elif types == {"i8"} and op.result.type.element == "i32" and a.type.shape[1] % 4 == 0:
            self._dot_of_bytes(op, sums)
        else:
            raise NotATile(f"products of {' and '.join(types)}")
        self.registers[op.result] = sums

    def _dot_of_floats(self, a: Value, b: Value, sums: list[list[str]], by: Products) -> None:
        name, extent = self.context.name("k"), a.type.shape[1]
        step = min(4 * by.terms, extent)
        turns = f"for (int {name} = 0; {name} < {extent}; {name} += {step})"
        if extent <= LONGEST_RUN and self._is_packed(b):
            name, step, turns = "0", extent, ""
        left_of = self._left(a, by)
        with self.scope(turns):
            for number in range(0, step, by.terms):
                k = plus(name, number)
                if by.terms == 2:
                    right = [self._pairs(b, (k, plus(name, number + 1)), column) for column in self.columns]
                else:
                    right = [self.vector(b, Place(k, column)) for column in self.columns]
                for r, of_row in enumerate(sums):
                    left = self.constant(by.kind, f"{by.kind}_splat({left_of(r, k)})", "left")
                    for total, factor in zip(of_row, right):
                        self.context.line(f"{total} = {by.text.format(sum=total, left=left, right=factor)};")

    def _is_packed(self, b: Value) -> bool:
        """Do several rows of the right operand lie in the same words? Without a loop over them, gcc knows each row's
        address and shifts. (8 rows of floats, K = 2048, N = 8192: Q4_1 1.23 ms instead of 1.61, Q6_K 1.43, 2.98.)"""
        loads = [part.op for part in self.parts(b) if part.op is not None and part.op.name == "tt.load"]
        pointers = [load.operands[0] for load in loads if load.result.type.shape == b.type.shape]
        return any(stride(tile, 0, self.context.origins) is None for tile in pointers)

    def _left(self, a: Value, by: Products) -> Callable[[int, Term], str]:
        """C for the terms of a row of the block from k on."""
        if by.terms == 1 and self._is_cheap(a):
            return lambda r, k: self.scalar(a, (self.rows[r], k))
        load = a.op
        if by.terms == 2 and load is not None and load.name == "tt.load" and a not in self.context.storage:
            if len(load.operands) == 1 and stride(load.operands[0], 1, self.context.origins) == 1:
                return lambda r, k: f"four_bytes({self.address(load.operands[0], (self.rows[r], k))})"
        if self._reads_registers(a):
            raise NotATile(f"{a} is computed from sums")
        copied = copy_of(self.context, a, by, 1, self.rows[0].text, len(self.rows))
        width = a.type.shape[1] // by.terms
        half = " / 2" if by.terms == 2 else ""
        return lambda r, k: f"{copied}[{r * width} + {k.text}{half}]"

    def _pairs(self, b: Value, rows: tuple[Term, Term], column: Term) -> str:
        """Two rows of a vector of columns, as pairs."""
        if b.op is None or b.op.name != "tt.load" or b in self.context.storage:
            raise NotATile(f"pairs of {b}, which is not read from memory")
        even, odd = (self._load(b.op, Place(row, column), in_halves=True) for row in rows)
        return self.constant("ivec", f"pairs_of({even}, {odd})", b.name)

    def _is_cheap(self, a: Value) -> bool:
        """Can an element of the left operand be broadcast from where it lies?"""
        if isinstance(self.context.storage.get(a), Array):
            return True
        return a.op is not None and a.op.name == "tt.load" and len(a.op.operands) == 1 and a.type.element == "f32"

    @contextmanager
    def _words_of(self, extent: int) -> Iterator[list[Term]]:
        """A C loop over `extent` bytes of k; yields where the words of a turn begin. For few there is no loop, and
        the next product finds the bytes that this one has loaded."""
        run, name = min(extent, LONGEST_RUN), self.context.name("k")
        if extent == run:
            yield [plus("0", number) for number in range(0, run, 4)]
            return
        with self.scope(f"for (int {name} = 0; {name} < {extent}; {name} += {run})"):
            yield [plus(name, number) for number in range(0, run, 4)]

    def _dot_of_bytes(self, op: Op, sums: list[list[str]]) -> None:
        """By add_dot4, or in the two steps of the drawing or, where not even two products fit, of halves."""
        a, b = op.operands[:2]
        least, greatest = range_of(b)
        unsigned = least >= 0
        if self.context.dots_in_two_steps and not unsigned and 2 * 255 * max(-least, greatest) > LARGEST_HALF:
            self._dot_of_halves(op, sums)
            return
        at_hand = (b, None, self.columns[0]) in self.memo  # else they come last: nothing waits for them
        columns = [] if unsigned else [self._column_sum(b, column) for column in self.columns]
        if at_hand:
            self._add_to_rows(sums, columns)
        if self.context.dots_in_two_steps:
            self._dot_in_halves(op, sums)
        else:
            self._dot_in_words(a, b, sums)
        if not at_hand:
            self._add_to_rows(sums, columns)

    def _dot_in_words(self, a: Value, b: Value, sums: list[list[str]]) -> None:
        """By the instruction that adds four products to a word."""
        unsigned = range_of(b)[0] >= 0
        with self._words_of(a.type.shape[1]) as steps:
            words = self._left_words(a, steps, flipped=not unsigned)
            for number, k in enumerate(steps):
                right = [self._quads(b, k, column) for column in self.columns]
                for of_row, total_of_row in zip(words, sums):
                    left = self.constant("bytes", f"(bytes)ivec_splat({of_row[number]})", "left")
                    for total, factor in zip(total_of_row, right):
                        pair = f"{factor}, {left}" if unsigned else f"{left}, {factor}"
                        self.context.line(f"{total} = add_dot4({total}, {pair});")

    def _add_to_rows(self, sums: list[list[str]], columns: list[str]) -> None:
        for of_row in sums:
            for total, column in zip(of_row, columns):
                self.context.line(f"{total} += {column};")

    def _left_words(self, a: Value, steps: list[Term], flipped: bool) -> list[list[str]]:
        """C for the words of the block's rows, with each byte's sign bit flipped or not."""
        if (
            flipped
            and not (self.has_panel and self.context.lanes == 16)
            and (in_memory := self._rewritten(a, steps, "flip_bytes", "flipped"))
        ):
            return in_memory[0]
        flip = " ^ 0x80808080" if flipped else ""
        return [[f"{self._four(a, row, k)}{flip}" for k in steps] for row in self.rows]

    def _dot_in_halves(self, op: Op, sums: list[list[str]]) -> None:
        """By bytes of a small range. Halves of words add up products as long as they can hold any sum of them."""
        a, b, initial = op.operands[:3]
        least, greatest = range_of(b)
        unsigned = least >= 0
        in_a_loop = a.type.shape[1] > LONGEST_RUN
        names, most = self.halves.pop(initial) if initial in self.halves else (self._undefined("halves"), 0)
        if in_a_loop and most:
            most = self._add_halves(names, sums)
        largest = 2 * 128 * greatest if unsigned else 2 * 255 * max(-least, greatest)  # what two products may come to
        with self._words_of(a.type.shape[1]) as steps:
            words = self._left_words(a, steps, flipped=not unsigned)
            for number, k in enumerate(steps):
                if most + largest > LARGEST_HALF:
                    most = self._add_halves(names, sums)
                right = [self._quads(b, k, column) for column in self.columns]
                form = "{0} = add_dot2_of_bytes({0}, {1}, {2});" if most else "{0} = dot2_of_bytes({1}, {2});"
                for of_row, names_of_row in zip(words, names):
                    left = self.constant("bytes", f"(bytes)ivec_splat({of_row[number]})", "left")
                    for name, factor in zip(names_of_row, right):
                        self.context.line(form.format(name, *((factor, left) if unsigned else (left, factor))))
                most += largest
            if in_a_loop:
                most = self._add_halves(names, sums)
        following = [user for user in op.result.uses if user.name == "tt.dot" and user.operands[2] is op.result]
        if not in_a_loop and len(op.result.uses) == len(following) == 1:
            self.halves[op.result] = names, most  # goes on from here
        elif not in_a_loop:
            self._add_halves(names, sums)

    def _add_halves(self, names: list[list[str]], sums: list[list[str]]) -> int:
        """Halves into the sums; returns what they come to from now on."""
        for of_row, totals in zip(names, sums):
            for name, total in zip(of_row, totals):
                self.context.line(f"{total} = add_halves({total}, {name});")
        return 0

    def _dot_of_halves(self, op: Op, sums: list[list[str]]) -> None:
        """By signed bytes, which become halves, as those of the left operand do."""
        a, b = op.operands[:2]
        with self._words_of(a.type.shape[1]) as steps:
            in_memory = self._rewritten(a, steps, "widen_bytes", "even", "odd") if len(steps) % 4 == 0 else None
            for number, k in enumerate(steps):
                quads = [self._quads(b, k, column) for column in self.columns]
                for part, parity in enumerate(("even", "odd")):
                    right = [self.constant("halves", f"{parity}_bytes({quad})", parity) for quad in quads]
                    for r, (row, of_row) in enumerate(zip(self.rows, sums)):
                        if in_memory:
                            text = f"(halves)ivec_splat({in_memory[part][r][number]})"
                        else:
                            text = f"{parity}_bytes((bytes)ivec_splat({self._four(a, row, k)}))"
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
        run = self._turns_ahead(a.op.operands[0]) if steps[0].text == "0" and not self.has_panel else None
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

    def _column_sum(self, b: Value, column: Term) -> str:
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
            self.prefetch(address)  # for every block of rows: it costs little: 32 rows of 4 bits take 13 % less time
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
