"""What tests of every room use."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may depend on a network

if os.environ.get("FASTDEPLOY_TESTS_ON") == "torch":  # a GPU under PyTorch, for the tests that ask for a device
    from bench.torch_device import use_torch

    use_torch()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the shell that started the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that differ between tests and not between runs."""
    return np.random.default_rng(list(request.node.name.encode()))
