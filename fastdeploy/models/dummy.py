"""A checkpoint without weights: a model of the right shape from config.json alone, for benchmarks and trials.

Every tensor that a model asks for is there. The values are a few megabytes of normal numbers, drawn once, which all
tensors repeat, each from a place of its own: to draw them all would take longer than to read them from a file.
"""

import logging
import os
import zlib
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy.config import ModelConfig
from fastdeploy.models.configs import read_configs
from fastdeploy.models.hub import from_hub, is_hub_name, published_name
from fastdeploy.models.storage import StoredTensor
from fastdeploy.models.weights import Checkpoint

logger = logging.getLogger("fastdeploy")

PERIOD = 1_048_573  # numbers; a prime, so that no two rows of a matrix are alike
DEVIATION = 0.02  # as models are initialised before they are trained


class DummyCheckpoint(Checkpoint):
    """Random tensors, the same for the same seed, whatever slices they are read in."""

    def __init__(self, path: Path, config: ModelConfig, generation_config: dict[str, Any], seed: int):
        super().__init__(path, config, {}, generation_config)
        self._values = np.random.default_rng(seed).normal(scale=DEVIATION, size=PERIOD).astype(np.float32)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        dtype = self.config.dtype
        nbytes = prod(shape) * (4 if dtype == "float32" else 2)
        self._tensors[name] = StoredTensor(shape, dtype, dtype, nbytes, partial(self._rows, name, shape))

    def _rows(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        width = prod(shape[1:])
        first = (zlib.crc32(name.encode()) + start * width) % PERIOD
        values = np.resize(np.concatenate([self._values[first:], self._values[:first]]), (stop - start, *shape[1:]))
        if name.endswith("norm.weight"):
            values += 1
        if self.config.dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(self.config.dtype)


def open_dummy(name_or_path: str | os.PathLike, seed: int) -> DummyCheckpoint:
    """The model of a directory with config.json, or of the Hugging Face Hub, with random weights drawn from `seed`.

    Raises FileNotFoundError if there is no config.json, ValueError if it can't be read or is of a model we don't have.
    """
    name = str(name_or_path)
    path = Path(name)
    if not path.exists() and (is_hub_name(name) or published_name(name)):
        path = from_hub(name, with_weights=False)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{name}: load_format='dummy' needs a directory with config.json, or a model's name on the Hugging Face Hub"
        )
    config, generation_config, quantisation = read_configs(path, dtype="bfloat16")
    if quantisation is not None:
        logger.warning(
            "%s: its weights are quantised, by %s; those that load_format='dummy' makes up are floats, which"
            " quantization='wint4' or 'wint8' makes as small",
            path,
            quantisation.method,
        )
    return DummyCheckpoint(path, config, generation_config, seed)
