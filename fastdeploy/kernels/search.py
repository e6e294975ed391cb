"""Four bits made of floats: for every group of 32 weights the scale d and the minimum m that lose least.

    W[n, k] ~ d[n, g] q[n, k] + m[n, g],   q = 0 ... 15,   g = k // 32                         GGUF's Q4_1

    error(d, m) = sum over k of the group   a[k] (W[n, k] - d q[n, k] - m)^2

a[k] says how much an error in the weights of input feature k matters: the mean of x[k]^2 over some text, as an error in
W[n, k] changes the output by x[k] times that (models/calibration.py). Rounded to nearest between a group's minimum and
maximum, SmolLM2's output has a KL divergence of 0.35; searched for with a = 1, of 0.24; with a of a text, of 0.07.

Given d and m, the best q are the nearest integers; given q, the best d and m are the regression of W on q, weighted by
a. So both are done in turns, twice, from steps of (maximum - minimum) / 13 to ... / 20 that begin at the minimum or lie
about the middle. d and m are rounded to float16 before q is chosen, which so makes up for the rounding. Minimum and
maximum themselves are a candidate: the error is never above that of rounding to nearest. (llama.cpp's quantisers search
in a similar way; a[k] is what it calls an importance matrix.)

    rows [n, K] float | importance [K] float32  ->  q [n, K] uint8 | scales, minimums [n, K/32] float16

One program takes a group of 16 rows, a row in each lane: sums over a group need no shuffles. Cost: 23 operations for
each weight and candidate, of which there are 16. Bound by arithmetic: 14 s of a core (EPYC, AVX-512) for 10^9 weights.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from fastdeploy.kernels.formats import GROUP, groups
from fastdeploy.kernels.launch import FLOATS, Target, cdiv, expect, launch, target, view

LEAST = 2.0**-24  # float16's least number above 0: every scale is that at least, so that there is its reciprocal
REACH = 16.0 * 65504.0  # no float16 scale and minimum reach beyond; float32 can hold the squares


@triton.jit
def _nearest(x, scale, minimum):
    """The integers 0 ... 15, as floats, nearest to x [32, ROWS]."""
    inverse = 1.0 / scale
    shift = 0.5 - minimum * inverse
    return tl.floor(tl.minimum(tl.maximum(x * inverse[None, :] + shift[None, :], 0.0), 15.0))


@triton.jit
def _fitted(q, a, ax, total, mean, scale, LEAST: tl.constexpr):
    """Scale and minimum of the regression on q, rounded to float16, as float32.

    a, ax [32, ROWS]: the weights, and the weights times what x lies above its `mean` [ROWS].  total [ROWS]: of a.
    scale [ROWS]: what it stays where all q that count are the same.
    """
    aq = a * q
    q_mean = tl.sum(aq, axis=0) / total
    variance = tl.sum(aq * q, axis=0) - q_mean * q_mean * total
    covariance = tl.sum(ax * q, axis=0)
    scale = tl.where(variance > 1e-6 * total, covariance / variance, scale)
    scale = _float16(tl.maximum(scale, LEAST))
    return scale, _float16(mean - scale * q_mean)


@triton.jit
def _float16(x):
    """float32 values rounded to float16, the largest of it beyond."""
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _error(x, a, q, scale, minimum):
    difference = x - minimum[None, :] - q * scale[None, :]
    return tl.sum(a * difference * difference, axis=0)


@triton.jit(do_not_specialize=["count"])
def _search_kernel(
    q_out, scales, minimums, rows, importance, count, K,
    LEAST: tl.constexpr, REACH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    group = tl.program_id(1)
    k = group * 32 + tl.arange(0, 32)  # [32]
    inside = n < count
    place = tl.minimum(n, count - 1).to(tl.int64)[None, :] * K + k[:, None]  # [32, ROWS]
    given = tl.load(rows + place).to(tl.float32)
    x = tl.minimum(tl.maximum(given, -REACH), REACH)
    a = tl.load(importance + k)  # [32]
    largest = tl.max(a, axis=0)
    a = tl.broadcast_to(tl.where(largest > 0.0, a / largest, 1.0)[:, None], x.shape)
    total = tl.sum(a, axis=0)
    mean = tl.sum(a * x, axis=0) / total
    ax = a * (x - mean[None, :])
    low, high = tl.min(x, axis=0), tl.max(x, axis=0)
    best_scale, best_minimum = _float16(tl.maximum((high - low) / 15.0, LEAST)), _float16(low)
    least = _error(x, a, _nearest(x, best_scale, best_minimum), best_scale, best_minimum)
    for candidate in range(0, 16):
        scale = tl.maximum((high - low) / (13.0 + candidate // 2), LEAST)
        minimum = tl.where(candidate % 2 == 0, low, (low + high) * 0.5 - 7.5 * scale)
        scale, minimum = _fitted(_nearest(x, scale, minimum), a, ax, total, mean, scale, LEAST)
        scale, minimum = _fitted(_nearest(x, scale, minimum), a, ax, total, mean, scale, LEAST)
        error = _error(x, a, _nearest(x, scale, minimum), scale, minimum)
        better = error < least
        least = tl.where(better, error, least)
        best_scale = tl.where(better, scale, best_scale)
        best_minimum = tl.where(better, minimum, best_minimum)
    tl.store(q_out + place, _nearest(x, best_scale, best_minimum).to(tl.uint8), mask=inside[None, :])
    # Integers have no way to say that a weight is NaN or infinite. tl.max looks past NaN, a sum does not.
    finite = tl.sum(given - given, axis=0) == 0.0
    group_place = n.to(tl.int64) * (K // 32) + group
    tl.store(scales + group_place, tl.where(finite, best_scale, float("nan")).to(tl.float16), mask=inside)
    tl.store(minimums + group_place, best_minimum.to(tl.float16), mask=inside)


def tiles(target: Target) -> dict[str, int]:
    """Tile rule: one vector of rows on a CPU, whose registers a group of them fills."""
    return {"ROWS": 16} if target.is_cpu else {"ROWS": 64, "num_warps": 4}


def search_q4(q: Any, scales: Any, minimums: Any, rows: Any, importance: Any) -> None:
    """Quantise `rows` to four bits such that q * scales + minimums loses least of what `importance` counts.

    A group with NaN or infinities has the scale NaN.

    Args:
        q: [n, K] uint8, 0 to 15.
        scales, minimums: [n, K/32] float16.
        rows: [n, K], any float type.
        importance: [K] float32, finite and not negative. Where a group has zeros alone, all its weights count alike.
    """
    q, scales, minimums, rows, importance = map(view, (q, scales, minimums, rows, importance))
    count, width = rows.shape
    expect("rows", rows, (count, width), *FLOATS)
    expect("q", q, (count, width), "uint8")
    expect("importance", importance, (width,), "float32")
    for name, tensor in {"scales": scales, "minimums": minimums}.items():
        expect(name, tensor, (count, groups(width)), "float16")
    rule = tiles(target())
    grid = (cdiv(count, rule["ROWS"]), width // GROUP)
    launch(_search_kernel, grid, q, scales, minimums, rows, importance, count, width, LEAST=LEAST, REACH=REACH, **rule)


# References


def weighted_error(
    rows: np.ndarray, importance: np.ndarray, q: np.ndarray, scales: np.ndarray, minimums: np.ndarray
) -> np.ndarray:
    """What the search makes small, [n, K/32] float64."""
    grouped = (len(rows), -1, GROUP)
    values = q.reshape(grouped) * scales.astype(np.float64)[..., None] + minimums.astype(np.float64)[..., None]
    squares = (rows.astype(np.float64).reshape(grouped) - values) ** 2
    return (importance.astype(np.float64).reshape(1, -1, GROUP) * squares).sum(axis=2)


def search_reference(rows: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The specification, in float64, of finite rows within float16's reach: q, scales, minimums."""
    x, a = rows.astype(np.float64).reshape(-1, GROUP), np.tile(importance.astype(np.float64), len(rows))
    a = a.reshape(-1, GROUP) + (a.reshape(-1, GROUP).max(axis=1, keepdims=True) == 0)
    a /= a.sum(axis=1, keepdims=True)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    mean = (a * x).sum(axis=1, keepdims=True)

    def nearest(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        return np.clip(np.floor((x - minimum) / scale + 0.5), 0, 15)

    def float16(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float16).astype(np.float64)

    candidates = [(float16(np.maximum((high - low) / 15, LEAST)), float16(low))]
    for parts in range(13, 21):
        step = np.maximum((high - low) / parts, LEAST)
        for scale, minimum in ((step, low), (step, (low + high) / 2 - 7.5 * step)):
            for _ in range(2):
                q = nearest(scale, minimum)
                q_mean = (a * q).sum(axis=1, keepdims=True)
                variance = (a * (q - q_mean) ** 2).sum(axis=1, keepdims=True)
                covariance = (a * q * (x - mean)).sum(axis=1, keepdims=True)
                scale = np.where(variance > 1e-6, covariance / np.maximum(variance, 1e-6), scale)
                scale = float16(np.maximum(scale, LEAST))
                minimum = float16(mean - scale * q_mean)
            candidates.append((scale, minimum))
    errors = [(a * (x - nearest(d, m) * d - m) ** 2).sum(axis=1) for d, m in candidates]
    best, place = np.argmin(errors, axis=0), np.arange(len(x))
    scales, minimums = (np.stack(part)[best, place] for part in zip(*candidates))
    q = nearest(scales, minimums).astype(np.uint8).reshape(rows.shape)
    return q, *(values.astype(np.float16).reshape(len(rows), -1) for values in (scales, minimums))
