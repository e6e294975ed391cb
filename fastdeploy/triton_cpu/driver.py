"""The driver half of the Triton plugin: what Triton asks of a device, answered for this machine's CPU cores."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from . import runtime


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
        kinds = list(_flat(list(source.signature.values())))
        if any(str(kind).startswith("tensordesc") for kind in kinds):
            raise NotImplementedError(
                f"kernel {metadata.name!r}: tensor descriptors made on the host are not supported on a CPU; "
                "use tl.make_tensor_descriptor in the kernel"
            )
        self.positions = [i for i, kind in enumerate(kinds) if kind != "constexpr"]
        codes = [  # TTIR's integers have no sign, Python's do
            code.upper() if code in "bhiq" and str(kinds[i]).startswith("u") else code
            for i, code in zip(self.positions, metadata.argument_format[1:], strict=True)
        ]
        self.format = struct.Struct("@" + "".join(codes))
        self.nested = any(isinstance(kind, tuple) for kind in source.signature.values())
        self.is_pointer = [code == "P" for code in metadata.argument_format[1:]]

    def pack(self, arguments: Any) -> bytes:
        """The bytes of the C struct that the kernel reads its arguments from."""
        if self.nested:
            arguments = list(_flat(arguments))
        return self.format.pack(
            *[
                _pointer(arguments[i]) if pointer else arguments[i]
                for i, pointer in zip(self.positions, self.is_pointer)
            ]
        )

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
        runtime.launch(function, self.pack(arguments), (x, y, z), arguments)
        if exit_hook is not None:
            exit_hook(launch_metadata)


def _flat(items: Any) -> Iterator[Any]:
    for item in items:
        if isinstance(item, (tuple, list)):
            yield from _flat(item)
        else:
            yield item


def _pointer(argument: Any) -> int:
    if argument is None:
        return 0
    return argument if isinstance(argument, int) else argument.data_ptr()


class CPUDriver(DriverBase):
    launcher_cls = CPULauncher

    def __init__(self) -> None:
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
