"""What is said when a kernel, a compiler or a setting is not as it should be."""

import inspect

import numpy as np
import pytest
import triton
import triton.language as tl

from fastdeploy.triton_cpu import compiler
from fastdeploy.triton_cpu.context import UnsupportedOperation
from fastdeploy.triton_cpu.runtime import record, run_queued

from .arrays import Tensor, empty, run_python


@triton.jit
def assembly_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.inline_asm_elementwise("mov $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + i, y)


def line_of(kernel, text):
    lines, start = inspect.getsourcelines(kernel.fn)
    return start + next(number for number, line in enumerate(lines) if text in line)


def test_an_unsupported_operation_is_named_with_its_source_line():
    with pytest.raises(UnsupportedOperation) as raised:
        assembly_kernel[(1,)](empty(16, "int32"), 16)
    message = str(raised.value)
    assert "tt.elementwise_inline_asm" in message and "assembly_kernel" in message
    assert f"{__file__}:{line_of(assembly_kernel, 'inline_asm')}" in message


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
def assert_kernel(x_ptr, done_ptr, n, N: tl.constexpr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tile = tl.load(x_ptr + x * N * N + i * N + j)
    tl.device_assert((tile >= 0) | (y + z > 0), 'is "\\negative": 100%s ½')
    tl.device_assert(x < n)
    tl.store(done_ptr + x, 1)


def _assert(values, n, done=None, **options):
    x = Tensor(np.array(values, np.int32))
    assert_kernel[(x.stored.shape[0], 2, 2)](x, empty(8, "int32") if done is None else done, n, 2, **options)


def test_device_assert_raises_with_the_source_line_the_program_and_the_element():
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            _assert([[1, 2, 3, 4], [5, 6, -7, 8]], 9, debug=True)
        place = f"{__file__}:{line_of(assert_kernel, 'tile >= 0')}: kernel 'assert_kernel', program (1, 0, 0): "
        assert str(raised.value) == place + 'device-side assertion failed at [1, 0]: is "\\negative": 100%s ½'
        with pytest.raises(
            RuntimeError, match=rf":{line_of(assert_kernel, 'x < n')}: .*program \(0, \d, \d\): device-side assert"
        ):
            _assert([[1, 2, 3, 4]], 0, debug=True)
        _assert([[1, 2, 3, 4]], 1, debug=True)


def test_a_program_ends_where_an_assertion_fails():
    done = Tensor(np.zeros(8, np.int32))
    with pytest.raises(RuntimeError, match="device-side assertion failed"):
        _assert([[1, 2, 3, 4]] * 8, 3, done, debug=True)
    assert not done.stored[3:].any()


def test_device_assert_counts_in_debug_mode_only(monkeypatch):
    _assert([[-1, -1, -1, -1]], 0)
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    with pytest.raises(RuntimeError, match="device-side assertion failed"):
        _assert([[-1, -1, -1, -1]], 0)


def test_a_failure_in_a_plan_is_raised_by_the_replay_it_happens_in():
    x, done = Tensor(np.zeros((1, 4), np.int32)), empty(1, "int32")
    with record() as plan:
        for _ in range(2):
            assert_kernel[(1, 1, 1)](x, done, 1, 2, debug=True)
    plan.replay()
    x.stored[0, 3] = -1
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"program \(0, 0, 0\): device-side assertion failed at \[1, 1\]"):
            plan.replay()
    x.stored[:] = 0
    plan.replay()


def test_a_failure_in_a_queue_is_raised_at_its_end():
    x, done = Tensor(np.full((1, 4), -1, np.int32)), empty(1, "int32")
    with pytest.raises(RuntimeError, match="device-side assertion failed"):
        run_queued(lambda: assert_kernel[(1, 1, 1)](x, done, 1, 2, debug=True))


@triton.jit(noinline=True)
def _checked(x):
    tl.device_assert(x > 0, "in a function")
    return x


@triton.jit
def calling_assert_kernel(x_ptr, n):
    for i in range(n):
        tl.store(x_ptr + i, _checked(tl.load(x_ptr + i)) + 1)


def test_an_assertion_in_a_called_function_ends_the_kernel():
    x = Tensor(np.array([1, 2, 0, 4], np.int32))
    with pytest.raises(RuntimeError, match="program .*in a function"):
        calling_assert_kernel[(1,)](x, 4, debug=True)
    np.testing.assert_array_equal(x.stored, [2, 3, 0, 4])


@triton.jit
def sum_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + tl.load(x_ptr + 1))


def test_sums_that_overflow_are_failures_in_debug_mode_unless_that_is_switched_off():
    for options in ({}, {"debug": True, "sanitize_overflow": False}):
        sum_kernel[(1,)](Tensor(np.array([2**31 - 1, 1], np.int32)), **options)
    with pytest.raises(RuntimeError, match="int32 overflow detected for operation add"):
        sum_kernel[(1,)](Tensor(np.array([2**31 - 1, 1], np.int32)), debug=True)


@triton.jit
def print_kernel(x_ptr, N: tl.constexpr):
    tl.device_print("seen %", tl.load(x_ptr + tl.arange(0, N)))


def test_device_print():
    program = """
import numpy as np
from fastdeploy import triton_cpu
triton_cpu.activate()
from tests.triton_cpu.arrays import Tensor
from tests.triton_cpu.test_errors import print_kernel
print_kernel[(1,)](Tensor(np.arange(4, dtype=np.int32)), 4)
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert "pid (0, 0, 0) idx (3) seen %: 3" in done.stdout
