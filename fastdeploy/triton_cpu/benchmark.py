"""Timing kernels on a CPU: what triton.testing and triton.autotune ask a driver for, with time.perf_counter.

    triton.testing.do_bench(fn)              Triton's own, on the `Device` here
    triton.testing.do_bench_cudagraph(fn)    the same: there are no graphs, and a launch is cheap
    @triton.autotune(configs, key)           a `Benchmarker`, which times what compiles to the same machine code once

Caches are not emptied between runs: they are what one run leaves for the next.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from typing import Any

import triton

from . import runtime


class Event:
    """A moment, as an event of a CUDA stream. A launch has ended when it returns, so there is nothing to wait for."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this moment to `end`."""
        return (end._seconds - self._seconds) * 1e3


class Device:
    """What triton.testing uses of a module like torch.cuda."""

    Event = Event

    @staticmethod
    def synchronize() -> None:
        """Launches have ended."""


class Benchmarker:
    """Measures an autotuner's configurations, as triton.testing.do_bench does; launches that it has measured before are
    not measured again: configurations often differ in what means nothing here, such as the number of warps.
    """

    def __init__(self) -> None:
        self._measured: dict[Any, Any] = {}

    def __call__(self, kernel_call: Callable[[], object], **options: Any) -> Any:
        """Milliseconds: quantiles, or whatever else the `options` of do_bench ask for. Launches are made at once, even
        within a recording."""
        with runtime.observe() as launches:
            kernel_call()
        key = (*launches, repr(options))
        if not launches or key not in self._measured:
            with runtime.at_once():
                self._measured[key] = triton.testing.do_bench(kernel_call, **options)
        return self._measured[key]


@functools.lru_cache(None)
def replace_graphs() -> None:
    """Has triton.testing.do_bench_cudagraph, which turns to PyTorch and CUDA whatever the driver, do here as do_bench.

    The function itself changes, since by now others have imported it.
    """
    function: Any = triton.testing.do_bench_cudagraph
    with_graphs: Any = types.FunctionType(function.__code__, function.__globals__, "", function.__defaults__)

    def benchmark(fn: Callable[[], object], **options: Any) -> Any:
        is_cpu = triton.runtime.driver.active.get_current_target().backend == "cpu"
        return (triton.testing.do_bench if is_cpu else with_graphs)(fn, **options)

    function.__code__ = _do_bench_cudagraph.__code__
    function.__globals__["_benchmark_on_any_device"] = benchmark


def _do_bench_cudagraph(fn, rep=20, grad_to_none=None, quantiles=None, return_mode="mean"):  # type: ignore[no-untyped-def]
    return _benchmark_on_any_device(  # type: ignore[name-defined]  # noqa: F821
        fn, rep=rep, grad_to_none=grad_to_none, quantiles=quantiles, return_mode=return_mode
    )
