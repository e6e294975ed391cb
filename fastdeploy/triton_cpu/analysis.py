"""Decides which tensors of a kernel live in memory and which are recomputed where they are used.

A tensor value is lazy or stored:

* lazy: an expression of its index, evaluated inside the loops of its users. So `tl.store(o, tl.load(x) * 2)` becomes
  one loop without temporaries.
* stored: computed once, where the kernel's source does, into a local array.

An expensive value (its expression holds a load or a division, say, or is several operations for each row of a
tile) is stored if several loop nests, or one inside another block, would evaluate it. A load is stored, too, if its
memory is written before its last use.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import TypeVar

from .operations import Kind, operation
from .ttir import Block, Function, Op, Value, reachable, walk


def is_lazy(op: Op) -> bool:
    return operation(op).lazy


MANY = 48  # cheap operations are together as expensive as a division or a load
SEVERAL = 4  # cheap operations are together as expensive as a load, where each row's are one by one
Apart = set[tuple[Value, Value, bool]]  # arguments: the one read, the one written, may both be the same address
_Root = tuple[Op, tuple[int, ...]]  # a user, and the shape it takes: the end of a loop has a nest for each shape


class StoragePlan:
    """`value in plan` says whether a lazy operation's tensor is stored when it is reached.

    disjoint: is the function's memory that comes by different arguments taken not to overlap?
    apart: where that was decisive.
    """

    def __init__(self, function: Function, disjoint: bool):
        self.disjoint = disjoint
        self.apart: Apart = set()
        self._stored: set[Value] = set()
        self._roots: dict[Value, set[_Root]] = {}  # the loop nests that evaluate a lazy value
        self._escapes: dict[Value, bool] = {}  # evaluated from an inner block, so perhaps many times
        self._analyse(function.body)

    def __contains__(self, value: Value) -> bool:
        return value in self._stored

    def _analyse(self, block: Block) -> None:
        for position in reversed(range(len(block.ops))):
            op = block.ops[position]
            for region in op.regions:
                self._analyse(region)
            for value in op.results:
                if value.type.is_tensor and is_lazy(op):
                    self._find_roots(value)
                    if op.name != "arith.constant" and self._must_store(value, position):
                        self._stored.add(value)

    def _find_roots(self, value: Value) -> None:
        roots: set[_Root] = set()
        escapes = False
        for user in value.uses:
            escapes |= user.block is not value.block
            if not is_lazy(user) or not user.results[0].type.is_tensor:
                roots.add((user, value.type.shape))
            for result in user.results if is_lazy(user) else []:
                if result in self._stored or not result.type.is_tensor:
                    roots.add((user, value.type.shape))
                else:
                    roots |= self._roots[result]
                    escapes |= self._escapes[result]
            if scatters(user):
                escapes |= is_expensive(value, self)
        self._roots[value], self._escapes[value] = roots, escapes

    def _must_store(self, value: Value, position: int) -> bool:
        if operation(value.op).kind is Kind.REPEATS:  # type: ignore[arg-type]
            return False  # a repeated one is bigger than what it repeats, which is stored in its stead
        if not is_expensive(value, self) and not self._takes_long_for_a_row(value):
            return False
        if self._escapes[value] or len(self._roots[value]) > 1:
            return True
        return value.op.name == "tt.load" and self._overwritten(value, position)  # type: ignore[union-attr]

    def _takes_long_for_a_row(self, value: Value) -> bool:
        """Is it a float for each row of a tile, made by several operations? Every nest of the tile would evaluate it
        before a row's columns. (Attention of a prompt of 512 in int8: 0.91 ms a layer, stored 0.84; AVX-512.)"""
        if value.type.element != "f32" or len(value.type.shape) != 1:
            return False
        if not any(user.name == "tt.expand_dims" and user.attribute("axis") == 1 for user in value.uses):
            return False
        parts = reachable(value, lambda part: part.op.operands if part.op is not None and is_lazy(part.op) else [])
        return sum(part.type.is_tensor and part.op is not None and is_lazy(part.op) for part in parts) >= SEVERAL

    def _overwritten(self, value: Value, position: int) -> bool:
        """Is memory written between a load and its only root, or does the root write the same tensor shifted?"""
        for op in value.block.ops[position + 1 :]:
            if any(root is op for root, _ in self._roots[value]):
                return op.name.startswith(("tt.store", "tt.atomic")) and (
                    any(rearranges(operand, {value}, self._stored) for operand in op.operands[1:])
                    or self._may_write(op, value.op.operands[0])  # type: ignore[union-attr]
                )
            if operation(op).writes:
                return True
        return False

    def _may_write(self, writer: Op, source: Value) -> bool:
        """May `writer` at one element change what is read from `source` for a later one?"""
        target, is_store = writer.operands[0], writer.name == "tt.store"
        alone = is_store and not _may_repeat(target)  # what an element writes is read for that element alone
        if source is target and alone:
            return False
        apart = must_be_apart(source, target, alone and _is_the_same_place(source, target))
        if not self.disjoint or apart is None:
            return True
        self.apart |= apart
        return False


def is_expensive(value: Value, plan: StoragePlan, cheap: set[Value] | None = None) -> bool:
    """Would evaluating `value` at a second place cost more than reading an array?

    cheap: values of this expression that are known not to be: it may use one many times.
    """
    cheap = set() if cheap is None else cheap
    op = value.op
    if op is None or value in cheap or value in plan or not value.type.is_tensor or not is_lazy(op):
        return False
    if len(cheap) >= MANY or (operation(op).expensive and not _is_by_a_power_of_two(op)):
        return True
    # What another block has made is stored there if it is expensive, because it escapes.
    if any(operand.block is value.block and is_expensive(operand, plan, cheap) for operand in op.operands):
        return True
    cheap.add(value)
    return False


def _is_by_a_power_of_two(op: Op) -> bool:
    """Is it a division or a remainder that takes a shift or a mask?"""
    if op.name not in ("arith.divsi", "arith.remsi", "arith.divui", "arith.remui"):
        return False
    by = splat_constant(op.operands[1])
    return by is not None and by > 0 and by & (by - 1) == 0


class LiveRows:
    """Answers, for one function, which rows of a tensor end up in memory."""

    def __init__(self) -> None:
        self._known: dict[Value, frozenset[Value]] = {}

    def conditions(self, value: Value) -> frozenset[Value]:
        """Masks [M], one element for each row of `value`: a row is of use only where all of them hold."""
        if value not in self._known:
            self._known[value] = frozenset()  # of a value that is reached again on its own way: a loop's
            uses = [self._of_use(user, value) for user in value.uses]
            self._known[value] = frozenset.intersection(*uses) if uses else frozenset()
        return self._known[value]

    def _of_use(self, user: Op, value: Value) -> frozenset[Value]:
        if user.name == "tt.store":
            return row_masks(user.operands[2]) if len(user.operands) > 2 else frozenset()
        if user.name in ("scf.for", "scf.yield"):
            return self._of_loop(user if user.name == "scf.for" else user.block.parent, value)
        keeps_rows = operation(user).kind not in (Kind.PERMUTES, Kind.SCATTERS, Kind.STANDS)
        if user.name in ("tt.expand_dims", "tt.reduce"):
            keeps_rows = user.attribute("axis") > 0
        if not keeps_rows or any(result.type.shape[:1] != value.type.shape[:1] for result in user.results):
            return frozenset()
        return frozenset.intersection(*map(self.conditions, user.results))

    def _of_loop(self, loop: Op | None, value: Value) -> frozenset[Value]:
        """Of a value that a loop begins or goes on with: what all results want that it may become a part of."""
        if loop is None or loop.name != "scf.for" or any(operation(op).writes for op in walk(loop.regions[0])):
            return frozenset()
        results = [result for result in loop.results if result.uses]
        if any(result.type.shape[:1] != value.type.shape[:1] for result in results):
            return frozenset()
        begun = [
            argument for argument, first in zip(loop.regions[0].arguments[1:], loop.operands[3:]) if first is value
        ]
        return frozenset.intersection(*map(self.conditions, (*results, *begun)))


def row_masks(mask: Value) -> frozenset[Value]:
    """The parts of a conjunction that are the same in a whole row, as masks [M]."""

    def parts(mask: Value) -> list[Value]:
        op = mask.op
        is_split = op is not None and (
            op.name == "arith.andi"
            or (op.name == "tt.broadcast" and op.operands[0].type.shape[1:] == (1,))
            or (op.name == "tt.expand_dims" and op.attribute("axis") == 1)
        )
        return op.operands if is_split else []  # type: ignore[union-attr]

    return frozenset(part for part in reachable(mask, parts) if len(part.type.shape) == 1 and not parts(part))


def _is_the_same_place(first: Value, second: Value) -> bool:
    """Are two pointer tensors equal if the arguments are that they are computed from?"""
    if first is second:
        return True
    if first.type != second.type:
        return False
    if first.op is None or second.op is None:
        return first.op is second.op and first.block.parent is None and second.block.parent is None
    return (
        first.op.name == second.op.name
        and first.op.name in ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims")
        and first.op.operands[1:] == second.op.operands[1:]
        and _is_the_same_place(first.op.operands[0], second.op.operands[0])
    )


def _may_repeat(pointers: Value) -> bool:
    """May two elements of a pointer tensor be the same place? A stride that is known at run time only is taken to be
    one of a tensor, whose rows lie apart."""
    shape, reach = pointers.type.shape, 0
    steps = [(stride(pointers, d, {}), extent) for d, extent in enumerate(shape) if extent > 1]
    for step, extent in sorted((abs(step), extent) for step, extent in steps if step is not None):
        if step <= reach:
            return True
        reach += step * (extent - 1)
    return not _is_affine(pointers, set())


def _is_affine(value: Value, seen: set[Value]) -> bool:
    """Is an integer or pointer tensor a sum of dimensions' indices, each times a number?"""
    op = value.op
    if value in seen or uniform(value):
        return True
    seen.add(value)
    if op is None or op.name == "scf.for":
        sources = _passed_to(value) if op is None else _sources(value)
        return bool(sources) and all(_is_affine(source, seen) for source in sources)
    if op.name == "arith.muli" and not any(map(uniform, op.operands)):
        return False
    return op.name in _AFFINE and all(_is_affine(operand, seen) for operand in op.operands)


_AFFINE = {"tt.make_range", "tt.addptr", "arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.extui"}
_AFFINE |= {"tt.broadcast", "tt.expand_dims", "tt.trans", "tt.reshape"}


def must_be_apart(source: Value, target: Value, in_place: bool) -> Apart | None:
    """What must not overlap in memory, so that nothing written to `target` is read from `source`; None: it may be."""
    read, written = bases(source), bases(target)
    if None in read | written or read & written:
        return None
    return {(a, b, in_place) for a in read for b in written if a is not None and b is not None}


def bases(pointer: Value) -> set[Value | None]:
    """The function's arguments that a pointer may be based on; None among them where that is not known."""
    ends = [value for value in reachable(pointer, _sources) if not _sources(value)]
    return {value if value.op is None and value.block.parent is None else None for value in ends}


def _sources(pointer: Value) -> list[Value]:
    """The pointers that one is computed from, or is one of; none where it is loaded, say, or was an integer."""
    op = pointer.op
    if op is None:
        return _passed_to(pointer)
    number = op.results.index(pointer)
    if op.name == "scf.for":
        return [op.regions[0].arguments[1 + number]]
    if op.name == "scf.while":
        return [op.regions[0].terminator.operands[1 + number]]  # type: ignore[union-attr]
    if op.name == "scf.if":
        return [region.terminator.operands[number] for region in op.regions]  # type: ignore[union-attr]
    if op.name in ("arith.select", "tt.join", "tt.cat"):
        return op.operands[op.name == "arith.select" :]
    if op.name == "tt.addptr" and _holds_address(op.operands[1]):
        return []
    return op.operands[:1] if operation(op).in_place or op.name == "tt.gather" else []


def _passed_to(argument: Value) -> list[Value]:
    """The values that an argument of a loop's block may have."""
    block, loop = argument.block, argument.block.parent
    number = block.arguments.index(argument)
    if loop is not None and loop.name == "scf.for":
        return [loop.operands[2 + number], block.terminator.operands[number - 1]]  # type: ignore[union-attr]
    if loop is None or loop.name != "scf.while":
        return []
    before, after = loop.regions
    if block is after:
        return [before.terminator.operands[1 + number]]  # type: ignore[union-attr]
    return [loop.operands[number], after.terminator.operands[number]]  # type: ignore[union-attr]


def _holds_address(offset: Value) -> bool:
    """Is an integer computed from a pointer?"""
    values = reachable(offset, lambda v: v.op.operands if v.op is not None and v.op.name != "tt.load" else ())
    return any(value.op is not None and value.op.name == "tt.ptr_to_int" for value in values)


def rearranges(value: Value, sources: Container[Value], stored: Container[Value]) -> bool:
    """Is an element of `value` computed from an element of one of `sources` at another index, with no array between?"""
    return _reads(value, sources, stored, False, set())


def _reads(
    value: Value, sources: Container[Value], stored: Container[Value], moved: bool, seen: set[tuple[Value, bool]]
) -> bool:
    if value in sources:
        return moved
    op = value.op
    if op is None or value in stored or not is_lazy(op) or (value, moved) in seen:
        return False
    seen.add((value, moved))
    moved |= moves_elements(op)
    return any(_reads(operand, sources, stored, moved, seen) for operand in op.operands)


def unit_reshape(op: Op) -> list[int] | None:
    """For a reshape that only adds or drops extents of one: each operand dimension's place in the result (-1: none)."""
    if op.name != "tt.reshape":
        return None
    source, target = op.operands[0].type.shape, op.result.type.shape
    kept = [d for d, extent in enumerate(target) if extent > 1]
    if [extent for extent in source if extent > 1] != [target[d] for d in kept]:
        return None
    following = iter(kept)
    return [next(following) if extent > 1 else -1 for extent in source]


def scatters(op: Op) -> bool:
    """Does `op` evaluate its operand at computed indices, element by element?"""
    return operation(op).kind is Kind.SCATTERS and unit_reshape(op) is None


def moves_elements(op: Op) -> bool:
    """Does `op` read elements of its operand at other indices than its own?"""
    return operation(op).kind is Kind.PERMUTES or scatters(op)


_I = TypeVar("_I")


def operand_index(op: Op, index: Sequence[_I], zero: _I) -> tuple[_I, ...] | None:
    """Where in its operand `op` finds the element at `index`, if it does but repeat elements and rename dimensions.

    An index has an entry of any type for each dimension; `zero` is the one for an extent of 1.
    """
    if op.name == "tt.splat":
        return ()
    if op.name == "tt.broadcast":
        return tuple(zero if extent == 1 else i for extent, i in zip(op.operands[0].type.shape, index))
    if op.name == "tt.expand_dims":
        axis = op.attribute("axis")
        return (*index[:axis], *index[axis + 1 :])
    if op.name == "tt.trans":
        source = dict(zip(permutation(op), index))
        return tuple(source[d] for d in range(len(index)))
    if axes := unit_reshape(op):
        return tuple(index[d] if d >= 0 else zero for d in axes)
    return None


def uniform(value: Value) -> bool:
    """All elements equal by construction."""
    if not value.type.is_tensor:
        return True
    op = value.op
    return op is not None and (
        op.name in ("tt.splat", "arith.constant")
        or (op.name in ("tt.broadcast", "tt.expand_dims", "tt.reshape") and uniform(op.operands[0]))
    )


def permutation(op: Op) -> list[int]:
    """`order` of tt.trans: result dimension k is operand dimension order[k]."""
    return [int(d) for d in re.search(r"order = array<i32: ([\d, ]+)>", op.text).group(1).split(",")]  # type: ignore[union-attr]


_Strides = dict[tuple[Value, int], int | None]


def stride(value: Value, dimension: int, origins: Mapping[Value, Value], known: _Strides | None = None) -> int | None:
    """How much an integer or pointer tensor (in elements) grows from one index to the next along `dimension`.

    None if that differs from place to place or is known at run time only. `origins` names, for pointer tensors that a
    loop moves as a whole, the tensor that they started as. `known` are answers: an index may use a value many times.
    """
    known = {} if known is None else known
    value = origins.get(value, value)
    if (value, dimension) not in known:
        known[value, dimension] = _stride(value, dimension, origins, known)
    return known[value, dimension]


def _stride(value: Value, dimension: int, origins: Mapping[Value, Value], known: _Strides) -> int | None:
    if not value.type.is_tensor or value.type.shape[dimension] == 1 or uniform(value):
        return 0
    op = value.op
    if op is None:
        return None
    if op.name == "tt.make_range":
        return 1
    dimensions = operand_index(op, range(len(value.type.shape)), -1)
    if dimensions is not None:
        return stride(op.operands[0], dimensions.index(dimension), origins, known) if dimension in dimensions else 0
    if op.name == "arith.trunci" and value.type.element != "i32":
        return None  # a range of 300 does not fit into i8
    if op.name == "arith.extui" and not _is_nonnegative(op.operands[0], set()):
        return 0 if stride(op.operands[0], dimension, origins, known) == 0 else None  # 2**32 - 1, then 0
    if op.name in ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"):
        return stride(op.operands[0], dimension, origins, known)
    if op.name not in ("arith.addi", "tt.addptr", "arith.subi", "arith.muli"):
        elementwise = operation(op).kind in (Kind.LANEWISE, Kind.LOADS) and op.operands
        return 0 if elementwise and all(stride(v, dimension, origins, known) == 0 for v in op.operands) else None
    left, right = (stride(operand, dimension, origins, known) for operand in op.operands)
    if left is None or right is None:
        return None
    if op.name == "arith.muli":
        return _product_stride(op, left, right)
    return left - right if op.name == "arith.subi" else left + right


def _is_nonnegative(value: Value, seen: set[Value]) -> bool:
    """Is an integer no less than 0, by what it is computed from?"""
    op, number = value.op, splat_constant(value)
    if value in seen or number is not None:
        return number is None or number >= 0
    seen.add(value)
    return op is not None and (
        op.name in ("tt.make_range", "tt.get_program_id")
        or (op.name in _KEEPS_SIGN and all(_is_nonnegative(operand, seen) for operand in op.operands))
    )


_KEEPS_SIGN = {"tt.splat", "tt.broadcast", "tt.expand_dims", "arith.addi", "arith.muli"}


def _product_stride(op: Op, left: int, right: int) -> int | None:
    if left == right == 0:
        return 0
    for step, factor in ((left, op.operands[1]), (right, op.operands[0])):
        if step and (known := splat_constant(factor)) is not None:
            return step * known
    return None


def is_zero(value: Value) -> bool:
    """A constant, 0 in all elements."""
    text = value.op.text if value.op is not None and value.op.name == "arith.constant" else ""
    return re.search(r"(dense<|constant )0(\.0+e\+00)?(?![.\w])", text) is not None


def splat_constant(value: Value) -> int | None:
    """The integer that fills a constant tensor."""
    op = value.op
    while op is not None and op.name in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
        op = op.operands[0].op
    if op is None or op.name != "arith.constant" or not value.type.element.startswith("i"):
        return None
    found = re.search(r"(?:dense<|constant )(-?\d+|true|false)", op.text)
    return int({"true": "1", "false": "0"}.get(found[1], found[1])) if found else None
