"""The driver half of the Triton plugin: what Triton asks of a device, answered for this machine's CPU cores."""

from __future__ import annotations

import ctypes
import functools
import operator
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from . import runtime
from .cache import use_checked_cache


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
        self.kernel = metadata.name
        self.can_fail = metadata.can_fail
        self.format = struct.Struct("@" + "".join(codes) + "P" * self.can_fail)
        # Where `pack` finds the values: among the arguments or, if there are tuples, among those picked by their paths.
        self.nested = any(len(path) > 1 for path in self.paths)
        self.positions = [number if self.nested else path[0] for number, path in enumerate(self.paths)]
        self.is_pointer = [code == "P" for code in codes]

    def pack(self, arguments: Any, *more: int) -> bytes:
        """The bytes of the C struct that the kernel reads its arguments from, and what it has behind them. ValueError
        for memory it can't read."""
        if self.nested:
            arguments = [functools.reduce(operator.getitem, path, arguments) for path in self.paths]
        try:
            return self.format.pack(
                *[
                    _pointer(arguments[i]) if pointer else arguments[i]
                    for i, pointer in zip(self.positions, self.is_pointer)
                ],
                *more,
            )
        except _Unreadable as error:
            name = next(name for name, i in zip(self.names, self.positions) if arguments[i] is error.tensor)
            raise ValueError(f"kernel {self.kernel!r}: argument {name!r} {error}") from None

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
        if enter_hook is not None:
            enter_hook(launch_metadata)
        if self.can_fail:
            failure = runtime.Failure()
            packed = self.pack(arguments, ctypes.addressof(failure))
            runtime.launch(function, packed, (x, y, z), arguments, failure)
        else:
            runtime.launch(function, self.pack(arguments), (x, y, z), arguments)
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


class CPUDriver(DriverBase):
    launcher_cls = CPULauncher

    def __init__(self) -> None:
        use_checked_cache()
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
        raise NotImplementedError("the CPU has no streams and events; time kernels with time.perf_counter")

    def get_benchmarker(self) -> Any:
        from triton.testing import do_bench

        return do_bench
