"""Triton's CPU backend, active in this process; random numbers that differ between tests but not between runs."""

import numpy as np
import pytest

from fastdeploy import triton_cpu


@pytest.fixture(scope="session", autouse=True)
def cpu_backend() -> None:
    triton_cpu.activate()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(list(request.node.name.encode()))
