"""Gathering rows: token embeddings from the packed table, hidden states of the tokens that need logits; late ids.

    embedding:     out[t, :] = W[ids[t], :]       gather_rows:     out[r, :] = x[rows[r], :]
    gather_columns:  out[t, k] = x[t, order[k]]

The table is laid out as linear.py describes, so that a model with tied embeddings stores it once and its LM head reads
it at full speed:  W[n, k] at (n // panel) * K * panel + k * panel + n % panel.  Plain rows are panels of one.
A quantised table lies as formats.py describes.

One program copies BLOCK elements of one row. Cost: out's T*K elements written; from a table in panels of 32 each
element comes with its cache line (64 B), in address order: 2 ms for 512 tokens of 576 elements, 1 % of their prefill.

resolve_ids:  ids[t] = sampled[-1 - ids[t]]   where ids[t] < 0: tokens sampled one step before, and not read yet.

Where ranks share a vocabulary, a rank's table has the ids from `first_id` on, and the ids that it lacks become zeros.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.formats import QuantisedWeight, weight_values, words
from fastdeploy.kernels.launch import FLOATS, Target, TensorView, cdiv, expect, launch, row_block, target, view
from fastdeploy.kernels.linear import FusedWeight, Weight


@triton.jit
def _place_in_table(row, first, count):
    """Where the table has the row, int64, and whether it has it; the place is one of the table's in any case."""
    n = tl.load(row).to(tl.int64) - first
    return tl.maximum(tl.minimum(n, count - 1), 0), (n >= 0) & (n < count)


@triton.jit(do_not_specialize=["first", "count"])
def _gather_kernel(out, table, rows, first, count, K: tl.constexpr, PANEL: tl.constexpr, BLOCK: tl.constexpr):
    target_row = tl.program_id(0).to(tl.int64)
    n, present = _place_in_table(rows + target_row, first, count)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = k < K if K % BLOCK != 0 else tl.full([BLOCK], True, tl.int1)
    values = tl.load(table + (n // PANEL) * K * PANEL + n % PANEL + k * PANEL, mask=inside)
    values = tl.where(present, values.to(tl.float32), 0.0)
    tl.store(out + target_row * K + k, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "count"])
def _dequantise_rows_kernel(
    out, data, high, scales, minimums, factors, table, rows, first, count,
    K: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    target_row = tl.program_id(0).to(tl.int64)
    n, present = _place_in_table(rows + target_row, first, count)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = k < K if K % BLOCK != 0 else tl.full([BLOCK], True, tl.int1)
    planes = (data, high, scales, minimums, factors, table)
    group = tl.minimum(k // 32, K // 32 - 1)  # groups past the end are read from the last one
    values = weight_values(planes, n // 16, group, k % 32, K // 32, n % 16, FORMAT)
    values = tl.where(present, values, 0.0)
    tl.store(out + target_row * K + k, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _resolve_kernel(ids, sampled, count, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    given = tl.load(ids + token, mask=token < count, other=0)
    unknown = given < 0
    tl.store(ids + token, tl.load(sampled + (-1 - given), mask=unknown, other=0), mask=unknown)


def tiles(target: Target, width: int) -> dict[str, int]:
    """Tile rule: up to 1024 elements of a row; on a GPU 4096, as each load waits for an id, and then should be long."""
    return {"BLOCK": min(1024 if target.is_cpu else 4096, row_block(target, width, limit=512))}


def embedding(out: Any, ids: Any, table: Weight, first_id: int = 0, num_ids: int | None = None) -> None:
    """out[t] = row ids[t] - first_id of the table, or zeros if it has no such row.

    Args:
        out: [T, K], any float type.
        ids: [T] int32.
        table: the embedding matrix [vocabulary, K] as a packed weight.
        first_id: the id of its first row. num_ids: rows that it has; all its output features, if not given.
    """
    out, ids = view(out), view(ids)
    num_ids = table.out_features if num_ids is None else num_ids
    if isinstance(table, QuantisedWeight):
        count, width = _checked(out, ids, table.in_features)
        rule = tiles(target(), width)
        grid = (count, cdiv(width, rule["BLOCK"]))
        packed, known = (words(table.data), words(table.high), *table.planes[2:]), {"FORMAT": table.format.constants}
        launch(_dequantise_rows_kernel, grid, out, *packed, ids, first_id, num_ids, K=width, **known, **rule)
    elif isinstance(table, FusedWeight):
        raise TypeError("a table of rows is one weight, not several side by side")
    else:
        _gather(out, ids, table.data, first_id, num_ids, table.in_features, table.panel)


def gather_rows(out: Any, x: Any, rows: Any) -> None:
    """out[r] = x[rows[r]].

    Args:
        out: [R, K], any float type.
        x: [T, K], any float type.
        rows: [R] int32, each from 0 to T - 1, which is not checked.
    """
    x = view(x)
    expect("x", x, x.shape, *FLOATS)
    num_rows, width = x.shape
    _gather(view(out), view(rows), x, 0, num_rows, width, panel=1)


@triton.jit
def _gather_columns_kernel(out, x, order, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = k < K if K % BLOCK != 0 else tl.full([BLOCK], True, tl.int1)
    values = tl.load(x + row + tl.load(order + k, mask=inside, other=0), mask=inside)
    tl.store(out + row + k, values.to(out.dtype.element_ty), mask=inside)


def gather_columns(out: Any, x: Any, order: Any) -> None:
    """out[t, k] = x[t, order[k]].

    Args:
        out: [T, K], any float type.
        x: [T, K], any float type.
        order: [K] int32, each from 0 to K - 1, which is not checked.
    """
    out, x, order = view(out), view(x), view(order)
    count, width = x.shape
    for name, tensor in (("x", x), ("out", out)):
        expect(name, tensor, (count, width), *FLOATS)
    expect("order", order, (width,), "int32")
    rule = tiles(target(), width)
    launch(_gather_columns_kernel, (count, cdiv(width, rule["BLOCK"])), out, x, order, K=width, **rule)


def resolve_ids(ids: Any, sampled: Any) -> None:
    """ids[t] = sampled[-1 - ids[t]] where ids[t] < 0, in place: tokens that the host does not know yet.

    What was sampled may be negative, too, where there was no token (sampling.py): `embedding` makes zeros of it.

    Args:
        ids: [T] int32; a negative one is -1 - the row of `sampled` that has the token.
        sampled: [R] int32. That it has the rows is not checked.
    """
    ids, sampled = view(ids), view(sampled)
    expect("ids", ids, ids.shape, "int32")
    expect("sampled", sampled, sampled.shape, "int32")
    (count,) = ids.shape
    block = 16 if target().is_cpu else 256
    launch(_resolve_kernel, (cdiv(count, block),), ids, sampled, count, BLOCK=block)


def _gather(
    out: TensorView, rows: TensorView, table: TensorView, first: int, num_rows: int, width: int, panel: int
) -> None:
    count, width = _checked(out, rows, width)
    rule = tiles(target(), width)
    grid = (count, cdiv(width, rule["BLOCK"]))
    launch(_gather_kernel, grid, out, table, rows, first, num_rows, K=width, PANEL=panel, **rule)


def _checked(out: TensorView, rows: TensorView, width: int) -> tuple[int, int]:
    """The shape of `out`, which has `width` columns and an id in `rows` for every row."""
    count = out.shape[0]
    expect("out", out, (count, width), *FLOATS)
    expect("ids or rows", rows, (count,), "int32")
    return count, width


def embedding_reference(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The specification; `table` is [vocabulary, K] before packing. `gather_rows` is the same with x for the table."""
    return table[ids]


def resolve_ids_reference(ids: np.ndarray, sampled: np.ndarray) -> np.ndarray:
    """The specification of `resolve_ids`."""
    return np.where(ids < 0, sampled[np.maximum(-1 - ids, 0)], ids)
