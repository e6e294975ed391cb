"""What tests of every room use."""

import numpy as np
import pytest


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that differ between tests and not between runs."""
    return np.random.default_rng(list(request.node.name.encode()))
