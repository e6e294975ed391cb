"""The driver half of the Triton plugin: what Triton asks of a device, answered for this machine's CPU cores."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from . import runtime
from .benchmark import Benchmarker, Device, replace_graphs
from .cache import use_checked_cache
from .launcher import CPULauncher
from .views import explain_arrays


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
        """Returns (module, function, registers, spills, most threads). Of the last three, tools for GPUs want to see at
        least one register and no spills."""
        library = runtime.load_library(kernel)
        return library, ctypes.cast(library.run_programs, ctypes.c_void_p).value or 0, 1, 0, 1 << 20

    def unload_module(self, module: Any) -> None:
        """Kernels stay loaded: recorded plans hold their addresses."""


class CPUDriver(DriverBase):
    launcher_cls = CPULauncher

    def __init__(self) -> None:
        use_checked_cache()
        replace_graphs()
        explain_arrays()
        self.utils = CPUUtils()

    @classmethod
    def is_active(cls) -> bool:
        """Is the CPU what Triton should use? As $TRITON_DEFAULT_BACKEND says:

        "cpu": yes, whatever GPU there is.  Another name: no.  Not set or empty: where no GPU's driver answers.
        A name that no backend has is an error of Triton's. `fastdeploy.triton_cpu.activate` is above all of them.
        """
        if wanted := os.environ.get("TRITON_DEFAULT_BACKEND"):
            return wanted == "cpu"
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
