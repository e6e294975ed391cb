"""A Triton backend for CPUs, made of the stock Triton wheel and a C compiler.

    @triton.jit source -> TTIR (Triton) -> C (emitter.py and what it stands on) -> a shared object (toolchain.py)
                       -> programs of a grid on a thread pool (launcher.py, runtime.py, pool.c)

README.md in this folder shows a kernel on its way, the map of the files, and how to add an operation.

Any Triton kernel runs. Tiles should fit into a cache. Loads and stores of different arguments are fused into one loop;
where the arguments of a launch overlap in memory, a version of the kernel runs that doesn't do so.

Where no GPU is, installing the package is all: Triton finds the backend by its entry point. TRITON_DEFAULT_BACKEND=cpu
asks for it by name, `activate()` from Python.
"""

from __future__ import annotations

import triton  # before driver.py, which Triton imports when it looks for backends

from .views import view

__all__ = ["activate", "view"]


def activate() -> None:
    """Makes the CPU Triton's active device in this process. Does nothing if it is already."""
    from triton.backends import Backend, backends

    from .compiler import CPUBackend
    from .driver import CPUDriver

    backends.setdefault("cpu", Backend(CPUBackend, CPUDriver))  # not installed, only on the path: no entry point
    active = triton.runtime.driver._active
    if not isinstance(active, CPUDriver):
        triton.runtime.driver.set_active(CPUDriver())
