import numpy as np
import pytest

from fastdeploy.kernels.collective import join_columns, join_columns_reference, sum_parts, sum_parts_reference


@pytest.mark.parametrize("ranks, rows, width", [(1, 3, 64), (2, 1, 576), (2, 7, 100), (3, 5, 33), (8, 2, 1)])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 8e-3)])
def test_sum_parts_matches_reference(ranks, rows, width, dtype, tolerance, normal, store, blank):
    parts, out = store(normal(ranks, rows, width).values, dtype), blank((rows, width), dtype)
    sum_parts(out.view, parts.view)
    np.testing.assert_allclose(out.values, sum_parts_reference(parts.values), rtol=tolerance, atol=tolerance)


def test_a_row_has_the_same_bits_among_others_and_alone(normal, store, blank):
    """What a ring's all-reduce of three ranks would not give."""
    parts = normal(3, 9, 160).values
    together, alone = blank((9, 160)), blank((1, 160))
    sum_parts(together.view, store(parts).view)
    sum_parts(alone.view, store(parts[:, 4:5]).view)
    np.testing.assert_array_equal(alone.values[0], together.values[4])


@pytest.mark.parametrize("ranks, rows, width, total", [(2, 3, 64, 128), (2, 1, 500, 999), (3, 4, 7, 15), (4, 2, 9, 30)])
def test_join_columns_matches_reference(ranks, rows, width, total, normal, blank):
    parts, out = normal(ranks, rows, width), blank((rows, total))
    join_columns(out.view, parts.view)
    np.testing.assert_array_equal(out.values, join_columns_reference(parts.values, total))


def test_parts_must_fill_the_result(blank):
    with pytest.raises(ValueError, match="2 parts of 8 columns do not fill 17"):
        join_columns(blank((1, 17)).view, blank((2, 1, 8)).view)
    with pytest.raises(ValueError, match="parts"):
        sum_parts(blank((2, 8)).view, blank((2, 1, 8)).view)
