"""A launch: Python arguments -> the kernel's C struct -> the thread pool.

kernel[grid](x, (y, 3), descriptor, BLOCK=64)
  x, y, 3, descriptor.base, descriptor.shape[0], ...     tuples and descriptors opened, no constants
  addresses and numbers                                  checked: is the memory the host's?
  which version?                                         `CPULauncher.careful` where tensors overlap
  bytes                                                  run, or recorded
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import fields
from math import prod
from typing import Any, NamedTuple

import triton
from triton._utils import canonicalize_dtype

from . import runtime
from .compiler import CPUOptions


class _Value(NamedTuple):
    """One that a kernel is given when it runs."""

    place: str  # among the arguments `a`, in Python: "a[0]", "a[1][2]", "a[3].shape[0]"
    name: str  # for messages
    kind: str  # as in Triton's signatures: "i32", "*fp32"


class CPULauncher:
    """Packs a kernel's arguments into its C struct and hands it to the thread pool. One per compiled kernel."""

    def __init__(self, source: Any, metadata: Any):
        signature = enumerate(source.signature.items())
        opened = [value for i, (name, kind) in signature for value in _values(kind, f"a[{i}]", str(name))]
        self.descriptors = [value for value in opened if value.kind.startswith("tensordesc")]
        self.descriptors_of = _picker(self.descriptors)
        opened = [inner for value in opened for inner in _open_descriptor(value)]
        self.names = [value.name for value in opened]
        self.values_of = _picker(opened)  # the arguments that are no constants, with tuples and descriptors opened
        codes = [  # TTIR's integers have no sign, Python's do
            code.upper() if code in "bhiq" and value.kind.startswith("u") else code
            for code, value in zip(metadata.argument_format[1:], opened, strict=True)
        ]
        self.kernel, self.source, self.metadata = metadata.name, source, metadata
        self.can_fail = metadata.can_fail
        self.bounded = [i for i, code in enumerate(codes) if code == "P" and metadata.check]
        self.format = struct.Struct("@" + "".join(codes) + "P" * (self.can_fail + 3 * len(self.bounded)))
        self.is_pointer = [code == "P" for code in codes]
        self.apart = metadata.apart  # as emitter.py's `Generated` says
        self.item_sizes = [_item_size(value.kind) for value in opened]  # of what pointers point to
        self.spanned = [(i, self.item_sizes[i]) for i in sorted({i for *pair, _ in self.apart for i in pair})]

    def check_descriptors(self, arguments: Any) -> None:
        """TypeError for a descriptor of other elements or blocks than the kernel was compiled for."""
        for descriptor, expected in zip(self.descriptors_of(arguments), self.descriptors):
            if (kind := _kind_of_descriptor(descriptor)) != expected.kind.replace(" ", ""):
                found = kind or type(descriptor).__name__
                message = f"argument {expected.name!r} is a {found}, it was compiled for a {expected.kind}"
                raise TypeError(f"kernel {self.kernel!r}: {message}")

    def numbers(self, values: list[Any]) -> list[Any]:
        """What the kernel's C struct has of values: of tensors the addresses. ValueError for memory it can't read."""
        try:
            return [_pointer(value) if pointer else value for value, pointer in zip(values, self.is_pointer)]
        except _Unreadable as error:
            pointers = zip(self.names, values, self.is_pointer)
            name = next(name for name, value, pointer in pointers if pointer and value is error.tensor)
            raise ValueError(f"kernel {self.kernel!r}: argument {name!r} {error}") from None

    def overlap(self, values: list[Any], numbers: list[Any]) -> bool:
        """Do tensors overlap that the kernel's code takes to be apart?"""
        spans = {i: _span(values[i], numbers[i], size) for i, size in self.spanned}
        for read, written, in_place in self.apart:
            begin, end = spans[read]
            other, others_end = spans[written]
            if begin < others_end and other < end and not (in_place and numbers[read] == numbers[written]):
                return True
        return False

    def extents(self, values: list[Any], numbers: list[Any]) -> Iterator[int]:
        """For the kernel's checks: where each pointer points, and the addresses that are its tensor's, or all."""
        for i in self.bounded:
            yield numbers[i]
            yield from (
                _span(values[i], numbers[i], self.item_sizes[i]) if hasattr(values[i], "shape") else (0, 2**64 - 1)
            )

    @functools.cached_property
    def careful(self) -> Any:
        """The kernel, compiled for tensors that overlap."""
        options = {field.name: getattr(self.metadata, field.name) for field in fields(CPUOptions)}
        source = getattr(self.source, "path", self.source)  # of a file with IR
        return triton.compile(source, self.metadata.target, options | {"disjoint": False})

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        """Triton's convention: the grid, the kernel's address, metadata, hooks, the kernel's arguments."""
        _, launch_metadata, enter_hook, exit_hook, *arguments = rest
        if self.descriptors:
            self.check_descriptors(arguments)
        values = self.values_of(arguments)
        numbers = self.numbers(values)
        if self.apart and self.overlap(values, numbers):
            run = self.careful.run  # which loads it
            run(x, y, z, stream, self.careful.function, *rest)
            return
        if enter_hook is not None:
            enter_hook(launch_metadata)
        failure = runtime.Failure() if self.can_fail else None
        if failure is not None:
            numbers += [ctypes.addressof(failure), *self.extents(values, numbers)]
        runtime.launch(function, self.format.pack(*numbers), (x, y, z), arguments, failure)
        if exit_hook is not None:
            exit_hook(launch_metadata)


# ---- what is in the arguments ---------------------------------------------------------------------------------------
def _values(kind: Any, place: str, name: str) -> Iterator[_Value]:
    """Every value in an argument, tuples opened, that is no constant of the kernel.

    A tuple can be a constant as a whole, whatever is in it.
    """
    if isinstance(kind, tuple | list):
        for i, inner in enumerate(kind):
            yield from _values(inner, f"{place}[{i}]", f"{name}[{i}]")
    elif kind != "constexpr":
        yield _Value(place, name, str(kind))


def _open_descriptor(value: _Value) -> Iterator[_Value]:
    """What Triton makes of a tensor descriptor, with shape and strides twice: for its pass that makes pointers of
    descriptors, and for the kernel's source. Any other value is left as it is."""
    found = re.match(r"tensordesc<([^[]*)\[(.*)\]", value.kind)
    if not found:
        yield value
        return
    from triton.tools.tensor_descriptor import TensorDescriptor

    dimensions = range(found.group(2).count(",") + 1)
    switches = {"padding": ".padding == 'nan'", "round_f32_to_tf32": ".round_f32_to_tf32"}  # the latter from 3.7 on
    known = {field.name for field in fields(TensorDescriptor)}
    parts = [(".base", "*" + found.group(1))]
    parts += [(f".{extents}[{d}]", "i64") for extents in ("shape", "strides") for d in dimensions]
    parts += [(switch, "i1") for name, switch in switches.items() if name in known]
    parts += [(f".shape[{d}]", "i32") for d in dimensions] + [(f".strides[{d}]", "i64") for d in dimensions]
    for part, kind in parts:
        yield _Value(value.place + part, value.name + part, kind)


def _picker(values: list[_Value]) -> Callable[[Any], list[Any]]:
    """A function that takes these values out of arguments `a`. Python compiles it, for it is called at every launch."""
    return eval(f"lambda a: [{', '.join(value.place for value in values)}]")


def _kind_of_descriptor(descriptor: Any) -> str | None:
    """As in a signature: "tensordesc<fp32[16,16]>"; None for what is none."""
    if not hasattr(descriptor, "block_shape"):
        return None
    return f"tensordesc<{canonicalize_dtype(descriptor.base.dtype)}[{','.join(map(str, descriptor.block_shape))}]>"


# ---- memory ---------------------------------------------------------------------------------------------------------
class _Unreadable(Exception):
    """A tensor whose memory is not this process's to read: an access would end the process."""

    def __init__(self, tensor: Any, reason: str) -> None:
        super().__init__(reason)
        self.tensor = tensor


def _pointer(argument: Any) -> int:
    if argument is None or isinstance(argument, int):  # to a compiled kernel, launched without Triton's JIT
        if not _is_mapped(argument or 0):
            raise _Unreadable(argument, f"is {argument!r}; the kernel was compiled for a tensor or an address there")
        return argument or 0
    device = getattr(argument, "device", None)  # of PyTorch, Paddle and the like; a `TensorView` has none
    if device and not _is_host(str(device)):
        raise _Unreadable(argument, f"is on device {str(device)!r}; kernels on a CPU need it in the host's memory")
    address = argument.data_ptr()
    if not address and 0 not in tuple(getattr(argument, "shape", ())):
        raise _Unreadable(
            argument, "has elements and no memory (its data_ptr() is 0), as tensors on a meta device have"
        )
    return address


def _is_mapped(address: int) -> bool:
    """Is there memory at an address? mincore fails where there is none."""
    page = address - address % mmap.PAGESIZE
    seen = ctypes.create_string_buffer(1)
    return 0 <= page < 2**63 and _libc().mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), seen) == 0


@functools.lru_cache(None)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@functools.lru_cache(64)
def _is_host(device: str) -> bool:
    return "cpu" in device.lower()


def _item_size(kind: str) -> int:
    """Bytes of what a pointer points to: "*fp32", "*ki8" (tl.const), "*i1", "*fp8e4nv"."""
    bits = re.search(r"\d+", kind)
    return 8 if kind.startswith("**") else max(int(bits[0]) // 8, 1) if bits else 1


def _span(tensor: Any, address: int, item_size: int) -> tuple[int, int]:
    """The addresses that a tensor's elements lie at, as [begin, end). Of what has no shape, one element is known of."""
    try:
        below, above = _extent(tensor.shape, tensor.strides)
    except (AttributeError, TypeError):  # no `TensorView` and no `ArrayView`, for which time counts
        if not hasattr(tensor, "shape"):
            return address, address + item_size * (address != 0)
        strides = (
            tensor.strides if hasattr(tensor, "strides") else tensor.stride() if hasattr(tensor, "stride") else None
        )
        below, above = _extent(tuple(tensor.shape), None if strides is None else tuple(strides))
    return address + below * item_size, address + above * item_size


@functools.lru_cache(4096)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> tuple[int, int]:
    """Where a tensor's elements lie, counted from its first one: [below, above). No strides: row after row."""
    if 0 in shape or strides is None:
        return 0, prod(shape)
    last = [(extent - 1) * stride for extent, stride in zip(shape, strides)]
    return sum(min(step, 0) for step in last), sum(max(step, 0) for step in last) + 1
