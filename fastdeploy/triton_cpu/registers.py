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

Bytes are multiplied four at a time: quads.py. Where a tile has several blocks of rows, what its columns need is
computed once for all of them: panels.py.

The arithmetic is that of the general path (control_flow.py, dot.py), bit by bit: a sum takes its terms in ascending k,
one FMA each, and the same additions are contracted. Loops that do not fit are left to that path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import takewhile
from typing import NamedTuple

from .analysis import is_lazy, stride
from .carried import assign, carry, for_header, uniform_step
from .context import Array, Context, NotATile
from .endings import Ending, ending_of
from .live_rows import number_of_live_rows
from .loops import ZERO, Term, linear
from .pairs import Products, copy_of, products
from .panels import Panel, Slot, panel_pays, rows_of_columns
from .quads import LONGEST_RUN, Quads
from .ranges import range_of
from .ttir import Op, Value
from .turns import mask_of_rows, turns_taken, write_scalars
from .vectors import VECTOR_TYPES, Place, plus, prefetched

MOST_VECTORS = 8  # of a row in a block


class _Sums(NamedTuple):
    """A tile that the loop carries."""

    argument: Value
    initial: Value
    new: Value
    result: Value


class _Chain(NamedTuple):
    """A loop, and one that goes on with its sums in some rows (turns.py) if there is such a one."""

    first: Op
    tiles: list[_Sums]
    between: list[Op]  # what is computed before the second loop
    second: Op | None
    last: list[_Sums]  # the last loop's tiles

    @classmethod
    def of(cls, context: Context, loop: Op) -> _Chain:
        """The chain that begins with `loop`. Raises NotATile where that is none for registers."""
        tiles, following = _carried_tiles(loop), loop.block.ops[loop.block.ops.index(loop) + 1 :]
        between = list(takewhile(is_lazy, following))
        after = following[len(between)] if len(between) < len(following) else None
        used = [result for result in loop.results if result.uses]
        if after is not None and after.name == "scf.for" and all(result.uses == [after] for result in used):
            try:
                last = _carried_tiles(after)
            except NotATile:
                last = []
            if last and [tile.initial for tile in last] == used and _mask(context, after, last) is not None:
                return cls(loop, tiles, between, after, last)
        return cls(loop, tiles, [], None, tiles)


def loop_to_memory(context: Context, loop: Op) -> None:
    """Writes an scf.for in registers, and the store of its sums."""
    if not (context.wanted.register_tiles and context.wanted.direct_stores and context.unit.plan.disjoint):
        raise NotATile
    chain = _Chain.of(context, loop)
    ending = ending_of(chain.second or loop)
    if ending is None:
        raise NotATile
    _emit(context, chain, ending)
    context.unit.plan.apart.update(ending.apart)


def loop(context: Context, loop: Op) -> None:
    """Writes an scf.for in registers; its sums go into arrays at the end."""
    if not context.wanted.register_tiles:
        raise NotATile
    _emit(context, _Chain.of(context, loop), None)


def _emit(context: Context, chain: _Chain, ending: Ending | None) -> None:
    """The loops and, where it is given, what follows up to the store of the sums."""
    before, after = (ending.before, ending.after) if ending else ([], [])
    for op in (*chain.between, *before):
        context.op(op)
    context.written |= {*chain.between, *before, *after, *([chain.second] if chain.second else [])}
    loop, tiles = chain.first, chain.tiles
    (m, n), dots = tiles[0].argument.type.shape, [op for op in loop.regions[0].ops if op.name == "tt.dot"]
    pays = panel_pays(context, loop) and _mask(context, loop, tiles) is None
    rows, vectors = _block_size(context, m, n, dots, tiles, pays)
    arrays = [] if ending else [context.declare(tile.result) for tile in chain.last]
    row, column = context.name("m"), context.name("n")
    width = vectors * context.lanes
    counts = {number_of_live_rows(context, tile.result) for tile in chain.last}
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
            block = _Block(context, here, columns, f"{row} == 0" if m > rows else None)
            if ending and m > rows:
                block.fetch_to_write(ending.store)
            _emit_block(block, loop, tiles, panel)
            with panel.in_last_run(block.sums(tiles)) if panel else nullcontext():
                if chain.second:
                    _emit_block(block, chain.second, chain.last, None)
                _finish(block, chain.last, ending, arrays)


def _finish(block: _Block, tiles: list[_Sums], ending: Ending | None, arrays: list[str]) -> None:
    """The sums to memory, by the kernel's own store, or into arrays."""
    if ending is None:
        _to_arrays(block, tiles, arrays)
    else:
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
    """A filled panel for a loop in which one pays, if it can be."""
    dots, others = [op for op in loop.regions[0].ops if op.name == "tt.dot"], _others(loop, tiles)
    if any(dot.operands[1].type.shape[0] > LONGEST_RUN for dot in dots):
        return None
    if loop.text.startswith("scf.for unsigned") or any(context.holds_addresses(first) for _, first, _ in others):
        return None
    block = _Block(context, [ZERO], columns, None)
    kept = -(-m // rows) * rows * len(columns) * len(tiles)
    return Panel(context, loop, others, block.slots(loop), kept)


def _emit_block(block: _Block, loop: Op, tiles: list[_Sums], panel: Panel | None) -> None:
    """The kernel's whole loop for one block of registers, or a run of its turns."""
    context, others = block.context, _others(loop, tiles)
    for tile in tiles:
        block.registers[tile.argument] = block.variables(tile.initial, tile.argument.name)
        block.registers[tile.result] = block.registers[tile.argument]
    if panel:
        panel.resume(block.sums(tiles))
    mask = _mask(context, loop, tiles)
    block.has_panel, block.skips = panel is not None, mask is not None
    if mask is not None:
        with turns_taken(block, loop, others, mask):
            _emit_turn(block, loop, tiles)
        return
    carried = panel.again() if panel else [carry(context, *other) for other in others]
    block.start = len(context.lines)
    with block.scope(panel.header() if panel else for_header(context, loop)):
        if panel:
            block.memo |= panel.vectors()
        write_scalars(context, loop)
        _emit_turn(block, loop, tiles)
        assign(context, carried, [new for *_, new in others])


def _mask(context: Context, loop: Op, tiles: list[_Sums]) -> Value | None:
    """What says in which rows a turn changes the sums, see `mask_of_rows`."""
    return mask_of_rows(context, loop, [(tile.argument, tile.new) for tile in tiles], _others(loop, tiles))


def _emit_turn(block: _Block, loop: Op, tiles: list[_Sums]) -> None:
    """The products of a turn of the kernel's loop, and the new sums."""
    for op in loop.regions[0].ops:
        if op.name == "tt.dot":
            block.dot(op)
    for place in block.places:
        new = [block.vector(tile.new, place) for tile in tiles]
        if len(tiles) > 1:  # one may be another's old sums
            kinds = [VECTOR_TYPES[tile.new.type.element] for tile in tiles]
            new = [block.constant(kind, text, "next") for kind, text in zip(kinds, new)]
        for tile, text in zip(tiles, new):
            block.context.line(f"{block.vector(tile.argument, place)} = {text};")


def _to_arrays(block: _Block, tiles: list[_Sums], arrays: list[str]) -> None:
    for tile, name in zip(tiles, arrays):
        for place in block.places:
            where = linear(tile.result.type.shape, (place.row, place.column)).text
            kind = VECTOR_TYPES[tile.result.type.element]
            block.context.line(f"*({kind} *)({name} + {where}) = {block.vector(tile.argument, place)};")


class _Block(Quads):
    """Writes the products of a loop for ROWS x VECTORS places, into variables."""

    def __init__(self, context: Context, rows: list[Term], columns: list[Term], first: str | None):
        """first: C for whether this is the first block of rows; None if it is the only one."""
        super().__init__(context, rows, columns, read_once=first is None)
        self.first, self.ahead = first, list[str]()

    @contextmanager
    def scope(self, opening: str) -> Iterator[None]:
        outer, self.ahead = self.ahead, []
        with super().scope(opening):
            yield
            if self.ahead:
                with self.context.braces(f"if ({self.first})"):
                    self.context.line(*self.ahead)
        self.ahead = outer

    def prefetch(self, address: str) -> None:
        """By the first block of rows, at the end of a turn: the others find the same in a cache. (60 rows of Q4_0, K =
        1024, on a core: 790 GOP/s; by each block, before each load 720.)"""
        if self.first is None:
            super().prefetch(address)
        elif self.context.wanted.prefetch:
            self.ahead.append(prefetched(address))

    def fetch_to_write(self, store: Op) -> None:
        """The lines that the block's sums go to. While they come from memory it computes; stores would have to wait.
        (480 rows, Q4_0, K = 1024, on a core: N = 6144 680 GOP/s instead of 550, N = 1024 715 and 710.)"""
        for place in self.places if self.context.wanted.prefetch else []:
            if self.columns.index(place.column) * 4 * self.context.lanes % 64 == 0:
                address = self.address(store.operands[0], (place.row, place.column))
                self.context.line(f"__builtin_prefetch({address}, 1);")

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
                    found.append(Slot((b, None, column), "ivec", partial(self.sum_of_column, b, column)))
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
            self.dot_of_bytes(a, b, sums, op=op)
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
