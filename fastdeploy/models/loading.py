"""From a checkpoint's tensors to the weights that kernels read: converted, fused and packed.

In two passes. A model first asks for all of its weights, which gives it their memory; then `load` compares what was
asked for with what the checkpoint has, and only if they agree reads it. Reading goes in slices of rows, each packed to
its place before the next is read, so that loading needs the memory of the model plus one slice, whatever the format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from fastdeploy.device import DTYPE_BYTES, GIB, Device
from fastdeploy.kernels.launch import TensorView, target, view
from fastdeploy.kernels.linear import LinearWeight, default_panel, pack, packed_shape
from fastdeploy.models.weights import Checkpoint, RawTensor

SLICE_ELEMENTS = 4 << 20  # 16 MiB as float32: large enough to hide the cost of a call, small beside any model


class WeightLoader:
    """Gives a model the memory of its weights, then fills it from a checkpoint.

    Args:
        checkpoint: where the tensors come from.
        device: where the weights go.
        dtype: what the linear layers' weights are stored in, "float32", "bfloat16" or "float16".

    Raises MemoryError if the weights can't fit.
    """

    def __init__(self, checkpoint: Checkpoint, device: Device, dtype: str) -> None:
        self.device = device
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._panel = default_panel(target())
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the tensors asked for
        self._reads: list[Callable[[tqdm], None]] = []  # what `load` has to do, in the order asked for
        self._check_memory()

    def vector(self, names: Sequence[str], sizes: Sequence[int]) -> TensorView:
        """The tensors [sizes[i]] one after the other, as float32: norm weights and biases are too small to round."""
        out = self.device.empty((sum(sizes),), "float32")
        for name, size in zip(names, sizes, strict=True):
            self._ask(name, (size,))
        self._reads.append(partial(self._read_vector, out, names))
        return view(out)

    def linear(
        self, modules: Sequence[str], in_features: int, out_features: Sequence[int], bias: bool = False
    ) -> LinearWeight:
        """The tensors "<module>.weight", [out_features[i], in_features] each, one below the other as one packed weight.

        With `bias`, the tensors "<module>.bias", [out_features[i]] each, come with them.
        """
        total = sum(out_features)
        data = view(self.device.empty(packed_shape(total, in_features, self._panel), self.dtype))
        row = 0
        for module, rows in zip(modules, out_features, strict=True):
            self._ask(f"{module}.weight", (rows, in_features))
            self._reads.append(partial(self._read_matrix, data, f"{module}.weight", row))
            row += rows
        biases = self.vector([f"{module}.bias" for module in modules], out_features) if bias else None
        return LinearWeight(data, total, in_features, self._panel, biases)

    def load(self, progress: bool) -> None:
        """Read everything that was asked for, with a progress bar if `progress`.

        Raises ValueError if the checkpoint lacks a tensor, has another shape of it, or has one that nobody asked for.
        """
        self._checkpoint.check(self._shapes)
        elements = sum(int(np.prod(shape)) for shape in self._shapes.values())
        total = elements * DTYPE_BYTES[self.dtype]
        with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
            for read in self._reads:
                read(bar)
        self._reads.clear()

    def _ask(self, name: str, shape: tuple[int, ...]) -> None:
        if name in self._shapes:
            raise ValueError(f"the model asks for the tensor {name!r} twice")
        self._shapes[name] = shape

    def _read_vector(self, out: Any, names: Sequence[str], bar: tqdm) -> None:
        values = np.concatenate([_as_float32(self._checkpoint.read(name)) for name in names])
        self.device.write(out, values)
        bar.update(values.size * DTYPE_BYTES[self.dtype])

    def _read_matrix(self, out: TensorView, name: str, first_row: int, bar: tqdm) -> None:
        rows, columns = self._shapes[name]
        step = max(1, SLICE_ELEMENTS // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = self._checkpoint.read_rows(name, start, stop)
            pack(out, view(self.device.from_numpy(part.array), part.dtype), first_row + start)
            bar.update(part.array.size * DTYPE_BYTES[self.dtype])

    def _check_memory(self) -> None:
        elements = sum(int(np.prod(self._checkpoint.shape(name))) for name in self._checkpoint.names())
        needed, free = elements * DTYPE_BYTES[self.dtype], self.device.free_memory()
        if needed > free:
            raise MemoryError(
                f"{self._checkpoint.path}: the weights take {needed / GIB:.1f} GiB as {self.dtype}, "
                f"{free / GIB:.1f} GiB are free; use a smaller model or free memory"
                + (', or dtype="bfloat16"' if self.dtype == "float32" else "")
            )


def _as_float32(tensor: RawTensor) -> np.ndarray:
    if tensor.dtype == "bfloat16":  # the upper half of a float32's bits
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array.astype(np.float32)
