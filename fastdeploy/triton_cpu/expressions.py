"""Scalar arithmetic: one TTIR operation on one element -> one C expression.

Every function here maps strings to strings and knows nothing of loops. Three rules keep the arithmetic strict:

* bf16, f16 and fp8 values are held in C floats and rounded to their type after each operation, as a GPU does.
* Signed overflow wraps (the C is compiled with -fwrapv), comparisons keep NaN's meaning, division is exact.
* The C compiler may not contract a*b+c (-ffp-contract=off): loops.py asks for each fma by itself, so that the
  same kernel source gives the same bits however it is tiled.
"""

from __future__ import annotations

import re
import struct

from .ttir import Op

# C types that hold a value in a register or a local array, and in memory behind a pointer.
VALUE_TYPES = {
    "i1": "_Bool",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "index": "int64_t",
    "f32": "float",
    "f64": "double",
    "bf16": "float",
    "f16": "float",
    "f8E4M3FN": "float",
    "f8E5M2": "float",
}
MEMORY_TYPES = VALUE_TYPES | {
    "i1": "int8_t",
    "bf16": "uint16_t",
    "f16": "uint16_t",
    "f8E4M3FN": "uint8_t",
    "f8E5M2": "uint8_t",
}
# The atomic updates of prelude.h
_INTEGER_ATOMICS = ("add", "max", "min", "umax", "umin", "and", "or", "xor", "exch")
ATOMICS = {"i32": _INTEGER_ATOMICS, "i64": _INTEGER_ATOMICS, "f32": ("fadd", "max", "min", "exch")}
ATOMICS |= {"f64": ATOMICS["f32"], "f16": ("fadd", "exch"), "bf16": ("fadd", "exch")}
# `struct` codes of kernel arguments
ARGUMENT_CODES = {
    "i1": "b",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "f32": "f",
    "f64": "d",
    "bf16": "f",
    "f16": "f",
}
FUSED = {"f32": "fusedf", "f64": "fused"}  # the calls of prelude.h that round a * b + c once
SMALL_FLOATS = {"bf16": "bf16", "f16": "f16", "f8E4M3FN": "e4m3", "f8E5M2": "e5m2"}  # -> suffix in prelude.h
BYTES = {
    "i1": 1,
    "i8": 1,
    "i16": 2,
    "i32": 4,
    "i64": 8,
    "index": 8,
    "f32": 4,
    "f64": 8,
    "bf16": 4,
    "f16": 4,
    "f8E4M3FN": 4,
    "f8E5M2": 4,
}


def value_type(element: str) -> str:
    """The C type of a value; a pointer points at the memory type."""
    if element.startswith("**"):
        return "int64_t*"  # a pointer to pointers: addresses are read as integers and cast where used
    return memory_type(element[1:]) + "*" if element.startswith("*") else _known(VALUE_TYPES, element)


def array_type(element: str) -> str:
    """In local arrays truth values are as wide as floats: gcc does not vectorise loops that read arrays of _Bool."""
    return "int32_t" if element == "i1" else value_type(element)


def constant_declaration(element: str, name: str) -> str:
    """`const float x`, `float* const p`"""
    return f"{value_type(element)} const {name}" if element.startswith("*") else f"const {value_type(element)} {name}"


def memory_type(element: str) -> str:
    return "int64_t" if element.startswith("*") else _known(MEMORY_TYPES, element)


def _known(table: dict[str, str], element: str) -> str:
    if element not in table:
        raise NotImplementedError(f"element type {element}")
    return table[element]


def from_memory(element: str, text: str) -> str:
    if element.startswith("*"):
        return f"({value_type(element)})({text})"
    return f"{SMALL_FLOATS[element]}_to_float({text})" if element in SMALL_FLOATS else text


def to_memory(element: str, text: str) -> str:
    if element.startswith("*"):
        return f"(int64_t)({text})"
    return f"float_to_{SMALL_FLOATS[element]}({text})" if element in SMALL_FLOATS else text


def rounded(element: str, text: str) -> str:
    """`text`, a float, rounded to a small float type and held in a float again."""
    return f"round_{SMALL_FLOATS[element]}({text})" if element in SMALL_FLOATS else text


def constant(op: Op, element: str) -> str:
    """The value of arith.constant: `dense<...>` of one repeated element, or a scalar."""
    dense = re.search(r"dense<(.*?)>", op.text)
    text = dense.group(1) if dense else op.text.split()[1 if "{" not in op.text else -3]
    if text.startswith("["):
        raise NotImplementedError("a constant tensor with different elements")
    if text in ("true", "false"):
        return str(int(text == "true"))
    if text.startswith("0x") and element in _FLOAT_BITS:
        return _float_literal(_from_bits(int(text, 16), element), element)
    if element in _FLOAT_BITS:
        return rounded(element, _float_literal(float(text), element))  # MLIR prints few digits of a small float
    if element == "i64" or element == "index":
        return f"INT64_C({text})" if text != str(-(2**63)) else "INT64_MIN"
    return text if text != str(-(2**31)) else "INT32_MIN"


_FLOAT_BITS = {
    "f32": ("<f", 4),
    "f64": ("<d", 8),
    "f16": ("<e", 2),
    "bf16": ("", 2),
    "f8E4M3FN": ("", 1),
    "f8E5M2": ("", 1),
}


def _from_bits(bits: int, element: str) -> float:
    if element == "bf16":
        bits, element = bits << 16, "f32"
    if element == "f8E5M2":
        bits, element = bits << 8, "f16"
    if element == "f8E4M3FN":
        magnitude = bits & 0x7F
        value = (
            float("nan")
            if magnitude == 0x7F
            else (magnitude * 2.0**-9 if magnitude < 8 else (8 + magnitude % 8) * 2.0 ** (magnitude // 8 - 10))
        )
        return -value if bits & 0x80 else value
    code, size = _FLOAT_BITS[element]
    return struct.unpack(code, bits.to_bytes(size, "little"))[0]


def _float_literal(value: float, element: str) -> str:
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = value.hex() + ("" if element == "f64" else "f")
    return f"({text})" if text.startswith("-") else text


_INFIX = {
    "addf": "+",
    "subf": "-",
    "mulf": "*",
    "divf": "/",
    "addi": "+",
    "subi": "-",
    "muli": "*",
    "andi": "&",
    "ori": "|",
    "xori": "^",
    "shli": "<<",
    "shrsi": ">>",
}
_INFIX_UNSIGNED = {"shrui": ">>"}
_DIVISIONS = {"divsi": "divide", "remsi": "remainder", "divui": "udivide", "remui": "uremainder"}
_CHOICES = {"maxsi": ">", "minsi": "<"}
_CHOICES_UNSIGNED = {"maxui": ">", "minui": "<"}
_FLOAT_CHOICES = {"maxnumf": "max_num", "minnumf": "min_num", "maximumf": "max_nan", "minimumf": "min_nan"}
COMPARE = {"eq": "==", "ne": "!=", "slt": "<", "sle": "<=", "sgt": ">", "sge": ">="}
_COMPARE_UNSIGNED = {"ult": "<", "ule": "<=", "ugt": ">", "uge": ">="}
# C's comparisons are the ordered ones (false on NaN); "une" is C's !=, and the other unordered ones negate.
COMPARE_FLOAT = {
    "oeq": "{0} == {1}",
    "ogt": "{0} > {1}",
    "oge": "{0} >= {1}",
    "olt": "{0} < {1}",
    "ole": "{0} <= {1}",
    "one": "({0} < {1}) | ({0} > {1})",
    "une": "{0} != {1}",
    "ueq": "!(({0} < {1}) | ({0} > {1}))",
    "ugt": "!({0} <= {1})",
    "uge": "!({0} < {1})",
    "ult": "!({0} >= {1})",
    "ule": "!({0} > {1})",
    "ord": "({0} == {0}) & ({1} == {1})",
    "uno": "({0} != {0}) | ({1} != {1})",
    "false": "0",
    "true": "1",
}
_CALLS = {
    "exp": "fast_exp",
    "exp2": "fast_exp2",
    "log": "fast_log",
    "log2": "fast_log2",
    "tanh": "fast_tanh",
    "sqrt": "sqrtf",
    "rsqrt": "fast_rsqrt",
    "sin": "sinf",
    "cos": "cosf",
    "erf": "erff",
    "absf": "fabsf",
    "floor": "floorf",
    "ceil": "ceilf",
    "round": "roundf",
    "roundeven": "rintf",
    "trunc": "truncf",
    "log1p": "log1pf",
    "expm1": "expm1f",
    "absi": "abs",
}
_CALLS_F64 = {"rsqrt": "1.0 / sqrt", "absf": "fabs", "roundeven": "rint", "absi": "llabs"}


def expression(op: Op, arguments: list[str], source: str, target: str) -> str:
    """C for one element of `op`; `source` and `target` are the element types of its operands and its result.

    Raises KeyError for an operation that is not scalar arithmetic.
    """
    dialect, _, name = op.name.partition(".")
    if name in _DIVISIONS:
        return _division(name, arguments, source)
    if name in _INFIX or name in _INFIX_UNSIGNED or name in _CHOICES or name in _CHOICES_UNSIGNED:
        return _integer_or_float(name, arguments, source)
    if name in _FLOAT_CHOICES:
        return f"{_FLOAT_CHOICES[name]}{_suffix(source)}({arguments[0]}, {arguments[1]})"
    if name == "remf":
        return rounded(source, f"fmod{_suffix(source)}({arguments[0]}, {arguments[1]})")
    if name in ("cmpi", "cmpf"):
        return _comparison(op, arguments, source)
    if dialect == "math" and name in _CALLS:
        return rounded(target, _call(name, arguments, source))
    special = _SPECIAL.get(op.name)
    if special:
        return special(op, arguments, source, target)
    return _CONVERSIONS[name](arguments[0], source, target)


def _suffix(element: str) -> str:
    return "" if element == "f64" else "f"


def _integer_or_float(name: str, arguments: list[str], source: str) -> str:
    a, b = arguments
    unsigned = f"u{VALUE_TYPES[source]}" if source.startswith("i") and source not in ("i1", "index") else "uint8_t"
    if name in _INFIX:
        if source == "i1" and name in ("addi", "subi"):
            return f"({a} ^ {b})"
        return rounded(source, f"({a} {_INFIX[name]} {b})")
    if name in _INFIX_UNSIGNED:
        return f"({VALUE_TYPES[source]})(({unsigned}){a} {_INFIX_UNSIGNED[name]} ({unsigned}){b})"
    if name in _CHOICES:
        return f"({a} {_CHOICES[name]} {b} ? {a} : {b})"
    return f"(({unsigned}){a} {_CHOICES_UNSIGNED[name]} ({unsigned}){b} ? {a} : {b})"


def _division(name: str, arguments: list[str], source: str) -> str:
    """Calls of prelude.h that do not trap where a machine's division would; of i32 for all narrower types."""
    width = "i64" if source in ("i64", "index") else "i32"
    if name.endswith("ui"):
        arguments = [_unsigned_operand(a, source) for a in arguments]
    return f"({VALUE_TYPES[source]}){_DIVISIONS[name]}_{width}({', '.join(arguments)})"


def _comparison(op: Op, arguments: list[str], source: str) -> str:
    predicate = op.text.split()[1].rstrip(",")
    a, b = arguments
    if op.name == "arith.cmpf":
        return f"({COMPARE_FLOAT[predicate].format(a, b)})"
    if predicate in COMPARE:
        if source == "i1" and predicate not in ("eq", "ne"):  # as signed numbers, true is -1
            a, b = f"-{a}", f"-{b}"
        return f"({a} {COMPARE[predicate]} {b})"
    unsigned = "uint8_t" if source == "i1" else f"u{VALUE_TYPES[source]}"
    return f"(({unsigned}){a} {_COMPARE_UNSIGNED[predicate]} ({unsigned}){b})"


def _call(name: str, arguments: list[str], source: str) -> str:
    function = _CALLS[name]
    if source == "f64":
        function = _CALLS_F64.get(name, name)
    elif source == "i64" and name == "absi":
        function = "llabs"
    return f"{function}({', '.join(arguments)})"


def _extern(op: Op, arguments: list[str], source: str, target: str) -> str:
    """libdevice functions are those of C's libm with a prefix: __nv_tanhf -> tanhf."""
    symbol = re.search(r'symbol = "(?:__nv_)?(?:fast_)?(\w+)"', op.text).group(1)  # type: ignore[union-attr]
    function = symbol.removesuffix("f") if source == "f32" else symbol
    if function not in _LIBM:
        raise NotImplementedError(f"the libdevice function {symbol}")
    if function in ("isnan", "isinf", "isfinite"):  # C's macros for any type
        return f"({function}({arguments[0]}) != 0)"
    return f"{_FAST.get(symbol, symbol)}({', '.join(arguments)})"


_LIBM = set(
    """acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 fabs fdim floor
    fma fmax fmin fmod hypot isfinite isinf isnan lgamma log log10 log1p log2 nearbyint pow remainder rint round rsqrt
    sin sinh sqrt tan tanh tgamma trunc""".split()
)
_FAST = {
    "tanhf": "fast_tanh",
    "expf": "fast_exp",
    "exp2f": "fast_exp2",
    "logf": "fast_log",
    "log2f": "fast_log2",
    "rsqrtf": "fast_rsqrt",
    "rsqrt": "1.0 / sqrt",
    "fmaf": "fusedf",
    "fma": "fused",
}


def _bitcast(op: Op, arguments: list[str], source: str, target: str) -> str:
    a = arguments[0]
    if target.startswith("*"):
        return f"({value_type(target)})({a})"
    if source in SMALL_FLOATS:
        a = to_memory(source, a)
    elif source == "f32":
        a = f"bits_of_float({a})"
    elif source == "f64":
        a = f"bits_of_double({a})"
    if target in SMALL_FLOATS:
        return from_memory(target, f"({MEMORY_TYPES[target]}){a}")
    if target == "f32":
        return f"float_of_bits({a})"
    return f"double_of_bits({a})" if target == "f64" else f"({VALUE_TYPES[target]}){a}"


def _high_product(op: Op, arguments: list[str], source: str, target: str) -> str:
    a, b = arguments
    if source == "i64":
        return f"(int64_t)(((unsigned __int128)(uint64_t){a} * (uint64_t){b}) >> 64)"
    return f"(int32_t)(((uint64_t)(uint32_t){a} * (uint32_t){b}) >> 32)"


def _float_to_float(a: str, source: str, target: str) -> str:
    return rounded(target, f"(float){a}" if source == "f64" else a) if target != "f64" else f"(double){a}"


def _rounded_as_asked(op: Op, arguments: list[str], source: str, target: str) -> str:
    if "rounding = rtz" in op.text and target in SMALL_FLOATS:
        return f"truncate_{SMALL_FLOATS[target]}({arguments[0]})"
    return _float_to_float(arguments[0], source, target)


_SPECIAL = {
    "arith.select": lambda op, a, s, t: f"({a[0]} ? {a[1]} : {a[2]})",
    "arith.negf": lambda op, a, s, t: f"(-{a[0]})",
    "math.fma": lambda op, a, s, t: rounded(t, f"fused{_suffix(t)}({a[0]}, {a[1]}, {a[2]})"),
    "math.absi": lambda op, a, s, t: f"({a[0]} < 0 ? -{a[0]} : {a[0]})",
    "tt.precise_sqrt": lambda op, a, s, t: f"sqrt{_suffix(s)}({a[0]})",
    "tt.precise_divf": lambda op, a, s, t: f"({a[0]} / {a[1]})",
    "tt.clampf": lambda op, a, s, t: (
        f"clamp_nan{_suffix(s)}({', '.join(a)})"
        if "propagateNan = all" in op.text
        else f"clamp_num{_suffix(s)}({', '.join(a)})"
    ),
    "tt.fp_to_fp": _rounded_as_asked,
    "tt.mulhiui": _high_product,
    "tt.extern_elementwise": _extern,
    "tt.bitcast": _bitcast,
    "arith.bitcast": _bitcast,
    "tt.int_to_ptr": lambda op, a, s, t: f"({value_type(t)})({a[0]})",
    "tt.ptr_to_int": lambda op, a, s, t: f"(int64_t)({a[0]})",
    "ub.poison": lambda op, a, s, t: "0",
}


def _unsigned_operand(a: str, source: str) -> str:
    return a if source == "i1" else f"(u{VALUE_TYPES[source]}){a}"


_CONVERSIONS = {
    "extf": _float_to_float,
    "truncf": _float_to_float,
    "extsi": lambda a, s, t: f"({VALUE_TYPES[t]}){'-' if s == 'i1' else ''}{a}",
    "extui": lambda a, s, t: f"({VALUE_TYPES[t]}){_unsigned_operand(a, s)}",
    "trunci": lambda a, s, t: f"({a} & 1)" if t == "i1" else f"({VALUE_TYPES[t]}){a}",
    "index_cast": lambda a, s, t: f"({VALUE_TYPES[t]}){a}",
    "sitofp": lambda a, s, t: rounded(t, f"({VALUE_TYPES[t]}){'-' if s == 'i1' else ''}{a}"),
    "uitofp": lambda a, s, t: rounded(t, f"({VALUE_TYPES[t]}){_unsigned_operand(a, s)}"),
    "fptosi": lambda a, s, t: f"({VALUE_TYPES[t]}){a}",
    "fptoui": lambda a, s, t: f"({VALUE_TYPES[t]})(u{VALUE_TYPES[t]}){a}",
}
