"""TTIR -> C: walks a kernel's operations in order and writes one C function.

    scalar operations          a C constant each, where they stand
    lazy tensor operations     nothing, or a local array if the storage plan says so (analysis.py)
    stores, atomics            a loop nest that evaluates pointers, values and masks (loops.py)
    reductions and scans       reductions.py
    tl.dot                     register tiles, dot.py
    for, while, if, calls      control_flow.py

The C is meant to be read: variables keep the names of the kernel's source. See it with
`compiled_kernel.asm["c"]`, or in Triton's cache folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

from . import control_flow, dot, reductions, registers, vectors
from . import expressions as c
from .analysis import StoragePlan, is_lazy, stride
from .live_rows import LiveRows, number_of_live_rows
from .loops import Array, LoopNest, MovingPointers, Scalar, best_order, linear
from .ttir import Block, Function, Op, Type, Value

# Larger local arrays go to static thread-local memory: a thread's stack is 8 MB, and a user's tile may be anything.
LARGEST_STACK_ARRAY = 32 * 1024


class UnsupportedOperation(NotImplementedError):
    """An operation that the CPU backend cannot compile; the message names it and the kernel's source line."""


class Contraction(NamedTuple):
    """a * b + c in one rounding; `signs` go before a and c."""

    values: tuple[Value, Value, Value]
    signs: tuple[str, str]

    def text(self, call: str, a: str, b: str, x: str) -> str:
        return f"{call}({self.signs[0]}{a}, {b}, {self.signs[1]}{x})"


class Optimisations(NamedTuple):
    """What is done for speed. Each can be left out, to see what it is worth; results are the same.

    register_tiles: loops around tl.dot as in registers.py, single ones as in dot.py, and vectors.py.
    live_rows: live_rows.py.  direct_stores: endings.py.  prefetch: what a loop reads next is asked for in advance.
    disjoint: what comes by different arguments is taken not to overlap; the launcher looks whether that is so.
    """

    register_tiles: bool = True
    live_rows: bool = True
    direct_stores: bool = True
    prefetch: bool = True
    disjoint: bool = True


class KernelEmitter:
    """Writes one function. After `emit`, `lines` holds its body."""

    def __init__(self, function: Function, lanes: int, contract: bool, wanted: Optimisations, called: bool = False):
        self.function, self.lanes, self.contract, self.wanted = function, lanes, contract, wanted

        # Vectors cost the C compiler a header of 0.1 s, which kernels with a tl.dot pay anyway.
        self.vectors = wanted.register_tiles and _has_dot(function.body)
        # A function that is called may be given one of the kernel's arguments as two.
        self.plan = StoragePlan(function, disjoint=wanted.disjoint and not called)
        self.live_rows = LiveRows()
        self.row_counts: dict[Value, str] = {}  # row masks -> C for how many rows they let through, in this C block
        self.storage: dict[Value, Scalar | Array | MovingPointers] = {}
        self.origins: dict[Value, Value] = {}  # loop-carried pointer tensors -> what they started as
        self.destinations: dict[Value, str] = {}  # tl.dot results that may go straight into a loop's accumulator
        self.written: set[Op] = set()  # operations that have been written before their turn
        self.copies: list[Value] = []  # arrays made for one operation's sake, in the C block being written
        self.lines: list[str] = []
        self.depth = 1
        self.names: dict[str, int] = {}

    # ---- writing ------------------------------------------------------------------------------------------------
    def line(self, text: str) -> None:
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
        name = self.name(hint)
        large = type_.size * c.BYTES.get(type_.element, 8) >= LARGEST_STACK_ARRAY
        self.line(
            f"{'static _Thread_local ' if large else ''}{c.array_type(type_.element)} {name}[{type_.size}] "
            "__attribute__((aligned(64)));"
        )
        return name

    @contextmanager
    def braces(self, opening: str) -> Iterator[None]:
        self.line(opening + " {" if opening else "{")
        yield
        self.line("}")

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
        if isinstance(self.storage.get(value), Array):
            return True
        op = value.op
        if op is None or op.name in (
            "tt.load",
            "arith.select",
            "tt.int_to_ptr",
            "tt.join",
            "tt.cat",
            "tt.gather",
            "scf.if",
        ):
            return value.type.is_tensor
        return op.name in (
            "tt.addptr",
            "tt.bitcast",
            "tt.broadcast",
            "tt.expand_dims",
            "tt.trans",
            "tt.reshape",
            "tt.split",
        ) and self.holds_addresses(op.operands[0])

    def materialise(self, value: Value, into: str | None = None) -> str:
        """Evaluates a tensor into a local array; returns its name."""
        type_ = value.type
        name = into or self.array(type_, value.name)
        if not (self.vectors and vectors.attempt(self, lambda: vectors.materialise(self, value, name))):
            nest = LoopNest(self, type_.shape, best_order(self, [value], type_.shape))
            nest.rows = number_of_live_rows(self, value)
            element = nest.evaluate(value)
            nest.put(f"{name}[{linear(type_.shape, nest.index).text}] = {element.text};")
            nest.write()
        if into is None:
            self.storage[value] = Array(name)
        return name

    def as_array(self, value: Value) -> str:
        storage = self.storage.get(value)
        if isinstance(storage, Array):
            return storage.name
        self.copies.append(value)
        return self.materialise(value)

    def scalar_expression(self, op: Op, arguments: list[str]) -> str:
        """C for one element of a lazy operation that computes."""
        operands, target = op.operands, op.results[0].type.element
        if op.name == "tt.addptr":
            return f"({arguments[0]} + {arguments[1]})"
        source = operands[1 if op.name == "arith.select" else 0].type.element if operands else target
        try:
            return c.expression(op, arguments, source, target)
        except (KeyError, NotImplementedError):
            raise self.unsupported(op) from None

    def contraction(self, op: Op) -> Contraction | None:
        """How `op`, an addition, takes in a product beside it: by one rule, the left one first, not at gcc's taste."""
        if (
            not self.contract
            or op.name not in ("arith.addf", "arith.subf")
            or op.result.type.element not in ("f32", "f64")
        ):
            return None
        minus = "-" if op.name == "arith.subf" else ""
        left, right = op.operands
        if self._is_open_product(left, op):
            a, b = left.op.operands  # type: ignore[union-attr]
            return Contraction((a, b, right), ("", minus))
        if self._is_open_product(right, op):
            a, b = right.op.operands  # type: ignore[union-attr]
            return Contraction((a, b, left), (minus, ""))
        return None

    def _is_open_product(self, value: Value, user: Op) -> bool:
        return (
            value.op is not None
            and value.op.name == "arith.mulf"
            and value.block is user.block
            and value not in self.plan
        )

    def unsupported(self, op: Op, why: str = "") -> UnsupportedOperation:
        return UnsupportedOperation(
            f"{op.location}: kernel {self.function.name!r} uses {op.name}{why and ' ' + why}, which the CPU "
            f"backend cannot compile: {op.text}"
        )

    # ---- operations ---------------------------------------------------------------------------------------------
    def block(self, block: Block, skip_terminator: bool = False) -> None:
        outer, self.copies = self.copies, []
        row_counts = dict(self.row_counts)
        for op in block.ops[:-1] if skip_terminator else block.ops:
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

    def op(self, op: Op) -> None:
        """Writes what an operation needs written where it stands; for most lazy ones, nothing."""
        if handler := _HANDLERS.get(op.name):
            try:
                handler(self, op)
            except UnsupportedOperation:
                raise
            except NotImplementedError as error:
                raise self.unsupported(op, f"with {error}") from None
        elif not is_lazy(op):
            raise self.unsupported(op)
        elif op.results and op.result.type.is_tensor:
            for value in op.results:
                if value in self.plan:
                    self.materialise(value)
        else:
            self._scalar_op(op)

    def _scalar_op(self, op: Op) -> None:
        value = op.result
        element = value.type.element
        if op.name == "arith.constant":
            self.storage[value] = Scalar(c.constant(op, element))
            return
        arguments = [self.as_array(v) if v.type.is_tensor else self.scalar(v) for v in op.operands]
        if op.name == "tt.load":
            text = c.from_memory(element, f"*{arguments[0]}")
            if len(arguments) > 1:
                text = f"{arguments[1]} ? {text} : {arguments[2] if len(arguments) > 2 else '0'}"
        elif fused := self.contraction(op):
            text = fused.text(c.FUSED[element], *[self.scalar(v) for v in fused.values])
        else:
            text = self.scalar_expression(op, arguments)
        name = self.name(value.name)
        self.line(f"{c.constant_declaration(element, name)} = {text};")
        self.storage[value] = Scalar(name)

    def store(self, op: Op) -> None:
        """tl.store: the loop nest in which most of a kernel's lazy expressions end up."""
        pointers, value = op.operands[:2]
        mask = op.operands[2] if len(op.operands) > 2 else None
        element = pointers.type.pointee
        if not value.type.is_tensor:
            condition = f"if ({self.scalar(mask)}) " if mask else ""
            self.line(f"{condition}*{self.scalar(pointers)} = {c.to_memory(element, self.scalar(value))};")
            return
        nest = LoopNest(self, value.type.shape, self._store_order(pointers, value))
        nest.rows = number_of_live_rows(self, pointers)
        text = c.to_memory(element, nest.evaluate(value).text)
        condition = f"if ({nest.evaluate(mask).text}) " if mask else ""
        nest.put(f"{condition}{nest.place(pointers, nest.index).text} = {text};")
        nest.write()

    def _store_order(self, pointers: Value, value: Value) -> list[int]:
        """Innermost the dimension along which the store is contiguous: scattered stores cost more than loads."""
        shape = value.type.shape
        contiguous = [d for d in range(len(shape)) if shape[d] > 1 and stride(pointers, d, self.origins) == 1]
        if contiguous:
            inner = contiguous[-1]
            return [d for d in range(len(shape)) if d != inner] + [inner]
        return best_order(self, [value], shape)

    def atomic_rmw(self, op: Op) -> None:
        """Read-modify-write by compare-and-swap, which serves every operation and type alike."""
        kind = op.text.split()[1].rstrip(",")
        pointers, value = op.operands[:2]
        mask = op.operands[2] if len(op.operands) > 2 else None
        result, element = op.result, value.type.element
        update = f"atomic_{kind}_{element}"
        if kind not in c.ATOMICS.get(element, ()):
            raise self.unsupported(op, f"{kind} of {element}")
        if not value.type.is_tensor:
            name = self.name(result.name)
            self.line(f"{c.value_type(element)} {name} = 0;")
            condition = f"if ({self.scalar(mask)}) " if mask else ""
            self.line(f"{condition}{name} = {update}({self.scalar(pointers)}, {self.scalar(value)});")
            self.storage[result] = Scalar(name)
            return
        old = self.array(result.type, result.name) if result.uses else None
        nest = LoopNest(self, value.type.shape, list(range(len(value.type.shape))))
        place, operand = nest.place(pointers, nest.index).text, nest.evaluate(value).text
        condition = f"if ({nest.evaluate(mask).text}) " if mask else ""
        target = f"{old}[{linear(value.type.shape, nest.index).text}] = " if old else ""
        nest.put(f"{condition}{target}{update}(&{place}, {operand});")
        nest.write(vectorise=False)
        if old:
            self.storage[result] = Array(old)

    def atomic_cas(self, op: Op) -> None:
        """tl.atomic_cas of a scalar; its result is the old value."""
        pointer, expected, desired = op.operands
        if expected.type.is_tensor:
            raise self.unsupported(op, "on a tensor")
        name, kind = self.name(op.result.name), c.memory_type(expected.type.element)
        self.line(f"{kind} {name} = {self.scalar(expected)}, {name}_desired = {self.scalar(desired)};")
        self.line(
            f"__atomic_compare_exchange({self.scalar(pointer)}, &{name}, &{name}_desired, 0, "
            "__ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);"
        )
        self.storage[op.result] = Scalar(name)

    def histogram(self, op: Op) -> None:
        values, result = op.operands[0], op.result
        source, counts = self.as_array(values), self.array(result.type, result.name)
        mask = self.as_array(op.operands[1]) if len(op.operands) > 1 else None
        condition = f"if ((uint64_t){source}[i] < {result.type.size}{f' && {mask}[i]' if mask else ''}) "
        self.line(f"memset({counts}, 0, sizeof {counts});")
        self.line(f"for (int i = 0; i < {values.type.size}; i++) {condition}{counts}[{source}[i]]++;")
        self.storage[result] = Array(counts)

    def assertion(self, op: Op) -> None:
        """tl.device_assert: of a tensor, the first element that is False is named."""
        condition, text = op.operands[0], "device-side assertion failed: " + _quoted(op).replace("%", "%%")
        if not condition.type.is_tensor:
            self.line(f"if (!{self.scalar(condition)}) {self.failure(op, text)}")
            return
        holds, shape = self.as_array(condition), condition.type.shape
        index = [f"i / {prod(shape[d + 1 :])} % {extent}" for d, extent in enumerate(shape)]
        text = text.replace(":", f" at [{', '.join(['%d'] * len(shape))}]:", 1)
        self.line(f"for (int i = 0; i < {condition.type.size}; i++) if (!{holds}[i]) {self.failure(op, text, *index)}")

    def failure(self, op: Op, text: str, *arguments: str) -> str:
        """C that ends the program and has the launcher raise a RuntimeError: the source line, the program's place in
        the grid, and `text`, a format of printf for `arguments`, which are C expressions."""
        location = op.location.replace("%", "%%")
        text = f"{location}: kernel {self.function.name!r}, program (%d, %d, %d): {text}"
        return f"fail({_c_string(text)}, {', '.join(['pid_x', 'pid_y', 'pid_z', *arguments])});"

    def print_values(self, op: Op) -> None:
        """tl.device_print: a line for each element, behind the program's place in the grid."""
        head = "printf(" + _c_string("pid (%d, %d, %d)" + _quoted(op).replace("%", "%%"))[:-1]
        for value in op.operands:
            code, cast = (
                ("%g", "(double)")
                if value.type.element in c.SMALL_FLOATS or value.type.element in ("f32", "f64")
                else ("%lld", "(long long)")
            )
            if not value.type.is_tensor:
                self.line(f'{head}{code}\\n", pid_x, pid_y, pid_z, {cast}{self.scalar(value)});')
                continue
            array = self.as_array(value)
            self.line(
                f"for (int i = 0; i < {value.type.size}; i++) "
                f'{head}[%d] {code}\\n", pid_x, pid_y, pid_z, i, {cast}{array}[i]);'
            )

    # ---- the whole function -------------------------------------------------------------------------------------
    def emit(self, result: str = "void") -> str:
        """The C function, static, taking the kernel's arguments and the program's place in the grid."""
        for parameter in self.function.parameters:
            self.storage[parameter] = Scalar(self.name("arg_" + parameter.name.lstrip("%")))
        control_flow.declare_labels(self)
        self.block(self.function.body)
        parameters = [f"{c.value_type(p.type.element)} {self.scalar(p)}" for p in self.function.parameters]
        signature = ", ".join(
            [*parameters, "int pid_x", "int pid_y", "int pid_z", "int num_x", "int num_y", "int num_z"]
        )
        return "\n".join([f"static {result} {c_function_name(self.function.name)}({signature}) {{", *self.lines, "}"])


def _has_dot(block: Block) -> bool:
    return any(op.name == "tt.dot" or any(map(_has_dot, op.regions)) for op in block.ops)


def _quoted(op: Op) -> str:
    """The text of a message, in which MLIR writes some characters as a backslash and two hexadecimal digits."""
    found = re.search(r'"([^"]*)"', op.text)
    shown = (found.group(1) if found else "").encode()
    plain = re.sub(rb"\\(\\|[0-9A-F]{2})", lambda m: b"\\" if m[1] == b"\\" else bytes.fromhex(m[1].decode()), shown)
    return plain.decode(errors="replace")


def _c_string(text: str) -> str:
    plain = [chr(byte) if 32 <= byte < 127 and chr(byte) not in '"?\\' else f"\\{byte:03o}" for byte in text.encode()]
    return f'"{"".join(plain)}"'


def c_function_name(name: str) -> str:
    return "kernel_" + re.sub(r"\W", "_", name)


def _program_id(emitter: KernelEmitter, op: Op) -> None:
    emitter.storage[op.result] = Scalar(f"pid_{op.text.split()[1]}")


def _num_programs(emitter: KernelEmitter, op: Op) -> None:
    emitter.storage[op.result] = Scalar(f"num_{op.text.split()[1]}")


def _for(emitter: KernelEmitter, op: Op) -> None:
    if not (emitter.wanted.register_tiles and registers.emit_loop(emitter, op)):
        control_flow.emit_for(emitter, op)


def _nothing(emitter: KernelEmitter, op: Op) -> None:
    """Barriers and hints: a program is one thread here."""


_HANDLERS: dict[str, Callable[[KernelEmitter, Op], None]] = {
    "tt.get_program_id": _program_id,
    "tt.get_num_programs": _num_programs,
    "tt.store": KernelEmitter.store,
    "tt.atomic_rmw": KernelEmitter.atomic_rmw,
    "tt.atomic_cas": KernelEmitter.atomic_cas,
    "tt.histogram": KernelEmitter.histogram,
    "tt.assert": KernelEmitter.assertion,
    "tt.print": KernelEmitter.print_values,
    "tt.reduce": reductions.emit_reduce,
    "tt.scan": reductions.emit_scan,
    "tt.dot": dot.emit_dot,
    "tt.unsplat": reductions.emit_unsplat,
    "scf.for": _for,
    "scf.while": control_flow.emit_while,
    "scf.if": control_flow.emit_if,
    "tt.call": control_flow.emit_call,
    "tt.return": control_flow.emit_return,
    "cf.br": control_flow.emit_jump,
    "cf.cond_br": control_flow.emit_jump,
    "cf.label": control_flow.emit_label,
    "llvm.intr.assume": _nothing,
    "gpu.barrier": _nothing,
    "ttg.barrier": _nothing,
    "tt.debug_barrier": _nothing,
}


class Generated(NamedTuple):
    """A C file whose `run_programs(arguments, begin, end, grid)` runs programs [begin, end) of the kernel's grid.

    apart: what it takes for granted, as (argument read, argument written, may both be the same address): their memory
        does not overlap.
    """

    text: str
    apart: list[tuple[int, int, bool]]


def generate_c(functions: list[Function], prelude: str, lanes: int, contract: bool, wanted: Optimisations) -> Generated:
    """The C of a kernel, the first of `functions`, and of those it calls."""
    kernel, helpers = functions[0], functions[1:]
    parts = [f"#define LANES {lanes}"]
    prototypes, bodies = [], []
    for function in [*reversed(helpers), kernel]:
        emitter = KernelEmitter(function, lanes, contract, wanted, called=function is not kernel)
        text = emitter.emit(control_flow.result_type(function))
        prototypes += [control_flow.result_struct(function), text.split(" {\n", 1)[0] + ";"]
        bodies.append(text)
    can_fail = any("fail(" in body for body in bodies)
    fields = [f"{_field_type(p)} a{i};" for i, p in enumerate(kernel.parameters)]
    fields += ["struct failure *failure;"] * can_fail
    arguments = ", ".join(
        [c.rounded(p.type.element, f"a->a{i}") for i, p in enumerate(kernel.parameters)]
        + ["i % grid[0]", "i / grid[0] % grid[1]", "i / grid[0] / grid[1]", "grid[0]", "grid[1]", "grid[2]"]
    )
    entry = (
        f"struct arguments {{ {' '.join(fields)} }};\n"
        "void run_programs(const struct arguments *a, long begin, long end, const int *grid) {\n"
        + "  if (has_failed(a->failure) || setjmp(end_of_programs)) return;\n" * can_fail
        + f"  for (long i = begin; i < end; i++) {c_function_name(kernel.name)}({arguments});\n}}\n"
    )
    code = "\n".join([p for p in prototypes if p] + bodies + [entry])
    uses = {"USES_VECTORS": "vec ", "USES_ATOMICS": "atomic_", "USES_FAILURES": "fail("}
    parts += [f"#define {macro}" for macro, sign in uses.items() if sign in code]
    numbers = {parameter: number for number, parameter in enumerate(kernel.parameters)}
    apart = sorted((numbers[read], numbers[written], same) for read, written, same in emitter.plan.apart)
    return Generated("\n".join([*parts, prelude, code]), apart)


def _field_type(parameter: Value) -> str:
    element = parameter.type.element
    return c.value_type(element) if element != "i1" else "int8_t"


def argument_format(kernel: Function) -> str:
    """`struct` format of the kernel's packed arguments; "P" is a pointer."""
    return "@" + "".join("P" if p.type.is_pointer else c.ARGUMENT_CODES[p.type.element] for p in kernel.parameters)
