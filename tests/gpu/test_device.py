"""A GPU as a device: copies, staging areas, recorded launches."""

import numpy as np
import pytest

from fastdeploy.device import Field
from fastdeploy.kernels.activation import silu_mul, silu_mul_reference
from fastdeploy.kernels.launch import view


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64", "int8"])
def test_what_is_written_to_a_tensor_is_read_back(device, dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype)
    tensor = device.empty((3, 4), dtype)
    device.write(tensor, values)
    np.testing.assert_array_equal(device.to_numpy(tensor), values)
    np.testing.assert_array_equal(device.to_numpy(device.from_numpy(values)), values)


def test_staging_brings_each_upload_to_the_launches_that_follow_it(device):
    """Forty uploads and fetches in flight, the host's memory written again at once."""
    staging = device.staging({"ids": Field((3000,), "int32"), "slots": Field((50, 2), "int64")})
    fetched = []
    for number in range(40):
        staging.host["ids"][:] = np.arange(3000) + number
        staging.host["slots"][:] = number
        staging.upload()
        if number % 2:
            fetched.append((number, staging.fetch("ids"), staging.fetch("slots")))
        if len(fetched) == 2:
            number_then, ids, slots = fetched.pop(0)
            np.testing.assert_array_equal(ids(), np.arange(3000) + number_then)
            assert (slots() == number_then).all()


def test_an_upload_of_rows_leaves_the_others(device):
    staging = device.staging({"a": Field((5, 3), "int32"), "b": Field((5,), "float32")})
    staging.host["a"][:], staging.host["b"][:] = 1, 1
    staging.upload(rows=[1, 3])
    for name in "ab":
        found = device.to_numpy(staging.device[name]).reshape(5, -1)
        np.testing.assert_array_equal(found[:, 0], [0, 1, 0, 1, 0])


def test_recorded_launches_read_what_is_there_when_replayed(device, rng):
    out, gate_up = (view(device.empty((64, width), "float32")) for width in (96, 192))
    device.write(gate_up, np.zeros((64, 192), np.float32))
    plan = device.record(lambda: silu_mul(out, gate_up))
    for _ in range(3):
        values = rng.standard_normal((64, 192)).astype(np.float32)
        device.write(gate_up, values)
        plan.replay()
        np.testing.assert_allclose(device.to_numpy(out), silu_mul_reference(values), rtol=1e-5, atol=1e-6)


def test_there_is_memory_and_the_cache_gets_a_part_of_it(device):
    assert 0 < device.cache_budget(0.5) < device.cache_budget(0.9) < device.free_memory()
    assert "GiB free" in device.describe()
