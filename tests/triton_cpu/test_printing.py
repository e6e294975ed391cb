"""tl.device_print: `pid (x, y, z) idx ( i,  j) prefix: value`, as Triton's own tests expect it of a GPU."""

import re

import numpy as np
import pytest
import triton
import triton.language as tl

from .arrays import Tensor


@triton.jit
def values_kernel(x_ptr, HEX: tl.constexpr, N: tl.constexpr):
    tl.device_print("x", tl.load(x_ptr + tl.arange(0, N)), hex=HEX)


def printed(capfd, x: Tensor, hexadecimal: bool = False) -> list[str]:
    """What stands behind the prefix on each line; the rest is checked here."""
    values_kernel[(1,)](x, hexadecimal, x.stored.size)
    lines = capfd.readouterr().out.splitlines()
    width = len(str(len(lines) - 1))
    heads = [line.partition(" x: ")[0] for line in lines]
    assert heads == [f"pid (0, 0, 0) idx ({i:{width}})" for i in range(len(lines))]
    return [line.partition(" x: ")[2] for line in lines]


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_integers_are_printed_with_their_sign(dtype, capfd):
    limits = np.iinfo(dtype)
    x = np.array([0, 1, limits.min, limits.max] * 4, dtype)
    assert printed(capfd, Tensor(x)) == [str(v) for v in x]
    digits = limits.bits // 4
    assert printed(capfd, Tensor(x), hexadecimal=True) == [f"0x{int(v) % 2**limits.bits:0{digits}x}" for v in x]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floats_are_printed_with_six_digits_or_exactly(dtype, capfd):
    x = Tensor(np.array([0.0, 1.5, -0.1, 1e-3, -np.inf, np.inf, 3e4, -0.0]), dtype)
    assert printed(capfd, x) == [f"{v:.6f}" for v in x.values]
    found = printed(capfd, x, hexadecimal=True)
    np.testing.assert_array_equal([float.fromhex(v) for v in found], x.values)
    assert found[1].startswith("0x1.8p")


@triton.jit
def shapes_kernel(x_ptr, n):
    place = tl.arange(0, 2)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.device_print("two ", tl.load(x_ptr + place), n)
    tl.device_print("at", x_ptr)
    tl.device_print("where", tl.load(x_ptr + place) > 30)
    print("nothing")
    print("", tl.program_id(1))


def test_operands_shapes_and_programs(capfd):
    x = Tensor(np.arange(32, dtype=np.int32))
    shapes_kernel[(1, 2)](x, 7)
    lines = capfd.readouterr().out.splitlines()
    for program in range(2):
        pid = f"pid (0, {program}, 0)"
        own = [line for line in lines if line.startswith(pid)]
        places = [(i, j) for i in range(2) for j in range(16)]
        expected = [f"{pid} idx ({i}, {j:2}) two: (operand 0) {16 * i + j}" for i, j in places]
        expected += [f"{pid} idx () two: (operand 1) 7", f"{pid} idx () at: {x.data_ptr():#x}"]
        expected += [f"{pid} idx ({i}, {j:2}) where: {int(16 * i + j > 30)}" for i, j in places]
        assert own == [*expected, f"{pid} nothing", f"{pid} idx (): {program}"]


@triton.jit
def prefix_kernel():
    tl.device_print('100% of "C:\\n"\t{} ??/ %s')


def test_any_ascii_text_may_stand_in_front(capfd):
    prefix_kernel[(1,)]()
    assert capfd.readouterr().out == 'pid (0, 0, 0) 100% of "C:\\n"\t{} ??/ %s\n'


@triton.jit
def static_kernel(x_ptr, N: tl.constexpr):
    tl.static_assert(N == 4)
    tl.static_print("block", N)


def test_static_print_and_static_assert_run_when_a_kernel_is_compiled(capsys):
    static_kernel[(1,)](Tensor(np.zeros(4, np.float32)), 4)
    assert re.search(r"block.*4", capsys.readouterr().out)
