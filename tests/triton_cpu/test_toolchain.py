"""Flags fit the compiler; kernels that clang compiled give the results of gcc's."""

import shutil
import sys

import numpy as np
import pytest

from fastdeploy.triton_cpu import runtime, toolchain
from fastdeploy.triton_cpu.toolchain import Toolchain

from .arrays import run_module
from .programs import run_all

GCC = "cc (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc."
CLANG = "Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu"


def written(path, script):
    """A program of this text; returns its path."""
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("version, is_gcc", [(GCC, True), (CLANG, False)], ids=["gcc", "clang"])
def test_each_compiler_is_given_the_flags_that_it_knows_and_needs(version, is_gcc, tmp_path):
    compiler = written(tmp_path / "cc", f"#!/bin/sh\necho '{version}'\n")
    flags = Toolchain((compiler,), "baseline").flags
    assert ("-fno-tree-pre" in flags, "-femulated-tls" in flags) == (is_gcc, not is_gcc)


KNOWS_NO_AVX_VNNI = """#!/bin/sh
case "$*" in
    *--version*) echo "gcc (GCC) 10.2.1, Free Software Foundation" ;;
    *-mavxvnni*) echo "cc: error: unrecognized command-line option '-mavxvnni'" >&2; exit 1 ;;
    *-mavx2*) for name in AVX2 FMA F16C; do echo "#define __${name}__ 1"; done ;;
esac
"""


@pytest.fixture
def old_compiler(tmp_path, monkeypatch):
    """$CC, which has no flag for AVX-VNNI, on a CPU that has it and no AVX-512."""
    monkeypatch.setattr(toolchain, "_cpu_features", lambda: {"avx2", "fma", "f16c", "avx_vnni"})
    monkeypatch.delenv("FASTDEPLOY_INSTRUCTION_SET", raising=False)
    monkeypatch.setenv("CC", written(tmp_path / "cc", KNOWS_NO_AVX_VNNI))


def test_an_instruction_set_that_the_compiler_does_not_know_is_not_chosen(old_compiler):
    assert toolchain.toolchain.__wrapped__().instruction_set == "avx2"


def test_to_ask_for_an_instruction_set_that_the_compiler_does_not_know_is_an_error(old_compiler, monkeypatch):
    monkeypatch.setenv("FASTDEPLOY_INSTRUCTION_SET", "avxvnni")
    with pytest.raises(ValueError, match="'avxvnni', but this compiler does not know avxvnni"):
        toolchain.toolchain.__wrapped__()


WAITS = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
for turn in $(seq 100); do
    [ -e "$0.tidied" ] && echo compiled > "$2" && exit
    sleep 0.1
done
exit 1
"""


def test_actions_are_called_while_the_compiler_is_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "_meanwhile", ())
    compiler = written(tmp_path / "cc", WAITS)
    toolchain.while_compiling((tmp_path / "cc.tidied").touch)
    assert Toolchain((compiler,), "baseline").compile("", "-O0") == b"compiled\n"


def test_programs_compiled_by_clang(tmp_path):
    if not shutil.which("clang"):
        pytest.skip("clang is not installed")
    path = tmp_path / "out.npz"
    run_module("tests.triton_cpu.programs", str(path), CC="clang")
    expected = run_all()
    with np.load(path) as found:
        for key, values in expected.items():
            np.testing.assert_array_equal(found[key], values, key)


def quota(root, memberships, **files):
    """Cores by the quotas of control groups: {path under /sys/fs/cgroup: content}."""
    for path, content in {"proc/self/cgroup": memberships, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return runtime._quota(root)


LIMITS = [("200000", "100000", 2), ("150000", "100000", 2), ("5000", "100000", 1), ("50000", "20000", 3)]


@pytest.mark.parametrize(("limit", "period", "cores"), [*LIMITS, ("max", "100000", sys.maxsize)])
@pytest.mark.parametrize("limited", ["", "pod/", "pod/container/"])
def test_a_quota_of_any_enclosing_control_group_limits_the_threads(tmp_path, limit, period, cores, limited):
    groups = {f"sys/fs/cgroup/{path}cpu.max": "max 100000\n" for path in ("pod/", "pod/container/")}
    groups[f"sys/fs/cgroup/{limited}cpu.max"] = f"{limit} {period}\n"
    assert quota(tmp_path, "0::/pod/container\n", **groups) == cores


@pytest.mark.parametrize(("limit", "period", "cores"), [*LIMITS, ("-1", "100000", sys.maxsize)])
@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("limited", ["", "pod/", "pod/container/"])
def test_quotas_of_control_groups_of_version_1_count(tmp_path, limit, period, cores, folder, limited):
    files = {f"sys/fs/cgroup/{folder}/pod/container/cpu.cfs_quota_us": "-1\n"}
    files[f"sys/fs/cgroup/{folder}/{limited}cpu.cfs_quota_us"] = f"{limit}\n"
    files[f"sys/fs/cgroup/{folder}/{limited}cpu.cfs_period_us"] = f"{period}\n"
    memberships = "5:cpu,cpuacct:/pod/container\n4:memory:/other\n0::/\n"
    assert quota(tmp_path, memberships, **files) == cores


def test_the_tightest_quota_counts_and_a_container_has_its_own_at_the_mount_point(tmp_path):
    groups = {"sys/fs/cgroup/cpu.max": "400000 100000\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}
    assert quota(tmp_path, "0::/a/b\n", **groups) == 3
    assert quota(tmp_path, "0::/docker/1234\n", **groups) == 4
    assert runtime._quota(tmp_path / "missing") == sys.maxsize
