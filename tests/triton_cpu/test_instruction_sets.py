"""Vectors of other widths give the same bits where the CPU fuses multiply and add, else nearly the same."""

import numpy as np
import pytest

from fastdeploy.triton_cpu.toolchain import _INSTRUCTION_SETS, _cpu_features

from .arrays import run_module
from .programs import run_all


@pytest.mark.parametrize("name", ["avxvnni", "avx2", "baseline"])
def test_programs_under_another_instruction_set(name, tmp_path):
    if not _INSTRUCTION_SETS[name][2] <= _cpu_features():
        pytest.skip(f"this CPU has no {name}")
    path = tmp_path / "out.npz"
    run_module("tests.triton_cpu.programs", str(path), FASTDEPLOY_INSTRUCTION_SET=name)
    expected = run_all()
    with np.load(path) as found:
        for key, values in expected.items():
            if name == "baseline" and values.dtype == np.float32:
                np.testing.assert_allclose(found[key], values, rtol=2e-4, atol=2e-5, err_msg=key)
            else:
                np.testing.assert_array_equal(found[key], values, key)
