"""What the checkpoint formats share: a file mapped into memory, and a tensor stored in one.

Loading must not hold the checkpoint twice, once as the file's pages and once as the model. So a `MappedFile` keeps one
window of itself resident: asking for the next window lets the pages of the previous one go. Arrays of earlier windows
stay valid; touching them reads the file again.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # importing kernels takes Triton, which headers need not wait for
    from fastdeploy.kernels.formats import Format
    from fastdeploy.kernels.packing import Codes, Layout

JSON_BYTES = 32 << 20  # of a file or a header, which have 10 MB in the largest models; read, it may be 50 times as much
JSON_DEPTH = 64
NUMBER_DIGITS = 308  # of an integer in JSON, which so fits a float; "model_max_length" has 31 in many files
DIMENSIONS = 8
AROUND = 64 << 10  # bytes that Linux may map before and behind a page that is read; 5 % of SmolLM2, were they kept
PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
TENSOR_VALUES = 1 << 48  # that a shape may mean; also counts the values that a size of 0 leaves out


def file_size(path: Path) -> int:
    """Bytes of a file. Raises FileNotFoundError, or ValueError if it is a directory, a device or can't be asked."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; is the checkpoint complete?") from None
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: expected a file, found a {'directory' if path.is_dir() else 'device'}")
    return status.st_size


def read_file(path: Path, most: int) -> bytes:
    """The whole of a file of `most` bytes at most. Raises FileNotFoundError or ValueError, naming the file."""
    size = file_size(path)
    if size > most:
        raise ValueError(f"{path}: has {size} bytes; such a file may have {most}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from None


def file_beside(path: Path, name: str) -> Path:
    """The file that the file `path` calls `name`: one in its own folder. Every name that a checkpoint gives comes here.

    A checkpoint may come from anybody and may not make us read other files, so a name with a folder in it is refused.
    What the file system makes of the name is its owner's affair: the Hugging Face cache keeps links to its blobs there.

    Raises ValueError for anything but a plain file name.
    """
    if name in ("", "..") or not name.isprintable() or len(name.encode()) > 255 or PureWindowsPath(name).name != name:
        raise ValueError(f"{path}: names the file {reprlib.repr(name)}; expected the name of one in the same folder")
    return path.parent / name


def gguf_parts(path: Path) -> list[Path]:
    """The files of the GGUF model that `path` belongs to: name-00001-of-00003.gguf and on, or `path` alone."""
    match = PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [path]
    numbers = range(1, int(match["count"]) + 1)
    return [path.with_name(f"{match['name']}-{number:05}-of-{match['count']}.gguf") for number in numbers]


class MappedFile:
    """A non-empty file, read-only, as one array of bytes.

    Raises FileNotFoundError if `path` is missing, ValueError if it is a directory, empty or can't be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = file_size(path)
        if self.size == 0:
            raise ValueError(f"{path}: the file is empty; was its download interrupted?")
        try:
            with open(path, "rb") as file:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"{path}: can't be read: {error.strerror}") from None
        self._bytes = np.frombuffer(self.buffer, dtype=np.uint8)
        self._resident = (0, self.size)

    def window(self, offset: int, length: int) -> np.ndarray:
        """Bytes [offset, offset + length) as a read-only uint8 view; the previous window's pages are let go."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"{self.path}: bytes {offset} to {offset + length} lie outside its {self.size} bytes")
        start, stop = self._resident
        start = max(start - start % mmap.PAGESIZE - AROUND, 0)  # madvise wants a page boundary
        self.buffer.madvise(mmap.MADV_DONTNEED, start, min(stop + AROUND, self.size) - start)
        self._resident = (offset, offset + length)
        return self._bytes[offset : offset + length]


@dataclass(frozen=True)
class RawTensor:
    """An array with the name of its true dtype, since NumPy has no bfloat16: such values come as uint16."""

    dtype: str  # "float32", "float16" or "bfloat16"
    array: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """A quantised matrix as it is stored: the format that kernels compute with, and where a file has its integers."""

    format: Format
    layout: Layout
    rows: Callable[[int, int], Codes]  # rows(start, stop)
    order: np.ndarray | None = None  # [K] int32: the columns of the matrix, as `rows` has them one after the other


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint file, not read yet."""

    shape: tuple[int, ...]
    dtype: str  # of what `rows` gives: "float32", "float16" or "bfloat16"; others only until a checkpoint is open
    storage: str  # the same, or the name of a quantisation such as "Q4_1"
    nbytes: int  # in the file
    rows: Callable[[int, int], np.ndarray]  # rows(start, stop) -> [stop - start, ...]; NumPy dtype as in RawTensor
    encoded: Encoded | None = None  # the same rows as kernels take them, of a quantisation that they know
    path: Path | None = None  # the file, where errors to come shall name it

    @property
    def num_rows(self) -> int:
        """0 for a single number, which has no dimension: no weight of a model is one."""
        return self.shape[0] if self.shape else 0

    def part(self, first: int, count: int) -> StoredTensor:
        """Rows [first, first + count) as a tensor."""

        def shifted(read: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
            return lambda start, stop: read(first + start, first + stop)

        encoded = self.encoded and replace(self.encoded, rows=shifted(self.encoded.rows))
        nbytes = self.nbytes * count // self.shape[0]
        return replace(self, shape=(count, *self.shape[1:]), nbytes=nbytes, rows=shifted(self.rows), encoded=encoded)

    def transposed(self) -> StoredTensor:
        """A matrix of floats [in, out] as [out, in]."""
        height, width = self.shape
        rows = lambda start, stop: self.rows(0, height)[:, start:stop].T  # noqa: E731
        return replace(self, shape=(width, height), rows=rows, encoded=None)


def mapped_rows(
    file: MappedFile, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int
) -> np.ndarray:
    """Rows [start, stop) of the array that begins at `offset`, a view of the file, perhaps not aligned."""
    row_shape = shape[1:]
    row_bytes = math.prod(row_shape) * dtype.itemsize
    array = file.window(offset + start * row_bytes, (stop - start) * row_bytes).view(dtype)
    return array.reshape(stop - start, *row_shape)


def tensor_shape(sizes: Iterable[Any], what: str) -> tuple[int, ...]:
    """The sizes that a file gives of a tensor. Raises ValueError, beginning with `what`, if no array can have them."""
    shape = tuple(sizes)
    counts = all(type(size) is int and 0 <= size < TENSOR_VALUES for size in shape)
    if not counts or len(shape) > DIMENSIONS or math.prod(max(size, 1) for size in shape) >= TENSOR_VALUES:
        raise ValueError(
            f"{what} has the shape {reprlib.repr(list(shape))}; expected up to {DIMENSIONS} sizes, and fewer than"
            f" {TENSOR_VALUES} values"
        )
    return shape


def refuse_overlaps(path: Path, places: Iterable[tuple[int, int, str]]) -> None:
    """Raises ValueError if two of the tensors (first byte, byte behind the last, name) of a file share a byte."""
    previous = (0, 0, "")
    for place in sorted(place for place in places if place[0] < place[1]):
        if place[0] < previous[1]:
            raise ValueError(
                f"{path}: tensors {previous[2]!r} and {place[2]!r} overlap at byte {place[0]}; the file is corrupt,"
                " download it again"
            )
        previous = place


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError or ValueError, naming the file."""
    return parse_json(read_file(path, JSON_BYTES), str(path))


def parse_json(content: bytes, source: str, unique: bool = False) -> dict[str, Any]:
    """A JSON object. With `unique`, no object in it may have a name twice; otherwise the last counts.

    Raises ValueError, beginning with `source`, for anything else, NaN and Infinity, which are no JSON, numbers out of a
    float's range, and values that are nested deeper than any file needs.
    """
    try:
        value = json.loads(
            content,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,  # of "NaN", "Infinity" and "-Infinity"
            object_pairs_hook=_unique if unique else None,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, found {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH):
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
        level = [part for part in level if isinstance(part, (dict, list))]
    if level:
        raise ValueError(f"{source}: expected JSON: its values are nested deeper than {JSON_DEPTH}")
    return value


def _integer(digits: str) -> int:
    if len(digits) > NUMBER_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is no number, or beyond the range of numbers")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{reprlib.repr(twice)} appears twice")
    return found
