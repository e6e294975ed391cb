"""safetensors files, memory-mapped.

    header length u64 | header: JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data

The `safetensors` package has no bfloat16 for NumPy and hands out copies; the format is simple enough to map it here.
Format: https://github.com/huggingface/safetensors#format
"""

import math
import reprlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy.models.storage import (
    JSON_BYTES,
    MappedFile,
    StoredTensor,
    mapped_rows,
    parse_json,
    refuse_overlaps,
    tensor_shape,
)

DTYPES: dict[str, tuple[np.dtype, str]] = {  # safetensors' name -> (NumPy dtype, dtype name)
    "F32": (np.dtype(np.float32), "float32"),
    "F16": (np.dtype(np.float16), "float16"),
    "BF16": (np.dtype(np.uint16), "bfloat16"),
    "U16": (np.dtype(np.uint16), "bfloat16"),  # as Paddle, which keeps such numbers in uint16, saves them
    # What only quantised checkpoints have, see quantised_checkpoints.py
    "F8_E4M3": (np.dtype(np.uint8), "float8_e4m3fn"),
    "F8_E5M2": (np.dtype(np.uint8), "float8_e5m2"),
    "F8_E8M0": (np.dtype(np.uint8), "float8_e8m0fnu"),
    "U8": (np.dtype(np.uint8), "uint8"),
    "I8": (np.dtype(np.int8), "int8"),
    "I32": (np.dtype(np.int32), "int32"),
    "I64": (np.dtype(np.int64), "int64"),
}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises FileNotFoundError or ValueError, naming the file, if it is missing or corrupt."""
    file = MappedFile(path)
    if file.size < 8:
        raise ValueError(f"{path}: expected a header length of 8 bytes, found a file of {file.size}; download it again")
    length = int.from_bytes(file.buffer[:8], "little")
    if length > min(file.size - 8, JSON_BYTES):
        raise ValueError(
            f"{path}: expected a header of {length} bytes, found {file.size - 8}, of which it may have {JSON_BYTES};"
            " the file is truncated or not safetensors, download it again"
        )
    header = parse_json(file.buffer[8 : 8 + length], f"{path}: its header", unique=True)
    header.pop("__metadata__", None)
    places = {name: _placed(file, 8 + length, name, entry) for name, entry in header.items()}
    refuse_overlaps(path, ((begin, begin + tensor.nbytes, name) for name, (begin, tensor) in places.items()))
    return {name: tensor for name, (_, tensor) in places.items()}


def _are_counts(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _placed(file: MappedFile, data_start: int, name: str, entry: Any) -> tuple[int, StoredTensor]:
    """A tensor by its entry in the header, and its first byte in the file."""
    what = f"{file.path}: tensor {reprlib.repr(name)}"
    match entry:
        case {"dtype": str(stored), "shape": [*sizes], "data_offsets": [begin, end]} if _are_counts(*sizes, begin, end):
            pass
        case _:
            raise ValueError(f"{what} needs dtype, shape and data_offsets, found {reprlib.repr(entry)}")
    if stored not in DTYPES:
        raise ValueError(f"{what} has dtype {reprlib.repr(stored)}; weights can be {', '.join(DTYPES)}")
    numpy_dtype, dtype = DTYPES[stored]
    shape = tensor_shape(sizes, what)
    nbytes = math.prod(shape) * numpy_dtype.itemsize
    if end - begin != nbytes:
        raise ValueError(
            f"{what} of shape {list(shape)} and dtype {stored} takes {nbytes} bytes, but its data_offsets span"
            f" {end - begin}; the file is corrupt, download it again"
        )
    if data_start + end > file.size:
        raise ValueError(
            f"{what} ends at byte {data_start + end}, but the file has {file.size} bytes; it is cut off, download it"
            " again"
        )
    rows = partial(mapped_rows, file, data_start + begin, shape, numpy_dtype)
    return data_start + begin, StoredTensor(shape, dtype, dtype, nbytes, rows, path=file.path)
