"""Four bits made of floats: for every group of 32 weights the scale d and the minimum m that lose least.

    W[n, k] ~ d[n, g] q[n, k] + m[n, g],   q = 0 ... 15,   g = k // 32               the values of GGUF's Q4_1

    error(d, m) = sum over k of the group   a[k] (W[n, k] - d q[n, k] - m)^2

a[k] is how much an error in the weights of input feature k matters: the mean of x[k]^2 over some text, since a linear
layer's output changes by x[k] times the error (`models/calibration.py` measures it). To round to nearest between a
group's minimum and maximum leaves four times the KL divergence that this leaves (SmolLM2: 0.31, 0.08).

Given d and m, the best q is the nearest; given q, the best d and m are a weighted regression of W on q. So both are
done in turns, from several beginnings: steps of (maximum - minimum) / f, for some f around 15, from the minimum or
about the middle. d and m are rounded to float16 before q is chosen, so q makes up for that rounding. Minimum and
maximum themselves are one candidate, so the error is never above that of rounding to nearest.
(llama.cpp searches its K-quants' scales in this manner; the weights are what it calls an importance matrix.)

    rows [n, K] float | a [K] float32  ->  q [n, K] uint8 | scales, minimums [n, K/32] float16

One program takes one group of 16 rows, a row in each lane, so that sums over the group need no shuffles. Cost: 70
operations of 16 lanes for a beginning and 16 weights; bound by arithmetic.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.launch import FLOATS, Target, cdiv, expect, launch, target, view
from fastdeploy.kernels.quantised import GROUP, groups

MOST = 65504.0  # float16's largest number
BEGINNINGS = 8  # steps from LEAST_PARTS to MOST_PARTS in a group's range, each from two places
LEAST_PARTS, MOST_PARTS = 13.0, 20.0


@triton.jit
def _nearest(x, scale, minimum):
    """The integers 0 ... 15, as floats, that lie nearest to x [32, ROWS]; 0 where the scale [ROWS] is none."""
    inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    q = tl.floor((x - minimum[None, :]) * inverse[None, :] + 0.5)
    return tl.minimum(tl.maximum(q, 0.0), 15.0)


@triton.jit
def _fitted(x, a, total, mean, q, scale):
    """Scale and minimum of the regression of x on q, weighted by a [32, ROWS]: rounded to float16, as floats. The scale
    stays `scale` where all q that count are one number. total, mean: the sum of a, and x's weighted mean, [ROWS]."""
    q_mean = tl.sum(a * q, axis=0) / total
    centred = q - q_mean[None, :]
    weighted = a * centred
    variance = tl.sum(weighted * centred, axis=0)
    covariance = tl.sum(weighted * (x - mean[None, :]), axis=0)
    scale = tl.where(variance > 1e-12 * total, covariance / variance, scale)
    scale = _rounded(tl.maximum(scale, 0.0))
    return scale, _rounded(mean - scale * q_mean)


@triton.jit
def _rounded(x):
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _error(x, a, q, scale, minimum):
    difference = x - (q * scale[None, :] + minimum[None, :])
    return tl.sum(a * difference * difference, axis=0)


@triton.jit(do_not_specialize=["count"])
def _search_kernel(
    q_out, scales, minimums, rows, importance, count, K,
    STEPS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    group = tl.program_id(1)
    k = group * 32 + tl.arange(0, 32)  # [32]
    inside = n < count
    place = tl.minimum(n, count - 1).to(tl.int64)[None, :] * K + k[:, None]  # [32, ROWS]
    # Beyond this no float16 scale and minimum reach; float32 could not hold the squares.
    x = tl.minimum(tl.maximum(tl.load(rows + place).to(tl.float32), -1048576.0), 1048576.0)
    a = tl.load(importance + k)  # [32]
    largest = tl.max(a, axis=0)
    a = tl.where(largest > 0.0, a / largest, 1.0)
    a = tl.broadcast_to(a[:, None], x.shape)
    total = tl.sum(a, axis=0)
    mean = tl.sum(a * x, axis=0) / total
    low, high = tl.min(x, axis=0), tl.max(x, axis=0)
    best_scale, best_minimum = _rounded((high - low) / 15.0), _rounded(low)
    least = _error(x, a, _nearest(x, best_scale, best_minimum), best_scale, best_minimum)
    for step in range(0, 2 * STEPS):
        scale = (high - low) / (FIRST + (step // 2).to(tl.float32) * STEP)
        minimum = tl.where(step % 2 == 0, low, (low + high) * 0.5 - 7.5 * scale)
        scale, minimum = _fitted(x, a, total, mean, _nearest(x, scale, minimum), scale)
        scale, minimum = _fitted(x, a, total, mean, _nearest(x, scale, minimum), scale)
        error = _error(x, a, _nearest(x, scale, minimum), scale, minimum)
        better = error < least
        least = tl.where(better, error, least)
        best_scale = tl.where(better, scale, best_scale)
        best_minimum = tl.where(better, minimum, best_minimum)
    q = _nearest(x, best_scale, best_minimum)
    tl.store(q_out + place, q.to(tl.uint8), mask=inside[None, :])
    per_group = n.to(tl.int64) * (K // 32) + group
    tl.store(scales + per_group, best_scale.to(tl.float16), mask=inside)
    tl.store(minimums + per_group, best_minimum.to(tl.float16), mask=inside)


def tiles(target: Target) -> dict[str, int]:
    """Tile rule: a vector of rows on a CPU."""
    return {"ROWS": 16} if target.is_cpu else {"ROWS": 64, "num_warps": 4}


def search_q4(q: Any, scales: Any, minimums: Any, rows: Any, importance: Any, steps: int = BEGINNINGS) -> None:
    """The four bits that lose least of `rows`.

    Args:
        q: [n, K] uint8, written.
        scales, minimums: [n, K/32] float16, written.
        rows: [n, K], any float type.
        importance: [K] float32, not negative. A group without any counts all its features alike.
    """
    q, scales, minimums, rows, importance = map(view, (q, scales, minimums, rows, importance))
    count, width = rows.shape
    expect("rows", rows, (count, width), *FLOATS)
    expect("q", q, (count, width), "uint8")
    expect("importance", importance, (width,), "float32")
    for name, tensor in {"scales": scales, "minimums": minimums}.items():
        expect(name, tensor, (count, groups(width)), "float16")
    rule = tiles(target())
    step = (MOST_PARTS - LEAST_PARTS) / (steps - 1)
    beginnings = {"STEPS": steps, "FIRST": LEAST_PARTS, "STEP": step}
    written = (q, scales, minimums)
    launch(_search_kernel, (cdiv(count, rule["ROWS"]), width // GROUP), *written, rows, importance, count, width, **beginnings, **rule)


def pack_q4(weight, rows, importance, row_offset=0, **kw):
    """Temporary: until canonical packing is there. CPU only."""
    count, width = rows.shape
    q = np.empty((count, width), np.uint8)
    scales, minimums = (np.empty((count, width // 32), np.float16) for _ in range(2))
    search_q4(q, scales, minimums, rows, importance, **kw)
    g = q.reshape(count, -1, 32)
    blocks = np.concatenate([scales[..., None].view(np.uint8).reshape(count,-1,2), minimums[..., None].view(np.uint8).reshape(count,-1,2), g[..., :16] | g[..., 16:] << 4], -1)
    from fastdeploy.kernels.quantised import pack_blocks
    pack_blocks(weight, view(np.ascontiguousarray(blocks).view(np.uint16)), "Q4_1", row_offset)
