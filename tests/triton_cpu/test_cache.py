"""Compiled kernels are found again, in this process and the next, and compiled anew when what made them changes."""

import os
import shutil
import stat

import pytest

from .arrays import run_python

PROGRAM = """
from fastdeploy import triton_cpu
triton_cpu.activate()
from tests.triton_cpu.arrays import empty
from tests.triton_cpu.pool_kernels import count_kernel
counts = empty(8, "int32")
counts.stored[:] = 0
for _ in range(3):
    count_kernel[(8,)](counts)
assert counts.stored.tolist() == [3] * 8
"""


@pytest.fixture
def kernels_compiled(tmp_path):
    """Runs PROGRAM in a process of its own; returns how many kernels the C compiler was given."""
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    real = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    compiler.write_text(
        f'#!/bin/sh\nfor word; do case $word in *.c) grep -l run_programs "$word" >> {log};; esac; done\n'
        f'exec {real} "$@"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)

    def run(program=PROGRAM, **environment):
        log.write_text("")
        settings = {"CC": str(compiler), "TRITON_CACHE_DIR": str(tmp_path / "cache")} | environment
        done = run_python(program, **settings)
        assert done.returncode == 0, done.stderr
        return len(log.read_text().splitlines())

    return run


def test_a_kernel_is_compiled_once_for_all_processes(kernels_compiled):
    assert kernels_compiled() == 1
    assert kernels_compiled() == 0


def test_a_kernel_is_compiled_again_when_flags_or_instruction_set_change(kernels_compiled):
    assert kernels_compiled() == 1
    assert kernels_compiled(FASTDEPLOY_CFLAGS="-fno-inline") == 1
    assert kernels_compiled(FASTDEPLOY_INSTRUCTION_SET="baseline") == 1
    for name in ("REGISTER_TILES", "LIVE_ROWS", "DIRECT_STORES", "PREFETCH"):
        assert kernels_compiled(**{f"FASTDEPLOY_{name}": "0"}) == 1
    assert kernels_compiled() == 0


def test_a_kernel_is_compiled_again_when_the_backend_changes(kernels_compiled, tmp_path):
    assert kernels_compiled() == 1
    package = tmp_path / "changed" / "fastdeploy"
    shutil.copytree("fastdeploy", package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(package / "triton_cpu" / "prelude.h", "a") as prelude:
        prelude.write("/* changed */\n")
    path = os.pathsep.join([str(package.parent), os.getcwd()])
    program = f"import sys; sys.path[:0] = {path.split(os.pathsep)!r}\n{PROGRAM}"
    assert kernels_compiled(program) == 1
    assert kernels_compiled() == 0
