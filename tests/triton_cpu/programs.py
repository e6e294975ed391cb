"""Kernels with their arguments, to be run here, under other settings and in Triton's interpreter.

python -m tests.triton_cpu.programs out.npz        runs all and saves every tensor argument as it is afterwards
"""

import os
import sys
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl

from . import test_control_flow, test_dot, test_memory, test_reductions, test_registers, test_shapes, test_vectors
from .arrays import Tensor, empty


class Program(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@triton.jit
def softmax_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + i, i < n, float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + i, e / tl.sum(e, 0), i < n)


@triton.jit
def norm_kernel(x_ptr, weight_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * n + i, i < n, 0.0)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares) / n + 1e-5)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * n + i, i < n, 0.0)
        tl.store(out_ptr + row * n + i, x * scale * tl.load(weight_ptr + i, i < n, 0.0), i < n)


@triton.jit
def gelu_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, 0.5 * x * (1 + tl.erf(x * 0.70710678)) + tl.log(1 + tl.abs(x)) * tl.sigmoid(x))


@triton.jit
def random_kernel(out_ptr, words_ptr, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.rand(seed, i))
    tl.store(words_ptr + i, tl.randint(seed, i))


def table() -> dict[str, Program]:
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> Tensor:
        return Tensor(rng.standard_normal(shape, dtype=np.float32))

    def indices(limit: int, *shape: int) -> Tensor:
        return Tensor(rng.integers(0, limit, shape).astype(np.int32))

    flow, moved, reduced = test_control_flow, test_shapes, test_reductions
    dot = (normal(8, 64), normal(64, 64), normal(64), empty((8, 64)), 8, 64, 64, 1, 8, 32, 32, False, 64)
    attended = (normal(8, 16), normal(50, 16), normal(50, 16))
    squares = (normal(16, 16), normal(16, 16))
    indexed = (empty((5, 4, 16)), empty((3, 4, 16), "int32"))
    ordered = (empty((2, 16)), empty((2, 4)), empty((2, 16)))
    q4, q8 = (test_registers.Quantised.random(rng, 9, 32, 96, *limits) for limits in ((0, 16), (-128, 128)))
    a, b = test_registers.bytes_of_all_sizes(rng, 8, 32, 192)
    multiplied = {form: (Tensor(a), Tensor(test_registers.quads(b)), empty((8, 32), "int32"), 192, 8, 32, 64, form)
                  for form in ("few bits", "signed")}  # fmt: skip
    gathered = (normal(8, 32), indices(8, 8, 32), indices(32, 8, 32))
    return {
        "softmax": Program(softmax_kernel, (5,), (normal(5, 77), empty((5, 77)), 77, 128)),
        "norm": Program(norm_kernel, (3,), (normal(3, 576), normal(576), empty((3, 576)), 576, 64)),
        "gelu": Program(gelu_kernel, (4,), (normal(512), empty(512), 128)),
        "random": Program(random_kernel, (2,), (empty(128), empty(128, "int32"), 42, 64)),
        "linear": Program(test_dot.linear_kernel, (1, 2), dot),
        "4 bits": Program(test_registers.linear_q4_kernel, *test_registers.q4_arguments(q4, 8, 16)),
        "8 bits": Program(test_registers.linear_q8_kernel, *test_registers.q8_arguments(q8, 4, 32)),
        "offset": Program(test_registers.linear_q8_kernel, *test_registers.q8_arguments(q8, 16, 16, True)),
        "bytes": Program(test_registers.bytes_kernel, (1,), multiplied["signed"]),
        "few bits": Program(test_registers.bytes_kernel, (1,), multiplied["few bits"]),
        "packed bytes": Program(test_dot.quads_kernel, (1,), test_dot.quads_arguments(rng, 8, 64, 64, 8)[0]),
        "attention": Program(test_dot.attention_kernel, (1,), (*attended, empty((8, 16)), 50, 8, 16, 32)),
        "accumulators": Program(test_dot.accumulator_kernel, (1,), (*squares, empty((4, 16, 16)), 2, 16)),
        "reductions": Program(reduced.float_kernel, (1,), (normal(4, 8, 16), *indexed, (4, 8, 16), 1, 64)),
        "scans": Program(reduced.scan_kernel, (1,), (normal(8, 16), empty((4, 8, 16)), (8, 16), 1, 128, False)),
        "order": Program(reduced.order_kernel, (2,), (normal(2, 16), *ordered, 16)),
        "loops": Program(flow.nested_kernel, (1,), (normal(3, 4, 32), empty((2, 32)), 3, 4, 32)),
        "pointers": Program(flow.scattered_pointer_kernel, (1,), (normal(256), empty(32), 5, 32)),
        "branches": Program(flow.branch_kernel, (3,), (normal(32), normal(32), empty((3, 32)), 32)),
        "while": Program(flow.collatz_kernel, (1,), (Tensor(np.arange(1, 33, dtype=np.int32)), empty(32, "int32"), 32)),
        "reshapes": Program(moved.reshape_kernel, (1,), (normal(64), empty((7, 64)), 64)),
        "gather": Program(moved.gather_kernel, (1,), (*gathered, empty((2, 8, 32)), 8, 32)),
        "limits": Program(test_vectors.limits_kernel, (1,), test_vectors.limits_arguments(rng)),
        "in place": Program(test_memory.transpose_in_place_kernel, (1,), (normal(16, 16), 16)),
    }  # fmt: skip


def run_all() -> dict[str, np.ndarray]:
    """Every tensor argument of every program, after it ran."""
    found = {}
    for name, program in table().items():
        program.kernel[program.grid](*program.arguments)
        for number, argument in enumerate(program.arguments):
            if isinstance(argument, Tensor):
                found[f"{name} {number}"] = argument.stored
    return found


def _interpret_in_place() -> None:
    """The interpreter copies arguments to the host by PyTorch's methods; ours are there already."""
    from triton.runtime.interpreter import GridExecutor

    GridExecutor._init_args_hst = lambda self, arguments, keywords: (arguments, keywords)
    GridExecutor._restore_args_dev = lambda self, *arguments: None


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpret_in_place()
    else:
        from fastdeploy import triton_cpu

        triton_cpu.activate()
    np.savez(sys.argv[1], **run_all())
