"""The table of operations: what each TTIR operation is, and its C. To add one, add a row (README.md shows how).

    "arith.addf": lanewise("({0} + {1})", vector={"f32": "({0} + {1})"}, rounds=True, identity="-0.0f")
     |                      |             |                              |            `- changes no sum of a reduction
     |                      |             |                              `- the C is rounded to a small float type
     |                      |             `- C for a vector of elements of that type, where there is one
     |                      `- C for one element
     `- name in TTIR

In a form, {0}, {1}, ... are the operands, {u[0]}, ... the same as unsigned integers, {T} is the result's C type and {f}
is "f" or, of doubles, nothing: the ending of libm's names. Instead of a form there may be a function (`Scalar`). It is
given the operation, the operands' C, and the element types of the first operand (of a selection: the second) and of the
result.

Three rules keep the arithmetic strict:

* Small floats are rounded after each operation, as a GPU does (elements.py).
* Signed overflow wraps (the C is compiled with -fwrapv), comparisons keep NaN's meaning, division is exact.
* The C compiler may not contract a*b+c (-ffp-contract=off): `contraction` in loops.py asks for each fma by itself, so
  that the same kernel source gives the same bits however it is tiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import NamedTuple

from . import libdevice
from .elements import SMALL_FLOATS, from_memory, memory_type, rounded, to_memory, unsigned_type, value_type
from .ttir import Op

Scalar = str | Callable[[Op, list[str], str, str], str]
Vector = Mapping[str, str] | Callable[[Op], str | None]


class Kind(Enum):
    """What an element of the result is made of. All but the last are lazy: evaluated in the loops of their users."""

    LANEWISE = auto()  # the same element of each operand
    REPEATS = auto()  # an operand's element, for many indices
    PERMUTES = auto()  # an operand's element at permuted indices
    SCATTERS = auto()  # operands' elements at computed indices
    COUNTS = auto()  # the index
    LOADS = auto()  # memory
    STANDS = auto()  # the operation is written where it stands


class Operation(NamedTuple):
    kind: Kind = Kind.STANDS
    scalar: Scalar = ""
    vector: Vector = MappingProxyType({})
    rounds: bool = False
    expensive: bool = False  # to evaluate it twice costs more than to store it
    identity: str = ""  # C for what it leaves unchanged; {bits} is the width of an integer. Not NaN-safe of i1.
    in_place: bool = False  # of pointers: the result points into what the first operand points into
    writes: bool = False  # memory, perhaps
    lowerings: tuple[str, ...] = ()  # "module.function"s that write it, tried in this order

    @property
    def lazy(self) -> bool:
        return self.kind is not Kind.STANDS


def lanewise(scalar: Scalar, vector: Vector = MappingProxyType({}), **what: bool | str) -> Operation:
    return Operation(Kind.LANEWISE, scalar, vector, **what)  # type: ignore[arg-type]


def stands(*lowerings: str, writes: bool = False) -> Operation:
    return Operation(lowerings=lowerings, writes=writes)


def operation(op: Op) -> Operation:
    """The row of an operation; one that nobody knows `stands` and has no lowering."""
    return OPERATIONS.get(op.name, _UNKNOWN)


def element(op: Op, operands: list[str], source: str, target: str) -> str:
    """C for one element. `source` and `target` are the element types of the operands and of the result.

    NotImplementedError for what is not computed lane by lane, or not of these types.
    """
    row = operation(op)
    if callable(row.scalar):
        text = row.scalar(op, operands, source, target)
    elif row.scalar:
        unsigned = [f"({unsigned_type(source)}){text}" if source != "i1" else text for text in operands]
        text = row.scalar.format(*operands, u=unsigned, T=value_type(target), f=_ending(source))
    else:
        raise NotImplementedError(op.name)
    return rounded(target, text) if row.rounds else text


def vector_form(op: Op) -> str | None:
    """C for a vector of elements, a form of the operands' vectors; None if there is none for its types."""
    vector = operation(op).vector
    source, target = (op.operands or op.results)[0].type.element, op.result.type.element
    form = vector(op) if callable(vector) else vector.get(source)
    return form if target in ("f32", "i32", "i8", "i1", "f8E4M3FN") else None


def _ending(element: str) -> str:
    return "" if element == "f64" else "f"


# ---- forms ----------------------------------------------------------------------------------------------------------
def _call(single: str, double: str) -> Scalar:
    """A function of libm or prelude.h: its name for floats and for doubles. (Of integers: int and int64_t.)"""
    return lambda op, a, s, t: f"{double if s in ('f64', 'i64') else single}({', '.join(a)})"


def _modulo_two(sign: str) -> Scalar:
    return lambda op, a, s, t: f"({a[0]} {'^' if s == 'i1' else sign} {a[1]})"


def _division(name: str, unsigned: bool = False) -> Scalar:
    """Calls of prelude.h that do not trap where a machine's division would; of i32 for all narrower types."""

    def form(op: Op, a: list[str], source: str, target: str) -> str:
        width = "i64" if source in ("i64", "index") else "i32"
        if unsigned and source != "i1":
            a = [f"({unsigned_type(source)}){text}" for text in a]
        return f"({value_type(source)}){name}_{width}({', '.join(a)})"

    return form


_COMPARE = {"eq": "==", "ne": "!=", "slt": "<", "sle": "<=", "sgt": ">", "sge": ">="}
_COMPARE_UNSIGNED = {"ult": "<", "ule": "<=", "ugt": ">", "uge": ">="}
# C's comparisons are the ordered ones (false on NaN); "une" is C's !=, and the other unordered ones negate.
_COMPARE_FLOATS = {
    "oeq": "{0} == {1}", "olt": "{0} < {1}", "ole": "{0} <= {1}", "ogt": "{0} > {1}", "oge": "{0} >= {1}",
    "une": "{0} != {1}", "ult": "!({0} >= {1})", "ule": "!({0} > {1})", "ugt": "!({0} <= {1})", "uge": "!({0} < {1})",
    "one": "({0} < {1}) | ({0} > {1})", "ueq": "!(({0} < {1}) | ({0} > {1}))", "true": "1", "false": "0",
    "ord": "({0} == {0}) & ({1} == {1})", "uno": "({0} != {0}) | ({1} != {1})",
}  # fmt: skip


def _predicate(op: Op) -> str:
    return op.text.split()[1].rstrip(",")


def _compare_floats(op: Op, a: list[str], source: str, target: str) -> str:
    return f"({_COMPARE_FLOATS[_predicate(op)].format(*a)})"


def _compare_integers(op: Op, a: list[str], source: str, target: str) -> str:
    predicate = _predicate(op)
    if predicate in _COMPARE:
        if source == "i1" and predicate not in ("eq", "ne"):  # as signed numbers, true is -1
            a = [f"-{text}" for text in a]
        return f"({a[0]} {_COMPARE[predicate]} {a[1]})"
    kind = "uint8_t" if source == "i1" else unsigned_type(source)
    return f"(({kind}){a[0]} {_COMPARE_UNSIGNED[predicate]} ({kind}){a[1]})"


def _compare_vectors(op: Op) -> str | None:
    predicate = _predicate(op)
    if op.name == "arith.cmpi" and op.operands[0].type.element == "i32" and predicate in _COMPARE:
        return f"(ivec)({{0}} {_COMPARE[predicate]} {{1}})"
    form = _COMPARE_FLOATS.get(predicate, "!") if op.operands[0].type.element == "f32" else "!"
    return None if "!(" in form or "{1}" not in form else f"(ivec)({form})"


def _select_vectors(op: Op) -> str | None:
    kind = {"f32": "vec", "i32": "ivec"}.get(op.result.type.element)
    return kind and f"{kind}_select({{0}}, {{1}}, {{2}})"


def _bitcast(op: Op, a: list[str], source: str, target: str) -> str:
    text = a[0]
    if target.startswith("*"):
        return f"({value_type(target)})({text})"
    if source in SMALL_FLOATS:
        text = to_memory(source, text)
    elif source in ("f32", "f64"):
        text = f"bits_of_{value_type(source)}({text})"
    if target in SMALL_FLOATS:
        return from_memory(target, f"({memory_type(target)}){text}")
    return f"{value_type(target)}_of_bits({text})" if target in ("f32", "f64") else f"({value_type(target)}){text}"


def _bitcast_vectors(op: Op) -> str | None:
    casts = {("f32", "i32"): "(ivec){0}", ("i32", "f32"): "(vec){0}", ("i8", "f8E4M3FN"): "vec_of_e4m3({0})"}
    return casts.get((op.operands[0].type.element, op.result.type.element))


def _high_product(op: Op, a: list[str], source: str, target: str) -> str:
    if source == "i64":
        return f"(int64_t)(((unsigned __int128)(uint64_t){a[0]} * (uint64_t){a[1]}) >> 64)"
    return f"(int32_t)(((uint64_t)(uint32_t){a[0]} * (uint32_t){a[1]}) >> 32)"


def _float_to_float(op: Op, a: list[str], source: str, target: str) -> str:
    """A double becomes a float that is rounded again without error: cut off, or odd where it is inexact."""
    text, cut = a[0], "rounding = rtz" in op.text
    if target == "f64" or source == target:
        return f"({value_type(target)}){text}"
    if source == "f64":
        text = f"truncate_float({text})" if cut else f"{'(float)' if target == 'f32' else 'odd_float'}({text})"
    if target not in SMALL_FLOATS:
        return text
    return f"truncate_{SMALL_FLOATS[target]}({text})" if cut else rounded(target, text)


def _clamp(op: Op) -> str:
    return "nan" if "propagateNan = all" in op.text else "num"


def _from_signed(op: Op, a: list[str], source: str, target: str) -> str:
    return f"({value_type(target)}){'-' if source == 'i1' else ''}{a[0]}"


def _from_unsigned(op: Op, a: list[str], source: str, target: str) -> str:
    return f"({value_type(target)}){a[0] if source == 'i1' else f'({unsigned_type(source)}){a[0]}'}"


def _to_narrower(op: Op, a: list[str], source: str, target: str) -> str:
    return f"({a[0]} & 1)" if target == "i1" else f"({value_type(target)}){a[0]}"


def _to_unsigned(op: Op, a: list[str], source: str, target: str) -> str:
    return f"({value_type(target)})({unsigned_type(target)}){a[0]}"


def _same(form: str, elements: str) -> dict[str, str]:
    return dict.fromkeys(elements.split(), form)


def _wrapping(sign: str) -> dict[str, str]:
    return {"i32": f"({{0}} {sign} {{1}})", "i8": f"(({{0}} {sign} {{1}}) << 24 >> 24)"}


# ---- the table ------------------------------------------------------------------------------------------------------
# In vectors an i8 is held in 32 bits with its sign, an i1 as 0 or -1.
_UNKNOWN = Operation()
OPERATIONS: dict[str, Operation] = {
    # floats
    "arith.addf": lanewise("({0} + {1})", {"f32": "({0} + {1})"}, rounds=True, identity="-0.0f"),
    "arith.subf": lanewise("({0} - {1})", {"f32": "({0} - {1})"}, rounds=True),
    "arith.mulf": lanewise("({0} * {1})", {"f32": "({0} * {1})"}, rounds=True),
    "arith.divf": lanewise("({0} / {1})", {"f32": "({0} / {1})"}, rounds=True, expensive=True),
    "arith.remf": lanewise("fmod{f}({0}, {1})", rounds=True, expensive=True),
    "arith.negf": lanewise("(-{0})", {"f32": "(-{0})"}),
    "arith.maxnumf": lanewise("max_num{f}({0}, {1})", {"f32": "vec_max_num({0}, {1})"}, identity="NAN"),
    "arith.minnumf": lanewise("min_num{f}({0}, {1})", {"f32": "vec_min_num({0}, {1})"}, identity="NAN"),
    "arith.maximumf": lanewise("max_nan{f}({0}, {1})", {"f32": "vec_max_nan({0}, {1})"}, identity="-INFINITY"),
    "arith.minimumf": lanewise("min_nan{f}({0}, {1})", {"f32": "vec_min_nan({0}, {1})"}, identity="INFINITY"),
    "arith.cmpf": lanewise(_compare_floats, _compare_vectors),
    "tt.clampf": lanewise(
        lambda op, a, s, t: f"clamp_{_clamp(op)}{_ending(s)}({', '.join(a)})",
        lambda op: f"vec_clamp_{_clamp(op)}({{0}}, {{1}}, {{2}})" if op.result.type.element == "f32" else None,
    ),
    "tt.precise_sqrt": lanewise("sqrt{f}({0})", expensive=True),
    "tt.precise_divf": lanewise("({0} / {1})", expensive=True),
    "tt.extern_elementwise": lanewise(libdevice.call, expensive=True),
    # integers
    "arith.addi": lanewise(_modulo_two("+"), _wrapping("+"), identity="0"),
    "arith.subi": lanewise(_modulo_two("-"), _wrapping("-")),
    "arith.muli": lanewise("({0} * {1})", {"i32": "({0} * {1})"}),
    "arith.andi": lanewise("({0} & {1})", _same("({0} & {1})", "i32 i8 i1"), identity="-1"),
    "arith.ori": lanewise("({0} | {1})", _same("({0} | {1})", "i32 i8 i1"), identity="0"),
    "arith.xori": lanewise("({0} ^ {1})", _same("({0} ^ {1})", "i32 i8 i1"), identity="0"),
    "arith.shli": lanewise("({0} << {1})", {"i32": "({0} << {1})", "i8": "(({0} << {1}) << 24 >> 24)"}),
    "arith.shrsi": lanewise("({0} >> {1})", _same("({0} >> {1})", "i32 i8")),
    "arith.shrui": lanewise(
        "({T})({u[0]} >> {u[1]})",
        {"i8": "((({0} & 255) >> {1}) << 24 >> 24)", "i32": "ivec_shifted_unsigned({0}, {1})"},
    ),
    "arith.divsi": lanewise(_division("divide"), expensive=True),
    "arith.remsi": lanewise(_division("remainder"), expensive=True),
    "arith.divui": lanewise(_division("udivide", unsigned=True), expensive=True),
    "arith.remui": lanewise(_division("uremainder", unsigned=True), expensive=True),
    "arith.maxsi": lanewise("({0} > {1} ? {0} : {1})", {"i32": "ivec_max({0}, {1})"}, identity="INT{bits}_MIN"),
    "arith.minsi": lanewise("({0} < {1} ? {0} : {1})", {"i32": "ivec_min({0}, {1})"}, identity="INT{bits}_MAX"),
    "arith.maxui": lanewise("({u[0]} > {u[1]} ? {0} : {1})", {"i32": "ivec_max_unsigned({0}, {1})"}, identity="0"),
    "arith.minui": lanewise("({u[0]} < {u[1]} ? {0} : {1})", {"i32": "ivec_min_unsigned({0}, {1})"}, identity="-1"),
    "arith.cmpi": lanewise(_compare_integers, _compare_vectors),
    "tt.mulhiui": lanewise(_high_product),
    # choices and conversions
    "arith.select": lanewise("({0} ? {1} : {2})", _select_vectors),
    "arith.extf": lanewise(_float_to_float, _same("{0}", "bf16 f16")),
    "arith.truncf": lanewise(_float_to_float),
    "tt.fp_to_fp": lanewise(_float_to_float, {"f8E4M3FN": "{0}"}),
    "arith.extsi": lanewise(_from_signed, {"i8": "{0}"}),
    "arith.extui": lanewise(_from_unsigned, {"i8": "({0} & 255)"}),
    "arith.trunci": lanewise(_to_narrower, {"i32": "({0} << 24 >> 24)"}),
    "arith.index_cast": lanewise("({T}){0}"),
    "arith.sitofp": lanewise(_from_signed, _same("vec_from_ivec({0})", "i32 i8"), rounds=True),
    "arith.uitofp": lanewise(
        _from_unsigned, {"i8": "vec_from_ivec({0} & 255)", "i32": "vec_from_unsigned({0})"}, rounds=True
    ),
    "arith.fptosi": lanewise("({T}){0}", {"f32": "ivec_from_vec({0})"}),
    "arith.fptoui": lanewise(_to_unsigned),
    "arith.bitcast": lanewise(_bitcast, _bitcast_vectors),
    "tt.bitcast": lanewise(_bitcast, _bitcast_vectors, in_place=True),
    "tt.int_to_ptr": lanewise("({T})({0})"),
    "tt.ptr_to_int": lanewise("(int64_t)({0})"),
    "tt.addptr": lanewise("({0} + {1})", in_place=True),
    "arith.constant": lanewise(""),
    "ub.poison": lanewise("0"),
    # functions
    "math.exp": lanewise(_call("fast_exp", "exp"), {"f32": "vec_exp({0})"}, rounds=True, expensive=True),
    "math.exp2": lanewise(_call("fast_exp2", "exp2"), {"f32": "vec_exp2({0})"}, rounds=True, expensive=True),
    "math.log": lanewise(_call("fast_log", "log"), rounds=True, expensive=True),
    "math.log2": lanewise(_call("fast_log2", "log2"), rounds=True, expensive=True),
    "math.tanh": lanewise(_call("fast_tanh", "tanh"), rounds=True, expensive=True),
    "math.rsqrt": lanewise(_call("fast_rsqrt", "1.0 / sqrt"), rounds=True, expensive=True),
    "math.roundeven": lanewise("rint{f}({0})", rounds=True, expensive=True),
    **{
        f"math.{name}": lanewise(f"{name}{{f}}({{0}})", rounds=True, expensive=True)
        for name in ("sqrt", "sin", "cos", "erf", "log1p", "expm1", "round", "trunc")
    },
    "math.floor": lanewise("floor{f}({0})", rounds=True),
    "math.ceil": lanewise("ceil{f}({0})", rounds=True),
    "math.absf": lanewise("fabs{f}({0})", {"f32": "vec_abs({0})"}, rounds=True),
    "math.absi": lanewise(_call("abs", "llabs")),
    "math.fma": lanewise("fused{f}({0}, {1}, {2})", {"f32": "vec_fused({0}, {1}, {2})"}, rounds=True),
    # elements of an operand at other indices, and memory
    "tt.splat": Operation(Kind.REPEATS, in_place=True),
    "tt.broadcast": Operation(Kind.REPEATS, in_place=True),
    "tt.expand_dims": Operation(Kind.REPEATS, in_place=True),
    "tt.trans": Operation(Kind.PERMUTES, in_place=True),
    "tt.reshape": Operation(Kind.SCATTERS, in_place=True),
    "tt.split": Operation(Kind.SCATTERS, in_place=True),
    "tt.join": Operation(Kind.SCATTERS),
    "tt.cat": Operation(Kind.SCATTERS),
    "tt.gather": Operation(Kind.SCATTERS, expensive=True),
    "tt.make_range": Operation(Kind.COUNTS),
    "tt.load": Operation(Kind.LOADS, expensive=True),
    # written where they stand
    "tt.store": stands("memory.store", writes=True),
    "tt.atomic_rmw": stands("memory.atomic_update", writes=True),
    "tt.atomic_cas": stands("memory.atomic_update", writes=True),
    "tt.atomic_poll": stands("memory.atomic_update", writes=True),
    "tt.histogram": stands("memory.histogram"),
    "tt.reduce": stands("reductions.vectors", "reductions.last_axis", "reductions.outer_axis"),
    "tt.scan": stands("reductions.scan"),
    "tt.unsplat": stands("reductions.unsplat"),
    "tt.map_elementwise": stands("control_flow.map_elementwise"),
    "tt.dot": stands("dot.blocks", "dot.quads", "dot.plain"),
    "tt.dot_scaled": stands("scaled_dot.decoded"),
    "tt.get_program_id": stands("programs.place"),
    "tt.get_num_programs": stands("programs.number"),
    "tt.assert": stands("programs.assertion"),
    "tt.print": stands("programs.print_values"),
    "scf.for": stands("registers.loop_to_memory", "registers.loop", "control_flow.for_", writes=True),
    "scf.while": stands("control_flow.while_", writes=True),
    "scf.if": stands("control_flow.if_", writes=True),
    "tt.call": stands("calls.call", writes=True),
    "tt.return": stands("calls.return_"),
    "cpu.keep": stands("memory.keep"),  # ours (rewrites.py)
    "cf.br": stands("control_flow.jump"),
    "cf.cond_br": stands("control_flow.jump"),
    "cf.label": stands("control_flow.label"),
    # a program is one thread here; what a region ends in is read by the operation that it belongs to
    **dict.fromkeys(("llvm.intr.assume", "gpu.barrier", "ttg.barrier", "tt.debug_barrier"), stands("programs.nothing")),
    **dict.fromkeys(("scf.yield", "scf.condition"), stands("programs.nothing")),
    **dict.fromkeys(
        [f"tt.{name}.return" for name in ("reduce", "scan", "map_elementwise")], stands("programs.nothing")
    ),
}
