"""Paddle's .pdparams files: a pickled dict of NumPy arrays, read without running the pickle.

A pickle is a program for a stack machine, and loading it runs whatever it names: a checkpoint from anybody could delete
files. Here a machine of our own goes through the program. It knows what dicts of arrays need and calls nothing: a call
of an array's constructor becomes a `Call` with its arguments, any other is refused. Nor does it read the arrays: their
bytes stay in the file until rows are asked for. paddle.save writes protocol 4 unless told otherwise.
Format: the opcodes of the standard library's `pickletools`.
"""

import math
import pickletools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy.models.storage import MappedFile, StoredTensor, mapped_rows

ARRAY, DTYPE = "numpy.core.multiarray._reconstruct", "numpy.dtype"
ALLOWED = {  # what a pickled array names -> how we call it; NumPy 2 renamed its insides
    ARRAY: ARRAY,
    "numpy._core.multiarray._reconstruct": ARRAY,
    DTYPE: DTYPE,
    "numpy.ndarray": "numpy.ndarray",
}
DTYPES: dict[str, tuple[np.dtype, str]] = {  # Paddle keeps bfloat16 in uint16
    "f4": (np.dtype(np.float32), "float32"),
    "f2": (np.dtype(np.float16), "float16"),
    "u2": (np.dtype(np.uint16), "bfloat16"),
}
LENGTH_BYTES = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
SHORT = 1024  # longer strings of bytes are not read
NO_WEIGHTS = ("StructuredToParameterName@@",)  # paddle.save's list of internal names


@dataclass
class Name:
    """A function or class that the pickle names."""

    text: str


@dataclass
class Call:
    """What would have been made by calling `name`, and by giving the result `state`."""

    name: str
    arguments: tuple
    state: Any = None


@dataclass
class Stretch:
    """Bytes of the file."""

    offset: int
    length: int


def read_pdparams(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises FileNotFoundError or ValueError, naming the file, if it is missing or corrupt, or
    holds anything else than arrays."""
    file = MappedFile(path)
    try:
        content = _interpret(file)
        if not isinstance(content, dict):
            raise ValueError(f"expected a dict of arrays, found {type(content).__name__}")
        return {name: _tensor(file, name, value) for name, value in content.items() if name not in NO_WEIGHTS}
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path}: {error}; only arrays as paddle.save writes them, with protocol 4, are read: download it again,"
            " or save it anew"
        ) from None


def _tensor(file: MappedFile, name: Any, value: Any) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(value, Call) or value.name != ARRAY:
        raise ValueError(f"expected arrays by name, found a {type(value).__name__} named {name!r:.80}")
    _, shape, dtype, is_fortran, data = value.state
    kind, byte_order = dtype.arguments[0], dtype.state[1]
    if kind not in DTYPES or byte_order != "<" or is_fortran:
        raise ValueError(f"{name!r} is an array of {byte_order}{kind}; weights can be < {', '.join(DTYPES)}, C order")
    numpy_dtype, dtype_name = DTYPES[kind]
    nbytes = math.prod(shape) * numpy_dtype.itemsize
    if nbytes != data.length or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{name!r} of shape {list(shape)} takes {nbytes} bytes, but has {data.length}")
    rows = partial(mapped_rows, file, data.offset, shape, numpy_dtype)
    return StoredTensor(shape, dtype_name, dtype_name, nbytes, rows)


class _Program:
    """The pickle as pickletools reads it. Of long strings of bytes it gets nothing but the length."""

    def __init__(self, file: MappedFile):
        self.file = file
        self.position = 0

    def tell(self) -> int:
        return self.position

    def read(self, length: int) -> Any:
        start, self.position = self.position, min(self.position + length, self.file.size)
        found = self.position - start
        return self.file.buffer[start : self.position] if found <= SHORT else range(found)

    def readline(self) -> Any:
        end = self.file.buffer.find(b"\n", self.position) + 1
        return self.read((end or self.file.size) - self.position)


def _interpret(file: MappedFile) -> Any:
    """What the pickle describes, made of dicts, tuples, numbers, str, `Name`, `Call` and `Stretch`."""
    machine = _Machine()
    for opcode, argument, position in pickletools.genops(_Program(file)):  # type: ignore[arg-type]
        machine.step(opcode.name, argument, position or 0)
    return machine.stack.pop()


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any, position: int) -> None:
        """Do one instruction, the one at byte `position`. Raises ValueError for those that no dict of arrays needs."""
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(CONSTANTS[opcode])
            case "EMPTY_DICT":
                stack.append({})
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(Stretch(position + 1 + LENGTH_BYTES[opcode], len(argument)))
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "SETITEM" | "SETITEMS":
                items = self._pop_to_mark() if opcode == "SETITEMS" else [stack.pop(-2), stack.pop()]
                stack[-1].update(zip(items[::2], items[1::2]))
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                self.memo[len(self.memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case _:
                self._call(opcode, argument, position)

    def _call(self, opcode: str, argument: Any, position: int) -> None:
        """Note down a call, or refuse it: here other readers run code."""
        stack = self.stack
        match opcode:
            case "GLOBAL" | "STACK_GLOBAL":
                name = f"{stack.pop(-2)}.{stack.pop()}" if opcode == "STACK_GLOBAL" else argument.replace(" ", ".")
                if name not in ALLOWED:
                    raise ValueError(f"refused to run {name}, which the pickle asks for at byte {position}")
                stack.append(Name(ALLOWED[name]))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(Call(function.text, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case _:
                raise ValueError(f"refused the instruction {opcode} at byte {position}, which no array needs")

    def _pop_to_mark(self) -> list[Any]:
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items
