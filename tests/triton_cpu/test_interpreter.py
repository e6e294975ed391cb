"""The same kernels under Triton's interpreter, which runs them with NumPy, give the same results."""

import numpy as np
import pytest

from .arrays import run_module
from .programs import run_all, table


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("interpreter") / "out.npz"
    try:
        run_module("tests.triton_cpu.programs", str(path), TRITON_INTERPRET="1")
    except AssertionError as error:
        if "only 0-dimensional arrays" in str(error):
            pytest.skip("the interpreter of this Triton does not work with this NumPy")
        raise
    with np.load(path) as interpreted:
        return run_all(), dict(interpreted)


@pytest.mark.parametrize("name", [name for name in table() if name != "limits"])  # NumPy's clip passes any NaN on
def test_the_interpreter_agrees(name, results):
    compiled, interpreted = results
    keys = [key for key in compiled if key.rsplit(" ", 1)[0] == name]
    assert keys
    for key in keys:
        if compiled[key].dtype == np.float32:
            np.testing.assert_allclose(compiled[key], interpreted[key], rtol=2e-4, atol=2e-5, err_msg=key)
        else:
            np.testing.assert_array_equal(compiled[key], interpreted[key], key)
