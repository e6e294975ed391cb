"""libdevice's functions by name: the C of each. To add one, add a row, and what libm has not to libdevice.h.

Triton's `libdevice` asks for CUDA's symbols, `__nv_` and a name of the table. In a form {0}, {1}, ... are the operands,
and {a} is all of them. How right they are:

    integers, bits, conversions, and all that names its rounding (_rn, _rz, _rd, _ru)   in every bit
    libm's and prelude.h's functions                                                    4 units in the last place
    libdevice.h's functions of doubles (floats are computed as doubles)                 10 units
    fast_...                                                                            as the accurate function
"""

from __future__ import annotations

import re
from itertools import product

from .ttir import Op

_BOTH = ("f", "")  # the ending of a float's function, and of a double's
_LIBM = """acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 fabs fdim floor
fma fmax fmin fmod hypot ldexp lgamma log log10 log1p log2 logb nearbyint nextafter pow remainder rint round scalbn sin
sinh sqrt tan tanh tgamma trunc""".split()
_OF_DOUBLES = """cospi cyl_bessel_i0 cyl_bessel_i1 erfcinv erfcx erfinv exp10 j0 j1 jn norm3d norm4d normcdf normcdfinv
powi rcbrt rhypot rnorm3d rnorm4d sinpi y0 y1 yn""".split()
_ARITHMETIC = {"add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})"}
_ARITHMETIC |= {"rcp": "(1 / {0})", "sqrt": "sqrt({0})"}
_DIRECTIONS = ("rz", "rd", "ru")  # toward zero, down, up
_TO_INTEGER = {"rn": "rint", "rz": "trunc", "rd": "floor", "ru": "ceil"}


def _rounded_arithmetic() -> dict[str, str]:
    """`fadd_rn`, `ddiv_ru`, ...; of an fma, `fmaf_rz` and `fma_rz`."""
    rows = {f"fma{f}_rn": f"fma{f}({{a}})" for f in _BOTH}
    for (name, form), kind in product(_ARITHMETIC.items(), "fd"):
        rows[f"{kind}{name}_rn"] = form.replace("sqrt", "sqrtf") if kind == "f" else form
        rows |= {f"{kind}{name}_{way}": f"nv_{kind}{name}_{way}({{a}})" for way in _DIRECTIONS}
    return rows | {f"fma{f}_{way}": f"nv_fma{f}_{way}({{a}})" for f, way in product(_BOTH, _DIRECTIONS)}


def _conversions() -> dict[str, str]:
    """Between integers and floats. To integers they saturate, as CUDA's do."""
    rows = {"int2double_rn": "(double){0}", "uint2double_rn": "(double)(uint32_t){0}"}
    integers = {"int": "int32_t", "uint": "uint32_t", "ll": "int64_t", "ull": "uint64_t"}
    for (name, type_), real in product(integers.items(), ("float", "double")):
        for way, function in _TO_INTEGER.items():
            sign_bit_of_nan = int(real == "double" or "ll" in name)
            rows[f"{real}2{name}_{way}"] = f"nv_to_{type_}({function}({{0}}), {sign_bit_of_nan})"
        if real == "float" or "ll" in name:
            rows[f"{name}2{real}_rn"] = f"({real})({type_}){{0}}"
            rows |= {f"{name}2{real}_{way}": f"nv_{real}_from_{type_}_{way}({{0}})" for way in _DIRECTIONS}
    return rows | {f"double2float_{way}": f"nv_double2float_{way}({{0}})" for way in _DIRECTIONS}


_BITS = {
    "clz": "({0} == 0 ? 32 : __builtin_clz({0}))",
    "clzll": "({0} == 0 ? 64 : __builtin_clzll({0}))",
    "popc": "__builtin_popcount({0})",
    "popcll": "__builtin_popcountll({0})",
    "ffs": "__builtin_ffs({0})",
    "ffsll": "__builtin_ffsll({0})",
    "brev": "(int32_t)(nv_reversed_bits((uint32_t){0}) >> 32)",
    "brevll": "(int64_t)nv_reversed_bits({0})",
    "byte_perm": "nv_byte_perm({a})",
    "mulhi": "(int32_t)((int64_t){0} * {1} >> 32)",
    "umulhi": "(int32_t)((uint64_t)(uint32_t){0} * (uint32_t){1} >> 32)",
    "mul64hi": "(int64_t)((__int128){0} * {1} >> 64)",
    "umul64hi": "(int64_t)((unsigned __int128)(uint64_t){0} * (uint64_t){1} >> 64)",
    "mul24": "(({0} << 8 >> 8) * ({1} << 8 >> 8))",
    "umul24": "(({0} & 0xffffff) * ({1} & 0xffffff))",
    "sad": "(({0} > {1} ? {0} - {1} : {1} - {0}) + {2})",
    "usad": "(((uint32_t){0} > (uint32_t){1} ? {0} - {1} : {1} - {0}) + {2})",
    "hadd": "(int32_t)((int64_t){0} + {1} >> 1)",
    "uhadd": "(int32_t)((uint64_t)(uint32_t){0} + (uint32_t){1} >> 1)",
    "rhadd": "(int32_t)((int64_t){0} + {1} + 1 >> 1)",
    "urhadd": "(int32_t)((uint64_t)(uint32_t){0} + (uint32_t){1} + 1 >> 1)",
    "abs": "abs({0})",
    "llabs": "llabs({0})",
    "float_as_int": "(int32_t)bits_of_float({0})",
    "float_as_uint": "(int32_t)bits_of_float({0})",
    "int_as_float": "float_of_bits({0})",
    "uint_as_float": "float_of_bits({0})",
    "double_as_longlong": "(int64_t)bits_of_double({0})",
    "longlong_as_double": "double_of_bits({0})",
    "hiloint2double": "double_of_bits((uint64_t){0} << 32 | (uint32_t){1})",
    "double2hiint": "(int32_t)(bits_of_double({0}) >> 32)",
    "double2loint": "(int32_t)bits_of_double({0})",
}
_PREDICATES = {"isnan": "({0} != {0})", "isinf": "(isinf({0}) != 0)", "signbit": "(signbit({0}) != 0)"}
_WHOLE = {"llrint": "nv_to_int64_t(rint({0}), 1)", "llround": "nv_to_int64_t(round({0}), 1)"}
_WHOLE |= {"ilogb": "({0} == 0 || {0} != {0} ? INT32_MIN : ilogb({0}))"}
_FAST = ("cos", "exp", "log", "log10", "log2", "pow", "sin", "tan")  # as `fast_cosf`

_FLOATS = {f"{name}f": f"{name}f({{a}})" for name in _LIBM}
_FLOATS |= {f"{name}f": f"fast_{name}({{a}})" for name in ("exp", "exp2", "log", "log2", "rsqrt", "tanh")}  # prelude.h
FORMS: dict[str, str] = {
    **_FLOATS,
    **{name: f"{name}({{a}})" for name in _LIBM},
    **{f"{name}f": f"(float)nv_{name}({{a}})" for name in _OF_DOUBLES},
    **{name: f"nv_{name}({{a}})" for name in _OF_DOUBLES},
    **{name + ending: form for (name, form), ending in product(_WHOLE.items(), _BOTH)},
    **{name + ending: form for (name, form), ending in product(_PREDICATES.items(), "fd")},
    **{f"fast_{name}f": _FLOATS[f"{name}f"] for name in _FAST},
    **dict.fromkeys(("finitef", "isfinited"), "(isfinite({0}) != 0)"),
    **_rounded_arithmetic(),
    **_conversions(),
    **_BITS,
    "double2float_rn": "(float){0}",
    "fast_exp10f": "(float)nv_exp10({0})",
    "fast_fdividef": "({0} / {1})",
    "frsqrt_rn": "(float)(1 / sqrt((double){0}))",  # right in every bit: tried for all floats of [1, 4)
    "rcp64h": "nv_upper_half(1 / nv_upper_half({0}))",
    "e4b15_to_float": "nv_e4b15_to_float({0})",
    "float_to_e4b15": "(int8_t)nv_float_to_e4b15({0})",
    "rsqrt": "(1 / sqrt({0}))",
    "saturatef": "({0} > 0 ? {0} < 1 ? {0} : 1 : 0)",
}


def call(op: Op, operands: list[str], source: str, target: str) -> str:
    """C for one element of tt.extern_elementwise. NotImplementedError names a function that is not in the table."""
    symbol = re.search(r'symbol = "([^"]*)"', op.text).group(1)  # type: ignore[union-attr]
    form = FORMS.get(symbol.removeprefix("__nv_"))
    if form is None:
        raise NotImplementedError(f"the libdevice function {symbol}")
    return form.format(*operands, a=", ".join(operands))
