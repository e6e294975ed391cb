"""Element types: how C holds them, in values and in memory, and their constants.

bf16, f16 and fp8 numbers are held in C floats and rounded to their type after each operation, as a GPU does. Behind a
pointer they are codes of 16 or 8 bits, which functions of prelude.h, named by the type's suffix, turn into floats.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from .ttir import Op


class Element(NamedTuple):
    value: str  # C type in a variable or a local array
    memory: str  # C type behind a pointer
    code: str  # `struct` code of a kernel's argument
    small: str = ""  # a small float's suffix in prelude.h


ELEMENTS = {
    "i1": Element("_Bool", "int8_t", "b"),
    "i8": Element("int8_t", "int8_t", "b"),
    "i16": Element("int16_t", "int16_t", "h"),
    "i32": Element("int32_t", "int32_t", "i"),
    "i64": Element("int64_t", "int64_t", "q"),
    "index": Element("int64_t", "int64_t", "q"),
    "f32": Element("float", "float", "f"),
    "f64": Element("double", "double", "d"),
    "bf16": Element("float", "uint16_t", "f", "bf16"),
    "f16": Element("float", "uint16_t", "f", "f16"),
    "f8E4M3FN": Element("float", "uint8_t", "", "e4m3"),
    "f8E5M2": Element("float", "uint8_t", "", "e5m2"),
    "f8E4M3FNUZ": Element("float", "uint8_t", "", "e4m3fnuz"),
    "f8E5M2FNUZ": Element("float", "uint8_t", "", "e5m2fnuz"),
}
_C_BYTES = {"_Bool": 1, "int8_t": 1, "int16_t": 2, "int32_t": 4, "int64_t": 8, "float": 4, "double": 8}
FUSED = {"f32": "fusedf", "f64": "fused"}  # the calls of prelude.h that round a * b + c once
SMALL_FLOATS = {name: element.small for name, element in ELEMENTS.items() if element.small}


def _known(element: str) -> Element:
    if element not in ELEMENTS:
        raise NotImplementedError(f"element type {element}")
    return ELEMENTS[element]


def value_type(element: str) -> str:
    """The C type of a value; a pointer points at the memory type."""
    if element.startswith("**"):
        return "int64_t*"  # a pointer to pointers: addresses are read as integers and cast where used
    return memory_type(element[1:]) + "*" if element.startswith("*") else _known(element).value


def memory_type(element: str) -> str:
    return "int64_t" if element.startswith("*") else _known(element).memory


def array_type(element: str) -> str:
    """In local arrays truth values are as wide as floats: gcc does not vectorise loops that read arrays of _Bool."""
    return "int32_t" if element == "i1" else value_type(element)


def bytes_in_array(element: str) -> int:
    """Of one element of a local array. (A truth value's is counted as 1: where arrays live has depended on it.)"""
    return 8 if element.startswith("*") else _C_BYTES[_known(element).value]


def unsigned_type(element: str) -> str:
    return "_Bool" if element == "i1" else f"u{value_type(element)}"


def constant_declaration(element: str, name: str) -> str:
    """`const float x`, `float* const p`"""
    return f"{value_type(element)} const {name}" if element.startswith("*") else f"const {value_type(element)} {name}"


def is_float(element: str) -> bool:
    return _known(element).value in ("float", "double")


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


# ---- constants ------------------------------------------------------------------------------------------------------
def constant(op: Op, element: str) -> str:
    """The value of arith.constant: `dense<...>` of one repeated element, or a scalar."""
    dense = re.search(r"dense<(.*?)>", op.text)
    text = dense.group(1) if dense else op.text.split()[1 if "{" not in op.text else -3]
    if text.startswith("["):
        raise NotImplementedError("a constant tensor with different elements")
    if text in ("true", "false"):
        return str(int(text == "true"))
    if is_float(element):
        if text.startswith("0x"):  # MLIR prints few digits of a small float
            return from_memory(element, text) if element in SMALL_FLOATS else _literal_of_bits(int(text, 16), element)
        return rounded(element, _float_literal(float(text), element))
    if ELEMENTS[element].value == "int64_t":
        return f"INT64_C({text})" if text != str(-(2**63)) else "INT64_MIN"
    return text if text != str(-(2**31)) else "INT32_MIN"


def _literal_of_bits(bits: int, element: str) -> str:
    code, size = ("<f", 4) if element == "f32" else ("<d", 8)
    return _float_literal(struct.unpack(code, bits.to_bytes(size, "little"))[0], element)


def _float_literal(value: float, element: str) -> str:
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = value.hex() + ("" if element == "f64" else "f")
    return f"({text})" if text.startswith("-") else text
