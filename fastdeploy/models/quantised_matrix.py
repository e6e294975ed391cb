"""One matrix of a quantised Hugging Face checkpoint, whatever tensors the file has of it.

    W[n, k] = scale[n, g] * (integer[n, k] - zero[n, g])       g = groups[k]

quantised_checkpoints.py finds integers, scales and zeros; here they become what loading.py reads: floats, or rows as
kernels take them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from fastdeploy.kernels.formats import GROUP, Format, e4m3_values
from fastdeploy.kernels.packing import Bits, Codes, Layout
from fastdeploy.models.storage import Encoded, StoredTensor

SPANS = range(256, 0, -GROUP)  # weights that may share an element of a plane of scales, the longest first
DISAGREES = "the file and its quantisation contradict each other; download both again, or use the unquantised model"

Rows = Callable[[int, int], np.ndarray]  # rows(start, stop): of the output features


class Parts:
    """What a file has of one matrix: tensors by what their names end in. Their errors name file and tensor."""

    def __init__(self, path: Path, module: str, tensors: dict[str, StoredTensor]):
        self.path = path
        self.module = module
        self.tensors = tensors
        self.used: set[str] = set()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def named(self, part: str) -> str:
        """What errors begin with: the file of a tensor, or of others of the module, and its name."""
        tensors = [tensor for tensor in (self.tensors.get(part), *self.tensors.values()) if tensor is not None]
        path = next((tensor.path for tensor in tensors if tensor.path is not None), self.path)
        return f"{path}: tensor {self.module + part!r}"

    def error(self, part: str, what: str) -> ValueError:
        """For the caller to raise."""
        return ValueError(f"{self.named(part)} {what}; {DISAGREES}")

    def find(self, part: str, *dtypes: str, shape: tuple[int, ...] | None = None) -> StoredTensor | None:
        """A tensor of one of these dtypes and, if given, this shape; None if there is none."""
        tensor = self.tensors.get(part)
        if tensor is None:
            return None
        self.used.add(part)
        if tensor.dtype not in dtypes:
            raise self.error(part, f"is stored as {tensor.dtype}, expected {' or '.join(dtypes)}")
        if shape is not None and tensor.shape != shape:
            raise self.error(part, f"has the shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def need(self, part: str, *dtypes: str, shape: tuple[int, ...] | None = None) -> StoredTensor:
        """The same of one that has to be there."""
        tensor = self.find(part, *dtypes, shape=shape)
        if tensor is None:
            raise self.error(part, f"is missing beside {', '.join(self.tensors)}")
        return tensor

    def matrix(self, part: str, *dtypes: str) -> StoredTensor:
        """The same of a matrix, which is not empty."""
        tensor = self.need(part, *dtypes)
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise self.error(part, f"has the shape {list(tensor.shape)}, expected that of a matrix")
        return tensor


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix [N, K], see above.

    name: of the quantisation, for people.
    format, layout: what kernels compute with, and how `blocks` has the integers; the format's span is filled in here.
    groups: the group of each k, [K].
    scale_part: the tensor that `scales` reads.
    blocks: rows -> [n, bytes of a row] uint8.  scales, zeros: rows -> [n, G], bfloat16 as uint16; zeros may be None.
    experts: that the rows are shared out to; 0 for a matrix that is one.
    """

    parts: Parts
    name: str
    shape: tuple[int, int]
    format: Format
    layout: Layout
    groups: np.ndarray
    scale_part: str
    blocks: Rows
    scales: Rows
    zeros: Rows | None = None
    experts: int = 0

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """What it is for models: "<module>.weight", or "<experts>.<number>.<module>.weight" for each expert."""
        stored = self._stored()
        if not self.experts:
            yield f"{self.parts.module}.weight", stored
        prefix, _, module = self.parts.module.rpartition(".")
        height = self.shape[0] // max(self.experts, 1)
        for index in range(self.experts):
            yield f"{prefix}.{index}.{module}.weight", stored.part(index * height, height)

    def _stored(self) -> StoredTensor:
        """The whole; with act order, kernels get the columns of a group side by side."""
        order = None if (np.diff(self.groups) >= 0).all() else np.argsort(self.groups, kind="stable").astype(np.int32)
        groups = self.groups if order is None else self.groups[order]
        span = next((span for span in SPANS if _constant(groups, span)), None)
        if span is None:  # floats
            return StoredTensor(self.shape, "float32", "float32", self.parts.nbytes, self.values)
        kernels = replace(
            self.format, span=span, name=f"{self.format.name}, {self.format.scale} scales of {span} weights"
        )
        if order is None:
            encoded = Encoded(kernels, self.layout, partial(self._codes, groups[::span]))
        else:
            layout = replace(self.layout, weights=1, size=1, low=Bits(0, 1, 1, max(self.layout.low.width, 4)))
            encoded = Encoded(kernels, layout, partial(self._ordered_codes, groups[::span], order), order)
        name = self.name + ", act order" * (order is not None)
        return StoredTensor(self.shape, "float32", name, self.parts.nbytes, self.values, encoded)

    def _checked(self, start: int, stop: int) -> Codes:
        """The rows as the file has them. Every row that is read comes by here."""
        zeros = None if self.zeros is None else self.zeros(start, stop)
        scales = np.array(self.scales(start, stop))
        # Last, and all else copied: a file keeps what was asked for last in memory, and pages that are read again later
        codes = Codes(self.blocks(start, stop), scales, zeros)
        damaged = self.format.floating and bool(((codes.blocks & 127) == 127).any())
        if damaged or not codes.finite():
            part, what = (".weight", "weights") if damaged else (self.scale_part, "scales")
            raise ValueError(
                f"{self.parts.named(part)} has {what} that are NaN, infinite or too large, for rows {start} to {stop};"
                " the file is corrupt or was badly converted, download or convert it again"
            )
        return codes

    def _codes(self, groups: np.ndarray, start: int, stop: int) -> Codes:
        """Rows [start, stop) as kernels take them, given the group of each span."""
        blocks, scales, zeros, _ = self._checked(start, stop)
        return Codes(blocks, scales[:, groups], None if zeros is None else zeros[:, groups])

    def _ordered_codes(self, groups: np.ndarray, order: np.ndarray, start: int, stop: int) -> Codes:
        """The same with the columns in this order, an integer in each byte."""
        codes = self._codes(groups, start, stop)
        return codes._replace(blocks=_unpacked(codes.blocks, self.layout).take(order, axis=1))

    def values(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32."""
        codes, in_features = self._checked(start, stop), self.shape[1]
        values = _meanings(self.format, self.layout).take(_unpacked(codes.blocks, self.layout)[:, :in_features])
        if codes.minimums is not None:
            values -= np.ascontiguousarray(codes.minimums, np.float32).take(self.groups, axis=1)
        scales = codes.scales
        if scales.dtype == np.uint16:
            scales = (scales.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # as kernels do
            values *= np.ascontiguousarray(scales, np.float32).take(self.groups, axis=1)
        return values


def _constant(groups: np.ndarray, span: int) -> bool:
    """Whether each `span` weights along k are of one group."""
    if len(groups) % span:
        return False
    spans = groups.reshape(-1, span)
    return bool((spans == spans[:, :1]).all())


def _unpacked(blocks: np.ndarray, layout: Layout) -> np.ndarray:
    """The integers of rows of blocks, which are single bytes here, as uint8."""
    return blocks if layout.low.share == 1 else _split(blocks, layout.low.width)


def _split(rows: np.ndarray, bits: int) -> np.ndarray:
    """[rows, B] uint8 -> [rows, 8 B / bits]: the parts of each byte, the lowest first."""
    parts = np.empty((*rows.shape, 8 // bits), np.uint8)
    for index in range(8 // bits):
        parts[..., index] = rows >> np.uint8(index * bits) & np.uint8((1 << bits) - 1)
    return parts.reshape(len(rows), -1)


def _meanings(format: Format, layout: Layout) -> np.ndarray:
    """What the bytes of `_unpacked` stand for, as float32, before scale and zero."""
    codes = np.arange(1 << layout.low.width, dtype=np.uint8)
    if format.floating:
        return e4m3_values()
    if format.table:
        return np.array(format.table, np.float32)
    if format.bits == 8:
        return (codes ^ 128 if layout.flipped else codes).view(np.int8).astype(np.float32)
    return codes.astype(np.float32) - np.float32(format.offset)


def unpacked_words(words: np.ndarray, bits: int) -> np.ndarray:
    """[rows, W] int32 -> [rows, 32 W / bits] uint8: the bits of a row, the lowest first."""
    rows = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return rows
    if 8 % bits == 0:
        return _split(rows, bits)
    single = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, bits)
    return single @ (1 << np.arange(bits)).astype(np.uint8)
