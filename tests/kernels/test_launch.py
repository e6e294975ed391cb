import ctypes
import gc
import weakref

import numpy as np
import pytest
import triton
import triton.language as tl

from fastdeploy.kernels import launch as launch_module
from fastdeploy.kernels.launch import TensorView, launch, target, view
from tests.triton_cpu.arrays import run_python


@triton.jit
def _double_kernel(out, x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, (tl.load(x + at, mask=at < n) * 2).to(out.dtype.element_ty), mask=at < n)


def doubled(out, x, count):
    launch(_double_kernel, (triton.cdiv(count, 64),), out, x, count, BLOCK=64)


def test_of_a_launched_kernel_the_machine_code_is_kept_and_no_text():
    x, out = np.arange(64, dtype=np.float32), np.zeros((2, 64), np.float32)
    for row in out:  # the second is launched past Triton's JIT
        doubled(row, x, 64)
    np.testing.assert_array_equal(out, [x * 2, x * 2])
    kernels = [kernel for kernel, _ in launch_module._compiled.values() if kernel.src.fn is _double_kernel]
    assert kernels and not any(kernel.asm for kernel in kernels)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float16", "float32", "float64", "bool"])
def test_view_of_numpy(dtype):
    array = np.zeros((3, 5), dtype)
    seen = view(array)
    assert (seen.data_ptr(), seen.dtype, seen.shape, seen.strides) == (array.ctypes.data, dtype, (3, 5), (5, 1))


def test_view_of_a_slice_has_its_address_and_strides():
    array = np.zeros((6, 8), np.float32)
    seen = view(array[2:5, 1::2])
    assert (seen.pointer, seen.shape, seen.strides) == (array[2:, 1:].ctypes.data, (3, 4), (8, 2))
    assert not seen.contiguous
    assert view(array[2:5]).contiguous


def test_view_of_read_only_memory():
    array = np.arange(4, dtype=np.float32)
    array.flags.writeable = False
    assert view(array).pointer == array.ctypes.data


def test_view_keeps_the_memory_alive():
    array = np.zeros(4, np.float32)
    gone = weakref.ref(array)
    seen = view(array)
    del array
    gc.collect()
    assert gone() is not None
    del seen
    gc.collect()
    assert gone() is None


def test_view_of_a_view_is_itself():
    seen = view(np.zeros(4, np.float32))
    assert view(seen) is seen


def test_reinterpreting_bits():
    array = np.array([0x3F80], np.uint16)
    assert view(array, "bfloat16").dtype == "bfloat16"
    with pytest.raises(ValueError, match="uint16 cannot be taken for 'float32'"):
        view(array, "float32")


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"expected a tensor with DLPack .* got list"):
        view([1.0, 2.0])
    with pytest.raises(TypeError, match="no kernel takes DLPack type code 5 of 64 bits"):
        view(np.zeros(2, np.complex64))


def test_rows_and_reshape_share_memory():
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    part = view(array).rows(2, start=3)
    assert (part.pointer, part.shape) == (array[3:].ctypes.data, (2, 4))
    assert view(array).rows(0).shape == (0, 4)
    flat = part.reshape(8)
    assert (flat.pointer, flat.shape, flat.strides) == (part.pointer, (8,), (1,))
    with pytest.raises(ValueError, match="rows 3 to 7 of a tensor with 6 rows"):
        view(array).rows(4, start=3)
    with pytest.raises(ValueError, match="cannot become"):
        view(array[:, :2]).reshape(12)


def test_a_dlpack_producer_without_strides_or_versions():
    class Old:
        """Gives NumPy's unversioned capsule, as producers older than DLPack 1.0 do, and leaves the strides out."""

        def __init__(self, array):
            self.array = array

        def __dlpack__(self, stream=None):
            capsule = self.array.__dlpack__()
            get = ctypes.pythonapi.PyCapsule_GetPointer
            get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            strides = get(capsule, b"dltensor") + 32  # data 8, device 8, ndim 4, dtype 4, shape 8
            ctypes.c_void_p.from_address(strides).value = None
            return capsule

    array = np.zeros((2, 3), np.float32)
    seen = view(Old(array))
    assert (seen.pointer, seen.shape, seen.strides) == (array.ctypes.data, (2, 3), (3, 1))


def test_launch_takes_numpy_arrays():
    x, out = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    doubled(out, x, 100)
    np.testing.assert_array_equal(out, 2 * x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int64"])
def test_launch_takes_paddle_tensors(dtype):
    paddle = pytest.importorskip("paddle")
    x = paddle.arange(100).astype(dtype)
    out = paddle.zeros([100], dtype=dtype)
    doubled(out, x, 100)
    np.testing.assert_array_equal(out.astype("float32").numpy(), 2 * np.arange(100))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int64"])
def test_launch_takes_torch_tensors(dtype):
    torch = pytest.importorskip("torch")
    x = torch.arange(100).to(getattr(torch, dtype))
    out = torch.zeros(100, dtype=getattr(torch, dtype))
    doubled(out, x, 100)
    np.testing.assert_array_equal(out.float().numpy(), 2 * np.arange(100))


def test_view_of_a_paddle_slice():
    paddle = pytest.importorskip("paddle")
    tensor = paddle.zeros([6, 8], dtype="bfloat16")
    seen = view(tensor[2:5])
    assert (seen.pointer, seen.dtype, seen.strides) == (tensor.data_ptr() + 2 * 8 * 2, "bfloat16", (8, 1))


class Exported:
    """A DLPack producer that says of an array's memory that it is another device's, or not there."""

    def __init__(self, device_type, data):
        self.array = np.zeros((2, 3), np.float32)
        self.device_type, self.data = device_type, data

    def __dlpack__(self):
        capsule = self.array.__dlpack__()
        described = launch_module._DLTensor.from_address(launch_module._capsule_pointer(capsule, b"dltensor"))
        described.device_type = self.device_type
        described.data = described.data if self.data is None else self.data
        return capsule


@pytest.mark.parametrize(
    ("device_type", "data", "said"),
    [(2, 1 << 44, "type 2"), (10, None, "type 10"), (1, 0, "has elements and no memory"), (2, 0, "no memory")],
)
def test_a_tensor_that_the_cpu_cannot_read_is_refused_and_a_launch_names_the_argument(device_type, data, said):
    exported = Exported(device_type, data)
    with pytest.raises(ValueError, match=said):
        view(exported)
    with pytest.raises(ValueError, match=rf"_double_kernel: argument 'x': .*{said}"):
        doubled(np.zeros(6, np.float32), exported, 6)


@pytest.mark.parametrize("device_type", [3, 11, 13])
def test_memory_of_a_gpu_that_the_host_can_read_is_taken(device_type):
    out, exported = np.zeros((2, 3), np.float32), Exported(device_type, None)
    exported.array[:] = 4
    doubled(out, exported, 6)
    assert (out == 8).all()


def test_a_launch_names_the_argument_that_no_kernel_takes():
    with pytest.raises(TypeError, match=r"_double_kernel: argument 'x': no kernel takes"):
        doubled(np.zeros(2, np.float32), np.zeros(2, np.complex64), 2)


def test_an_empty_grid_launches_nothing():
    out = np.zeros(4, np.float32)
    launch(_double_kernel, (0,), out, out, 0, BLOCK=64)


@triton.jit
def _number_kernel(out, number, addend):
    if addend is None:
        tl.store(out, number)
    else:
        tl.store(out, number + tl.load(addend))


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_each_variant_of_the_arguments_gets_its_own_kernel(dtype):
    """Launched twice each, so that the second time is the one that goes past Triton's JIT."""
    numbers = [1, 5, 0, -7, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40]
    for number in [*numbers, *numbers]:
        out = np.zeros(1, dtype)
        launch(_number_kernel, (1,), out, number, None)
        assert out[0] == number
        launch(_number_kernel, (1, 1), out, number, np.full(1, 3, np.int32))
        assert out[0] == number + 3 or number == 2**31 - 1  # an i32 there, and i32 + i32 wraps
        launch(_number_kernel, (1, 1, 1), out, number, np.full(1, 0.5, np.float64))
        assert out[0] == np.array(number + 0.5).astype(dtype)
    launch(_number_kernel, (1,), out, 2.5, None)
    assert out[0] == np.array(2.5).astype(dtype)


def test_a_cache_folder_that_can_not_be_written_is_named_with_the_remedy(tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    code = "import numpy as np; from fastdeploy import triton_cpu; triton_cpu.activate(); "
    code += "from fastdeploy.kernels.activation import silu_mul; from fastdeploy.kernels.launch import view; "
    code += "silu_mul(view(np.zeros((1, 32), 'f4')), view(np.zeros((1, 64), 'f4')))"
    done = run_python(code, TRITON_CACHE_DIR=str(file / "cache"))
    last = done.stderr.splitlines()[-1]
    assert "Error: " in last and str(file / "cache") in last and "set TRITON_CACHE_DIR" in last


def test_target_is_this_cpu():
    assert target().kind == "cpu"
    assert target().parallelism >= 1


def test_a_view_names_its_type_and_shape():
    assert repr(TensorView(0, "float32", (2, 3), (3, 1), None)) == "TensorView(float32[2, 3])"
