"""NumPy arrays as arguments of kernels, where there is no PyTorch.

    from fastdeploy.triton_cpu import view
    kernel[grid](view(x), view(y), n)

All that Triton asks of a tensor is an address and an element type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton

# Bytes of an element, by the names that Triton takes.
_ITEM_SIZES = {"bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_ITEM_SIZES |= {f"{sign}int{8 * size}": size for size in (1, 2, 4, 8) for sign in ("", "u")}


class DType(str):
    """The name of an element type, such as "bfloat16", with what a `TensorDescriptor` wants to know of it."""

    @property
    def itemsize(self) -> int:
        """Bytes."""
        return _ITEM_SIZES[self]

    @property
    def is_floating_point(self) -> bool:
        return "float" in self


class ArrayView:
    """A NumPy array as Triton sees a tensor; `view` makes them. The array's memory is shared and kept alive.

    Attributes:
        array: the NumPy array.
        dtype: a `DType`.
        shape, strides: tuples of ints; strides count elements.
    """

    def __init__(self, array: np.ndarray, dtype: str | None = None) -> None:
        self.array = array
        self.dtype = DType(dtype or array.dtype.name)
        self.shape = array.shape
        if self.dtype not in _ITEM_SIZES:
            raise TypeError(f"no kernel takes elements of {self.dtype}, only of {', '.join(_ITEM_SIZES)}")
        if self.dtype.itemsize != array.itemsize:
            raise ValueError(f"elements of {array.dtype} cannot be taken for {self.dtype}: the sizes differ")
        if not array.dtype.isnative or any(stride % array.itemsize for stride in array.strides):
            raise ValueError(f"an array of {array.dtype!r} with strides of {array.strides} bytes: copy it first")
        self.strides = tuple(stride // array.itemsize for stride in array.strides)
        self._address: int = array.__array_interface__["data"][0]

    def data_ptr(self) -> int:
        """The address of the first element; by this method Triton recognises a tensor."""
        return self._address

    def stride(self) -> tuple[int, ...]:
        """`strides`, for `TensorDescriptor.from_tensor`."""
        return self.strides

    def zero_(self) -> None:
        """Fills the array; this, `clone` and `copy_` are what triton.autotune resets and restores tensors by."""
        self.array[...] = 0

    def clone(self) -> ArrayView:
        return ArrayView(self.array.copy(), self.dtype)

    def copy_(self, source: ArrayView) -> None:
        self.array[...] = source.array

    def __repr__(self) -> str:
        return f"ArrayView({self.dtype}{list(self.shape)})"


def view(array: np.ndarray, dtype: str | None = None) -> ArrayView:
    """A NumPy array as an argument of a kernel, without a copy.

    `dtype` says what the bits mean where NumPy has no name for it: view(array_of_uint16, "bfloat16").
    TypeError for what is no array or has elements that no kernel takes. ValueError where `dtype` has another size than
    the elements, for a foreign byte order, and for strides that are no multiple of an element.
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"expected a NumPy array, got {type(array).__name__}")
    return ArrayView(array, dtype)


def explain_arrays() -> None:
    """Has Triton's `bind` say what to do with a NumPy array that is passed as it is, rather than its type alone."""
    jit: Any = triton.runtime.jit
    create = jit.create_function_from_signature
    if hasattr(create, "explains_arrays"):
        return

    def create_function_from_signature(signature: Any, parameters: Any, backend: Any) -> Callable:
        """Triton's own, with the explanation around what it returns."""
        bind = create(signature, parameters, backend)

        def bind_or_explain(*arguments: Any, **keywords: Any) -> Any:
            try:
                return bind(*arguments, **keywords)
            except TypeError:
                named = zip([parameter.name for parameter in parameters], arguments)
                for name, argument in [*named, *keywords.items()]:
                    _refuse_arrays(name, argument)
                raise

        return bind_or_explain if backend.target.backend == "cpu" else bind

    create_function_from_signature.explains_arrays = True  # type: ignore[attr-defined]
    jit.create_function_from_signature = create_function_from_signature


def _refuse_arrays(name: str, argument: Any) -> None:
    """TypeError if an argument, or what a tuple has in it, is an array or a number of NumPy's."""
    if isinstance(argument, tuple):
        for number, inner in enumerate(argument):
            _refuse_arrays(f"{name}[{number}]", inner)
    elif isinstance(argument, np.ndarray):
        remedy = "pass fastdeploy.triton_cpu.view(array), which shares its memory"
        raise TypeError(f"argument {name!r} is a NumPy array: {remedy}")
    elif isinstance(argument, np.generic):
        raise TypeError(f"argument {name!r} is a {type(argument).__name__} of NumPy: pass a number of Python, .item()")
