"""Which backend is active: ours by its name, by activate(), and then Triton's whole machinery uses it."""

import triton

from fastdeploy import triton_cpu
from fastdeploy.triton_cpu.driver import CPUDriver

from .arrays import run_python


def test_activating_twice_changes_nothing():
    active = triton.runtime.driver.active
    assert isinstance(active, CPUDriver)
    triton_cpu.activate()
    assert triton.runtime.driver.active is active


def test_the_target_is_this_cpu():
    target = triton.runtime.driver.active.get_current_target()
    assert target.backend == "cpu"


def test_the_backend_is_found_by_its_entry_point(tmp_path):
    info = tmp_path / "fastdeploy_test-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastdeploy-test\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[triton.backends]\ncpu = fastdeploy.triton_cpu\n")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import triton
from tests.triton_cpu.arrays import empty
from tests.triton_cpu.pool_kernels import count_kernel
counts = empty(4, "int32")
counts.stored[:] = 0
count_kernel[(4,)](counts)
print(triton.runtime.driver.active.get_current_target().backend, counts.stored.tolist())
"""
    for settings in ({"TRITON_DEFAULT_BACKEND": "cpu"}, {}):
        done = run_python(program, **settings)
        assert done.stdout.strip() == "cpu [1, 1, 1, 1]", done.stderr
