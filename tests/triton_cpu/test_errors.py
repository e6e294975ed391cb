"""What is said when a kernel, a compiler or a setting is not as it should be."""

import inspect

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastdeploy.triton_cpu import compiler
from fastdeploy.triton_cpu.context import UnsupportedOperation

from .arrays import Tensor, empty, run_python


@triton.jit
def assembly_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.inline_asm_elementwise("mov $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + i, y)


@triton.jit
def unknown_function_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + i, libdevice.erfinv(tl.load(x_ptr + i)))


@triton.jit
def scaled_dot_kernel(x_ptr, s_ptr, out_ptr, N: tl.constexpr):
    i, j, k = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, N // 32)[None, :]
    x = tl.load(x_ptr + i * N + j)
    scale = tl.load(s_ptr + i * (N // 32) + k)
    tl.store(out_ptr + i * N + j, tl.dot_scaled(x, scale, "e4m3", x, scale, "e4m3"))


def line_of(kernel, text):
    lines, start = inspect.getsourcelines(kernel.fn)
    return start + next(number for number, line in enumerate(lines) if text in line)


@pytest.mark.parametrize(
    "kernel, call, operation, text",
    [
        (assembly_kernel, lambda: (empty(16, "int32"), 16), "tt.elementwise_inline_asm", "inline_asm"),
        (unknown_function_kernel, lambda: (empty(16), 16), "tt.extern_elementwise", "erfinv"),
        (
            scaled_dot_kernel,
            lambda: (empty((64, 64), "uint8"), empty((64, 2), "uint8"), empty((64, 64)), 64),
            "tt.dot_scaled",
            "dot_scaled",
        ),
    ],
    ids=["assembly", "libdevice", "dot_scaled"],
)
def test_an_unsupported_operation_is_named_with_its_source_line(kernel, call, operation, text):
    with pytest.raises(UnsupportedOperation) as raised:
        kernel[(1,)](*call())
    message = str(raised.value)
    assert operation in message and kernel.__name__ in message
    assert f"{__file__}:{line_of(kernel, text)}" in message


@triton.jit
def clock_kernel(x_ptr):
    tl.store(x_ptr, tl.extra.cuda.globaltimer())


def test_names_in_assembly_are_no_operands():
    with pytest.raises(UnsupportedOperation, match="globaltimer"):
        clock_kernel[(1,)](empty(1, "int64"))


def test_c_that_does_not_compile_is_told_with_the_kernel():
    with pytest.raises(RuntimeError, match="kernel 'plain_kernel' does not compile") as raised:
        compiler.make_so("#error of this test", {"name": "plain_kernel"})
    assert "#error of this test" in str(raised.value)


@triton.jit
def _doubled(x):
    return tl.inline_asm_elementwise("add $0, $1, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def calling_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, _doubled(x))


def test_an_unsupported_operation_in_an_inlined_function_is_located_in_the_file():
    with pytest.raises(UnsupportedOperation, match="tt.elementwise_inline_asm") as raised:
        calling_kernel[(1,)](empty(16, "int32"), 16)
    lines = {line_of(calling_kernel, "_doubled(x)"), line_of(_doubled, "inline_asm")}
    assert any(f"{__file__}:{line}" in str(raised.value) for line in lines)


@triton.jit
def plain_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def test_a_kernel_still_works_after_an_error():
    for _ in range(2):
        with pytest.raises(UnsupportedOperation):
            assembly_kernel[(1,)](empty(16, "int32"), 16)
    x = empty(1)
    plain_kernel[(1,)](x)
    assert x.stored[0] == 1


def test_a_host_made_tensor_descriptor_is_refused():
    descriptor = pytest.importorskip("triton.tools.tensor_descriptor")

    x = Tensor(np.zeros((16, 16), np.float32))
    x.dtype = x.stored.dtype  # the descriptor asks for the size of an element
    with pytest.raises(NotImplementedError, match="descriptor"):
        _descriptor_kernel[(1,)](descriptor.TensorDescriptor(x, [16, 16], [16, 1], [16, 16]))


@triton.jit
def _descriptor_kernel(x):
    x.store([0, 0], x.load([0, 0]) + 1)


FIRST_LAUNCH = """
from fastdeploy import triton_cpu
triton_cpu.activate()
from tests.triton_cpu.arrays import empty
from tests.triton_cpu.test_errors import plain_kernel
plain_kernel[(1,)](empty(1))
"""


@pytest.mark.parametrize(
    "environment, missing",
    [
        ({"CC": "/nonexistent/compiler"}, "CC='/nonexistent/compiler' was not found"),
        ({"PATH": "/nonexistent", "CC": " "}, "none of gcc, clang, cc was found"),
    ],
    ids=["CC", "PATH"],
)
def test_without_a_compiler_it_is_said_what_to_install(environment, missing, tmp_path):
    done = run_python(FIRST_LAUNCH, TRITON_CACHE_DIR=str(tmp_path), **environment)
    assert done.returncode == 1
    assert "CompilerNotFound" in done.stderr and "apt-get install gcc" in done.stderr and missing in done.stderr


@pytest.mark.parametrize(
    "name, value",
    [
        ("FASTDEPLOY_NUM_THREADS", "0"),
        ("FASTDEPLOY_NUM_THREADS", "many"),
        ("FASTDEPLOY_NUM_THREADS", "²"),
        ("FASTDEPLOY_INSTRUCTION_SET", "mmx"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(name, value, tmp_path):
    done = run_python(FIRST_LAUNCH, **{name: value, "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 1
    assert f"ValueError: {name}='{value}'" in done.stderr


@triton.jit
def assert_kernel(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.device_assert(x >= 0, "x is negative: 100%")
    tl.device_print("seen %", x)


def test_device_assert_and_device_print():
    program = """
import numpy as np
from fastdeploy import triton_cpu
triton_cpu.activate()
from tests.triton_cpu.arrays import Tensor
from tests.triton_cpu.test_errors import assert_kernel
assert_kernel[(1,)](Tensor(np.arange(4, dtype=np.int32)), 4, debug=True)
assert_kernel[(1,)](Tensor(np.array([0, 1, -2, 3], np.int32)), 4, debug=True)
"""
    done = run_python(program)
    assert done.returncode == -6, done.stderr
    line = line_of(assert_kernel, "device_assert")
    assert f"test_errors.py:{line}" in done.stderr and "x is negative: 100%" in done.stderr
    assert "pid (0, 0, 0) seen %: [3] 3" in done.stdout
