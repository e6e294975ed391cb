"""Paddle's .pdparams files: a pickled dict of NumPy arrays, read without running the pickle.

A pickle is a program for a stack machine, and loading it runs whatever it names: a checkpoint from anybody could delete
files. Here a machine of our own goes through the program. It knows what dicts of arrays need and calls nothing: a call
of an array's constructor becomes a `Call` with its arguments, any other is refused. Nor does it read the arrays: their
bytes stay in the file until rows are asked for. paddle.save writes protocol 4 unless told otherwise.
Format: the opcodes of the standard library's `pickletools`.
"""

import math
import pickletools
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy.models.storage import MappedFile, StoredTensor, mapped_rows, tensor_shape

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
# What no dict of arrays exceeds. An array takes some fifty instructions; picklers store 1,000 items of a dict at once.
INSTRUCTIONS, STACK, TUPLE, INTEGER = 2_000_000, 10_000, 32, 1 << 63


@dataclass(eq=False, repr=False)  # neither may go into what a file nests
class Name:
    """A function or class that the pickle names."""

    text: str


@dataclass(eq=False, repr=False)
class Call:
    """What would have been made by calling `name`, and by giving the result `state`."""

    name: str
    arguments: tuple
    state: Any = None


@dataclass(eq=False, repr=False)
class Stretch:
    """Bytes of the file."""

    offset: int
    length: int


KINDS = {
    type(None): "nothing",
    Stretch: "bytes",
    Call: "a call",
    Name: "a function's name",
    int: "an int",
    object: "a value",
}


def read_pdparams(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises FileNotFoundError or ValueError, naming the file, if it is missing or corrupt, or
    holds anything else than arrays."""
    file = MappedFile(path)
    try:
        content = _interpret(file)
        if not isinstance(content, dict):
            raise ValueError(f"expected a dict of arrays, found {_kind(content)}")
        return {name: _tensor(file, name, value) for name, value in content.items() if name not in NO_WEIGHTS}
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; only arrays as paddle.save writes them, with protocol 4, are read: download it again,"
            " or save it anew"
        ) from None


def _kind(value: Any) -> str:
    """For errors, which say of a value no more: it may hold itself, or be nested without end."""
    return KINDS.get(type(value), f"a {type(value).__name__}")


def _tensor(file: MappedFile, name: str, value: Any) -> StoredTensor:
    what = f"the entry {reprlib.repr(name)}"
    match value:
        case Call(
            name=function,
            state=(
                int(),
                tuple(sizes),
                Call(name=dtype_function, arguments=(str(kind), *_), state=(int(), str(byte_order), *_)),
                bool(is_fortran),
                Stretch() as data,
            ),
        ) if (function, dtype_function) == (ARRAY, DTYPE):
            pass
        case _:
            raise ValueError(f"expected an array with shape, dtype and bytes, found {_kind(value)} as {what}")
    if kind not in DTYPES or byte_order != "<" or is_fortran:
        found = reprlib.repr(byte_order + kind)
        raise ValueError(f"{what} is an array of {found}; weights can be < {', '.join(DTYPES)}, C order")
    shape = tensor_shape(sizes, what)
    numpy_dtype, dtype_name = DTYPES[kind]
    nbytes = math.prod(shape) * numpy_dtype.itemsize
    if nbytes != data.length:
        raise ValueError(f"{what} of shape {list(shape)} takes {nbytes} bytes, but has {data.length}")
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


def _instructions(file: MappedFile) -> Iterator[tuple[str, Any, int]]:
    """The pickle's instructions: name, argument, byte. Raises ValueError where the bytes make none."""
    program = _Program(file)
    instructions = pickletools.genops(program)  # type: ignore[arg-type]
    while True:
        start = program.position
        try:
            opcode, argument, _ = next(instructions)
        except StopIteration:
            return
        except Exception:  # what it raises depends on the instruction: ValueError, TypeError, struct.error, ...
            raise ValueError(f"expected an instruction of a pickle at byte {start}, found something else") from None
        yield opcode.name, argument, start


def _interpret(file: MappedFile) -> Any:
    """What the pickle describes, made of dicts, tuples, numbers, str, `Name`, `Call` and `Stretch`."""
    machine = _Machine()
    for count, (opcode, argument, start) in enumerate(_instructions(file)):
        if count >= INSTRUCTIONS:
            raise ValueError(f"expected the end within {INSTRUCTIONS} instructions, found more at byte {start}")
        machine.start = start
        machine.step(opcode, argument)
    return machine.pop()


class _Machine:
    """What the pickle may make is flat, and so nothing that goes through it needs a bound: the keys of dicts are str,
    tuples hold no dicts, and hold tuples only of what is neither."""

    def __init__(self) -> None:
        self.start = 0  # byte of the instruction
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Do one instruction. Raises ValueError for those that no dict of arrays needs."""
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                self.push(CONSTANTS[opcode])
            case "EMPTY_DICT":
                self.push({})
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                if isinstance(argument, int) and abs(argument) >= INTEGER:
                    raise self.error("a number of 64 bits", "a longer one")
                self.push(argument)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                self.push(Stretch(self.start + 1 + LENGTH_BYTES[opcode], len(argument)))
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                self.push_tuple(self.pop_to_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.push_tuple([self.pop() for _ in range(int(opcode[-1]))][::-1])
            case "SETITEM" | "SETITEMS":
                items = self.pop_to_mark() if opcode == "SETITEMS" else [self.pop(), self.pop()][::-1]
                self.set_items(items)
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                self.memo[len(self.memo) if argument is None else argument] = self.top(object)
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise self.error("a value that was noted before", f"number {argument}, which was not")
                self.push(self.memo[argument])
            case _:
                self.call(opcode, argument)

    def call(self, opcode: str, argument: Any) -> None:
        """Note down a call, or refuse it: here other readers run code."""
        match opcode:
            case "GLOBAL" | "STACK_GLOBAL":
                parts = [self.pop(), self.pop()][::-1] if opcode == "STACK_GLOBAL" else argument.split(" ")
                if not all(isinstance(part, str) for part in parts):
                    raise self.error("the name of a function", "something else")
                name = ".".join(parts)
                if name not in ALLOWED:
                    refused = reprlib.repr(name)
                    raise ValueError(f"refused to run {refused}, which the pickle asks for at byte {self.start}")
                self.push(Name(ALLOWED[name]))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                if not isinstance(function, Name) or not isinstance(arguments, tuple):
                    raise self.error("a function and its arguments", f"{_kind(function)} and {_kind(arguments)}")
                self.push(Call(function.text, arguments))
            case "BUILD":
                state = self.pop()
                self.top(Call).state = state
            case _:
                raise ValueError(f"refused the instruction {opcode} at byte {self.start}, which no array needs")

    def error(self, expected: str, found: str) -> ValueError:
        return ValueError(f"expected {expected} at byte {self.start}, found {found}")

    def push(self, value: Any) -> None:
        if len(self.stack) >= STACK:
            raise self.error(f"at most {STACK} values that nothing was made of", "more")
        self.stack.append(value)

    def push_tuple(self, items: list[Any]) -> None:
        inner = [item for tuple_ in items if isinstance(tuple_, tuple) for item in tuple_]
        is_flat = not any(isinstance(item, dict) for item in items) and not any(isinstance(i, tuple) for i in inner)
        if len(items) > TUPLE or not is_flat:
            raise self.error(f"a flat tuple of at most {TUPLE} values", "a longer or deeper one")
        self.push(tuple(items))

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise self.error("names with values", "a dict of something else")
        target.update(zip(items[::2], items[1::2]))

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            expected = KINDS.get(kind, f"a {kind.__name__}")
            raise self.error(f"{expected} before it", _kind(self.stack[-1]) if self.stack else "nothing")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top(object)
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks or self.marks[-1] > len(self.stack):
            raise self.error("a mark before it", "none")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items
