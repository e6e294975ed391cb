"""tl.dot as register tiles.

A tile acc[M, N] += a[M, K] b[K, N] is cut into blocks of ROWS x COLUMNS vectors that stay in registers while k runs:

    for each block:   acc vectors <- memory                       a: one float, broadcast
        for k:        b vectors   <- row k of b                   b: COLUMNS vectors of LANES floats
                      acc[r][c] += a[r][k] * b[c]                 one fused multiply-add each
                      acc vectors -> memory

Every output element adds its K terms one by one in ascending k, whatever the block: a row's result does not depend on
how many rows are computed with it. On x86 an FMA has a latency of 4 cycles and two start per cycle, so 8 accumulators
or more are needed; 16 of the 32 registers leave room for b and for the broadcast.

Operands are read where they are when that is cheap: `a` if it is a plain load of rows, by one pointer per row; `b` if
it is a plain load of contiguous rows and few blocks use it (decode: a GEMV at memory speed). Otherwise the operand is
evaluated into a local array of floats first, which pays when many blocks of rows use it (prefill).

Where products of bf16 are made in pairs (pairs.py), k counts pairs, and what is said of floats holds for pairs.

Bytes are multiplied four at a time (quads.py) where `b` lies packed for that in memory; `a` goes into an array first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from .analysis import is_zero, stride
from .arrays import as_array, materialise
from .carried import in_next_turn
from .context import Array, Context, NotATile
from .elements import FUSED, SMALL_FLOATS, from_memory, rounded, value_type
from .live_rows import columns_let_through, number_of_live_rows, rows_let_through
from .loops import ZERO, Term, evaluated, linear
from .pairs import Products, copy_of, products
from .quads import Quads, flips
from .ttir import Op, Type, Value, reachable
from .vectors import PREFETCH_BYTES, Place, Vectors, has_vectors, is_splat, plus

# The vector loads of prelude.h, by the element type in memory.
_VECTOR_LOADS = {"f32": "vec_from_float", "bf16": "vec_from_bf16", "f16": "vec_from_f16", "i8": "vec_from_int8_t"}
_WIDENING = ("arith.extf", "arith.sitofp")
# Up to so many blocks of rows convert `b` again rather than share an array. At 2 blocks (M = 16, K = N = 2048, bf16)
# the array costs a third: 62 against 95 GFLOP/s on one core.
FEW_BLOCKS = 4


def blocks(context: Context, op: Op) -> None:
    """2-D products of floats at least a vector wide."""
    a, b = op.operands[:2]
    if len(op.result.type.shape) != 2 or op.result.type.shape[1] < context.lanes:
        raise NotATile
    if a.type.element not in ("f32", *SMALL_FLOATS) or op.result.type.element == "f64":
        raise NotATile
    by = products(context, op)
    in_place = _VectorRows.of(context, b, by)
    converts = in_place is not None and by.terms == 1 and in_place.element_type != "f32"
    block = _block_size(context, op.result.type, converts)
    if op.result.type.shape[0] > FEW_BLOCKS * block[0]:
        in_place, block = None, _block_size(context, op.result.type, converts=False)
    left = _RowPointers.of(context, a, by) or _LocalRows(context, a, by, 1)
    right = in_place or _LocalRows(context, b, by, 0)
    target = context.destinations.get(op.result) or context.array(op.result.type, op.result.name)
    write = functools.partial(_emit_blocks, context, op, left, right, target, block)
    if not (
        context.wanted.register_tiles
        and context.attempt(lambda: write(op.operands[2]), "what is added to has no vectors")
    ):
        _accumulator(context, op, target)
        write(None)
    context.storage[op.result] = Array(target)
    _round(context, op.result.type, target)


def quads(context: Context, op: Op) -> None:
    """2-D products of bytes whose right operand is packed in fours. Blocks of 4 x 4 vectors: 8 loads for 16 products.
    (Attention of a prompt of 512 in int8, AVX-512: 2.6 ms a layer, with blocks of 8 x 2 2.8.)"""
    (a, b, initial), type_ = op.operands[:3], op.result.type
    if (a.type.element, b.type.element, type_.element) != ("i8", "i8", "i32") or not context.vectors:
        raise NotATile
    if len(type_.shape) != 2 or type_.shape[1] < context.lanes or a.type.shape[1] % 4:
        raise NotATile("not a vector wide, or not fours of bytes")
    m, n = type_.shape
    vectors = min(n // context.lanes, 4)
    rows = min(m, (16 if context.lanes == 16 else 8) // vectors)
    left, target = _bytes_of(context, a, flips(a, b)), context.declare(op.result)
    row, column = context.name("m"), context.name("n")
    live = number_of_live_rows(context, op.result) or m
    moved = _moved_in_next_turn(context, b) if m <= rows else None  # many rows wait for arithmetic
    with context.braces(f"for (int {column} = 0; {column} < {n}; {column} += {vectors * context.lanes})"):
        places = [plus(row if m > rows else "0", r) for r in range(rows)]
        columns = [plus(column if n > vectors * context.lanes else "0", v * context.lanes) for v in range(vectors)]
        block = _QuadsOfTile(context, places, columns, read_once=False)
        if flips(a, b):
            block.sums_of_columns(b)
        block.moved = moved
        with block.scope(f"for (int {row} = 0; {row} < {live}; {row} += {rows})"):
            sums = block.variables(initial, op.result.name)
            block.dot_of_bytes(a, b, sums, lambda r, k: f"four_bytes({left} + {linear(a.type.shape, (r, k)).text})")
            for place in block.places:
                r, v = place.register  # type: ignore[misc]
                context.line(f"*(ivec *)({target} + {linear((m, n), (place.row, place.column)).text}) = {sums[r][v]};")


class _QuadsOfTile(Quads):
    """Bytes of a tile that several blocks of rows multiply."""

    # One of 64 has no loop: gcc then keeps the right operand for all blocks of rows, and the sums move to and from
    # memory instead. (The same prompt: 3.2 ms, with 16 2.9.)
    longest_run = 16
    moved: str | None = None  # C for how far the right operand of the loop's next turn lies from this one's

    def prefetch(self, address: str) -> None:
        """(48 decodes of 4096 int8 keys, 9 heads of 64: 6.3 ms a layer; into the second cache 6.8, not at all 9.5.)"""
        if self.moved:
            self.context.line(f"__builtin_prefetch({address} + {self.moved}, 0, 3);")


def _moved_in_next_turn(context: Context, b: Value) -> str | None:
    """How far the right operand's bytes will have moved in the next turn of the loop around, if that is known."""
    if b.op is None or b.op.name != "tt.load" or not context.wanted.prefetch:
        return None
    pointers = b.op.operands[0]
    here = _address(context, pointers, "0")
    there = in_next_turn(context, pointers, lambda: _address(context, pointers, "0"))
    return there and f"({there} - {here})"


def _bytes_of(context: Context, value: Value, flipped: bool) -> str:
    """The name of an array of bytes, with their signs flipped if wanted, from which words are broadcast by loads."""
    name = as_array(context, value)
    if flipped:
        source, name = name, context.array(value.type, "flipped")
        context.line(f"flip_bytes((int32_t *){name}, {source}, {value.type.size // 4});")
    context.line(f"IN_MEMORY({name});")
    return name


def _round(context: Context, type_: Type, target: str) -> None:
    """Sums are kept in floats; a result of a smaller type is rounded once, at the end."""
    if type_.element in SMALL_FLOATS:
        element = rounded(type_.element, f"{target}[i]")
        context.line(f"for (int i = 0; i < {type_.size}; i++) {target}[i] = {element};")


def _block_size(context: Context, type_: Type, converts: bool) -> tuple[int, int]:
    """(rows, vectors) of a register block for an accumulator of this type: powers of two, as all extents are.

    Many rows that convert their vectors of `b` take one vector at a time: each is converted for as many rows as can be.
    (Attention of a prompt of 512, bf16 keys: 3.1 ms a layer, with 8 x 2 blocks 3.4; Intel, one core.)
    """
    m, n = type_.shape
    registers = 16 if context.lanes == 16 else 8  # AVX-512 has 32 vector registers, its elders 16
    if converts and m >= registers:
        return registers, 1
    vectors = min(n // context.lanes, 2 if m >= 8 else 4 if m >= 4 else 8, registers)
    return min(m, max(1, registers // vectors)), vectors


def _accumulator(context: Context, op: Op, name: str) -> None:
    """The initial accumulator in the array that will receive the result."""
    if context.storage.get(op.operands[2]) != Array(name):
        materialise(context, op.operands[2], into=name)


def _local_array(context: Context, value: Value, by: Products, axis: int) -> str:
    return as_array(context, value) if by.terms == 1 else copy_of(context, value, by, axis)


class _LocalRows:
    """An operand in a local array of floats or pairs, row-major."""

    row_count = column_mask = None  # all

    def __init__(self, context: Context, value: Value, by: Products, axis: int):
        self.name, self.by = _local_array(context, value, by, axis), by
        self.width = value.type.shape[1] // (by.terms if axis else 1)

    def prepare(self, context: Context, rows: list[str]) -> None:
        if rows:  # one pointer: every other row is at a constant distance from it
            self.first = context.name("rows")
            start = f"{self.name} + (long){rows[0]} * {self.width}"
            context.line(f"const {value_type(self.by.element)} *const {self.first} = {start};")

    def element(self, row: int, k: str) -> str:
        return f"{self.first}[{row * self.width} + {k}]"

    def vector(self, k: str, column: str, some: str | None = None) -> str:
        load = "vec_from_float" if self.by.terms == 1 else "*(const ivec *)"
        return f"{load}({self.name} + {k} * {self.width} + {column})"

    def prefetch(self, k: str, column: str) -> str | None:
        return None


class _RowPointers:
    """`a`, read where it is: rows contiguous along k, behind one pointer each."""

    def __init__(self, load: Op, by: Products):
        self.pointers, self.element_type, self.by = load.operands[0], load.result.type.element, by

    @classmethod
    def of(cls, context: Context, value: Value, by: Products) -> _RowPointers | None:
        load = _plain_load(context, value)
        if load is None or load.result.type.element not in ("f32", "bf16"):
            return None
        contiguous = value.type.shape[1] == 1 or stride(load.operands[0], 1, context.origins) == 1
        return cls(load, by) if contiguous else None

    def prepare(self, context: Context, rows: list[str]) -> None:
        self.rows = [_address(context, self.pointers, row) for row in rows]

    def element(self, row: int, k: str) -> str:
        if self.by.terms == 2:
            return f"four_bytes({self.rows[row]} + 2 * {k})"
        return from_memory(self.element_type, f"{self.rows[row]}[{k}]")


class _VectorRows:
    """`b`, read where it is: rows contiguous along n, converted to floats in registers, or two of them made pairs.

    A mask may exclude whole rows and, in favour of zeros, whole columns. Neither those after the last row that it lets
    through nor such columns are multiplied, or fetched in advance.
    """

    def __init__(self, context: Context, load: Op, by: Products, row_masks: list[Value], column_mask: Value | None):
        self.context, self.load, self.element_type, self.by = context, load, load.result.type.element, by
        self.row_masks, self.column_mask = row_masks, column_mask
        self.pointers, self.other = load.operands[0], load.operands[2:]
        self.step = stride(self.pointers, 0, context.origins) if load.result.type.shape[0] > 1 else 0
        count = rows_let_through(context, load)
        self.row_count = f"({count} + 1) / 2" if count and by.terms == 2 else count
        self.next_counts: list[str | None] = [None, None]  # of rows and columns
        wanted = context.wanted.prefetch
        self.next = in_next_turn(context, self.pointers, self._next) if wanted else None

    @classmethod
    def of(cls, context: Context, value: Value, by: Products) -> _VectorRows | None:
        """`value`, if it is a load that can be read so."""
        load = _plain_load(context, value, masked=True)
        if load is None or load.result.type.element not in (_VECTOR_LOADS if by.terms == 1 else ("bf16",)):
            return None
        masks = _masks(load)
        rows = [mask for mask in masks if is_splat(mask)]
        columns = [_of_columns(mask) for mask in masks if not is_splat(mask)]
        if len(columns) > 1 or not all(mask and has_vectors(context, mask) for mask in columns):
            return None
        if not all(map(is_zero if columns else is_splat, load.operands[2:])):
            return None
        contiguous = stride(load.operands[0], 1, context.origins) == 1
        return cls(context, load, by, rows, columns[0] if columns else None) if contiguous else None

    def prepare(self, context: Context, rows: list[str]) -> None:
        self.base = self._first()

    def _first(self) -> str:
        return _address(self.context, self.pointers, "0")

    def _next(self) -> str:
        columns = columns_let_through(self.context, self.column_mask) if self.column_mask else None
        self.next_counts = [rows_let_through(self.context, self.load), columns]
        return self._first()

    def _row(self, k: str) -> str:
        if self.step is not None:
            return f"{self.base} + {self.step} * {k}"
        return _address(self.context, self.pointers, k)

    def vector(self, k: str, column: str, some: str | None = None) -> str:
        """some: the columns that there are, if not all of them."""
        if self.by.terms == 1:
            return self._one_row(k, column, some, "vec")
        return f"pairs_of({', '.join(self._one_row(row, column, some, 'half') for row in self._rows(k))})"

    def _rows(self, k: str) -> list[str]:
        """Which rows the terms of step k are in."""
        return [k] if self.by.terms == 1 else [f"(2 * {k})", f"(2 * {k} + 1)"]

    def _one_row(self, k: str, column: str, some: str | None, kind: str) -> str:
        place, load = f"{self._row(k)} + {column}", _VECTOR_LOADS[self.element_type].replace("vec", kind)
        text = f"{load.replace('from', 'from_some')}({place}, {some})" if some else f"{load}({place})"
        if not self.row_masks:
            return text
        masks = " && ".join(_of_row(self.context, value, k) for value in self.row_masks)
        other = [_of_row(self.context, value, k) for value in self.other]
        return f"{masks} ? {text} : {kind}_splat({other[0] if other else '0'})"

    def prefetch(self, k: str, column: str) -> str | None:
        if self.step is None or not self.context.wanted.prefetch:
            return None
        return " ".join(self._prefetch(row, column) for row in self._rows(k))

    def _prefetch(self, k: str, column: str) -> str:
        # The next turn's tile may lie elsewhere (a KV cache in blocks). It is fetched into the second cache: the first
        # has few places for lines under way. (Reading tiles of 8 KB in disorder: 15 GB/s instead of 10. Decode, 8
        # sequences of 512 bf16 keys: 276 us a layer instead of 357.)
        if self.next:
            counts = [f"{n} < {count}" for n, count in zip((k, column), self.next_counts) if count]
            needed = f"if ({' && '.join(counts)}) " if counts else ""
            return f"{needed}__builtin_prefetch({self.next} + {self.step} * {k} + {column}, 0, 2);"
        return f"__builtin_prefetch((const char *)({self._row(k)} + {column}) + {PREFETCH_BYTES});"


def _masks(load: Op) -> list[Value]:
    """The masks that must all hold for an element to be read."""

    def parts(mask: Value) -> list[Value]:
        return mask.op.operands if mask.op is not None and mask.op.name == "arith.andi" else []

    return [part for mask in load.operands[1:2] for part in reachable(mask, parts) if not parts(part)]


def _of_columns(mask: Value) -> Value | None:
    """The mask as [1, N], if it is the same in all rows."""
    if mask.op is not None and mask.op.name == "tt.broadcast" and mask.op.operands[0].type.shape[0] == 1:
        return mask.op.operands[0]
    return mask if mask.type.shape[0] == 1 else None


def _plain_load(context: Context, value: Value, masked: bool = False) -> Op | None:
    """The load behind `value`, if it is lazy, unmasked unless `masked`, and only widened since."""
    if context.unit.target.bounds is not None:
        return None
    while value.op is not None and value.op.name in _WIDENING and value not in context.storage:
        value = value.op.operands[0]
    op = value.op
    if op is None or op.name != "tt.load" or value in context.storage or (len(op.operands) > 1 and not masked):
        return None
    return None if context.holds_addresses(op.operands[0]) else op


def _address(context: Context, pointers: Value, row: str) -> str:
    """Of the first element in a row."""
    return evaluated(context, lambda nest: nest.address(pointers, (Term(row, 0), ZERO)))


def _of_row(context: Context, value: Value, row: str) -> str:
    return evaluated(context, lambda nest: nest.evaluate(value, (Term(row, 0), ZERO)))


def _emit_blocks(  # type: ignore[no-untyped-def]
    context: Context, op: Op, left, right, target: str, block: tuple[int, int], initial: Value | None
) -> None:
    """`initial`: what the sums begin with, evaluated in registers; None: what lies in the target."""
    by: Products = right.by
    (m, n), k_extent = op.result.type.shape, op.operands[0].type.shape[1] // by.terms
    rows, vectors = block
    row, column, k = context.name("m"), context.name("n"), context.name("k")
    with (
        context.braces(f"for (long {row} = 0; {row} < {m}; {row} += {rows})"),
        context.braces(f"for (long {column} = 0; {column} < {n}; {column} += {vectors * context.lanes})"),
    ):
        row_names = [f"({row} + {r})" for r in range(rows)] if m > rows else [str(r) for r in range(rows)]
        columns = [f"{column} + {v * context.lanes}" for v in range(vectors)]
        left.prepare(context, row_names)
        right.prepare(context, [])
        sums = [[f"sum{r}x{v}" for v in range(vectors)] for r in range(rows)]
        places = [[f"{target} + ({name}) * {n} + {col}" for col in columns] for name in row_names]
        begin = Vectors(context, [Term(name, 0) for name in row_names], [Term(f"({col})", 0) for col in columns], False)
        for place in begin.places:
            r, v = place.register  # type: ignore[misc]
            first = begin.vector(initial, place) if initial else f"vec_from_float({places[r][v]})"
            context.line(f"vec {sums[r][v]} = {first};")
        turns = f"for (long {k} = 0; {k} < {right.row_count or k_extent}; {k}++)"
        if right.column_mask is None:
            with context.braces(turns):
                _emit_step(context, left, right, sums, columns, k)
        else:
            some = [begin.vector(right.column_mask, Place(ZERO, Term(f"({col})", 0))) for col in columns]
            with context.braces(f"if (ivec_all({' & '.join(some)})) {turns}"):
                _emit_step(context, left, right, sums, columns, k)
            there_are_some = f"if (ivec_any({' | '.join(some)})) " if context.wanted.live_rows else ""
            with context.braces(f"else {there_are_some}{turns}"):
                _emit_step(context, left, right, sums, columns, k, some)
        for r in range(rows):
            for v in range(vectors):
                context.line(f"*(vec *)({places[r][v]}) = {sums[r][v]};")


def _emit_step(  # type: ignore[no-untyped-def]
    context: Context, left, right, sums: list[list[str]], columns: list[str], k: str, some: Sequence[str] = ()
) -> None:
    """One k: a rank-one update of the register block; one pair of k: of rank two. some: masks, for the columns that
    there are of each vector."""
    by: Products = right.by
    elements_per_line = 64 // 2
    for v, column in enumerate(columns):
        if v * context.lanes % elements_per_line == 0 and (line := right.prefetch(k, column)):
            context.line(line)
        context.line(f"const {by.kind} rhs{v} = {right.vector(k, column, *some[v : v + 1])};")
    for r, accumulators in enumerate(sums):
        context.line(f"const {by.kind} lhs{r} = {by.kind}_splat({left.element(r, k)});")
        for v, name in enumerate(accumulators):
            context.line(f"{name} = {by.text.format(sum=name, left=f'lhs{r}', right=f'rhs{v}')};")


def plain(context: Context, op: Op) -> None:
    """Any shape and type, batched ones too: three loops, the innermost along n."""
    a, b = op.operands[:2]
    *batch, m, n = op.result.type.shape
    k_extent, element = a.type.shape[-1], op.result.type.element
    if a.type.element == "i1" or value_type(a.type.element) != value_type(b.type.element):
        raise context.unsupported(op, f"of {a.type.element} and {b.type.element}")
    by = products(context, op)
    left, right, k_extent = _local_array(context, a, by, 1), _local_array(context, b, by, 0), k_extent // by.terms
    target = context.destinations.get(op.result) or context.array(op.result.type, op.result.name)
    _accumulator(context, op, target)
    context.storage[op.result] = Array(target)
    kind = value_type(element) if by.terms == 1 else "int32_t"
    batches = batch[0] if batch else 1
    product = "{t} + x * y" if element.startswith("i") else f"{FUSED.get(element, 'fusedf')}(x, y, {{t}})"
    if by.terms == 2:
        product = "add_dot2_to_one({t}, x, y)"
    place = f"{target}[(z * {m} + m) * {n} + n]"
    with context.braces(
        f"for (int z = 0; z < {batches}; z++) for (int m = 0; m < {m}; m++) for (int k = 0; k < {k_extent}; k++)"
    ):
        context.line(f"const {kind} x = {left}[(z * {m} + m) * {k_extent} + k];")
        context.line("#pragma omp simd")
        with context.braces(f"for (int n = 0; n < {n}; n++)"):
            context.line(f"const {kind} y = {right}[(z * {k_extent} + k) * {n} + n];")
            context.line(f"{place} = {product.format(t=place)};")
    _round(context, op.result.type, target)
