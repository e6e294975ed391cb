"""The process on its host: free memory, giving back what it has touched of it, standard streams."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdeploy.triton_cpu.cgroups import control_groups

MADV_PAGEOUT = 21  # Linux 5.4; an older kernel refuses, and an unprivileged process may ask for its own files only


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still allocate on the host: what the kernel calls available, or less where a control group
    (a container's memory limit) allows less. `root` is where /proc and /sys are looked up.

    File pages that a group could drop at once (`inactive_file`) count as free: a checkpoint just read must not make its
    own KV cache smaller.
    """
    meminfo = _named_numbers(root / "proc/meminfo")
    available = meminfo["MemAvailable"] * 1024
    return max(0, min([available, *_cgroup_headrooms(root)]))


def release_library_pages(smaps: Path = Path("/proc/self/smaps")) -> None:
    """Take the libraries' pages out of this process's resident memory; those needed again come back by themselves.

    Importing Paddle and Triton touches 230 MB of their files, for 40 MB of which there is a use afterwards. The rest
    would stay mapped until the whole machine is short of memory. It stays in the page cache, free for others to take.

    Released are mappings that hold no page of the process's own (as relocated ones do): their pages are in the file,
    the kernel itself takes them away in the same manner. Where one can be written (25 MB of Paddle's tables), another
    thread may be about to do that, and the kernel is asked to take what is still the file's.
    """
    try:
        mappings = _shared_mappings(smaps.read_text())
    except OSError:  # no /proc, or a hidden one
        return
    madvise = ctypes.CDLL(None).madvise
    for start, end, writable in mappings:
        advice = MADV_PAGEOUT if writable else mmap.MADV_DONTNEED
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def release_free_memory() -> None:
    """Give what was allocated and freed back to the system: glibc keeps it, for this process to allocate again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


@functools.cache
def release_pages_after(stage: str) -> None:
    """`release_library_pages`, once a process for each stage: what a later device or model touches is not worth looking
    through all mappings again."""
    release_library_pages()


def ask_for_huge_pages(start: int, size: int) -> None:
    """Have memory that wasn't touched yet come in huge pages, where the system has them for whoever asks."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)


def has_huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> bool:
    """Whether the system gives them: it says "always [madvise] never", the choice in brackets."""
    try:
        return "[never]" not in setting.read_text()
    except OSError:
        return False


def open_standard_streams() -> None:
    """Give a process whose standard streams are closed (`2>&-`) some that lead nowhere.

    Else the next file that is opened gets the number of one, for libraries to write their messages into; and progress
    bars fail for want of `sys.stderr`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free: this one
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the process lives)


def progress_bar(**settings: Any) -> Any:
    """A tqdm of these settings, on standard error. Where that can't be written to, the work that it shows goes on."""
    from tqdm import tqdm  # 20 ms that `import fastdeploy` does without

    return tqdm(file=_Dropping(sys.stderr), **settings)


def tell(text: str) -> None:
    """A line on standard error; dropped where that can't be written to."""
    print(text, file=_Dropping(sys.stderr))


class _Dropping:
    """A stream that drops what can't be written: to a full disk, to a pipe that nobody reads."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _shared_mappings(smaps: str) -> list[tuple[int, int, bool]]:
    """(start, end, whether it can be written) of each private mapping of a library that holds nothing but the file's
    own pages, and has none of its own swapped out. Libraries only: another thread may be about to unmap other files."""
    mapping = (
        r"^([0-9a-f]+)-([0-9a-f]+) r([-w])[x-]p [0-9a-f]+ \S+ \S+ +/\S*\.so[.\d]*\n"
        r"(?:\w+:.*\n)*?Anonymous: +0 kB\n(?:\w+:.*\n)*?Swap: +0 kB$"
    )
    found = re.findall(mapping, smaps, re.MULTILINE)
    return [(int(start, 16), int(end, 16), write == "w") for start, end, write in found]


# Names of a control group's limit, its usage, and what of that could be dropped, by version.
_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """Limit minus usage of every control group that holds this process, in bytes."""
    for version, group in control_groups("memory", root):
        yield from _headroom(group, *_MEMORY_FILES[version])


def _headroom(group: Path, limit_file: str, usage_file: str, droppable: str) -> Iterator[int]:
    """Limit minus usage of one control group; nothing where it has no limit."""
    try:
        limit, usage = (group / limit_file).read_text(), (group / usage_file).read_text()
        statistics = _named_numbers(group / "memory.stat")
    except OSError:
        return
    if limit.strip() != "max":
        yield int(limit) - int(usage) + statistics.get(droppable, 0)


def _named_numbers(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file of the /proc kind."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
