"""The driver: picks the lowering of each operation by the table (operations.py), and writes whole functions.

    scalar operations          a C constant each, where they stand
    lazy tensor operations     nothing, or a local array if the storage plan says so (analysis.py)
    all others                 their lowerings, in the table's order, until one fits

The C is meant to be read: variables keep the names of the kernel's source, and where a special lowering did not fit
a comment says why. See it with `compiled_kernel.asm["c"]`, or in Triton's cache folder.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from . import calls, control_flow, dot, memory, programs, reductions, registers
from .arrays import as_array, materialise
from .context import Context, Optimisations, Scalar, Target, UnsupportedOperation
from .elements import ELEMENTS, FUSED, constant, constant_declaration, from_memory, rounded, value_type
from .loops import computed, contraction
from .operations import OPERATIONS, operation
from .ttir import Function, Op, Value

_MODULES: tuple[ModuleType, ...] = (calls, control_flow, dot, memory, programs, reductions, registers)
_BY_NAME = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
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
            if not any(context.attempt(lambda write=write: write(context, op)) for write in lowerings[:-1]):  # type: ignore[misc]
                lowerings[-1](context, op)
        else:
            raise context.unsupported(op)
    except UnsupportedOperation:
        raise
    except NotImplementedError as error:
        raise context.unsupported(op, f"with {error}") from None


def _compute(context: Context, op: Op) -> None:
    if not op.result.type.is_tensor:
        _scalar(context, op)
    for value in op.results:
        if value in context.unit.plan:
            materialise(context, value)


def _scalar(context: Context, op: Op) -> None:
    value = op.result
    element = value.type.element
    if op.name == "arith.constant":
        context.storage[value] = Scalar(constant(op, element))
        return
    arguments = [as_array(context, v) if v.type.is_tensor else context.scalar(v) for v in op.operands]
    if op.name == "tt.load":
        text = from_memory(element, f"*{arguments[0]}")
        if len(arguments) > 1:
            text = f"{arguments[1]} ? {text} : {arguments[2] if len(arguments) > 2 else '0'}"
    elif fused := contraction(context, op):
        text = fused.text(FUSED[element], *[context.scalar(v) for v in fused.values])
    else:
        text = computed(context, op, arguments)
    name = context.name(value.name)
    context.line(f"{constant_declaration(element, name)} = {text};")
    context.storage[value] = Scalar(name)


def function_in_c(function: Function, target: Target, called: bool) -> str:
    """The C function, static, taking the kernel's arguments and the program's place in the grid."""
    context = Context(function, target, lower, called)
    signature = calls.signature(context)
    control_flow.declare_labels(context, function.body)
    context.block(function.body)
    return "\n".join([f"{signature} {{", *context.lines, "}"])


def generate_c(functions: list[Function], prelude: str, lanes: int, contract: bool, wanted: Optimisations) -> str:
    """A C file whose `run_programs(arguments, begin, end, grid)` runs programs [begin, end) of the kernel's grid."""
    kernel, helpers = functions[0], functions[1:]
    parts = [f"#define LANES {lanes}"]
    prototypes, bodies = [], []
    for function in [*reversed(helpers), kernel]:
        text = function_in_c(function, Target(lanes, contract, wanted), called=function is not kernel)
        prototypes += [calls.result_struct(function), text.split(" {\n", 1)[0] + ";"]
        bodies.append(text)
    fields = [f"{_field_type(p)} a{i};" for i, p in enumerate(kernel.parameters)]
    arguments = ", ".join(
        [rounded(p.type.element, f"a->a{i}") for i, p in enumerate(kernel.parameters)]
        + ["i % grid[0]", "i / grid[0] % grid[1]", "i / grid[0] / grid[1]", "grid[0]", "grid[1]", "grid[2]"]
    )
    entry = (
        f"struct arguments {{ {' '.join(fields)} }};\n"
        "void run_programs(const struct arguments *a, long begin, long end, const int *grid) {\n"
        f"  for (long i = begin; i < end; i++) {calls.function_name(kernel.name)}({arguments});\n}}\n"
    )
    code = "\n".join([p for p in prototypes if p] + bodies + [entry])
    uses = {"USES_VECTORS": "vec ", "USES_ATOMICS": "atomic_"}
    parts += [f"#define {macro}" for macro, sign in uses.items() if sign in code]
    return "\n".join([*parts, prelude, code])


def _field_type(parameter: Value) -> str:
    element = parameter.type.element
    return value_type(element) if element != "i1" else "int8_t"


def argument_format(kernel: Function) -> str:
    """`struct` format of the kernel's packed arguments; "P" is a pointer."""
    return "@" + "".join("P" if p.type.is_pointer else ELEMENTS[p.type.element].code for p in kernel.parameters)
