"""The only room that knows Paddle's devices: allocation, copies, memory, recording, collectives.

Everything above asks a `Device` for memory and gets Paddle tensors; everything below (the kernels) sees them through
DLPack only. A step of the engine meets its device in three places:

    staging.host[...] = ...   the step's inputs, written by NumPy            (GPU: pinned memory)
    staging.upload()          one transfer to where kernels read them        (CPU: nothing to do, it is the same memory)
    plan.replay()             the recorded kernel launches of the step       (GPU: a CUDA graph; CPU: a list of calls)

Importing this module imports Paddle (2 to 3 seconds).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fastdeploy.kernels.launch import TensorView, expect


@contextmanager
def _unchanged_root_logger() -> Iterator[None]:
    """Paddle gives the root logger a handler and the level INFO, and so has every library speak on the console."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers).difference(handlers):
        root.removeHandler(handler)


with warnings.catch_warnings(), _unchanged_root_logger():
    os.environ.setdefault("GLOG_minloglevel", "1")  # Paddle tells of every socket that it opens
    warnings.simplefilter("ignore")  # Paddle warns of a missing ccache, which only its own custom operators use
    import paddle

GIB = 1 << 30
CACHE_LINE = 64
SILENCE_SECONDS = 30  # that a rank waits for another; for gloo's collectives Paddle has fixed the same
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Plan(Protocol):
    """A recorded sequence of kernel launches."""

    def replay(self) -> None:
        """Run the recorded launches, in their order, on the memory that they were recorded with."""


class Field(NamedTuple):
    """One named array of a staging area."""

    shape: tuple[int, ...]
    dtype: str  # "int32", "int64" or "float32"


class Staging:
    """What a step reads or leaves for the host: one flat area of memory, seen as named arrays on host and device.

    `host[name]` is a NumPy array to write; `device[name]` is the Paddle tensor that kernels read. Both keep their
    address for life, so that recorded launches can refer to them. One flat area, because a GPU then needs one copy a
    step, whatever the number of fields.
    """

    def __init__(self, fields: Mapping[str, Field]) -> None:
        offsets, size = _offsets(fields)
        area = paddle.zeros([size // 8], dtype="int64")
        flat = np.from_dlpack(area)
        self._area = area
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, paddle.Tensor] = {}
        for name, field in fields.items():
            dtype = np.dtype(field.dtype)
            start = offsets[name] // dtype.itemsize
            part = slice(start, start + int(np.prod(field.shape)))
            self.host[name] = flat.view(dtype)[part].reshape(field.shape)
            # The dtype first, the slice second: Paddle 3.3 counts the slice's offset twice the other way round.
            self.device[name] = area.view(getattr(paddle, field.dtype))[part].reshape(field.shape)

    def upload(self) -> None:
        """Make what was written to `host` visible in `device`. On a CPU they share their memory: nothing to do."""

    def download(self) -> None:
        """Make what kernels wrote to `device` visible in `host`, all fields, once they have run. On a CPU it is."""


class Device(ABC):
    """Where tensors live and kernels run."""

    name: str

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> paddle.Tensor:
        """A tensor with unspecified contents; `dtype` as Paddle names it ("float32", "bfloat16", "int32", ...)."""

    @abstractmethod
    def from_numpy(self, array: np.ndarray) -> paddle.Tensor:
        """The array as a tensor on this device, without a copy where the device is the host.

        NumPy has no bfloat16: the bits of such numbers come as uint16, and it is for `kernels.launch.view` to be told.
        """

    @abstractmethod
    def write(self, tensor: paddle.Tensor, values: np.ndarray) -> None:
        """Copy `values`, of the same shape and dtype, to `tensor`."""

    @abstractmethod
    def to_numpy(self, tensor: paddle.Tensor) -> np.ndarray:
        """A copy of the tensor's present values on the host; bfloat16 numbers come as their bits, in uint16.

        Waits for the kernels that write them.
        """

    @abstractmethod
    def staging(self, fields: Mapping[str, Field]) -> Staging:
        """Memory for a step's inputs, see `Staging`."""

    @abstractmethod
    def activation_dtype(self, weight_dtype: str) -> str:
        """What activations are stored in when weights are stored in `weight_dtype`."""

    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that this process may still allocate on the device."""

    @abstractmethod
    def cache_budget(self) -> int:
        """Bytes that this process's KV cache may take at most, of what is free now."""

    @abstractmethod
    def capture(self) -> AbstractContextManager[Plan]:
        """Record the kernel launches made inside the `with` block, without running them, as a plan to replay."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything launched so far has run."""

    @abstractmethod
    def describe(self) -> str:
        """The device in words, for the line logged at start."""


class PeerLost(RuntimeError):
    """Another rank did not take part: it has died, or has been silent for too long."""


class Group:
    """The processes (ranks) that compute one model together, and what they tell each other in the middle of a step.

    rank: this process's number, from 0. size: how many there are. address: host and port where rank 0 listens. All
    ranks make their Group at the same time; it returns when they have found each other. patience: seconds to wait for
    that. Raises PeerLost if a rank does not come, and later at once if one dies, after 30 s if one is silent.

    One process may be in several groups. So this is Paddle's process group itself, not paddle.distributed's global one.
    Paddle keeps it, and the port, until the process ends.
    """

    def __init__(self, rank: int, size: int, address: tuple[str, int], patience: int = SILENCE_SECONDS) -> None:
        from paddle.base import core

        self.rank = rank
        self.size = size
        with _environment("PADDLE_TRAINER_ID", str(rank)):  # Paddle asks for it, to name the rank in its logs
            try:
                self._store = core.TCPStore(*address, rank == 0, size, patience)
                number = address[1]  # of the group; Paddle wants another one for each group of a process
                self._group = core.ProcessGroupGloo.create(self._store, rank, size, number)
            except (RuntimeError, SystemError) as error:
                raise PeerLost(f"not all of {size} ranks came to {address} within {patience} s: {error}") from error

    def publish(self, name: str, text: str) -> None:
        """Tell the other ranks something, outside of steps."""
        self._store.set(name, text)

    def published(self, name: str) -> str:
        """What a rank has published under this name; waits for it, 30 s at most."""
        return self._store.get(name).decode()

    def all_gather(self, out: TensorView, x: TensorView) -> None:
        """out [size, ...] = the `x` of all ranks, in their order. Recorded where launches are recorded."""
        from fastdeploy.triton_cpu import runtime

        expect("out", out, (self.size, *x.shape), x.dtype)
        expect("x", x, x.shape)
        # gloo gathers bytes rightly in any type (its sums of float16 are wrong, which is why nobody asks it for sums).
        everything, own = _bytes_of(out), _bytes_of(x)
        runtime.call(lambda: self._gather(everything, own))

    def _gather(self, out: paddle.Tensor, x: paddle.Tensor) -> None:
        try:
            self._group.all_gather_into_tensor(out, x, True).wait()
        except (RuntimeError, SystemError) as error:
            raise PeerLost(f"a rank did not take part in a step: {error}") from error


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for the length of the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _bytes_of(tensor: TensorView) -> paddle.Tensor:
    """The memory of a contiguous view on the host as a Paddle tensor."""
    array = np.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.pointer))
    return paddle.from_dlpack(array)


class CPUDevice(Device):
    """The host's processors, Triton kernels run by `fastdeploy.triton_cpu`.

    Memory from `paddle.empty` begins on a page, which the packed weights rely on (a panel's row is one cache line), and
    is not resident before it is written: a large KV cache costs only what is used of it.
    """

    name = "cpu"

    def __init__(self, ranks: int = 1) -> None:
        from fastdeploy import triton_cpu
        from fastdeploy.triton_cpu import runtime

        triton_cpu.activate()
        runtime.share_cores(ranks)
        self._ranks = ranks
        _release_pages_of_imports()
        if not paddle.in_dynamic_mode():  # Paddle 3.3 is in it only on the thread that imported Paddle first
            paddle.disable_static()

    def empty(self, shape: tuple[int, ...], dtype: str) -> paddle.Tensor:
        return paddle.empty(shape, dtype=getattr(paddle, dtype))

    def from_numpy(self, array: np.ndarray) -> paddle.Tensor:
        return paddle.from_dlpack(array)

    def write(self, tensor: paddle.Tensor, values: np.ndarray) -> None:
        np.from_dlpack(tensor)[...] = values

    def to_numpy(self, tensor: paddle.Tensor) -> np.ndarray:
        return tensor.numpy()

    def staging(self, fields: Mapping[str, Field]) -> Staging:
        return Staging(fields)

    def activation_dtype(self, weight_dtype: str) -> str:
        # No CPU we target adds in half precision faster than in float32, and float32 keeps every digit.
        return "float32"

    def free_memory(self) -> int:
        return available_memory() // self._ranks

    def cache_budget(self) -> int:
        """A quarter of the free memory: the host is shared with everything else that its owner runs."""
        return self.free_memory() // 4

    def num_threads(self) -> int:
        """Threads that a kernel is spread over."""
        from fastdeploy.triton_cpu import runtime

        return runtime.thread_pool().threads

    def capture(self) -> AbstractContextManager[Plan]:
        from fastdeploy.triton_cpu import runtime

        return runtime.record()

    def synchronize(self) -> None:
        """Nothing to wait for: a launch on a CPU returns when it has run."""

    def describe(self) -> str:
        return f"CPU ({_processor_name()}), {self.num_threads()} threads, {self.free_memory() / GIB:.1f} GiB free"


def open_device(ranks: int = 1) -> Device:
    """The device that this process computes on, as one of `ranks` processes on this machine."""
    return CPUDevice(ranks)


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

    Released are mappings that can't be written and hold no page of the process's own (as relocated ones do): those
    pages are in the file, the kernel itself takes them away in the same manner.
    """
    try:
        mappings = _shared_mappings(smaps.read_text())
    except OSError:  # no /proc, or a hidden one
        return
    madvise = ctypes.CDLL(None).madvise
    for start, end in mappings:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


# Once: nothing that a later device imports is worth looking through all mappings again.
_release_pages_of_imports = functools.cache(release_library_pages)


def _shared_mappings(smaps: str) -> list[tuple[int, int]]:
    """[start, end) of each private, read-only mapping of a library that holds nothing but the file's own pages, and has
    none of its own swapped out. Libraries only: other files may be unmapped by another thread meanwhile."""
    mapping = (
        r"^([0-9a-f]+)-([0-9a-f]+) r-[x-]p [0-9a-f]+ \S+ \S+ +/\S*\.so[.\d]*\n"
        r"(?:\w+:.*\n)*?Anonymous: +0 kB\n(?:\w+:.*\n)*?Swap: +0 kB$"
    )
    return [(int(start, 16), int(end, 16)) for start, end in re.findall(mapping, smaps, re.MULTILINE)]


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """Limit minus usage of every control group that holds this process, in bytes."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers == "":  # version 2, one tree for all controllers
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        # A container sees its own group at the mount point but its path as on the host: missing levels are skipped.
        for level in [group, *group.parents]:
            if level.is_relative_to(base):
                yield from _headroom(level, *names)


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


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


def _offsets(fields: Mapping[str, Field]) -> tuple[dict[str, int], int]:
    """Where each field begins in a flat area, in bytes, each on its own cache line; and the area's size."""
    offsets: dict[str, int] = {}
    size = 0
    for name, field in fields.items():
        offsets[name] = size
        nbytes = int(np.prod(field.shape)) * np.dtype(field.dtype).itemsize
        size += -(-nbytes // CACHE_LINE) * CACHE_LINE
    return offsets, size
