"""Runs compiled kernels: loads them, packs arguments, launches on the thread pool, records and replays plans.

    with record() as plan:          # launches inside are written down, not run
        model(batch)
    plan.replay()                   # the whole list in one native call: about 0.2 us a launch instead of 12

    run_queued(model)               # launches run while Python makes the next ones

A plan keeps the addresses and numbers that it saw: change the contents of tensors between replays, not their places.
Between launches it may have calls of Python functions (`call`), for what no kernel does: talking to other processes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .cgroups import control_groups
from .toolchain import toolchain


class Failure(ctypes.Structure):
    """Where programs say that they have failed, and the first one how: `struct failure` of prelude.h."""

    _fields_ = (
        ("count", ctypes.c_int64),  # of programs
        ("program", ctypes.c_int64),
        ("locked", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("message", ctypes.c_char * 4072),
    )

    def check(self) -> None:
        """RuntimeError if an assertion failed in the first program that did, IndexError if it left its memory."""
        if self.count:
            others = f" (and {self.count - 1} more programs failed)" if self.count > 1 else ""
            raise (RuntimeError, IndexError)[self.kind](self.message.decode(errors="replace") + others)


class Launch(NamedTuple):
    function: int  # address of a kernel's `run_programs`
    arguments: bytes  # its packed argument struct
    grid: tuple[int, int, int]
    keep: Any  # what owns the memory that the arguments point to
    failure: Failure | None  # the arguments have its address, if the kernel can fail


class _Recorded(ctypes.Structure):
    _fields_ = (("run", ctypes.c_void_p), ("arguments", ctypes.c_void_p), ("grid", ctypes.c_int * 4))


class _Launches:
    """Recorded launches without a call between them: one native call replays them all."""

    def __init__(self) -> None:
        self._launches: list[Launch] = []
        self._native: int | None = None

    def __len__(self) -> int:
        return len(self._launches)

    def add(self, launch: Launch) -> None:
        if prod(launch.grid) > 0:
            self._launches.append(launch)

    def __call__(self) -> None:
        pool = thread_pool()
        if self._native is None:
            self._arguments = [
                ctypes.create_string_buffer(one.arguments, len(one.arguments) or 1) for one in self._launches
            ]
            self._failures = [one.failure for one in self._launches if one.failure is not None]
            array = (_Recorded * len(self._launches))()
            for entry, one, arguments in zip(array, self._launches, self._arguments):
                entry.run, entry.arguments, entry.grid[:3] = one.function, ctypes.addressof(arguments), one.grid
            # Never freed: a worker that wakes late may still look at its counters. A plan is about 50 KB.
            self._native = pool.plan_new(array, len(self._launches))
        for failure in self._failures:
            failure.count = 0
        pool.plan_replay(self._native)
        for failure in self._failures:
            failure.check()


class Plan:
    """A recorded sequence of launches and calls."""

    def __init__(self) -> None:
        self._parts: list[Callable[[], object]] = []

    def __len__(self) -> int:
        """The number of launches."""
        return sum(len(part) for part in self._parts if isinstance(part, _Launches))

    def add(self, launch: Launch) -> None:
        if not self._parts or not isinstance(self._parts[-1], _Launches):
            self._parts.append(_Launches())
        self._parts[-1].add(launch)  # type: ignore[attr-defined]

    def call(self, function: Callable[[], object]) -> None:
        self._parts.append(function)

    def replay(self) -> None:
        """Runs everything in order; returns when the last launch has finished."""
        for part in self._parts:
            part()


class _Observer(Plan):
    """Runs launches and calls at once, and keeps a list of the launches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bytes, tuple[int, int, int]]] = []

    def add(self, launch: Launch) -> None:
        self.seen.append(launch[:3])
        _run(*launch[:3], launch.failure)

    def call(self, function: Callable[[], object]) -> None:
        function()


class _Queue(Plan):
    """Has the pool run launches while the next ones are made. Calls are made when all launches before them have run."""

    def __init__(self) -> None:
        super().__init__()
        self._launches: list[Launch] = []  # keeps what they read

    def add(self, launch: Launch) -> None:
        if prod(launch.grid) > 0:
            self._launches.append(launch)
            thread_pool().queue(launch.function, launch.arguments, *launch.grid)

    def call(self, function: Callable[[], object]) -> None:
        thread_pool().finish()
        self.check()
        function()

    def check(self) -> None:
        """For launches that have run: raises what has failed in them."""
        launches, self._launches = self._launches, []
        for launch in launches:
            if launch.failure is not None:
                launch.failure.check()


_recording = threading.local()


@contextmanager
def _into(plan: Plan | None) -> Iterator[None]:
    """This thread's launches go into `plan`; None runs them."""
    outer = getattr(_recording, "plan", None)
    _recording.plan = plan
    try:
        yield
    finally:
        _recording.plan = outer


@contextmanager
def record() -> Iterator[Plan]:
    """Records this thread's launches instead of running them. Kernels are compiled if they have not been."""
    if getattr(_recording, "plan", None) is not None:
        raise RuntimeError("a recording is under way on this thread; end it before starting another")
    plan = Plan()
    with _into(plan):
        yield plan


@contextmanager
def observe() -> Iterator[list[tuple[int, bytes, tuple[int, int, int]]]]:
    """Lists this thread's launches, which are made as ever, but not recorded: (function, packed arguments, grid)."""
    observer = _Observer()
    with _into(observer):
        yield observer.seen


def run_queued(launches: Callable[[], None]) -> None:
    """Has the launches that the function makes run while it makes the next ones. At the end all of them have run; what
    fails in a kernel is raised then. Within a recording they are recorded.

    Python takes 13 us for a launch, and 20 to 40 between kernels that have driven its data from the caches. (A prompt
    of 512 tokens, SmolLM2 in 4 bits, two threads: 145 ms one after the other, so 136.)
    """
    if getattr(_recording, "plan", None) is not None:
        launches()
        return
    queue, finish = _Queue(), thread_pool().finish
    try:
        _recording.plan = queue
        launches()
    finally:  # no context manager: before a native function Python leaves no room for Ctrl-C, before its own it does
        _recording.plan = None
        finish()
    queue.check()


def at_once() -> AbstractContextManager[None]:
    """Runs this thread's launches, even within a recording."""
    return _into(None)


def launch(
    function: int, arguments: bytes, grid: tuple[int, int, int], keep: Any = None, failure: Failure | None = None
) -> None:
    """Runs, or records, all programs of a grid, as `Launch` says. With a `failure`, this, or the replay, raises what
    `Failure.check` does."""
    plan = getattr(_recording, "plan", None)
    if plan is not None:
        plan.add(Launch(function, arguments, grid, keep, failure))
    else:
        _run(function, arguments, grid, failure)


def _run(function: int, arguments: bytes, grid: tuple[int, int, int], failure: Failure | None) -> None:
    thread_pool().launch(function, arguments, *grid)
    if failure is not None:
        failure.check()


def call(function: Callable[[], object]) -> None:
    """Calls, or records, a function that works between launches; what it returns is dropped."""
    plan = getattr(_recording, "plan", None)
    if plan is not None:
        plan.call(function)
    else:
        function()


_processes_on_cores = 1


def share_cores(processes: int) -> None:
    """Use but this process's share of the cores, of which there are `processes`. Before the first kernel runs."""
    global _processes_on_cores
    _processes_on_cores = processes


def num_threads() -> int:
    """$FASTDEPLOY_NUM_THREADS, or as many as this process may use cores, by its affinity and its container's quota, and
    what `share_cores` leaves it of them."""
    text = os.environ.get("FASTDEPLOY_NUM_THREADS")
    if not text:
        cores = min(len(os.sched_getaffinity(0)), _quota())
        return max(1, cores // _processes_on_cores)
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ValueError(f"FASTDEPLOY_NUM_THREADS={text!r} is not a number from 1 to 1024")
    return int(text)


def pins_threads() -> bool:
    """Does each worker stay on one core? Only where $FASTDEPLOY_PIN_THREADS=1 asks for it.

    A worker that wanders may be woken on the core of the thread that wakes it, and two threads take one's time for a
    while: alone on two cores, 8 rows of a 4-bit layer took 33 us pinned and 36 free. But two processes that pin to the
    same cores wait for each other's workers, which cannot move away (both busy: 78 us each, free 65). So pin where a
    process has its cores to itself, and where there are several, give each its own (taskset, cgroups).
    The calling thread is never pinned: what it starts would inherit that.
    """
    return os.environ.get("FASTDEPLOY_PIN_THREADS") == "1" and num_threads() <= len(os.sched_getaffinity(0))


_CPU_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}  # by version of control groups


def _quota(root: Path = Path("/")) -> int:
    """Cores that the tightest limit of a control group amounts to ("200000 100000": two), rounded up; very many where
    there is none. `root` is where /proc and /sys are looked up."""
    cores = [sys.maxsize]
    for version, group in control_groups("cpu", root):
        try:
            quota, period = map(int, " ".join((group / name).read_text() for name in _CPU_FILES[version]).split())
        except (OSError, ValueError):  # no such file, or "max 100000"
            continue
        if quota > 0 and period > 0:  # version 1 has -1 for none
            cores.append(-(-quota // period))
    return min(cores)


class _ThreadPool:
    def __init__(self) -> None:
        library = load_library(_compiled_pool())
        self.launch = library.fd_launch
        self.launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        self.launch.restype = None
        self.queue, self.finish = library.fd_queue, library.fd_finish
        self.queue.argtypes, self.queue.restype = self.launch.argtypes, None
        self.finish.argtypes, self.finish.restype = [], None
        self.plan_new = library.fd_plan_new
        self.plan_new.argtypes, self.plan_new.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_void_p
        self.plan_replay = library.fd_plan_replay
        self.plan_replay.argtypes, self.plan_replay.restype = [ctypes.c_void_p], None
        self.threads = library.fd_start(num_threads(), pins_threads())


def _compiled_pool() -> bytes:
    """pool.c as a shared object, from Triton's cache where it has been compiled before."""
    from triton.runtime.cache import get_cache_manager

    from .cache import use_checked_cache

    use_checked_cache()
    source = (Path(__file__).parent / "pool.c").read_text()
    cache = get_cache_manager(hashlib.sha256((source + toolchain().fingerprint()).encode()).hexdigest())
    found = cache.get_group("pool")
    if found is None:
        found = {"pool.so": cache.put(toolchain().compile(source, "-O2"), "pool.so")}
        cache.put_group("pool", found)
    return Path(found["pool.so"]).read_bytes()


_making_the_pool = threading.Lock()


def _forget_who_makes_the_pool() -> None:
    """In a forked child: a thread that was making the pool is not there to end it."""
    global _making_the_pool
    _making_the_pool = threading.Lock()


os.register_at_fork(after_in_child=_forget_who_makes_the_pool)


def thread_pool() -> _ThreadPool:
    """The process's one pool, made when the first kernel runs."""
    with _making_the_pool:
        return _the_pool()


@functools.lru_cache(None)
def _the_pool() -> _ThreadPool:
    return _ThreadPool()


_libraries: dict[str, ctypes.CDLL] = {}


def load_library(code: bytes) -> ctypes.CDLL:
    """Maps a shared object given as bytes, once. It stays loaded: recorded plans point into it."""
    digest = hashlib.sha256(code).hexdigest()
    if digest not in _libraries:
        _libraries[digest] = _load(code)
    return _libraries[digest]


def _load(code: bytes) -> ctypes.CDLL:
    try:
        with tempfile.NamedTemporaryFile(suffix=".so", prefix="fastdeploy-") as file:
            file.write(code)
            file.flush()
            return ctypes.CDLL(file.name)
    except OSError as error:  # the folder for temporary files is full, can't be written to, or is mounted noexec
        return _load_from_memory(code, error)


def _load_from_memory(code: bytes, reason: OSError) -> ctypes.CDLL:
    """The same from a file that has no folder. It stays open, as to the loader its number is the library's name."""
    try:
        number = os.memfd_create("fastdeploy-kernel")
        with open(number, "wb", closefd=False) as file:
            file.write(code)
        return ctypes.CDLL(f"/proc/self/fd/{number}")
    except OSError as error:
        message = (
            f"a compiled kernel can't be loaded, neither by way of a temporary file ({reason}) nor from memory "
            f"({error}): set TMPDIR to a folder that has room and is not mounted noexec"
        )
        raise OSError(error.errno, message) from error
