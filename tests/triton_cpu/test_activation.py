"""Which backend is active: ours by its name, by activate(), and then Triton's whole machinery uses it."""

import numpy as np
import pytest
import triton
from triton.backends import Backend

from fastdeploy import triton_cpu
from fastdeploy.triton_cpu.compiler import CPUBackend
from fastdeploy.triton_cpu.driver import CPUDriver

from .arrays import Tensor, run_python
from .pool_kernels import count_kernel


def test_activating_twice_changes_nothing():
    active = triton.runtime.driver.active
    assert isinstance(active, CPUDriver)
    triton_cpu.activate()
    assert triton.runtime.driver.active is active


def test_the_target_is_this_cpu():
    target = triton.runtime.driver.active.get_current_target()
    assert target.backend == "cpu"


@pytest.fixture
def entry_point(tmp_path):
    """A folder by which Python finds the backend as if it were installed."""
    info = tmp_path / "fastdeploy_test-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastdeploy-test\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[triton.backends]\ncpu = fastdeploy.triton_cpu\n")
    return str(tmp_path)


def test_the_backend_is_found_by_its_entry_point(entry_point):
    program = f"""
import sys
sys.path.insert(0, {entry_point!r})
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


ORDERS = ["triton, fastdeploy.triton_cpu", "fastdeploy.triton_cpu.driver, triton", "fastdeploy.triton_cpu.runtime"]


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("modules", ORDERS)
def test_modules_may_be_imported_in_any_order_without_a_compiler(modules, interpret, entry_point):
    code = f"import sys; sys.path.insert(0, {entry_point!r}); import {modules}; import triton"
    code += "; print(triton.runtime.driver.active.get_current_target().backend)"
    done = run_python(code, TRITON_INTERPRET=interpret, TRITON_DEFAULT_BACKEND="cpu", CC="/nonexistent/compiler")
    assert done.stdout == "cpu\n", done.stderr


class Answering:
    """A GPU's driver, with a GPU."""

    @staticmethod
    def is_active():
        return True


@pytest.mark.parametrize(
    ("wanted", "gpu", "active"),
    [
        (None, False, True),
        (None, True, False),
        ("", False, True),
        ("", True, False),
        ("cpu", False, True),
        ("cpu", True, True),
        ("nvidia", False, False),
        ("nvidia", True, False),
    ],
)
def test_the_cpu_is_active_where_it_is_asked_for_or_where_no_gpu_is(wanted, gpu, active, monkeypatch):
    others = {"gpu": Backend(CPUBackend, Answering)} if gpu else {}
    monkeypatch.setattr(triton.backends, "backends", {"cpu": Backend(CPUBackend, CPUDriver)} | others)
    monkeypatch.delenv("TRITON_DEFAULT_BACKEND", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TRITON_DEFAULT_BACKEND", wanted)
    assert CPUDriver.is_active() == active


def test_a_backend_that_there_is_not_is_tritons_own_error(entry_point):
    code = f"import sys; sys.path.insert(0, {entry_point!r}); import triton; triton.runtime.driver.active"
    done = run_python(code, TRITON_DEFAULT_BACKEND="tpu")
    assert "RuntimeError: Unknown backend device 'tpu'" in done.stderr


def test_what_is_reported_of_a_kernel_is_what_tools_for_gpus_expect():
    compiled = count_kernel[(1,)](Tensor(np.zeros(1, np.int32)))
    assert compiled.n_regs >= 1 and compiled.n_spills == 0 and compiled.metadata.shared >= 1
    assert compiled.asm["ttir"] and compiled.asm["c"] and compiled.asm["so"]
