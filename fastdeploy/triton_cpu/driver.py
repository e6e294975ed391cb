"""The driver half of the Triton plugin: what Triton asks of a device, answered for this machine's CPU cores."""

from __future__ import annotations

import ctypes
import functools
import operator
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import fields
from math import prod
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from . import runtime
from .benchmark import Benchmarker, Device, replace_graphs
from .cache import use_checked_cache
from .compiler import CPUOptions


class CPUUtils:
    """Loading a compiled kernel; the limits that Triton checks a launch against."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 1 << 30,
            "multiprocessor_count": runtime.num_threads(),
            "max_num_regs": 1 << 16,
            "warpSize": 1,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, int, int, int, int]:
        """Returns (module, function, registers, spills, most threads): the last three as Triton wants to see them."""
        library = runtime.load_library(kernel)
        return library, ctypes.cast(library.run_programs, ctypes.c_void_p).value or 0, 0, 0, 1 << 20

    def unload_module(self, module: Any) -> None:
        """Kernels stay loaded: recorded plans hold their addresses."""


class CPULauncher:
    """Packs a kernel's arguments into its C struct and hands it to the thread pool. One per compiled kernel."""

    def __init__(self, source: Any, metadata: Any):
        leaves = [
            leaf
            for place, (name, kind) in enumerate(source.signature.items())
            for leaf in _runtime_values(kind, (place,), str(name))
        ]
        self.paths = [path for path, _, _ in leaves]
        self.names = [name for _, name, _ in leaves]
        kinds = [kind for _, _, kind in leaves]
        if any(kind.startswith("tensordesc") for kind in kinds):
            raise NotImplementedError(
                f"kernel {metadata.name!r}: tensor descriptors made on the host are not supported on a CPU; "
                "use tl.make_tensor_descriptor in the kernel"
            )
        codes = [  # TTIR's integers have no sign, Python's do
            code.upper() if code in "bhiq" and kind.startswith("u") else code
            for code, kind in zip(metadata.argument_format[1:], kinds, strict=True)
        ]
        self.kernel, self.source, self.metadata = metadata.name, source, metadata
        self.can_fail = metadata.can_fail
        self.format = struct.Struct("@" + "".join(codes) + "P" * self.can_fail)
        self.is_nested = any(len(path) > 1 for path in self.paths)
        self.positions = [path[0] for path in self.paths]  # among the arguments, if no value is within a tuple
        self.is_pointer = [code == "P" for code in codes]
        self.apart = metadata.apart  # as `generate_c` says
        self.spanned = [(i, _item_size(kinds[i])) for i in sorted({i for *pair, _ in self.apart for i in pair})]

    def values(self, arguments: Any) -> list[Any]:
        """The arguments that are no constants, those in tuples, too."""
        if self.is_nested:
            return [functools.reduce(operator.getitem, path, arguments) for path in self.paths]
        return [arguments[i] for i in self.positions]

    def numbers(self, values: list[Any]) -> list[Any]:
        """What the kernel's C struct has of them: of tensors the addresses. ValueError for memory it can't read."""
        try:
            return [_pointer(value) if pointer else value for value, pointer in zip(values, self.is_pointer)]
        except _Unreadable as error:
            name = next(name for name, value in zip(self.names, values) if value is error.tensor)
            raise ValueError(f"kernel {self.kernel!r}: argument {name!r} {error}") from None

    def overlap(self, values: list[Any], numbers: list[Any]) -> bool:
        """Do tensors overlap that the kernel's code takes to be apart?"""
        spans = {i: _span(values[i], numbers[i], size) for i, size in self.spanned}
        for read, written, in_place in self.apart:
            (begin, end), (other, others_end) = spans[read], spans[written]
            if begin < others_end and other < end and not (in_place and numbers[read] == numbers[written]):
                return True
        return False

    @functools.cached_property
    def careful(self) -> Any:
        """The kernel, compiled for tensors that overlap."""
        options = {field.name: getattr(self.metadata, field.name) for field in fields(CPUOptions)}
        source = getattr(self.source, "path", self.source)  # of a file with IR
        return triton.compile(source, self.metadata.target, options | {"disjoint": False})

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: int,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable | None,
        exit_hook: Callable | None,
        *arguments: Any,
    ) -> None:
        values = self.values(arguments)
        numbers = self.numbers(values)
        if self.apart and self.overlap(values, numbers):
            run = self.careful.run  # which loads it
            hooks = enter_hook, exit_hook
            run(x, y, z, stream, self.careful.function, packed_metadata, launch_metadata, *hooks, *arguments)
            return
        if enter_hook is not None:
            enter_hook(launch_metadata)
        failure = runtime.Failure() if self.can_fail else None
        if failure is not None:
            numbers.append(ctypes.addressof(failure))
        runtime.launch(function, self.format.pack(*numbers), (x, y, z), arguments, failure)
        if exit_hook is not None:
            exit_hook(launch_metadata)


def _runtime_values(kind: Any, path: tuple[int, ...], name: str) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """(path, name, kind) of every value in an argument, tuples opened, that is no constant of the kernel.

    A tuple can be a constant as a whole, whatever is in it.
    """
    if isinstance(kind, tuple | list):
        for place, inner in enumerate(kind):
            yield from _runtime_values(inner, (*path, place), f"{name}[{place}]")
    elif kind != "constexpr":
        yield path, name, str(kind)


class _Unreadable(Exception):
    """A tensor whose memory is not this process's to read: an access would end the process."""

    def __init__(self, tensor: Any, reason: str) -> None:
        super().__init__(reason)
        self.tensor = tensor


def _pointer(argument: Any) -> int:
    if argument is None:
        return 0
    if isinstance(argument, int):
        return argument
    device = getattr(argument, "device", None)  # of PyTorch, Paddle and the like; a `TensorView` has none
    if device and not _is_host(str(device)):
        raise _Unreadable(argument, f"is on device {str(device)!r}; kernels on a CPU need it in the host's memory")
    address = argument.data_ptr()
    if not address and 0 not in tuple(getattr(argument, "shape", ())):
        raise _Unreadable(
            argument, "has elements and no memory (its data_ptr() is 0), as tensors on a meta device have"
        )
    return address


@functools.lru_cache(64)
def _is_host(device: str) -> bool:
    return "cpu" in device.lower()


def _item_size(kind: str) -> int:
    """Bytes of what a pointer points to: "*fp32", "*ki8" (tl.const), "*i1", "*fp8e4nv"."""
    return 8 if kind.startswith("**") else max(int(re.findall(r"\d+", kind)[0]) // 8, 1)


def _span(tensor: Any, address: int, item_size: int) -> tuple[int, int]:
    """The addresses that a tensor's elements lie at, as [begin, end). Of what has no shape, one element is known of."""
    shape = getattr(tensor, "shape", None)
    if shape is None:
        return address, address + item_size * (address != 0)
    strides = getattr(tensor, "strides", None)
    if strides is None and hasattr(tensor, "stride"):
        strides = tensor.stride()
    below, above = _extent(tuple(shape), None if strides is None else tuple(strides))
    return address + below * item_size, address + above * item_size


@functools.lru_cache(1024)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> tuple[int, int]:
    """Where a tensor's elements lie, counted from its first one: [below, above). No strides: row after row."""
    if 0 in shape or strides is None:
        return 0, prod(shape)
    last = [(extent - 1) * stride for extent, stride in zip(shape, strides)]
    return sum(min(step, 0) for step in last), sum(max(step, 0) for step in last) + 1


class CPUDriver(DriverBase):
    launcher_cls = CPULauncher

    def __init__(self) -> None:
        use_checked_cache()
        replace_graphs()
        self.utils = CPUUtils()

    @classmethod
    def is_active(cls) -> bool:
        """Where asked for by name, or where no GPU's driver answers."""
        if os.environ.get("TRITON_DEFAULT_BACKEND") == "cpu":
            return True
        from triton.backends import backends

        return not any(backend.driver.is_active() for name, backend in backends.items() if backend.driver is not cls)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", "native", 1)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return Device

    def get_benchmarker(self) -> Any:
        return Benchmarker()

    def get_empty_cache_for_benchmark(self) -> Any:
        """Nothing: see `clear_cache`."""

    def clear_cache(self, cache: Any) -> None:
        """Leaves the CPU's caches as they are."""
