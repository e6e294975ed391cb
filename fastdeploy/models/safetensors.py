"""safetensors files, memory-mapped.

    header length u64 | header: JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data

The `safetensors` package has no bfloat16 for NumPy and hands out copies; the format is simple enough to map it here.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy.models.storage import MappedFile, StoredTensor, mapped_rows

DTYPES: dict[str, tuple[np.dtype, str]] = {  # safetensors' name -> (NumPy dtype, dtype name)
    "F32": (np.dtype(np.float32), "float32"),
    "F16": (np.dtype(np.float16), "float16"),
    "BF16": (np.dtype(np.uint16), "bfloat16"),
    "U16": (np.dtype(np.uint16), "bfloat16"),  # as Paddle, which keeps such numbers in uint16, saves them
}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises FileNotFoundError or ValueError, naming the file, if it is missing or corrupt."""
    file = MappedFile(path)
    if file.size < 8:
        raise ValueError(f"{path}: expected a header length of 8 bytes, found a file of {file.size}; download it again")
    data_start = 8 + int.from_bytes(file.buffer[:8], "little")
    if data_start > file.size:
        raise ValueError(
            f"{path}: expected a header of {data_start - 8} bytes, found {file.size - 8}; the file is truncated or not"
            " safetensors, download it again"
        )
    try:
        header = json.loads(file.buffer[8:data_start])
        header.pop("__metadata__", None)
        return {name: _tensor(file, data_start, name, entry) for name, entry in header.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON object as header, found something else: {error}") from None


def _tensor(file: MappedFile, data_start: int, name: str, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_formed = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise ValueError(f"{file.path}: tensor {name!r} needs dtype, shape and data_offsets, found {entry!r}")
    if dtype not in DTYPES:
        raise ValueError(f"{file.path}: tensor {name!r} has dtype {dtype!r}; weights can be {', '.join(DTYPES)}")
    numpy_dtype, dtype_name = DTYPES[dtype]
    nbytes = math.prod(shape) * numpy_dtype.itemsize
    if end - begin != nbytes:
        raise ValueError(
            f"{file.path}: tensor {name!r} of shape {list(shape)} and dtype {dtype} takes {nbytes} bytes, but its"
            f" data_offsets span {end - begin}; the file is corrupt, download it again"
        )
    if data_start + end > file.size:
        raise ValueError(
            f"{file.path}: tensor {name!r} ends at byte {data_start + end}, but the file has {file.size} bytes; it is"
            " truncated, download it again"
        )
    rows = partial(mapped_rows, file, data_start + begin, shape, numpy_dtype)
    return StoredTensor(shape, dtype_name, dtype_name, nbytes, rows)
