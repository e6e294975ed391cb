import numpy as np
import pytest

from fastdeploy.kernels.activation import silu_mul, silu_mul_reference


@pytest.mark.parametrize("width", [1, 24, 500, 1536, 8192])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 8e-3), ("float16", 2e-3)])
def test_silu_mul_matches_reference(width, dtype, tolerance, normal, store, blank):
    gate_up, out = store(normal(3, 2 * width).values * 4, dtype), blank((3, width), dtype)
    silu_mul(out.view, gate_up.view)
    np.testing.assert_allclose(out.values, silu_mul_reference(gate_up.values), rtol=tolerance, atol=1e-6)


def test_large_gates_saturate(store, blank):
    gate_up, out = store([[-1000.0, -90.0, 0.0, 90.0, 1000.0, 1, 1, 1, 1, 1]]), blank((1, 5))
    silu_mul(out.view, gate_up.view)
    np.testing.assert_allclose(out.values, [[0, 0, 0, 90, 1000]], atol=1e-6)


def test_no_rows_is_nothing_to_do(blank):
    silu_mul(blank((0, 64)).view, blank((0, 128)).view)


def test_gate_up_is_twice_as_wide(blank):
    with pytest.raises(ValueError, match=r"gate_up has shape \(2, 64\), expected \(2, 128\)"):
        silu_mul(blank((2, 64)).view, blank((2, 64)).view)
