"""Compiled kernels are found again, in this process and the next, and compiled anew when what made them changes, or
when they have been damaged; folders that are full, or that nothing runs from."""

import errno
import logging
import os
import shutil
import stat
import subprocess
import tempfile

import pytest
from triton import knobs
from triton.runtime.cache import FileCacheManager, get_cache_manager

from fastdeploy.triton_cpu import runtime
from fastdeploy.triton_cpu.cache import CheckedCache
from fastdeploy.triton_cpu.toolchain import toolchain

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


# Damaged files


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def overwrite(path):
    path.write_bytes(b"\xff[" * path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_kernel_of_damaged_files_is_compiled_again_and_runs(kernels_compiled, tmp_path, damage):
    assert kernels_compiled() == 1
    for path in (tmp_path / "cache").rglob("*.*"):
        damage(path)
    assert kernels_compiled() == 1
    assert kernels_compiled() == 0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one group of files in it."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    cache = get_cache_manager("ab" * 32)
    assert isinstance(cache, CheckedCache)
    group = {name: cache.put(content, name) for name, content in {"k.json": "{}" * 50, "k.so": bytes(100)}.items()}
    cache.put_group("k.json", group)
    assert cache.get_group("k.json") == group
    return cache


@pytest.mark.parametrize("damage", [truncate, empty, flip, overwrite, os.unlink])
@pytest.mark.parametrize("name", ["k.json", "k.so"])
def test_a_damaged_file_is_named_in_a_warning(cache, tmp_path, caplog, name, damage):
    (path,) = tmp_path.rglob(name)
    damage(path)
    with caplog.at_level(logging.WARNING, "fastdeploy"):
        assert cache.get_group("k.json") is None
    assert str(path) in caplog.text and "compiled again" in caplog.text


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"digests": {}}', '{"child_paths": {"k.so": 1}, "digests": {"k.so": 2}}',
                '{"child_paths": 3, "digests": 4}', '{"child_paths": {"k.so": "/nowhere"}, "digests": {}}'],
)  # fmt: skip
def test_a_damaged_list_of_files_is_no_list(cache, tmp_path, content):
    (path,) = tmp_path.rglob("__grp__k.json")
    path.write_text(content)
    assert cache.get_group("k.json") is None


def test_what_is_not_there_is_not_damaged(cache, caplog):
    assert cache.get_group("other.json") is None
    assert not caplog.records


def test_what_tritons_own_manager_has_stored_is_found(cache, tmp_path):
    plain = FileCacheManager("PLAIN")
    plain.put_group("k.json", {"k.json": plain.put("{}", "k.json")})
    assert CheckedCache("PLAIN").get_group("k.json") == plain.get_group("k.json") != None  # noqa: E711


# Folders


def test_a_cache_without_room_is_named_with_the_remedy(cache, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")  # as `write` raises it: without a name

    monkeypatch.setattr(FileCacheManager, "put", full)
    with pytest.raises(OSError, match=rf"stored \(No space left on device\): .*TRITON_CACHE_DIR.*{cache.cache_dir}"):
        cache.put(b"", "k.so")


ADD_ONE = "int add(int x) { return x + NUMBER; }"


def check_loads():
    """Libraries are loaded, each its own."""
    codes = [toolchain().compile(ADD_ONE.replace("NUMBER", str(number))) for number in range(3)]
    assert [runtime.load_library(code).add(10) for code in codes] == [10, 11, 12]


def test_kernels_are_compiled_and_loaded_where_nothing_may_run_from_the_folder_for_temporary_files(
    tmp_path, monkeypatch
):
    mount = ["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        check_loads()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # a failed load stays mapped


def test_kernels_are_loaded_from_memory_where_no_file_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **_: (tmp_path / "missing" / "file").open("wb"))
    check_loads()
    with pytest.raises(OSError, match=r"can't be loaded.*file too short.*set TMPDIR"):
        runtime.load_library(b"no library")


def test_a_compiler_without_room_for_its_files_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OSError, match=r"can't be compiled \(.*\): set TMPDIR to a folder that has room: .*missing"):
        toolchain().compile(ADD_ONE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\necho "$TMPDIR/x.s: No space left on device" >&2; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(OSError, match=rf"can't be compiled \(No space.*\): set TMPDIR.*{tmp_path}"):
        toolchain.__wrapped__().compile(ADD_ONE)
