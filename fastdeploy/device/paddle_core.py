"""Paddle's library, without the Python package around it: what it takes to allocate memory on a CPU.

`import paddle` brings 1,500 Python modules: 80 MB of memory and 0.8 s of the 1.0 s that it takes. What allocates is one
extension module of it, `paddle.base.libpaddle`, which is loaded here by itself and under its own name. So the package
finds it loaded if it is imported later (ranks and GPUs need it), and it is found here if the package came first.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

_NAME = "paddle.base.libpaddle"
# Paddle's names of element types. NumPy's unsigned integers wider than a byte have none.
_TYPES = {
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
    "float16": "FP16",
    "int8": "INT8",
    "uint8": "UINT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}


def _load() -> Any:
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    os.environ.setdefault("GLOG_minloglevel", "1")  # Paddle tells of every socket that it opens
    file = _file()
    if file is not None and _import(file):
        return sys.modules[_NAME]
    from fastdeploy.device.quiet_paddle import paddle  # where its package does what we don't know of

    return paddle.base.core


def _import(file: Path) -> bool:
    """Import the extension module by itself; False, and nothing done, if it can't be."""
    spec = spec_from_file_location(_NAME, file, loader=ExtensionFileLoader(_NAME, str(file)))
    assert spec is not None and spec.loader is not None  # there is a loader: the one just made
    try:
        sys.modules[_NAME] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_NAME])
    except ImportError:  # a library that it needs, and that the package would have found
        sys.modules.pop(_NAME, None)
        return False
    return True


def _file() -> Path | None:
    """Where the extension module is. Raises ModuleNotFoundError if Paddle is not installed."""
    package = find_spec("paddle")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("no Paddle: install fastdeploy with its extra 'cpu', or paddlepaddle", name="paddle")
    names = [f"libpaddle{suffix}" for suffix in EXTENSION_SUFFIXES]
    folders = [Path(folder) / "base" for folder in package.submodule_search_locations]
    return next((folder / name for folder in folders for name in names if (folder / name).exists()), None)


core = _load()


def sees_a_gpu() -> bool:
    """Whether this Paddle can compute on an NVIDIA GPU of this machine."""
    return core.is_compiled_with_cuda() and core.get_cuda_device_count() > 0


@functools.cache
def _prepare() -> None:
    """What Paddle's package does when it is imported, as far as memory needs it; it may be done twice."""
    core.init_memory_method()
    core.init_devices()


class HostTensor:
    """Memory of the host that Paddle has allocated and frees; contents unspecified. Beyond that, a DLPack producer."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        if dtype not in _TYPES:
            raise ValueError(f"{dtype!r} is no element type of Paddle; there are {', '.join(_TYPES)}")
        _prepare()
        self.shape = tuple(shape)
        self._tensor = core.DenseTensor()
        self._tensor._set_dims(list(shape))
        self._tensor._mutable_data(core.CPUPlace(), getattr(core.VarDesc.VarType, _TYPES[dtype]))

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **_: Any) -> Any:
        # NumPy takes what comes without a version for read-only.
        return self._tensor._to_dlpack() if max_version is None else self._tensor._to_dlpack_versioned()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # DLPack's number of the host
