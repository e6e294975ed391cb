"""Reads TTIR, the text of Triton's first intermediate language, into Python objects.

    %acc = tt.dot %a, %b, %c : tensor<16x64xf32> * tensor<64x32xf32> -> tensor<16x32xf32> loc(#loc7)
     |       |     `- operands      `- operand types                      `- result type    `- place in the source
     |       `- operation
     `- result: one static assignment, so a Value knows the one Op that makes it

Triton's passes work on MLIR objects in C++; the text is their only stable interface (no difference was found from
Triton 3.6 to 3.9 in what we read). One operation is one line, except those with regions (loops, branches, reductions).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True)
class Type:
    """`tensor<16x64xf32>` is Type((16, 64), "f32"), `!tt.ptr<bf16>` is Type((), "*bf16")."""

    shape: tuple[int, ...]
    element: str

    @property
    def is_tensor(self) -> bool:
        return bool(self.shape)

    @property
    def is_pointer(self) -> bool:
        return self.element.startswith("*")

    @property
    def pointee(self) -> str:
        return self.element[1:]

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(eq=False)
class Value:
    """A result of an operation, or an argument of a block (then `op` is None)."""

    name: str
    type: Type
    block: Block
    op: Op | None = None
    uses: list[Op] = field(default_factory=list)

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False)
class Op:
    name: str
    operands: list[Value]
    text: str
    location: str
    block: Block
    results: list[Value] = field(default_factory=list)
    regions: list[Block] = field(default_factory=list)

    @property
    def result(self) -> Value:
        return self.results[0]

    def attribute(self, key: str, default: int | None = None) -> int:
        """The integer attribute `key = 3 : i32`."""
        found = re.search(rf"\b{key} = (-?\d+)", self.text)
        if found is None and default is None:
            raise ValueError(f"{self.name} has no attribute {key!r}: {self.text}")
        return int(found.group(1)) if found else default  # type: ignore[return-value]


@dataclass(eq=False)
class Block:
    parent: Op | None
    arguments: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    @property
    def terminator(self) -> Op | None:
        return self.ops[-1] if self.ops else None


@dataclass(eq=False)
class Function:
    name: str
    body: Block
    result_types: list[Type]

    @property
    def parameters(self) -> list[Value]:
        return self.body.arguments


def walk(block: Block) -> Iterator[Op]:
    """All operations of a block and of the regions in it, in the order of the text."""
    for op in block.ops:
        yield op
        for region in op.regions:
            yield from walk(region)


def reachable(value: Value, sources: Callable[[Value], Iterable[Value]]) -> Iterator[Value]:
    """`value` and what is reached from it, each once; `sources(v)` are the next steps from v: its operands, or none."""
    seen, found = {value}, [value]
    for value in found:  # which grows
        yield value
        new = dict.fromkeys(source for source in sources(value) if source not in seen)
        seen.update(new)
        found += new


def parse(text: str) -> list[Function]:
    """All functions of a module, the kernel (the public one) first."""
    return _Parser(text).functions()


def parse_type(text: str) -> Type:
    text = text.strip()
    shape: tuple[int, ...] = ()
    tensor = re.match(r"tensor<((?:\d+x)*)(.*)>$", text)
    if tensor:
        shape, text = tuple(int(extent) for extent in tensor.group(1).split("x") if extent), tensor.group(2)
    pointer = re.match(r'!tt\.ptr<(.*?)(?:, (?:\d+|"\w*"))?>$', text)  # an address space is of no use here
    return Type(shape, "*" + parse_type(pointer.group(1)).element if pointer else text)


SYMBOL = re.compile(r'@("[^"]*"|[\w$.\-]+)')  # quoted if it has other characters: @"sum__Pf32__(1,)cconstexpr_32_"
_VALUE = re.compile(r"%[\w$.\-]+(?:#\d+)?")
_RESULTS = re.compile(r"((?:%[\w$.\-]+(?::\d+)?(?:, )?)+) = ")
_LOCATION = re.compile(r' loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*")*\))*\))*\)')
_FOR = re.compile(
    r"scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+?)"
    r"(?: iter_args\((.*?)\) -> \((.*)\))?\s*(?:: (\w+))?\s*\{$"
)
_IF = re.compile(r"scf\.if (%\S+)(?: -> \((.*)\))? \{$")
_WHILE = re.compile(r"scf\.while(?: \((.*?)\))? : \((.*?)\) -> (.*?) \{$")


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets: "tensor<2xf32>, i32" -> ["tensor<2xf32>", "i32"]."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "<([{":
            depth += 1
        elif character in ")]}" or (character == ">" and text[position - 1] != "-"):
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()] if text[start:].strip() else parts


def _types(text: str) -> list[Type]:
    """A list such as `tensor<2xf32>, i32`, perhaps in parentheses."""
    return [parse_type(part) for part in _split(text[1:-1] if text.startswith("(") else text)]


def _read(pattern: re.Pattern[str], line: str) -> re.Match[str]:
    if not (found := pattern.match(line)):
        raise ValueError(f"cannot read the operation: {line}")
    return found


class _Parser:
    def __init__(self, text: str):
        self.locations: dict[str, str] = {}
        self.lines: list[tuple[str, str]] = []  # (line without locations, its own location)
        for line in map(str.strip, text.split("\n")):
            alias = re.match(r"(#\w+) = loc\((.*)\)$", line)
            if alias:
                self.locations[alias.group(1)] = alias.group(2)
            elif line and not line.startswith("#"):
                found = _LOCATION.findall(line)
                self.lines.append((_LOCATION.sub("", line), found[-1][5:-1] if found else ""))
        self.at = 0
        self.scopes: list[dict[str, Value]] = []

    def functions(self) -> list[Function]:
        found = []
        while self.at < len(self.lines):
            if self.lines[self.at][0].startswith("tt.func"):
                found.append(self.function())
            else:
                self.at += 1
        return [function for function, _ in sorted(found, key=lambda pair: pair[1])]

    def function(self) -> tuple[Function, bool]:
        """The function that begins on this line, and whether it is private, that is not the kernel."""
        header = self.lines[self.at][0]
        self.at += 1
        found = SYMBOL.search(header)
        name, start = found.group(1).strip('"'), found.end() + 1  # type: ignore[union-attr]
        end, depth = start, 1
        while depth:
            depth += {"(": 1, ")": -1}.get(header[end], 0)
            end += 1
        block = Block(None)
        self.scopes = [{}]
        block.arguments = self.arguments(re.sub(r"\{[^{}]*\}", "", header[start : end - 1]), block)
        results = re.match(r" -> (\(.*?\)|.*?)(?= attributes| \{$)", header[end:])
        self.fill(block)
        return Function(name, block, _types(results.group(1)) if results else []), " private " in header

    def location(self, text: str) -> str:
        """`file.py:12`, seen from the kernel: of an inlined call, the line of the call."""
        for _ in range(64):
            if text in self.locations:
                text = self.locations[text]
            elif text.startswith("callsite("):
                text = text[9:-1].rsplit(" at ", 1)[1]
            elif found := re.match(r'"([^"]*)":(\d+)', text):
                return f"{found.group(1)}:{found.group(2)}"
            elif found := re.match(r'"[^"]*"\((.*)\)$', text):
                text = found.group(1)
            else:
                break
        return "unknown source line"

    # Names are scoped by region, and siblings may use the same name again.
    def define(self, name: str, type_: Type, block: Block, op: Op | None = None) -> Value:
        value = self.scopes[-1][name] = Value(name, type_, block, op)
        return value

    def find(self, name: str) -> Value:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise ValueError(f"TTIR uses {name} before its definition")

    def arguments(self, text: str, block: Block, op: Op | None = None) -> list[Value]:
        """Defines what stands in a list such as `%x: i32, %y: f32`."""
        pairs = [argument.split(":", 1) for argument in _split(text)]
        return [self.define(name.strip(), parse_type(type_), block, op) for name, type_ in pairs]

    def fill(self, block: Block) -> None:
        """Reads operations into `block` up to the closing brace, which is left to the caller."""
        while not self.lines[self.at][0].startswith("}"):
            line, location = self.lines[self.at]
            self.at += 1
            arguments = line[line.index("(") + 1 : line.rindex(")")] if line.startswith("^bb") and "(" in line else ""
            if line.startswith("^bb") and (block.parent is None or block.ops):
                block.ops.append(self.label(line, arguments, block))
            elif line.startswith("^bb"):
                block.arguments = self.arguments(arguments, block)
            else:
                block.ops.append(self.op(line, location, block))

    def label(self, line: str, arguments: str, block: Block) -> Op:
        """A return cuts a function or region into blocks: `^bb2(%x: i32)` is an operation with %x as its result."""
        op = Op("cf.label", [], re.match(r"\^\w+", line).group(), "", block)  # type: ignore[union-attr]
        op.results = self.arguments(arguments, block, op)
        return op

    def region(self, op: Op, arguments: list[tuple[str, Type]] = ()) -> tuple[str, str]:  # type: ignore[assignment]
        """Reads one region of `op`; returns the closing line, which may open the next one, and its location."""
        block = Block(op)
        op.regions.append(block)
        self.scopes.append({})
        block.arguments = [self.define(name, type_, block) for name, type_ in arguments]
        self.fill(block)
        self.scopes.pop()
        self.at += 1
        return self.lines[self.at - 1]

    def op(self, line: str, location: str, block: Block) -> Op:
        """One operation with its regions. Its `read` function fills in the operands and returns the result types."""
        names: list[str] = []
        if results := _RESULTS.match(line):
            line = line[results.end() :]
            for result in results.group(1).split(", "):
                name, _, count = result.partition(":")
                names += [f"{name}#{i}" for i in range(int(count))] if count else [name]
        kind = re.match(r'"?([\w.]+)"?', line).group(1)  # type: ignore[union-attr]
        op = Op(kind, [], line, location, block)
        plain = self.with_region if line.endswith("({") else self.simple
        read = {"scf.for": self.for_, "scf.if": self.if_, "scf.while": self.while_}.get(kind, plain)
        types = read(op, line, len(names))
        op.location = self.location(op.location)
        op.results = [self.define(name, type_, block, op) for name, type_ in zip(names, types, strict=True)]
        for operand in op.operands:
            operand.uses.append(op)
        return op

    def for_(self, op: Op, line: str, count: int) -> list[Type]:
        """scf.for %i = %lower to %upper step %step iter_args(%carried = %initial, ...) -> (types) {"""
        variable, lower, upper, step, carried, types_text, variable_type = _read(_FOR, line).groups()
        pairs = [pair.split(" = ") for pair in _split(carried or "")]
        types = _types(types_text or "")
        op.operands = [self.find(name) for name in [lower, upper, step] + [initial for _, initial in pairs]]
        arguments = [(variable, parse_type(variable_type or "i32"))]
        _, op.location = self.region(op, arguments + [(name, t) for (name, _), t in zip(pairs, types)])
        return types

    def if_(self, op: Op, line: str, count: int) -> list[Type]:
        """scf.if %condition -> (types) { ... } else { ... }"""
        condition, types_text = _read(_IF, line).groups()
        op.operands = [self.find(condition)]
        closing, op.location = self.region(op)
        if closing.endswith("{"):
            _, op.location = self.region(op)
        return _types(types_text or "")

    def while_(self, op: Op, line: str, count: int) -> list[Type]:
        """scf.while (%carried = %initial, ...) : (types) -> types { ... } do { ... }"""
        carried, types_text, results = _read(_WHILE, line).groups()
        pairs = [pair.split(" = ") for pair in _split(carried or "")]
        op.operands = [self.find(initial) for _, initial in pairs]
        types = _types(types_text)
        self.region(op, [(name, t) for (name, _), t in zip(pairs, types)])  # "before": condition
        _, op.location = self.region(op)  # "after": body; its arguments stand on its ^bb line
        return _types(results)

    def with_region(self, op: Op, line: str, count: int) -> list[Type]:
        """The generic form: "tt.reduce"(%x) <{axis = 0 : i32}> ({ ... }) : (operand types) -> result types."""
        op.operands = [self.find(name) for name in _VALUE.findall(line)]
        closing, op.location = self.region(op)
        return _types(closing.rsplit(" -> ", 1)[1])

    def simple(self, op: Op, line: str, count: int) -> list[Type]:
        """An operation on one line: every %name before the types, and in no string, is an operand."""
        line = re.sub(r'"[^"]*"', '""', line)
        body, _, types = line.rpartition(" : ")
        if not body or op.name in ("arith.constant", "tt.make_range"):
            body = line
        op.operands = [self.find(name) for name in _VALUE.findall(body)]
        return self.result_types(op, types, count) if count else []

    @staticmethod
    def result_types(op: Op, text: str, count: int) -> list[Type]:
        """MLIR prints a type once where operands and results agree; each exception is known by name."""
        if op.name in ("arith.cmpi", "arith.cmpf"):
            return [Type(parse_type(_split(text)[0]).shape, "i1")]
        if op.name == "arith.constant" and not text:
            return [Type((), "i1")]  # `arith.constant true`
        if " -> " in text:
            types = _types(text.rsplit(" -> ", 1)[1])
            return types * count if len(types) == 1 else types  # tt.split prints the type of its two halves once
        if " to " in text:
            return [parse_type(text.rsplit(" to ", 1)[1])]
        if op.name == "arith.select":
            return [parse_type(_split(text)[-1])]
        type_ = parse_type(_split(text)[0])
        if op.name == "tt.load":
            type_ = Type(type_.shape, type_.pointee)
        return [type_] * count
