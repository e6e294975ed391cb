import numpy as np
import pytest

from fastdeploy.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference

WIDTHS = [1, 7, 64, 100, 576, 2048, 4104]


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_matches_reference(width, normal, blank):
    x, weight, out = normal(5, width), normal(width), blank((5, width))
    rms_norm(out.view, x.view, weight.view, 1e-5)
    np.testing.assert_allclose(out.values, rms_norm_reference(x.values, weight.values, 1e-5), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rms_norm_of_half_precision_rows(dtype, normal, blank):
    x, weight, out = normal(3, 576, dtype=dtype), normal(576), blank((3, 576), dtype)
    rms_norm(out.view, x.view, weight.view, 1e-6)
    np.testing.assert_allclose(out.values, rms_norm_reference(x.values, weight.values, 1e-6), rtol=8e-3, atol=1e-3)


def test_rms_norm_in_place(normal):
    x, weight = normal(4, 576), normal(576)
    expected = rms_norm_reference(x.values, weight.values, 1e-5)
    rms_norm(x.view, x.view, weight.view, 1e-5)
    np.testing.assert_allclose(x.values, expected, rtol=2e-5, atol=1e-6)


def test_rms_norm_of_zeros_is_zeros(store, normal, blank):
    x, weight, out = store(np.zeros((2, 64))), normal(64), blank((2, 64))
    rms_norm(out.view, x.view, weight.view, 1e-5)
    assert (out.values == 0).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_updates_the_residual(width, normal, blank):
    residual, delta, weight, out = normal(5, width), normal(5, width), normal(width), blank((5, width))
    total = residual.memory + delta.memory
    add_rms_norm(out.view, residual.view, delta.view, weight.view, 1e-5)
    np.testing.assert_array_equal(residual.memory, total)
    np.testing.assert_allclose(out.values, rms_norm_reference(total, weight.values, 1e-5), rtol=2e-5, atol=1e-6)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(normal, blank):
    residual, delta, weight = normal(9, 576), normal(9, 576), normal(576)
    alone, together, again = blank((9, 576)), blank((9, 576)), residual.memory.copy()
    add_rms_norm(together.view, residual.view, delta.view, weight.view, 1e-5)
    for row in range(9):
        one = slice(row, row + 1)
        add_rms_norm(alone.memory[one], again[one], delta.memory[one], weight.view, 1e-5)
    assert alone.bits == together.bits
    assert again.tobytes() == residual.bits


def test_no_rows_is_nothing_to_do(blank, normal):
    rms_norm(blank((0, 64)).view, blank((0, 64)).view, normal(64).view, 1e-5)


def test_wrong_shapes_are_named(normal, blank):
    with pytest.raises(ValueError, match=r"x has shape \(2, 60\), expected \(2, 64\)"):
        rms_norm(blank((2, 64)).view, normal(2, 60).view, normal(64).view, 1e-5)
    with pytest.raises(TypeError, match="weight is bfloat16, expected float32"):
        rms_norm(blank((2, 64)).view, normal(2, 64).view, normal(64, dtype="bfloat16").view, 1e-5)
