"""The driver: picks the lowering of each operation by the table (operations.py), and writes whole functions.

    scalar operations          a C constant each, where they stand
    lazy tensor operations     nothing, or a local array if the storage plan says so (analysis.py)
    all others                 their lowerings, in the table's order, until one fits

The C is meant to be read: variables keep the names of the kernel's source, and where a special lowering did not fit
a comment says why. See it with `compiled_kernel.asm["c"]`, or in Triton's cache folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from . import calls, control_flow, dot, memory, programs, reductions, registers, scaled_dot
from .arrays import materialise
from .bounds import Bounds
from .context import Context, Scalar, Target, UnsupportedOperation
from .elements import ELEMENTS, memory_type, rounded, value_type
from .loops import evaluated
from .operations import OPERATIONS, operation
from .ttir import Function, Op

MODULES: tuple[ModuleType, ...] = (calls, control_flow, dot, memory, programs, reductions, registers, scaled_dot)
_BY_NAME = {module.__name__.rpartition(".")[2]: module for module in MODULES}
LOWERINGS: dict[str, list[Callable[[Context, Op], None]]] = {
    name: [getattr(_BY_NAME[module], function) for module, function in (text.split(".") for text in row.lowerings)]
    for name, row in OPERATIONS.items()
}


def lower(context: Context, op: Op) -> None:
    """Writes what an operation needs written where it stands; for most lazy ones, nothing."""
    try:
        if operation(op).lazy:
            _compute(context, op)
        elif lowerings := LOWERINGS.get(op.name):
            _try_in_turn(context, op, lowerings)
        else:
            raise context.unsupported(op)
    except UnsupportedOperation:
        raise
    except NotImplementedError as error:
        raise context.unsupported(op, f"with {error}") from None


def _try_in_turn(context: Context, op: Op, lowerings: list[Callable[[Context, Op], None]]) -> None:
    *special, general = lowerings
    for write, name in zip(special, operation(op).lowerings):
        if context.attempt(lambda write=write: write(context, op), f"{Path(op.location).name}: not {name}"):  # type: ignore[misc]
            return
    general(context, op)


def _compute(context: Context, op: Op) -> None:
    if not op.result.type.is_tensor:
        context.storage[op.result] = Scalar(evaluated(context, lambda nest: nest.computed(op.result, op, ())))
    for value in op.results:
        if value in context.unit.plan:
            materialise(context, value)


def function_in_c(context: Context) -> str:
    """The C function, static, taking the kernel's arguments and the program's place in the grid."""
    signature = calls.signature(context)
    control_flow.declare_labels(context, context.unit.function.body)  # which C wants first
    if context.unit.target.bounds is not None:
        context.line("const struct extent *const extents = extents_of_launch;")
    context.block(context.unit.function.body)
    return "\n".join([f"{signature} {{", *context.lines, "}"])


class Generated(NamedTuple):
    """A C file whose `run_programs(arguments, begin, end, grid)` runs programs [begin, end) of the kernel's grid.

    apart: what it takes for granted, as (argument read, argument written, may both be the same address): their memory
        does not overlap.
    """

    text: str
    apart: list[tuple[int, int, bool]]


def generate_c(functions: list[Function], prelude: str, target: Target) -> Generated:
    """The C of a kernel, the first of `functions`, and of those it calls."""
    kernel, helpers = functions[0], functions[1:]
    parts = [f"#define LANES {target.lanes}"]
    prototypes, bodies = [], []
    for function in [*reversed(helpers), kernel]:
        context = Context(function, target, lower, called=function is not kernel)
        text = function_in_c(context)
        prototypes += [calls.result_struct(function), text.split(" {\n", 1)[0] + ";"]
        bodies.append(text)
    code = "\n".join([p for p in prototypes if p] + bodies)
    code += _entry(kernel, can_fail="fail(ASSERTION" in code or target.bounds is not None, bounds=target.bounds)
    parts += [f"#define {macro}" for macro, signs in _USES.items() if any(sign in code for sign in signs)]
    if target.bounds is not None:
        known = [f'{{"{p.name[1:]}", sizeof({memory_type(p.type.pointee)})}}' for p in target.bounds.pointers]
        prelude += f"\nstatic const struct argument known_arguments[] = {{{', '.join(known)}}};"
    numbers = {parameter: number for number, parameter in enumerate(kernel.parameters)}
    apart = sorted((numbers[read], numbers[written], same) for read, written, same in context.unit.plan.apart)
    return Generated("\n".join([*parts, prelude, code]), apart)


_USES = {
    "USES_VECTORS": ("vec ", "add_dot2_to_one"),
    "USES_ATOMICS": ("atomic_",),
    "USES_POLL": ("atomic_poll",),
    "USES_LIBDEVICE": ("nv_",),
    "USES_FNUZ": ("fnuz",),
    "USES_MX": ("mx_",),
    "USES_FAILURES": ("failure_of_launch",),
    "CHECKS_BOUNDS": ("struct extent",),
}


def _entry(kernel: Function, can_fail: bool, bounds: Bounds | None) -> str:
    """C of `run_programs`, and of the arguments that it takes."""
    types = [p.type.element for p in kernel.parameters]
    fields = [f"{'int8_t' if t == 'i1' else value_type(t)} a{i};" for i, t in enumerate(types)]
    prepare, call = [], f"{calls.function_name(kernel.name)}({{}})"
    if can_fail:
        fields.append("struct failure *failure;")
        prepare.append("failure_of_launch = a->failure;")
        call = f"current_program = i; if (!setjmp(end_of_program)) {call}"
    if bounds is not None:
        fields.append(f"struct extent extents[{len(bounds.pointers)}];")
        prepare.append("extents_of_launch = a->extents;")
    arguments = [rounded(t, f"a->a{i}") for i, t in enumerate(types)]
    arguments += ["i % grid[0]", "i / grid[0] % grid[1]", "i / grid[0] / grid[1]", "grid[0]", "grid[1]", "grid[2]"]
    return f"""
struct arguments {{ {" ".join(fields)} }};
void run_programs(const struct arguments *a, long begin, long end, const int *grid) {{
  {" ".join(prepare)}
  for (long i = begin; i < end; i++) {{ {call.format(", ".join(arguments))}; }}
}}
"""


def argument_format(kernel: Function) -> str:
    """`struct` format of the kernel's packed arguments; "P" is a pointer."""
    return "@" + "".join("P" if p.type.is_pointer else ELEMENTS[p.type.element].code for p in kernel.parameters)
