"""Four bits by search: never worse than rounding to nearest, as good as the search in float64, whatever the weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.kernels.launch import view
from fastdeploy.kernels.search import search_q4, search_reference, weighted_error


def searched(rows, importance, dtype=None):
    count, width = rows.shape
    q = np.full((count, width), 99, np.uint8)
    scales, minimums = (np.full((count, width // 32), 99, np.float16) for _ in range(2))
    search_q4(q, scales, minimums, view(rows, dtype), importance)
    return q, scales, minimums


def to_nearest(rows):
    """Q4_1 between minimum and maximum, as it is rounded without a search."""
    grouped = rows.astype(np.float64).reshape(len(rows), -1, 32)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    step = ((high - low) / 15)[..., None]
    q = np.floor(np.divide(grouped - low[..., None], step, out=np.zeros_like(grouped), where=step > 0) + 0.5)
    return np.clip(q, 0, 15).reshape(rows.shape), step[..., 0].astype(np.float16), low.astype(np.float16)


def random_rows(rng, count, width):
    scales = np.exp(rng.normal(size=(count, width // 32, 1)))
    rows = rng.standard_t(4, size=(count, width // 32, 32)) * scales * 0.02 + rng.normal(size=scales.shape) * 0.02
    return rows.reshape(count, width).astype(np.float32)


def random_importance(rng, width):
    return np.exp(2 * rng.normal(size=width)).astype(np.float32)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40), groups=st.integers(1, 6), power=st.floats(-6, 4))
@settings(max_examples=40, deadline=None)
def test_no_group_loses_more_than_by_rounding_to_nearest(seed, count, groups, power):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, count, 32 * groups) * np.float32(10**power)
    importance = random_importance(rng, 32 * groups)
    error = weighted_error(rows, importance, *searched(rows, importance))
    assert (error <= weighted_error(rows, importance, *to_nearest(rows)) * (1 + 1e-5)).all()


@pytest.mark.parametrize("power", [-4, 0, 3])
def test_the_error_is_that_of_the_search_in_float64(power, rng):
    rows, importance = random_rows(rng, 64, 512) * np.float32(10**power), random_importance(rng, 512)
    error = weighted_error(rows, importance, *searched(rows, importance))
    expected = weighted_error(rows, importance, *search_reference(rows, importance))
    # In single groups float32 may go on from another candidate that is nearly as good.
    assert (np.abs(error - expected) <= 1e-3 * expected).mean() > 0.97
    assert error.sum() == pytest.approx(expected.sum(), rel=0.01)


def test_errors_are_moved_to_where_they_count_little(rng):
    rows, importance = random_rows(rng, 64, 256), np.ones(256, np.float32)
    importance[::8] = 1000.0
    alike = searched(rows, np.ones(256, np.float32))
    weighted = searched(rows, importance)
    of_the_important = np.where(importance > 1, importance, 0)
    errors = [weighted_error(rows, of_the_important, *result).sum() for result in (weighted, alike)]
    assert errors[0] < errors[1] / 2
    assert weighted_error(rows, importance, *weighted).sum() < weighted_error(rows, importance, *to_nearest(rows)).sum()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_of_any_float_type_give_what_their_values_give(dtype, rng):
    rows, importance = random_rows(rng, 20, 96), random_importance(rng, 96)
    if dtype == "bfloat16":
        stored = (rows.view(np.uint32) >> 16).astype(np.uint16)
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = rows.astype(dtype)
        values = stored.astype(np.float32)
    for found, expected in zip(searched(stored, importance, dtype), searched(values, importance)):
        np.testing.assert_array_equal(found, expected)


def test_a_row_has_the_same_bits_in_any_company(rng):
    rows, importance = random_rows(rng, 37, 64), random_importance(rng, 64)
    together = searched(rows, importance)
    for start, stop in ((0, 1), (5, 22), (36, 37)):
        alone = searched(np.ascontiguousarray(rows[start:stop]), importance)
        for found, expected in zip(alone, together):
            np.testing.assert_array_equal(found, expected[start:stop])


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 60000.0, 3e-8, -1e-30, 1e-45])
def test_a_group_of_one_value_has_that_value(value):
    rows = np.full((3, 32), value, np.float32)
    q, scales, minimums = searched(rows, np.ones(32, np.float32))
    found = q.reshape(3, 1, 32) * scales.astype(np.float64)[..., None] + minimums.astype(np.float64)[..., None]
    rounding = abs(float(np.float16(value)) - rows[0, 0].astype(np.float64))
    assert np.abs(found.reshape(3, 32) - rows).max() <= rounding + 2**-24


@pytest.mark.parametrize(
    "importance",
    [
        np.zeros(64),
        np.eye(64)[3] + np.eye(64)[40],
        np.full(64, 1e-45),
        np.full(64, 3e38),
        np.geomspace(1e-30, 1e30, 64),
    ],
    ids=["zeros", "one each", "subnormal", "huge", "sixty orders of magnitude"],
)
def test_any_importance_is_served(importance, rng):
    rows, importance = random_rows(rng, 16, 64), importance.astype(np.float32)
    q, scales, minimums = searched(rows, importance)
    assert q.max() <= 15
    assert np.isfinite(scales).all() and np.isfinite(minimums).all()
    counted = np.where(importance.reshape(1, 2, 32).max(axis=2, keepdims=True) > 0, importance.reshape(1, 2, 32), 1)
    counted = (counted / counted.max(axis=2, keepdims=True)).reshape(64)
    error = weighted_error(rows, counted, q, scales, minimums)
    assert (error <= weighted_error(rows, counted, *to_nearest(rows)) * (1 + 1e-5)).all()


@pytest.mark.parametrize("scale", [1e38, 1e6, 2e-7, 1e-12, 1e-42])
def test_weights_at_the_ends_of_what_float16_reaches_stay_finite(scale, rng):
    rows = (rng.uniform(-1, 1, size=(16, 64)) * scale).astype(np.float32)
    q, scales, minimums = searched(rows, np.ones(64, np.float32))
    assert np.isfinite(scales).all() and np.isfinite(minimums).all()
    values = q.reshape(16, 2, 32) * scales.astype(np.float64)[..., None] + minimums.astype(np.float64)[..., None]
    reached = np.clip(rows.reshape(16, 2, 32), -65504, 15 * 65504)
    tolerance = max(65504 * 16 / 15, 6e-8) if scale >= 1e6 else max(2 * scale / 15, 6e-8)
    assert np.abs(values - reached).max() <= tolerance


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_group_with_a_value_that_is_no_number_has_the_scale_nan(value, rng):
    rows = random_rows(rng, 4, 96)
    rows[2, 40] = value
    _, scales, _ = searched(rows, np.ones(96, np.float32))
    broken = np.isnan(scales)
    assert broken[2, 1] and broken.sum() == 1


def test_arrays_that_do_not_fit_are_errors_that_name_them(rng):
    rows, importance = random_rows(rng, 4, 64), np.ones(64, np.float32)
    q, scales, minimums = searched(rows, importance)
    with pytest.raises(ValueError, match="importance has shape"):
        search_q4(q, scales, minimums, rows, importance[:32].copy())
    with pytest.raises(ValueError, match="minimums has shape"):
        search_q4(q, scales, minimums[:, :1].copy(), rows, importance)
    with pytest.raises(ValueError, match="rows of 40 elements cannot be quantised"):
        search_q4(q[:, :40].copy(), scales, minimums, rows[:, :40].copy(), importance[:40].copy())
