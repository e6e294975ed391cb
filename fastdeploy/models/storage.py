"""What the checkpoint formats share: a file mapped into memory, and a tensor stored in one.

Loading must not hold the checkpoint twice, once as the file's pages and once as the model. So a `MappedFile` keeps one
window of itself resident: asking for the next window lets the pages of the previous one go. Arrays of earlier windows
stay valid; touching them reads the file again.
"""

import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


class MappedFile:
    """A non-empty file, read-only, as one array of bytes.

    Raises FileNotFoundError if `path` is missing, ValueError if it is a directory or empty.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        if not path.is_file():
            raise ValueError(f"{path}: expected a file, found a directory")
        self.size = path.stat().st_size
        if self.size == 0:
            raise ValueError(f"{path}: the file is empty; was its download interrupted?")
        with open(path, "rb") as file:
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self.buffer, dtype=np.uint8)
        self._resident = (0, self.size)

    def window(self, offset: int, length: int) -> np.ndarray:
        """Bytes [offset, offset + length) as a read-only uint8 view; the previous window's pages are let go."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"{self.path}: bytes {offset} to {offset + length} lie outside its {self.size} bytes")
        start, stop = self._resident
        start -= start % mmap.PAGESIZE  # madvise wants a page boundary
        if stop > start:
            self.buffer.madvise(mmap.MADV_DONTNEED, start, stop - start)
        self._resident = (offset, offset + length)
        return self._bytes[offset : offset + length]


@dataclass(frozen=True)
class RawTensor:
    """An array with the name of its true dtype, since NumPy has no bfloat16: such values come as uint16."""

    dtype: str  # "float32", "float16" or "bfloat16"
    array: np.ndarray


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint file, not read yet."""

    shape: tuple[int, ...]
    dtype: str  # of what `rows` gives: "float32", "float16" or "bfloat16"
    storage: str  # the same, or the name of a quantisation such as "Q4_1"
    nbytes: int  # in the file
    rows: Callable[[int, int], np.ndarray]  # rows(start, stop) -> [stop - start, ...]; NumPy dtype as in RawTensor
    blocks: Callable[[int, int], np.ndarray] | None = None  # of a quantised tensor: the same rows as in the file, uint8

    def part(self, first: int, count: int) -> "StoredTensor":
        """Rows [first, first + count) as a tensor."""

        def shifted(read: Callable[[int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
            return lambda start, stop: read(first + start, first + stop)

        blocks = None if self.blocks is None else shifted(self.blocks)
        nbytes = self.nbytes * count // self.shape[0]
        return replace(self, shape=(count, *self.shape[1:]), nbytes=nbytes, rows=shifted(self.rows), blocks=blocks)

    def transposed(self) -> "StoredTensor":
        """A matrix of floats [in, out] as [out, in]."""
        height, width = self.shape
        rows = lambda start, stop: self.rows(0, height)[:, start:stop].T  # noqa: E731
        return replace(self, shape=(width, height), rows=rows, blocks=None)


def mapped_rows(
    file: MappedFile, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int
) -> np.ndarray:
    """Rows [start, stop) of the array that begins at `offset`, a view of the file, perhaps not aligned."""
    row_shape = shape[1:]
    row_bytes = math.prod(row_shape) * dtype.itemsize
    array = file.window(offset + start * row_bytes, (stop - start) * row_bytes).view(dtype)
    return array.reshape(stop - start, *row_shape)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError or ValueError, naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is the checkpoint complete?")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
