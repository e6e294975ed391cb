"""NumPy arrays as arguments: by `view`, and what is said to those who pass them as they are."""

import numpy as np
import pytest
import triton
import triton.language as tl

from fastdeploy.triton_cpu import view

from .arrays import FLOATS, FP8, INTEGERS, encode


@triton.jit
def copy_kernel(x_ptr, y_ptr, stride, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride))


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS, *FP8])
def test_a_kernel_reads_and_writes_the_arrays_own_memory(dtype):
    x, y = encode(np.arange(32), dtype), encode(np.zeros(16), dtype)
    copy_kernel[(1,)](view(x[::2], dtype), view(y, dtype), view(x[::2], dtype).strides[0], 16)
    np.testing.assert_array_equal(y, x[::2])


def test_a_view_says_what_the_array_is():
    x = view(np.zeros((4, 6), np.uint16)[:, ::-2], "bfloat16")
    assert (x.shape, x.strides, x.stride()) == ((4, 3), (6, -2), (6, -2))
    assert (x.dtype, x.dtype.itemsize, x.dtype.is_floating_point) == ("bfloat16", 2, True)
    assert x.data_ptr() == x.array.ctypes.data and "bfloat16[4, 3]" in repr(x)
    assert not view(np.zeros(3, np.int8)).dtype.is_floating_point


def test_bools():
    x, y = np.array([True, False] * 8), np.zeros(16, np.int32)
    copy_kernel[(1,)](view(x), view(y), 1, 16)
    np.testing.assert_array_equal(y, x)


def test_a_view_keeps_the_array_alive():
    x, y = view(np.full(1 << 20, 7)), view(np.zeros(16, np.int64))
    copy_kernel[(1,)](x, y, 65536, 16)
    np.testing.assert_array_equal(y.array, 7)


@pytest.mark.parametrize(
    ("array", "dtype", "error", "said"),
    [
        ([1, 2], None, TypeError, "expected a NumPy array, got list"),
        (np.zeros(3, complex), None, TypeError, "elements of complex128, only of bool"),
        (np.zeros(3, object), None, TypeError, "elements of object"),
        (np.zeros(3, np.float32), "half", TypeError, "elements of half"),
        (np.zeros(3, np.uint16), "float32", ValueError, "elements of uint16 cannot be taken for float32"),
        (np.zeros(3, ">f4"), None, ValueError, "copy it first"),
        (np.zeros(3, [("a", "f4"), ("b", "i1")])["a"], None, ValueError, "strides of .5,. bytes"),
    ],
)
def test_what_is_no_array_of_a_kernels_elements_is_an_error(array, dtype, error, said):
    with pytest.raises(error, match=said):
        view(array, dtype)


@triton.jit
def pair_kernel(pair, out_ptr, n):
    tl.store(out_ptr, tl.load(pair[0]) + n)


@pytest.mark.parametrize("fresh", [True, False])
def test_an_array_that_is_passed_as_it_is_is_named_with_the_remedy(fresh):
    kernel = triton.jit(pair_kernel.fn) if fresh else pair_kernel
    x, out = view(np.ones(1)), view(np.zeros(1))
    for bad, name in [
        (((x.array,), out, 1), r"'pair\[0\]' is a NumPy array: pass fastdeploy.triton_cpu.view\(array\)"),
        (((x,), out.array, 1), "'out_ptr' is a NumPy array"),
        (((x,), out, np.int32(1)), r"'n' is a int32 of NumPy: pass a number of Python, .item\(\)"),
    ]:
        with pytest.raises(TypeError, match=name):
            kernel[(1,)](*bad)
    with pytest.raises(TypeError, match="'out_ptr' is a NumPy array"):
        kernel[(1,)]((x,), out_ptr=out.array, n=1)
    with pytest.raises(TypeError, match="object"):  # of anything else Triton says what it says
        kernel[(1,)]((x,), out, object())
    kernel[(1,)]((x,), out, 1)
    assert out.array[0] == 2
