"""Tensor descriptors made on the host, as arguments."""

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeploy.triton_cpu import view
from fastdeploy.triton_cpu.runtime import record

from .arrays import Tensor, empty, rounded


@triton.jit
def tile_kernel(x, y, scale, N: tl.constexpr):
    """A tile of N x N of y from one of x, which begins in places that are no multiple of anything."""
    i, j = tl.program_id(0) * N, tl.program_id(1) * N
    tile = x.load([i - 1, j + 3])
    y.store([i, j], (tile.to(tl.float32) * scale).to(y.dtype))


def _shifted(x, padding):
    """x with its corner at [-1, 3]."""
    wide = np.full((x.shape[0] + 2, x.shape[1] + 8), padding, np.float64)
    wide[1 : x.shape[0] + 1, : x.shape[1]] = x
    return wide[: x.shape[0], 3 : x.shape[1] + 3]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_tiles_are_padded_where_they_leave_the_tensor(dtype, padding, rng):
    x, y = Tensor(rng.standard_normal((40, 48)), dtype), empty((40, 48), dtype)
    source = TensorDescriptor.from_tensor(x, [16, 16], padding)
    tile_kernel[(3, 3)](source, TensorDescriptor.from_tensor(y, [16, 16]), 2.0, 16)
    expected = _shifted(x.values, np.nan if padding == "nan" else 0).astype(np.float32) * 2
    np.testing.assert_array_equal(y.values, rounded(expected, dtype))


def test_shape_and_strides_are_the_descriptors_own(rng):
    memory, y = rng.standard_normal((40, 48)), empty((16, 16), "float64")
    x = TensorDescriptor(Tensor(memory), [7, 9], [96, 1], [16, 16])
    tile_kernel[(1, 1)](x, TensorDescriptor.from_tensor(y, [16, 16]), 1.0, 16)
    expected = np.zeros((16, 16))
    expected[1:8, :6] = memory[:14:2, 3:9]
    np.testing.assert_array_equal(y.stored, expected.astype(np.float32))


@triton.jit
def nested_kernel(pair, n, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, pair[0][0].load([n]) + pair[1])


def test_descriptors_in_tuples_and_other_arguments_beside_them():
    out = empty(16, "int32")
    x = TensorDescriptor.from_tensor(Tensor(np.arange(32, dtype=np.int32)), [16])
    nested_kernel[(1,)](((x,), 100), 20, out, 16)
    np.testing.assert_array_equal(out.stored, np.where(np.arange(16) < 12, np.arange(20, 36), 0) + 100)


@triton.jit
def cube_kernel(x, y):
    y.store([0, 0, 0, 0, 0], x.load([1, 0, 0, 0, 0]) + 1)


def test_five_dimensions():
    x = Tensor(np.arange(2 * 2 * 2 * 2 * 8, dtype=np.float32).reshape(2, 2, 2, 2, 8))
    y = empty((1, 2, 2, 2, 8))
    block = [1, 2, 2, 2, 8]
    cube_kernel[(1,)](TensorDescriptor.from_tensor(x, block), TensorDescriptor.from_tensor(y, block))
    np.testing.assert_array_equal(y.stored, x.stored[1:] + 1)


def test_a_recorded_launch_reads_what_the_tensor_holds_at_the_replay():
    x, y = Tensor(np.zeros((16, 16))), empty((16, 16), "float64")
    with record() as plan:
        tile_kernel[(1, 1)](*[TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, y)], 1.0, 16)
    x.stored[:] = 5
    plan.replay()
    np.testing.assert_array_equal(y.stored, _shifted(x.stored, 0))


@triton.jit
def up_kernel(x, y):
    y.store([0, 0], x.load([0, 0]) + 1)


def test_tensors_of_descriptors_may_overlap(rng):
    memory = rng.integers(0, 9, (20, 16)).astype(np.float32)
    expected = memory.copy()
    expected[1:17] = memory[:16] + 1
    x, y = view(memory[:16]), view(memory[1:17])
    up_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), TensorDescriptor.from_tensor(y, [16, 16]))
    np.testing.assert_array_equal(memory, expected)


@triton.jit
def round_kernel(x, y):
    y.store([0], x.load([0]))


@pytest.mark.skipif(not hasattr(TensorDescriptor, "round_f32_to_tf32"), reason="a switch of later Tritons")
def test_values_are_rounded_to_tf32_where_that_is_asked_for(rng):
    x, y = Tensor(rng.standard_normal(16, np.float32)), empty(16)
    round_kernel[(1,)](
        TensorDescriptor.from_tensor(x, [16], round_f32_to_tf32=True), TensorDescriptor.from_tensor(y, [16])
    )
    bits = x.stored.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0xFFF + (bits >> 13 & 1)) & ~np.uint64(0x1FFF)
    np.testing.assert_array_equal(y.stored.view(np.uint32), nearest)


def test_another_descriptor_than_a_kernel_was_compiled_for_is_an_error():
    x, y = Tensor(np.zeros((16, 16))), Tensor(np.zeros((16, 16)))
    square, single = (TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, Tensor(np.zeros((16, 16), np.float32))))
    compiled = up_kernel[(1,)](square, TensorDescriptor.from_tensor(y, [16, 16]))
    for wrong in (single, TensorDescriptor.from_tensor(x, [8, 16]), TensorDescriptor(x, [256], [1], [16]), x):
        with pytest.raises(
            TypeError, match=r"'up_kernel': argument 'y' is a .*compiled for a tensordesc<fp64\[16, ?16\]>"
        ):
            compiled[(1, 1, 1)](square, wrong)


def test_a_descriptor_of_memory_elsewhere_is_an_error_that_names_the_argument():
    x = Tensor(np.zeros((16, 16)))
    elsewhere = TensorDescriptor.from_tensor(x, [16, 16])
    x.device = "cuda:0"
    with pytest.raises(ValueError, match=r"argument 'x.base' is on device 'cuda:0'"):
        up_kernel[(1,)](elsewhere, elsewhere)
