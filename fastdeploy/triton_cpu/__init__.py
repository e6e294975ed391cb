"""A Triton backend for CPUs, made of the stock Triton wheel and a C compiler.

    @triton.jit source
      -> Triton's front end and its target-independent passes                  (Triton; compiler.py)
      -> TTIR text -> objects                                                  ttir.py
      -> which tensors are stored, which recomputed, which rows are of use     analysis.py, live_rows.py
      -> C: loop nests, reductions, register tiles, loops and branches,        loops.py, reductions.py, dot.py,
         over a prelude of small floats and elementary functions               control_flow.py, emitter.py, prelude.h
         libdevice's functions by name; microscaling formats                   libdevice.py, libdevice.h, scaled_dot.py
         loops around tl.dot whose sums stay in registers                      registers.py, lanes.py, endings.py
      -> a shared object, in Triton's cache                                    toolchain.py, cache.py
      -> its programs run on a thread pool, one launch or a plan at a time     driver.py, runtime.py, pool.c,
                                                                                   cgroups.py

Any Triton kernel runs. Two rules: tensors that overlap, shifted against each other, must come through one argument,
because loads and stores of different arguments are fused into one loop; and tiles should fit into a cache.

Where no GPU is, installing the package is all: Triton finds the backend by its entry point. TRITON_DEFAULT_BACKEND=cpu
asks for it by name, `activate()` from Python.
"""

from __future__ import annotations


def activate() -> None:
    """Makes the CPU Triton's active device in this process. Does nothing if it is already."""
    import triton
    from triton.backends import Backend, backends

    from .compiler import CPUBackend
    from .driver import CPUDriver

    backends.setdefault("cpu", Backend(CPUBackend, CPUDriver))  # not installed, only on the path: no entry point
    active = triton.runtime.driver._active
    if not isinstance(active, CPUDriver):
        triton.runtime.driver.set_active(CPUDriver())
