"""Triton's CPU backend, active in this process."""

import pytest

from fastdeploy import triton_cpu


@pytest.fixture(scope="session", autouse=True)
def cpu_backend() -> None:
    triton_cpu.activate()
