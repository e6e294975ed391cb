"""Flags fit the compiler; kernels that clang compiled give the results of gcc's."""

import shutil
import sys

import numpy as np
import pytest

from fastdeploy.triton_cpu import runtime
from fastdeploy.triton_cpu.toolchain import Toolchain

from .arrays import run_module
from .programs import run_all

GCC = "cc (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc."
CLANG = "Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu"


@pytest.mark.parametrize("version, is_gcc", [(GCC, True), (CLANG, False)], ids=["gcc", "clang"])
def test_each_compiler_is_given_the_flags_that_it_knows_and_needs(version, is_gcc, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\necho '{version}'\n")
    compiler.chmod(0o755)
    flags = Toolchain((str(compiler),), "baseline").flags
    assert ("-fno-tree-pre" in flags, "-femulated-tls" in flags) == (is_gcc, not is_gcc)


def test_programs_compiled_by_clang(tmp_path):
    if not shutil.which("clang"):
        pytest.skip("clang is not installed")
    path = tmp_path / "out.npz"
    run_module("tests.triton_cpu.programs", str(path), CC="clang")
    expected = run_all()
    with np.load(path) as found:
        for key, values in expected.items():
            np.testing.assert_array_equal(found[key], values, key)


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("200000 100000\n", 2), ("150000 100000\n", 2), ("5000 100000\n", 1), ("max 100000\n", sys.maxsize)],
)
def test_a_containers_quota_limits_the_threads(tmp_path, cpu_max, cores):
    (tmp_path / "cpu.max").write_text(cpu_max)
    assert runtime._quota(tmp_path / "cpu.max") == cores
    assert runtime._quota(tmp_path / "missing") == sys.maxsize
