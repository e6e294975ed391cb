"""The C compiler: which one, with which flags, for which CPU."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# -ffp-contract=off: emitter.py decides where a multiply and an add are one rounding.  -fwrapv: signed overflow wraps.
# No -ffast-math of any kind: infinities and NaN mean something in attention masks, and sums keep their order.
# -fno-trapping-math only lets the compiler speculate (a masked lane may divide by zero), -fno-math-errno inline sqrt.
_FLAGS: tuple[str, ...] = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_FLAGS += ("-fwrapv", "-fno-semantic-interposition", "-w")
# gcc's partial redundancy elimination puts jumps into loops with selects, which then are not vectorised (the sampler's
# draw from 49,152 logits: 1050 us with it, 260 us without). clang stops at the flag.
_GCC_FLAGS = ("-fno-tree-pre",)
# clang 14 keeps zeros in zmm16-31 across __tls_get_addr, which may overwrite them at a thread's first use of a tile
# (NaN in attention's padded lanes, now and then). An emulated thread-local variable is had by an ordinary call.
_CLANG_FLAGS = ("-femulated-tls",)
# -march=x86-64-v3 without two instructions that no kernel has; gcc knows it from 11 on only, clang from 12 on.
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt", "-mmovbe")
# Vector instruction sets by name: (lanes of a float vector, flags, features that /proc/cpuinfo must list and under
# these flags the compiler)
_INSTRUCTION_SETS = {
    "avx512": (16, ("-march=native", "-mprefer-vector-width=512"), {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avxvnni": (8, (*_AVX2, "-mavxvnni"), {"avx2", "fma", "f16c", "avx_vnni"}),
    "avx2": (8, _AVX2, {"avx2", "fma", "f16c"}),
    "baseline": (4, (), set()),
}


class CompilerNotFound(RuntimeError):
    """No C compiler on this machine."""


@dataclass(frozen=True)
class Toolchain:
    compiler: tuple[str, ...]  # the command: a program, perhaps with arguments ("ccache gcc")
    instruction_set: str

    @property
    def lanes(self) -> int:
        """Floats in a vector register."""
        return _INSTRUCTION_SETS[self.instruction_set][0]

    @property
    def multiplies_bf16(self) -> bool:
        """Has the CPU AVX512-BF16, and does the compiler know it, under these flags?"""
        return self.lanes == 16 and "__AVX512BF16__" in _macros((*self.compiler, *self.flags))

    @property
    def vnni(self) -> bool:
        """Do these flags give vectors the instruction that adds four products of bytes at once (vpdpbusd)?"""
        macro = "__AVX512VNNI__" if self.lanes == 16 else "__AVXVNNI__"
        return self.lanes >= 8 and macro in _macros((*self.compiler, *self.flags))

    @property
    def flags(self) -> tuple[str, ...]:
        is_gcc = "Free Software Foundation" in _version(self.compiler)  # cc and ccache can be either
        own = _GCC_FLAGS if is_gcc else _CLANG_FLAGS
        extra = os.environ.get("FASTDEPLOY_CFLAGS", "").split()
        return _FLAGS + own + _INSTRUCTION_SETS[self.instruction_set][1] + tuple(extra)

    def fingerprint(self) -> str:
        """Changes whenever the machine code for the same C might: part of every cache key."""
        parts = (_version(self.compiler), " ".join(self.flags), " ".join(sorted(_cpu_features())), platform.machine())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def compile(self, source: str, *flags: str) -> bytes:
        """C text -> the bytes of a shared object. OSError with the remedy where there is no room for it."""
        with _workspace() as folder:
            code, library = Path(folder, "kernel.c"), Path(folder, "kernel.so")
            code.write_text(source)
            command = [*self.compiler, *(flags or self.flags), "-shared", "-fPIC"]
            command += ["-o", str(library), str(code), "-lm", "-pthread"]
            environment = os.environ | {"TMPDIR": folder, "LC_ALL": "C"}
            with subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
            ) as process:
                for action in _meanwhile:
                    action()
                _, errors = process.communicate()
            if process.returncode and os.strerror(errno.ENOSPC) in errors:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
            if process.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{errors[:4000]}")
            return library.read_bytes()


_meanwhile: tuple[Callable[[], None], ...] = ()


def while_compiling(*actions: Callable[[], None]) -> None:
    """Have these called each time that the compiler, a process of its own, is at work; no others than these."""
    global _meanwhile
    _meanwhile = actions


@contextmanager
def _workspace() -> Iterator[str]:
    """A folder of temporary files."""
    parent = ""
    try:
        parent = tempfile.gettempdir()
        with tempfile.TemporaryDirectory(prefix="fastdeploy-") as folder:
            yield folder
    except OSError as error:
        if error.filename and not str(error.filename).startswith(parent):
            raise
        message = f"a kernel can't be compiled ({error.strerror}): set TMPDIR to a folder that has room"
        raise OSError(error.errno, message, error.filename or parent or None) from error


@functools.lru_cache(None)
def toolchain() -> Toolchain:
    """The compiler named by $CC, or the first of gcc, clang and cc; the widest vectors that it and this CPU have.

    $FASTDEPLOY_INSTRUCTION_SET (avx512, avxvnni, avx2, baseline) narrows the vectors, for tests and comparisons.
    """
    wanted = os.environ.get("CC", "").strip()
    for command in [wanted] if wanted else ["gcc", "clang", "cc"]:
        program, *arguments = shlex.split(command)
        if path := shutil.which(program):
            return Toolchain((path, *arguments), _instruction_set((path, *arguments)))
    missing = f"CC={wanted!r} was not" if wanted else "none of gcc, clang, cc was"
    raise CompilerNotFound(
        f"Triton kernels are compiled for this CPU by a C compiler, and {missing} found. "
        "Install one (Debian and Ubuntu: apt-get install gcc libc6-dev; Fedora: dnf install gcc) or set CC."
    )


def _instruction_set(compiler: tuple[str, ...]) -> str:
    wanted = os.environ.get("FASTDEPLOY_INSTRUCTION_SET")
    if wanted and wanted not in _INSTRUCTION_SETS:
        raise ValueError(f"FASTDEPLOY_INSTRUCTION_SET={wanted!r} is none of {', '.join(_INSTRUCTION_SETS)}")
    for name in [wanted] if wanted else _INSTRUCTION_SETS:
        needed = _INSTRUCTION_SETS[name][2]
        on_cpu = needed <= _cpu_features()
        if on_cpu and _defined_for(needed) <= _macros((*compiler, *Toolchain(compiler, name).flags)):
            return name
    lacks = "compiler does not know" if on_cpu else "CPU has no"
    raise ValueError(f"FASTDEPLOY_INSTRUCTION_SET={wanted!r}, but this {lacks} {wanted}")


def _defined_for(features: set[str]) -> set[str]:
    """The macros by which a compiler says that it uses these features: avx_vnni -> __AVXVNNI__."""
    return {f"__{feature.replace('_', '').upper()}__" for feature in features}


@functools.lru_cache(None)
def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, []))


@functools.lru_cache(None)
def _macros(command: tuple[str, ...]) -> frozenset[str]:
    """The macros that a compiler defines."""
    command = (*command, "-dM", "-E", "-x", "c", os.devnull)
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return frozenset(line.split()[1] for line in lines)


@functools.lru_cache(None)
def _version(compiler: tuple[str, ...]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
