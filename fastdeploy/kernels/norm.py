"""RMS normalisation, alone or after the addition to the residual stream.

    rms_norm:       out[t, k] = x[t, k] * weight[k] / sqrt(mean_k x[t, k]^2 + eps)
    add_rms_norm:   residual[t, k] += delta[t, k];   out = rms_norm(residual)

(Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.) Fusing the addition saves one write and one read of
the residual stream per norm.

Layout: x, out, residual, delta [T, K] row-major; weight [K] float32. All arithmetic is fp32. `out` may be
`QuantisedRows`: for a linear layer that takes integers, groups of 32 are quantised before they leave the registers.

    one program = one row          | BLOCK | BLOCK | BLOCK | ... |     K elements

A program walks its row twice in chunks of BLOCK: first for the sum of squares, one partial sum per lane, then to scale.
The second walk finds the row in the cache. Where BLOCK covers the row, as on GPUs, it stays in registers in between.
Cost: T*K reads and writes, bandwidth bound. The order of the sum depends on K alone.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.launch import (
    FLOATS,
    Target,
    TensorView,
    early,
    expect,
    launch,
    row_block,
    target,
    view,
    wait_for_inputs,
)
from fastdeploy.kernels.quantised import QuantisedRows, low_limit, store_quantised


@triton.jit
def _rms_norm_kernel(
    out, out_scales, out_sums, out_low, out_low_sums, x, residual, delta, weight, eps,
    K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    written = (out, out_scales, out_sums, out_low, out_low_sums)
    if BLOCK >= K:
        values = _row_chunk(x, residual, delta, row * K, lanes, K, BLOCK)
        scale = tl.rsqrt(tl.sum(values * values, axis=0) / K + eps)
        weighted = values * tl.load(weight + lanes, mask=_inside(lanes, K, BLOCK))
        limit = 0.0 if out_low is None else low_limit(weighted * weighted, K) * scale
        _store_chunk(written, residual, weight, values, scale, limit, row, 0, K, BLOCK)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            values = _row_chunk(x, residual, delta, row * K, start + lanes, K, BLOCK)
            squares += values * values
            if out_low is not None:
                values *= tl.load(weight + start + lanes, mask=_inside(start + lanes, K, BLOCK), other=0.0)
                weighted += values * values
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        limit = 0.0 if out_low is None else low_limit(weighted, K) * scale
        for start in range(0, K, BLOCK):
            values = _row_chunk(x, residual, delta, row * K, start + lanes, K, BLOCK)
            _store_chunk(written, residual, weight, values, scale, limit, row, start, K, BLOCK)


@triton.jit
def _store_chunk(written, residual, weight, values, scale, limit, row, start, K: tl.constexpr, BLOCK: tl.constexpr):
    """Columns from `start` on of the row: `values` to the residual stream if there is one, normed to `written`."""
    out, out_scales = written[0], written[1]
    columns = start + tl.arange(0, BLOCK)  # [BLOCK]
    inside = _inside(columns, K, BLOCK)
    if residual is not None:
        tl.store(residual + row * K + columns, values.to(residual.dtype.element_ty), mask=inside)
    normed = values * scale * tl.load(weight + columns, mask=inside)
    if out_scales is None:
        tl.store(out + row * K + columns, normed.to(out.dtype.element_ty), mask=inside)
    else:
        store_quantised(written, normed, limit, row, start, K, BLOCK)


@triton.jit
def _row_chunk(x, residual, delta, row, columns, K: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of x, or of residual + delta, in fp32; zeros past the end of the row."""
    inside = _inside(columns, K, BLOCK)
    if residual is None:
        values = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        values = tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        values += tl.load(delta + row + columns, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _inside(columns, K: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of columns within the row; always true, and folded away, where BLOCK divides K."""
    if K % BLOCK == 0:
        return tl.full(columns.shape, True, tl.int1)
    else:
        return columns < K


def tiles(target: Target, width: int) -> dict[str, int]:
    """Tile rule: 64 lanes on a CPU (four AVX-512 sums in flight; divides SmolLM2's 576); the whole row on a GPU."""
    block = row_block(target, width, limit=64)
    return {"BLOCK": block} if target.is_cpu else {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}


def rms_norm(out: Any, x: Any, weight: Any, eps: float) -> None:
    """out = x / rms(x) * weight for every row.

    Args:
        out, x: [T, K], any float types; they may be the same memory. `out` may be `QuantisedRows`.
        weight: [K] float32.
        eps: added to the mean square.
    """
    x, weight = view(x), view(weight)
    _check(out, weight, x=x)
    _launch(out, x, None, None, weight, eps)


def add_rms_norm(out: Any, residual: Any, delta: Any, weight: Any, eps: float) -> None:
    """residual += delta, then out = residual / rms(residual) * weight.

    Args:
        out, residual, delta: [T, K], any float types; `residual` is updated in place. The norm is of the fp32 sum,
            before that is rounded to the residual's type. `out` may be `QuantisedRows`.
        weight: [K] float32.
    """
    residual, delta, weight = view(residual), view(delta), view(weight)
    _check(out, weight, residual=residual, delta=delta)
    _launch(out, None, residual, delta, weight, eps)


def _check(out: Any, weight: TensorView, **inputs: TensorView) -> None:
    if not isinstance(out, QuantisedRows):
        inputs["out"] = view(out)
    for name, tensor in inputs.items():
        expect(name, tensor, out.shape, *FLOATS)
    expect("weight", weight, out.shape[1:], "float32")


def _launch(out: Any, *arguments: Any) -> None:
    count, width = out.shape
    written = out.tensors if isinstance(out, QuantisedRows) else (view(out), None, None, None, None)
    launch(_rms_norm_kernel, (count,), *written, *arguments, K=width, **tiles(target(), width), **early(target()))


def rms_norm_reference(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """The specification, in float64. `add_rms_norm` is this after residual + delta."""
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
