"""Tensors in, Triton launches out.

Kernels know a tensor by six facts, kept in a `TensorView`. `view` reads them through DLPack, so that Paddle, NumPy,
PyTorch and every other DLPack producer may own the memory. Reading them costs about 5 us: build views once, for
weights, caches and workspaces, and cut them with `TensorView.rows`, which costs less than 1 us.

    launch(kernel, grid, *arguments, **constexprs)      kernel[grid](...) through Triton's JIT and its active driver

Launchers choose their tiles by plain rules of the `target()` and of the problem, never of the batch where a tile's
width could change the order of a sum (see DESIGN.md, "A token does not depend on its neighbours").
"""

import ctypes
import functools
import os
import threading
from dataclasses import dataclass
from math import prod
from typing import Any

# Triton 3.10 stops contracting a * b + c by default: slower on GPUs, and other bits than before.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl
from triton.runtime import driver

FLOATS = ("float32", "bfloat16", "float16")

# (type code, bits) of DLPack's DLDataType, under the names that Triton takes.
_DLPACK_DTYPES = {
    (0, 8): "int8", (0, 16): "int16", (0, 32): "int32", (0, 64): "int64",
    (1, 8): "uint8", (1, 16): "uint16", (1, 32): "uint32", (1, 64): "uint64",
    (2, 16): "float16", (2, 32): "float32", (2, 64): "float64",
    (4, 16): "bfloat16", (6, 8): "bool", (10, 8): "float8_e4m3fn", (12, 8): "float8_e5m2",
}  # fmt: skip
# DLPack's numbers of devices whose memory the host can read: its own, pinned for CUDA and ROCm, managed by CUDA.
_READABLE_BY_HOST = (1, 3, 11, 13)
ITEM_SIZES = {name: bits // 8 for (_, bits), name in _DLPACK_DTYPES.items()}


class TensorView:
    """Where a tensor lies and what it looks like: all that a kernel launch needs.

    Attributes:
        pointer: address of the first element, int.
        dtype: Triton's name of the element type, such as "bfloat16".
        shape, strides: tuples of ints; strides count elements.
        contiguous: rows follow each other without gaps (C order).
        owner: keeps the memory alive.
    """

    __slots__ = ("contiguous", "dtype", "owner", "pointer", "shape", "strides")

    def __init__(self, pointer: int, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], owner: Any) -> None:
        self.pointer = pointer
        self.dtype = dtype
        self.shape = shape
        self.strides = strides
        self.contiguous = _is_contiguous(shape, strides)
        self.owner = owner

    def data_ptr(self) -> int:
        """The address; by this method Triton recognises a tensor argument."""
        return self.pointer

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]

    def rows(self, count: int, start: int = 0) -> "TensorView":
        """Rows [start, start + count) of the first dimension, no copy. ValueError if there are not that many."""
        if not 0 <= start <= start + count <= self.shape[0]:
            raise ValueError(f"rows {start} to {start + count} of a tensor with {self.shape[0]} rows")
        pointer = self.pointer + start * self.strides[0] * ITEM_SIZES[self.dtype]
        return TensorView(pointer, self.dtype, (count, *self.shape[1:]), self.strides, self.owner)

    def columns(self, start: int, stop: int) -> "TensorView":
        """Columns [start, stop) of a matrix, no copy. ValueError if it lacks some."""
        if not 0 <= start <= stop <= self.shape[1]:
            raise ValueError(f"columns {start} to {stop} of a matrix with {self.shape[1]}")
        pointer = self.pointer + start * self.strides[1] * ITEM_SIZES[self.dtype]
        return TensorView(pointer, self.dtype, (self.shape[0], stop - start), self.strides, self.owner)

    def reshape(self, *shape: int) -> "TensorView":
        """The same memory under another shape, no copy. ValueError if elements are lost or rows have gaps."""
        if not self.contiguous or prod(shape) != prod(self.shape):
            raise ValueError(f"a view of shape {self.shape}, strides {self.strides} cannot become {shape}")
        return TensorView(self.pointer, self.dtype, shape, _contiguous_strides(shape), self.owner)

    def __repr__(self) -> str:
        return f"TensorView({self.dtype}{list(self.shape)})"


class _DLTensor(ctypes.Structure):
    """DLPack's description of a tensor, as in dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
# A versioned capsule puts a version, a context, a deleter and flags (8 bytes each) before the tensor.
_TENSOR_OFFSETS = {b"dltensor": 0, b"dltensor_versioned": 32}


def view(tensor: Any, dtype: str | None = None) -> TensorView:
    """A view of any DLPack producer's tensor, which it keeps alive; a `TensorView` is returned as it is.

    `dtype` says what the bits mean where the producer has no name for it: view(array_of_uint16, "bfloat16").
    TypeError for what is no tensor; ValueError where `dtype` has another size than the elements, and for memory that
    kernels can't read: another device's on a CPU, or none at all.
    """
    if isinstance(tensor, TensorView):
        found = tensor
    elif hasattr(tensor, "__dlpack__"):
        found = _read_capsule(_export(tensor))
    else:
        raise TypeError(f"expected a tensor with DLPack (Paddle, NumPy, PyTorch, ...), got {type(tensor).__name__}")
    if dtype is None or dtype == found.dtype:
        return found
    if ITEM_SIZES.get(dtype) != ITEM_SIZES[found.dtype]:
        raise ValueError(f"elements of {found.dtype} cannot be taken for {dtype!r}: the sizes differ")
    return TensorView(found.pointer, dtype, found.shape, found.strides, found.owner)


def _export(tensor: Any) -> Any:
    try:
        return tensor.__dlpack__(max_version=(1, 0))  # only versioned capsules may be read-only, as a mapped file is
    except TypeError:  # producers older than DLPack 1.0
        return tensor.__dlpack__()


def _read_capsule(capsule: Any) -> TensorView:
    name = _capsule_name(capsule)
    described = _DLTensor.from_address(_capsule_pointer(capsule, name) + _TENSOR_OFFSETS[name])
    dtype = _DLPACK_DTYPES.get((described.code, described.bits))
    if dtype is None or described.lanes != 1:
        raise TypeError(f"no kernel takes DLPack type code {described.code} of {described.bits} bits")
    shape = tuple(described.shape[: described.ndim])
    strides = tuple(described.strides[: described.ndim]) if described.strides else _contiguous_strides(shape)
    if not described.data and 0 not in shape:
        raise ValueError(f"a tensor of shape {shape} has elements and no memory, as tensors on a meta device have")
    if described.device_type not in _READABLE_BY_HOST and target().is_cpu:
        raise ValueError(
            f"a tensor on device {described.device_id} of DLPack's type {described.device_type} is not in the host's "
            "memory, where kernels on a CPU need it"
        )
    pointer = (described.data or 0) + described.byte_offset
    return TensorView(pointer, dtype, shape, strides, owner=capsule)  # an unconsumed capsule owns its tensor


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:  # the stride of a single element means nothing
            return 0 in shape
        step *= size
    return True


def expect(name: str, tensor: TensorView, shape: tuple[int, ...], *dtypes: str, row_gaps: bool = False) -> None:
    """Check an argument of a launcher: its shape, its element type (any, if none is given) and that it has no gaps, but
    between the rows of a matrix if `row_gaps`."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tensor.shape}, expected {shape}")
    if dtypes and tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}, expected {' or '.join(dtypes)}")
    if not tensor.contiguous and not (row_gaps and tensor.strides[-1] == 1):
        raise ValueError(f"{name} of shape {tensor.shape} has strides {tensor.strides}: it must be contiguous")


@dataclass(frozen=True)
class Target:
    """What launchers need to know of the processor that kernels are compiled for."""

    kind: str  # "cpu", "cuda" or "hip"
    arch: int | str  # 80, 90, ... for cuda; "gfx942", ... for hip
    parallelism: int  # programs that run at the same time: threads of a CPU, multiprocessors of a GPU

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"


def target() -> Target:
    """The target of Triton's active driver."""
    return _describe(driver.active)


@functools.lru_cache(maxsize=8)
def _describe(active: Any) -> Target:
    found = active.get_current_target()
    properties = active.utils.get_device_properties(active.get_current_device())
    return Target(found.backend, found.arch, properties["multiprocessor_count"])


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own `cdiv` is for kernels: called from Python it takes 8 us.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def operand_dtype(target: Target, activations: TensorView, weights: TensorView | None = None) -> tl.dtype:
    """What `tl.dot` multiplies: on a GPU the activations' type. Sums are fp32.

    On a CPU it is fp32, but where both operands are bfloat16, which a CPU may be asked to multiply in pairs.
    """
    both_bf16 = weights is not None and activations.dtype == weights.dtype == "bfloat16"
    return getattr(tl, activations.dtype) if both_bf16 or not target.is_cpu else tl.float32


def row_block(target: Target, width: int, limit: int) -> int:
    """How many of a row's `width` elements an elementwise kernel takes at a time, a power of two.

    On a CPU padded lanes are paid for, so the largest power of two that divides the row, up to `limit`; a row that none
    from 16 on divides is padded. On a GPU padding is free: the whole row, up to 8192.
    """
    if not target.is_cpu:
        return min(next_power_of_2(width), 8192)
    divisor = min(width & -width, limit)
    return divisor if divisor >= 16 else min(next_power_of_2(width), limit)


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """What a kernel begins with that `early` may have launched before its predecessor has ended: it waits for that, and
    lets its successor be launched in turn."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def early(target: Target) -> dict[str, bool]:
    """Constants of a kernel that begins with `wait_for_inputs`. On Hopper its programs are brought to the processor
    while those of the kernel before are at work ("programmatic dependent launch"), which hides what a launch costs."""
    on_hopper = target.kind == "cuda" and target.arch == 90 and _may_be_early
    return {"EARLY": True, "launch_pdl": True} if on_hopper else {"EARLY": False}


def forbid_early_launches() -> None:
    """From now on, each kernel begins when the one before has ended."""
    global _may_be_early
    _may_be_early = False


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constexprs: Any) -> None:
    """Run `kernel` on every program of `grid`; nothing happens where the grid is empty.

    Arguments are `TensorView`s, DLPack tensors, numbers or None. A kernel's constexprs come after its arguments.
    TypeError or ValueError that names the argument, for a tensor of which there can be no `view`.
    """
    if 0 in grid:
        return
    ready: list[Any] = []
    try:
        for argument in arguments:
            ready.append(view(argument) if hasattr(argument, "__dlpack__") else argument)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{kernel.__name__}: argument {kernel.arg_names[len(ready)]!r}: {error}") from error
    variant = _cpu_variant if target().is_cpu else _gpu_variant
    key = (kernel, *map(variant, ready), *constexprs.items())
    found = _compiled.get(key)
    if found is None:
        _lend_scratch()
        compiled = kernel[grid](*ready, **constexprs)
        if compiled is not None:  # Triton's interpreter compiles nothing
            constants = [constexprs[name] for name in kernel.arg_names[len(ready) :]]
            _compiled[key] = (compiled, constants)
            if target().is_cpu:  # where the process would hold the text of each stage, 150 KB a kernel
                compiled.asm.clear()
        return
    # Past the JIT, which would look at every argument again for 8 us.
    compiled, constants = found
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    programs = (*grid, *_ONES[len(grid) :])
    _lend_scratch()
    compiled.run(*programs, stream, compiled.function, compiled.packed_metadata, None, None, None, *ready, *constants)


def provide_scratch(memory: Any) -> None:
    """Give kernels on a GPU memory for tensor descriptors, which programs make for themselves and forget at their end:
    a tensor of bytes, which all launches of the process use in turn, as they do the stream."""
    global _scratch
    _scratch = view(memory)


def _lend_scratch() -> None:
    """Have Triton take scratch memory from what was provided; it asks in every thread anew."""
    if _scratch is not None and not getattr(_lent, "done", False):
        triton.set_allocator(_take_scratch)
        _lent.done = True


def _take_scratch(nbytes: int, alignment: int, stream: int | None) -> TensorView:
    if _scratch is None or nbytes > _scratch.nbytes:
        have = 0 if _scratch is None else _scratch.nbytes
        raise MemoryError(f"a kernel needs {nbytes} bytes of scratch memory, {have} were provided")
    return _scratch


_compiled: dict[tuple, tuple[Any, list[Any]]] = {}  # kernels and their constexprs, by all that distinguishes them
_ONES = (1, 1, 1)
_may_be_early = True
_scratch: TensorView | None = None
_lent = threading.local()


def _cpu_variant(argument: Any) -> Any:
    """What Triton's JIT distinguishes arguments by: element types, the integer 1, widths of other integers, None."""
    if isinstance(argument, TensorView):
        return argument.dtype
    if type(argument) is int and argument != 1:
        return -(2**31) <= argument < 2**31, argument < 2**63
    return argument if type(argument) is int else type(argument)


def _gpu_variant(argument: Any) -> Any:
    """The same for GPUs, where multiples of 16 are something else, too: there, loads may take 16 bytes."""
    if isinstance(argument, TensorView):
        return argument.dtype, argument.pointer % 16 == 0
    if type(argument) is int:
        return _cpu_variant(argument), argument % 16 == 0
    return type(argument)
