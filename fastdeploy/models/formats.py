"""The quantisations of GGUF files that kernels compute with as they are: a row for each.

A row has the format in memory (kernels/formats.py), where the integers lie in a block of the file (kernels/packing.py),
and a function that finds the scales in blocks. What has no row is converted when it is loaded, see loading.py.
Blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastdeploy.kernels.formats import FORMATS, Format
from fastdeploy.kernels.packing import Bits, Codes, Layout

Blocks = np.ndarray  # [rows, blocks of a row, bytes of a block] uint8


class FileFormat(NamedTuple):
    """One quantisation. scales: blocks -> (scales, minimums, factors) of `Codes`."""

    format: Format
    layout: Layout
    scales: Callable[[Blocks], tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]

    def codes(self, rows: np.ndarray) -> Codes:
        """Rows [n, bytes of a row] uint8 of a file."""
        blocks = rows.reshape(len(rows), -1, self.layout.size)
        return Codes(rows, *self.scales(blocks))


def _halves(blocks: Blocks, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0]


def _scale(blocks: Blocks) -> tuple[np.ndarray, None, None]:
    return _halves(blocks, 0), None, None


def _scale_and_minimum(blocks: Blocks) -> tuple[np.ndarray, np.ndarray, None]:
    return _halves(blocks, 0), _halves(blocks, 2), None


def _two_levels(blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q4_K and Q5_K: d, m, and eight factors of 6 bits for either, in twelve bytes.

    byte  0 ... 3   low 6 bits: the scale's factors 0 ... 3            upper 2: of the scale's factors 4 ... 7
          4 ... 7   the same of the minimum
          8 ... 11  low 4 bits: of the scale's factors 4 ... 7         upper 4: of the minimum's
    """
    scale, minimum, mixed = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    factors = np.empty((*blocks.shape[:2], 8, 2), np.uint8)
    factors[..., :4, 0], factors[..., :4, 1] = scale & 63, minimum & 63
    factors[..., 4:, 0] = mixed & 15 | scale >> 6 << 4
    factors[..., 4:, 1] = mixed >> 4 | minimum >> 6 << 4
    return _halves(blocks, 0), -_halves(blocks, 2), factors.reshape(len(blocks), -1, 2)


def _q6_k(blocks: Blocks) -> tuple[np.ndarray, None, np.ndarray]:
    factors = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return _halves(blocks, 208), None, factors.reshape(len(blocks), -1, 2)


def _iq4_xs(blocks: Blocks) -> tuple[np.ndarray, None, np.ndarray]:
    """Eight factors of 6 bits, 32 added: the upper two bits in bytes 2 and 3, the lower four in 4 ... 7."""
    shifts = np.arange(8, dtype=np.uint8)
    upper = blocks[..., 2 + shifts // 4] >> (shifts % 4 * 2) & 3
    lower = blocks[..., 4 + shifts // 2] >> (shifts % 2 * 4) & 15
    factors = (lower | upper << 4).view(np.int8) - np.int8(32)
    return _halves(blocks, 0), None, np.ascontiguousarray(factors.reshape(len(blocks), -1, 1))


def power_of_two(exponents: np.ndarray, bias: int) -> np.ndarray:
    """2^(exponent - bias) of uint8 exponents, as the bits of a bfloat16; bias 127 or 128. 255 is NaN."""
    shifted = exponents.astype(np.int32) + (127 - bias)
    bits = np.where(shifted > 0, shifted << 7, np.where(shifted == 0, 0x40, 0x20))  # below 2^-126: subnormal
    return np.where(exponents == 255, 0x7FC0, bits).astype(np.uint16)


def _mxfp4(blocks: Blocks) -> tuple[np.ndarray, None, None]:
    return power_of_two(blocks[..., 0], 128), None, None  # 128, as the table holds twice the values


_PAIRS_16 = (16, 2, 4)  # run, share, width: byte i has weights i and i + 16
GGUF_FORMATS = {
    row.format.name: row
    for row in (
        FileFormat(FORMATS["Q4_0"], Layout(32, 18, Bits(2, *_PAIRS_16)), _scale),
        FileFormat(FORMATS["Q4_1"], Layout(32, 20, Bits(4, *_PAIRS_16)), _scale_and_minimum),
        FileFormat(FORMATS["Q5_0"], Layout(32, 22, Bits(6, *_PAIRS_16), Bits(2, 1, 8, 1)), _scale),
        FileFormat(FORMATS["Q5_1"], Layout(32, 24, Bits(8, *_PAIRS_16), Bits(4, 1, 8, 1)), _scale_and_minimum),
        FileFormat(FORMATS["Q8_0"], Layout(32, 34, Bits(2, 1, 1, 8)), _scale),
        FileFormat(FORMATS["Q4_K"], Layout(256, 144, Bits(16, 32, 2, 4)), _two_levels),
        FileFormat(FORMATS["Q5_K"], Layout(256, 176, Bits(48, 32, 2, 4), Bits(16, 32, 8, 1)), _two_levels),
        FileFormat(FORMATS["Q6_K"], Layout(256, 210, Bits(0, 64, 2, 4), Bits(128, 32, 4, 2)), _q6_k),
        FileFormat(FORMATS["IQ4_NL"], Layout(32, 18, Bits(2, *_PAIRS_16)), _scale),
        FileFormat(FORMATS["IQ4_XS"], Layout(256, 136, Bits(8, *_PAIRS_16)), _iq4_xs),
        FileFormat(FORMATS["MXFP4"], Layout(32, 17, Bits(1, *_PAIRS_16)), _mxfp4),
    )
}
