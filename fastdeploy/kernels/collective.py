"""What the ranks of a tensor-parallel model have computed becomes one tensor again.

    sum_parts:      out[t, k] = sum_r parts[r, t, k]                a linear layer whose input features are shared out
    join_columns:   out[t, v] = parts[v // W, t, v % W]             one whose output features are: W a rank, the last
                                                                    rank's surplus is dropped
    parts [ranks, T, ...] is what an all-gather leaves: every rank has the parts of all.

Every rank adds in the order of ranks, so that all have the same bits, and a row's do not depend on how many rows there
are: a ring's all-reduce, which cuts the rows into chunks and begins each at another rank, gives neither. Its price is
(ranks - 1) / 2 times the bytes of a ring's: nothing for two ranks, and in a decode latency counts, not bytes.

One program handles BLOCK elements of one row. Cost: ranks * T * K elements read, T * K written.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.launch import FLOATS, cdiv, expect, launch, row_block, target, view


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(out, parts, rows, RANKS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = k < K if K % BLOCK != 0 else tl.full([BLOCK], True, tl.int1)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        total += tl.load(parts + (rank * rows + row) * K + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _join_kernel(out, parts, rows, WIDTH: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(2)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] columns of the part
    inside = (k < WIDTH) & (rank * WIDTH + k < K)
    values = tl.load(parts + (rank * rows + row) * WIDTH + k, mask=inside, other=0.0)
    tl.store(out + row * K + rank * WIDTH + k, values.to(out.dtype.element_ty), mask=inside)


def sum_parts(out: Any, parts: Any) -> None:
    """out = the sum of the parts, in float32 and in ascending order.

    Args:
        out: [T, K], any float type.
        parts: [ranks, T, K], any float type.
    """
    out, parts = view(out), view(parts)
    rows, width = out.shape
    expect("out", out, (rows, width), *FLOATS)
    expect("parts", parts, (parts.shape[0], rows, width), *FLOATS)
    block = row_block(target(), width, limit=512)
    launch(_sum_kernel, (rows, cdiv(width, block)), out, parts, rows, RANKS=parts.shape[0], K=width, BLOCK=block)


def join_columns(out: Any, parts: Any) -> None:
    """out = the parts side by side, cut to the width of `out`.

    Args:
        out: [T, K], any float type.
        parts: [ranks, T, W], any float type; ranks * W >= K.
    """
    out, parts = view(out), view(parts)
    rows, total = out.shape
    ranks, _, width = parts.shape
    expect("out", out, (rows, total), *FLOATS)
    expect("parts", parts, (ranks, rows, width), *FLOATS)
    if ranks * width < total:
        raise ValueError(f"{ranks} parts of {width} columns do not fill {total}")
    block = row_block(target(), width, limit=1024)
    launch(_join_kernel, (rows, cdiv(width, block), ranks), out, parts, rows, WIDTH=width, K=total, BLOCK=block)


def sum_parts_reference(parts: np.ndarray) -> np.ndarray:
    """The specification of `sum_parts`, in float64."""
    return parts.astype(np.float64).sum(axis=0)


def join_columns_reference(parts: np.ndarray, width: int) -> np.ndarray:
    """The specification of `join_columns`."""
    return np.concatenate(list(parts), axis=1)[:, :width]
