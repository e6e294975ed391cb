"""What a kernel may be called with, and that Triton's random numbers are Triton's."""

from typing import NamedTuple

import numpy as np
import pytest
import triton
import triton.language as tl

from fastdeploy.triton_cpu.runtime import record

from .arrays import Tensor, empty, rounded


@triton.jit
def scalar_kernel(out_ptr, float_ptr, small, large, huge, negative, flag, one, x, absent, C: tl.constexpr):
    tl.store(out_ptr, small)
    tl.store(out_ptr + 1, large)
    tl.store(out_ptr + 2, huge)
    tl.store(out_ptr + 3, negative)
    tl.store(out_ptr + 4, flag)
    tl.store(out_ptr + 5, one)
    tl.store(out_ptr + 6, C)
    if absent is None:
        tl.store(out_ptr + 7, 7)
    tl.store(float_ptr, x)


def test_numbers_bools_and_none():
    out, x = empty(8, "uint64"), empty(1, "float64")
    for flag in (True, False):
        scalar_kernel[(1,)](out, x, 7, 2**40, 2**64 - 3, -5, flag, 1, 0.1, None, 11)
        np.testing.assert_array_equal(out.stored, [7, 2**40, 2**64 - 3, 2**64 - 5, flag, 1, 11, 7])
        assert x.stored[0] == np.float32(0.1)


@triton.jit
def typed_kernel(out_ptr, a: tl.float16, b: tl.bfloat16, c: tl.float64, d: tl.uint8, e: tl.int16, f: tl.uint32):
    tl.store(out_ptr, a)
    tl.store(out_ptr + 1, b)
    tl.store(out_ptr + 2, c)
    tl.store(out_ptr + 3, d)
    tl.store(out_ptr + 4, e)
    tl.store(out_ptr + 5, f)


def test_arguments_with_a_declared_type():
    out = empty(6, "float64")
    typed_kernel[(1,)](out, 0.1, 0.1, 0.1, 200, -3, 2**32 - 1)
    tenth = [rounded(np.array(0.1), dtype) for dtype in ("float16", "bfloat16")]
    np.testing.assert_array_equal(out.stored, [*tenth, 0.1, 200, -3, 2**32 - 1])


@triton.jit
def tuple_kernel(tensors, sizes, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(tensors[0] + i, i < sizes[0], 0.0)
    y = tl.load(tensors[1] + i, i < sizes[1][0], 0.0)
    tl.store(tensors[2] + i, x * scale + y * sizes[1][1])


def test_tuples(rng):
    x, y = rng.standard_normal((2, 16), dtype=np.float32)
    out = empty(16)
    tuple_kernel[(1,)]((Tensor(x), Tensor(y), out), (10, (12, 3)), 0.5, 16)
    i = np.arange(16)
    np.testing.assert_allclose(out.stored, np.where(i < 10, x, 0) * 0.5 + np.where(i < 12, y, 0) * 3, rtol=1e-6)


@triton.jit
def mixed_kernel(shape: tl.constexpr, tensors, pair, N: tl.constexpr, scale):
    """Constants before, within and after what the kernel is given when it runs."""
    i = tl.arange(0, N)
    x = tl.load(tensors[0] + i)
    if tensors[1] is not None:
        x += tl.load(tensors[1] + i)
    tl.store(tensors[2][0] + i, x * scale + pair[1] * shape[0] + pair[0] * shape[1][0])


@pytest.mark.parametrize("shape", [(5, (7,)), (5, (7, (8, 9)), None, ())])
@pytest.mark.parametrize("second", ["constant", "number", "one"])
@pytest.mark.parametrize("absent", [True, False])
def test_constants_anywhere_in_tuples_do_not_shift_what_is_not_constant(rng, shape, second, absent):
    x, y = rng.standard_normal((2, 16), dtype=np.float32)
    out, value = empty(16), {"constant": 3, "number": 3, "one": 1}[second]
    tensors = (Tensor(x), None if absent else Tensor(y), (out, ()))
    mixed_kernel[(1,)](shape, tensors, (4, tl.constexpr(value) if second == "constant" else value), 16, 2.0)
    np.testing.assert_allclose(out.stored, (x if absent else x + y) * 2 + value * 5 + 4 * 7, rtol=1e-5, atol=1e-5)


class Pair(NamedTuple):
    tensor: Tensor
    number: object


@triton.jit
def nested_kernel(out, pair, N: tl.constexpr, deep):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(pair.tensor + i) * pair.number[0] + deep[1][0][1] * deep[1][1] + deep[0])


@pytest.mark.parametrize("factor", [2, tl.constexpr(2)])
@pytest.mark.parametrize("last", [7, tl.constexpr(7)])
@pytest.mark.parametrize("first", [3, tl.constexpr(3)])
def test_named_tuples_and_tuples_in_tuples(factor, last, first):
    x, out = Tensor(np.arange(16, dtype=np.int32)), empty(16, "int32")
    nested_kernel[(1,)](out, Pair(x, (factor, ())), 16, (first, ((None, last), 5), tl.constexpr((1, (2, 3)))))
    np.testing.assert_array_equal(out.stored, np.arange(16) * 2 + 7 * 5 + 3)


class Elsewhere(Tensor):
    """A tensor as PyTorch has them on other devices."""

    def __init__(self, device, address, shape=(1,)):
        super().__init__(np.zeros(shape, np.float32))
        self.device, self.shape, self.address = device, shape, address

    def data_ptr(self):
        return super().data_ptr() if self.address is None else self.address


@triton.jit
def copy_kernel(out_ptr, inputs, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(inputs[0] + i, i < n, 0.0))


@pytest.mark.parametrize(
    ("device", "address", "said"),
    [("meta", 0, "'meta'"), ("cuda:0", 1 << 44, "'cuda:0'"), ("cpu", 0, "no memory"), (None, 0, "no memory")],
)
def test_memory_that_a_cpu_cannot_read_is_an_error_that_names_the_argument(device, address, said):
    out, elsewhere = empty(4), Elsewhere(device, address)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"'copy_kernel': argument 'inputs\[0\]' .*{said}"):
            copy_kernel[(1,)](out, (elsewhere,), 1, 4)
        with pytest.raises(ValueError, match=rf"argument 'out_ptr' .*{said}"), record():
            copy_kernel[(1,)](elsewhere, (out,), 1, 4)


@pytest.mark.parametrize("nowhere", [None, 0, 12345, -1, 2**63 + 5, 1 << 44])
def test_an_address_where_there_is_no_memory_is_an_error_that_names_the_argument(nowhere):
    x, out = Tensor(np.arange(4, dtype=np.float32)), empty(4)
    compiled = copy_kernel[(1,)](out, (x,), 4, 4)
    compiled[(1, 1, 1)](out.data_ptr(), (x.data_ptr(),), 4)  # addresses will do
    with pytest.raises(ValueError, match=rf"'copy_kernel': argument 'inputs\[0\]' is {nowhere}"):
        compiled[(1, 1, 1)](out, (nowhere,), 4)
    with pytest.raises(ValueError, match=rf"argument 'out_ptr' is {nowhere}"), record():
        compiled[(1, 1, 1)](nowhere, (x,), 0 if nowhere == 0 else 4)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "Place(cpu)", None])
def test_tensors_in_the_hosts_memory_and_those_without_elements_are_taken(device):
    out, full = empty(4), Elsewhere(device, None, (4,))
    full.stored[:] = 5
    copy_kernel[(1,)](out, (full,), 4, 4)
    np.testing.assert_array_equal(out.stored, 5)
    copy_kernel[(1,)](out, (Elsewhere(device, 0, (0, 3)),), 0, 4)
    np.testing.assert_array_equal(out.stored, 0)


def _philox(seed, offset, rounds=10):
    """Philox-4x32 (Salmon et al., 2011): four words for a 64-bit key and a counter."""
    word = np.uint64(0xFFFFFFFF)
    counter = [np.asarray(offset, np.uint64)] + [np.zeros_like(offset, np.uint64)] * 3
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (b >> np.uint64(32)) ^ counter[1] ^ key[0],
            b & word,
            (a >> np.uint64(32)) ^ counter[3] ^ key[1],
            a & word,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & word, (key[1] + np.uint64(0xBB67AE85)) & word]
    return counter


@triton.jit
def random_kernel(out_ptr, uniform_ptr, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c, d = tl.randint4x(seed, i)
    tl.store(out_ptr + i, a)
    tl.store(out_ptr + N + i, b)
    tl.store(out_ptr + 2 * N + i, c)
    tl.store(out_ptr + 3 * N + i, d)
    tl.store(uniform_ptr + i, tl.rand(seed, i))


def test_random_numbers_are_philox():
    for seed in (0, 1234567, 2**40 + 17):
        out, uniform = empty((4, 64), "uint32"), empty(64)
        random_kernel[(1,)](out, uniform, seed, 64)
        words = _philox(seed, np.arange(64))
        np.testing.assert_array_equal(out.stored, np.array(words))
        signed = words[0].astype(np.uint32).view(np.int32).astype(np.int64)
        expected = np.where(signed < 0, -signed - 1, signed).astype(np.float32) * np.float32(4.6566127342e-10)
        np.testing.assert_array_equal(uniform.stored, expected)


@triton.jit
def constant_pointer_kernel(x_ptr: tl.const, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_a_pointer_to_what_is_only_read(dtype):
    out = empty(8, dtype)
    constant_pointer_kernel[(1,)](Tensor(np.arange(1, 9), dtype), out, 8)
    np.testing.assert_array_equal(out.values, np.arange(2, 10))
