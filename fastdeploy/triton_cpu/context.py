"""What all lowerings of one function share: C lines, C names, and where each value of the kernel is stored.

A lowering knows this and nothing of other lowerings. What it does not do itself (the body of a loop, an operand's
operation) it asks of the context, which calls the driver (emitter.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

from .analysis import LiveRows, StoragePlan
from .bounds import Bounds
from .elements import array_type, bytes_in_array, value_type
from .operations import operation
from .ttir import Block, Function, Op, Type, Value, walk

# Larger local arrays go to static thread-local memory: a thread's stack is 8 MB, and a user's tile may be anything.
LARGEST_STACK_ARRAY = 32 * 1024


class UnsupportedOperation(NotImplementedError):
    """An operation that the CPU backend cannot compile; the message names it and the kernel's source line."""


class NotATile(Exception):
    """Why an expression, a loop or an operation is left to the next, more general lowering. (No text: plain to see.)"""


class Array(NamedTuple):
    """Storage of a tensor: a local C array in row-major order."""

    name: str


class Scalar(NamedTuple):
    """Storage of a scalar, or of a tensor whose elements are all equal: a C expression."""

    text: str


class MovingPointers(NamedTuple):
    """Storage of a loop-carried pointer tensor: the tensor it started as, and how far it has moved (elements)."""

    origin: Value
    moved: str


@dataclass(frozen=True)
class Optimisations:
    """What is done for speed. Each can be left out, to see what it is worth; results are the same but for the last one.

    register_tiles: loops around tl.dot as in registers.py, single ones as in dot.py, and vectors.py.
    live_rows: live_rows.py.  direct_stores: endings.py.  prefetch: what a loop reads next is asked for in advance.
    disjoint: what comes by different arguments is taken not to overlap; the launcher looks whether that is so.
    bf16_products: pairs.py, where the CPU can. It changes the last bits of sums, so it is left out unless asked for.
    """

    register_tiles: bool = True
    live_rows: bool = True
    direct_stores: bool = True
    prefetch: bool = True
    disjoint: bool = True
    bf16_products: bool = False


class Target(NamedTuple):
    """What code is written for: the kernel's name, floats in a vector, whether an instruction adds four products of
    bytes, whether products contract with additions, and what is wanted.

    bounds: what accesses are checked against; None: they are not. The optimisations know of no checks.
    """

    kernel: str
    lanes: int
    vnni: bool
    contract: bool
    wanted: Optimisations
    bounds: Bounds | None = None


@dataclass(frozen=True)
class Unit:
    """The function being compiled, and what is known of it before a line is written."""

    function: Function
    target: Target
    lower: Callable[[Context, Op], None]  # the driver
    plan: StoragePlan
    live_rows: LiveRows
    has_dot: bool


class Context:
    """All attributes but `unit` change as code is written, and an attempt that fails puts them back."""

    def __init__(self, function: Function, target: Target, lower: Callable[[Context, Op], None], called: bool = False):
        has_dot = any(op.name in ("tt.dot", "tt.dot_scaled") for op in walk(function.body))
        # A function that is called may be given one of the kernel's arguments as two.
        plan = StoragePlan(function, disjoint=target.wanted.disjoint and not called)
        self.unit = Unit(function, target, lower, plan, LiveRows(), has_dot)
        self.lines: list[str] = []
        self.depth = 1
        self.names: dict[str, int] = {}
        self.storage: dict[Value, Scalar | Array | MovingPointers] = {}
        self.origins: dict[Value, Value] = {}  # loop-carried pointer tensors -> what they started as
        self.destinations: dict[Value, str] = {}  # tl.dot results that may go straight into a loop's accumulator
        self.row_counts: dict[Value, str] = {}  # row masks -> C for how many rows they let through, in this C block
        self.written: set[Op] = set()  # operations that have been written before their turn
        self.copies: list[Value] = []  # arrays made for one operation's sake, in the C block being written

    @property
    def lanes(self) -> int:
        """Floats in a vector register."""
        return self.unit.target.lanes

    @property
    def dots_in_two_steps(self) -> bool:
        """Are four products of bytes added by two instructions? (Vectors of four lanes may have none of them.)"""
        return self.lanes > 4 and not self.unit.target.vnni

    @property
    def wanted(self) -> Optimisations:
        return self.unit.target.wanted

    @property
    def vectors(self) -> bool:
        """May tensors be computed as C vectors? They cost the C compiler a header of 0.1 s, which kernels with a
        tl.dot pay anyway."""
        return self.wanted.register_tiles and self.unit.has_dot

    # ---- writing ------------------------------------------------------------------------------------------------
    def line(self, *lines: str) -> None:
        for text in lines:
            self.depth -= text.startswith("}")
            self.lines.append(text if text.startswith("#") else "  " * self.depth + text)
            self.depth += text.endswith("{")

    def name(self, hint: str) -> str:
        """A fresh C name that starts like `hint`, a TTIR name such as %acc_12."""
        stem = re.sub(r"\W", "_", hint.lstrip("%").split("#")[0])
        stem = re.sub(r"_?\d+$", "", stem) or "v"
        self.names[stem] = self.names.get(stem, -1) + 1
        return f"{stem}_{self.names[stem]}"

    def array(self, type_: Type, hint: str = "tile") -> str:
        return self.local_array(array_type(type_.element), type_.size, bytes_in_array(type_.element), hint)

    def local_array(self, kind: str, count: int, size: int, hint: str) -> str:
        """An array of `count` elements of the C type `kind`, which have `size` bytes. Returns its name."""
        name, large = self.name(hint), count * size >= LARGEST_STACK_ARRAY
        storage = "static _Thread_local " if large else ""
        self.line(f"{storage}{kind} {name}[{count}] __attribute__((aligned(64)));")
        return name

    def declare(self, value: Value) -> str:
        """Storage for a result that is written later: an array, or a variable of C. Returns its name."""
        if value.type.is_tensor:
            name = self.array(value.type, value.name)
            self.storage[value] = Array(name)
        else:
            name = self.name(value.name)
            self.line(f"{value_type(value.type.element)} {name};")
            self.storage[value] = Scalar(name)
        return name

    def give_same_place(self, new: Value, old: Value) -> None:
        """`new` is `old` by another name."""
        self.storage[new] = self.storage[old]
        if old in self.origins:
            self.origins[new] = self.origins[old]

    @contextmanager
    def braces(self, opening: str) -> Iterator[None]:
        self.line(opening + " {" if opening else "{")
        yield
        self.line("}")

    @contextmanager
    def aside(self) -> Iterator[list[str]]:
        """Lines written inside go to the list, not into the function."""
        outer, depth = self.lines, self.depth
        self.lines, self.depth = [], 0
        yield self.lines
        self.lines, self.depth = outer, depth

    def attempt(self, write: Callable[[], object], what: str, keep: bool = True) -> bool:
        """Runs `write`; the answer is False if it raises NotATile. What it has written is forgotten then, and unless
        `keep` in any case. `what` was attempted and the reason stand as a comment in the C."""
        before = {name: copy(value) for name, value in vars(self).items()}
        reason = None
        try:
            write()
        except NotATile as why:
            reason = str(why)
        if reason is not None or not keep:
            vars(self).update(before)
        if reason and keep:
            self.line(f"// {what}: {reason}")
        return reason is None

    # ---- values -------------------------------------------------------------------------------------------------
    def scalar(self, value: Value) -> str:
        storage = self.storage[value]
        if not isinstance(storage, Scalar):
            raise AssertionError(f"{value} is not a scalar")
        return storage.text

    def holds_addresses(self, value: Value) -> bool:
        """Pointers that are data themselves (loaded, selected, computed), rather than one base plus offsets."""
        if not value.type.is_pointer or isinstance(self.storage.get(value), (Scalar, MovingPointers)):
            return False
        if isinstance(self.storage.get(value), Array) or value.op is None:
            return value.type.is_tensor
        if value.op.name == "tt.splat":
            return False
        if operation(value.op).in_place:
            return self.holds_addresses(value.op.operands[0])
        return value.type.is_tensor

    def unsupported(self, op: Op, why: str = "") -> UnsupportedOperation:
        return UnsupportedOperation(
            f"{op.location}: kernel {self.unit.function.name!r} uses {op.name}{why and ' ' + why}, which the CPU "
            f"backend cannot compile: {op.text}"
        )

    # ---- operations ---------------------------------------------------------------------------------------------
    def op(self, op: Op) -> None:
        """Writes what an operation needs written where it stands; for most lazy ones, nothing."""
        self.unit.lower(self, op)

    def block(self, block: Block) -> None:
        outer, self.copies = self.copies, []
        row_counts = dict(self.row_counts)
        for op in block.ops:
            if op not in self.written:
                self.op(op)
        self.forget_copies(keep=block)
        self.copies, self.row_counts = outer, row_counts

    def forget_copies(self, keep: Block | None = None) -> None:
        """A C block ends: its arrays are out of reach behind it. (What belongs to `keep` has no user there.)"""
        for value in self.copies:
            if value.block is not keep:
                del self.storage[value]
        self.copies = []
