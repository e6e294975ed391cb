"""Random rows of every GGUF quantisation that kernels know, and the values that the gguf package reads there."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Storage

from fastdeploy.models.formats import GGUF_FORMATS

# Where a block has its float16 scales (and minimums); all other bytes may be anything.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2]}
SCALES |= {"Q2_K": [80, 82], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": []}
STORAGES = tuple(GGUF_FORMATS)


def random_blocks(storage, rows, width, rng):
    """[rows, bytes of a row] uint8, in which every bit of an integer or a factor is random."""
    weights, size = gguf.GGML_QUANT_SIZES[Storage[storage]]
    blocks = rng.integers(0, 256, (rows, width // weights, size), dtype=np.uint8)
    for start in SCALES[storage]:
        scales = (rng.standard_normal(blocks.shape[:2]) * 0.01).astype(np.float16)
        blocks[..., start : start + 2] = scales[..., None].view(np.uint8)
    if storage == "MXFP4":
        blocks[..., 0] = rng.integers(117, 125, blocks.shape[:2])
    return blocks.reshape(rows, -1)


def values_of(storage, blocks):
    """The values of rows, in float64."""
    return gguf.quants.dequantize(blocks, Storage[storage]).astype(np.float64)


def widths(storage, *wanted):
    """These widths as whole blocks, the next ones where they are none."""
    weights, _ = gguf.GGML_QUANT_SIZES[Storage[storage]]
    return [-(-width // weights) * weights for width in wanted]
