"""The device: memory that kernels and NumPy share, how much of it is free, recorded launches."""

import ctypes
import io
import itertools
import logging
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastdeploy.device import CACHE_LINE, Field, open_device
from fastdeploy.device.cpu import HugePages
from fastdeploy.device.host import (
    _shared_mappings,
    available_memory,
    has_huge_pages,
    progress_bar,
    release_free_memory,
    release_library_pages,
)
from fastdeploy.device.nvidia import NvidiaDevice
from fastdeploy.device.root_logger import PADDLES_FORMAT, undo_paddles_logging
from fastdeploy.kernels.activation import silu_mul, silu_mul_reference
from fastdeploy.kernels.launch import view
from tests.triton_cpu.arrays import run_python

GIB = 1 << 30


@pytest.fixture(scope="module")
def device():
    return open_device()


# Tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int64"])
def test_empty_memory_begins_on_a_cache_line_and_has_the_dtype(device, dtype):
    for shape in ((1,), (3, 5), (7, 33, 32)):
        tensor = view(device.empty(shape, dtype))
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.data_ptr() % CACHE_LINE == 0


def test_memory_for_weights_comes_in_pieces_of_huge_pages_resident_only_where_written(device):
    pages, page = HugePages(), HugePages.PAGE
    pieces = [
        pages.piece(shape, dtype) for shape, dtype in [((3, 5), "float32"), ((7 << 20,), "uint8"), ((9,), "int8")]
    ]
    large = pages.piece((HugePages.AREA + 1,), "uint8")  # more than an area has
    spans = sorted((piece.pointer, piece.pointer + piece.nbytes) for piece in [*pieces, large])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % CACHE_LINE == 0 for start, _ in spans) and pieces[0].pointer % page == 0
    assert [piece.shape for piece in pieces] == [(3, 5), (7 << 20,), (9,)] and pieces[0].dtype == "float32"
    values = np.arange(7 << 20, dtype=np.int64).astype(np.uint8)
    device.write(pieces[1], values)
    assert (device.to_numpy(pieces[1]) == values).all()
    assert 7 << 10 <= resident_kb(pieces[0].pointer) <= 8 << 10  # the written part, to the end of its last page
    assert resident_kb(pieces[0].pointer, "AnonHugePages") == (8 << 10 if has_huge_pages() else 0)
    assert resident_kb(large.pointer) == 0


@pytest.mark.parametrize(
    "setting", ["always [madvise] never", "[always] madvise never", "always madvise [never]", None]
)
def test_a_device_says_whether_the_system_has_huge_pages(tmp_path, setting):
    file = tmp_path / "enabled"
    if setting:
        file.write_text(setting)
    assert has_huge_pages(file) == (setting is not None and "[never]" not in setting)


def test_a_numpy_array_is_taken_without_a_copy(device):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    array.flags.writeable = False
    assert view(device.from_numpy(array)).data_ptr() == array.ctypes.data


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64"])
def test_what_is_written_to_a_tensor_is_read_back(device, dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype)
    tensor = device.empty((3, 4), dtype)
    device.write(tensor, values)
    found = device.to_numpy(tensor)
    device.write(tensor, values + 1)  # what was read is a copy
    np.testing.assert_array_equal(found, values)


# Staging


def test_staging_shows_kernels_what_the_host_wrote(device):
    fields = {"ids": Field((5,), "int32"), "slots": Field((3,), "int64"), "tables": Field((2, 7), "int32"),
              "temperature": Field((4,), "float32")}  # fmt: skip
    staging = device.staging(fields)
    for number, (name, field) in enumerate(fields.items()):
        staging.host[name][...] = np.arange(np.prod(field.shape)).reshape(field.shape) + 100 * number
    staging.upload()
    for number, (name, field) in enumerate(fields.items()):
        expected = np.arange(np.prod(field.shape)).reshape(field.shape) + 100 * number
        found = device.to_numpy(staging.device[name])
        assert found.dtype == field.dtype and found.shape == field.shape
        np.testing.assert_array_equal(found, expected)
        assert view(staging.device[name]).data_ptr() % CACHE_LINE == 0


def test_staging_begins_as_zeros(device):
    assert not device.staging({"ids": Field((1000,), "int32")}).host["ids"].any()


# Recorded launches


def test_recorded_launches_run_when_replayed_and_read_what_is_there_then(device):
    out, gate_up = np.zeros((2, 8), np.float32), np.zeros((2, 16), np.float32)
    plan = device.record(lambda: silu_mul(view(out), view(gate_up)))
    gate_up[:] = np.random.default_rng(0).normal(size=gate_up.shape)
    assert not out.any()
    for _ in range(2):
        gate_up *= 2
        plan.replay()
        device.synchronize()
        np.testing.assert_allclose(out, silu_mul_reference(gate_up), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most", [1, 3, 7, 8, 100, 200, 256, 1000])
def test_sizes_of_plans_ascend_to_the_most_in_steps_of_at_most_a_quarter(device, most):
    assert list(device.plan_sizes(most)) == list(range(1, most + 1))
    sizes = list(NvidiaDevice.plan_sizes(device, most))
    assert sizes[0] == 1 and sizes[-1] == most and sizes == sorted(set(sizes))
    assert all(after - before <= max(8, before / 4) for before, after in itertools.pairwise(sizes))


# Free memory


def write_tree(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def meminfo(available):
    return f"MemTotal:       {100 * GIB // 1024} kB\nMemAvailable:   {available // 1024} kB\n"


def group(limit, usage, droppable=0, path="."):
    files = {"max": f"{limit}\n", "current": f"{usage}\n", "stat": f"anon 5\ninactive_file {droppable}\n"}
    return {f"sys/fs/cgroup/{path}/memory.{name}": text for name, text in files.items()}


def test_without_control_groups_what_the_system_calls_available_is_free(tmp_path):
    assert available_memory(write_tree(tmp_path, {"proc/meminfo": meminfo(6 * GIB)})) == 6 * GIB


@pytest.mark.parametrize("limited", ["a", "a/b"])
def test_a_limit_of_any_enclosing_control_group_counts(tmp_path, limited):
    groups = {"a": ("max", 3 * GIB), "a/b": ("max", 3 * GIB)} | {limited: (5 * GIB, 3 * GIB)}
    files = {"proc/meminfo": meminfo(6 * GIB), "proc/self/cgroup": "0::/a/b\n"}
    for path, (limit, usage) in groups.items():
        files |= group(limit, usage, droppable=GIB, path=path)
    assert available_memory(write_tree(tmp_path, files)) == 3 * GIB  # 5 - 3 + 1 that could be dropped


def test_a_container_that_sees_its_group_at_the_mount_point_has_its_limit(tmp_path):
    files = {"proc/meminfo": meminfo(6 * GIB), "proc/self/cgroup": "0::/docker/1234\n", **group(2 * GIB, GIB)}
    assert available_memory(write_tree(tmp_path, files)) == GIB


def test_control_groups_of_version_1_count(tmp_path):
    path = "sys/fs/cgroup/memory/a"
    files = {
        "proc/meminfo": meminfo(6 * GIB),
        "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
        f"{path}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{path}/memory.usage_in_bytes": f"{2 * GIB}\n",
        f"{path}/memory.stat": f"total_inactive_file {GIB}\n",
    }
    assert available_memory(write_tree(tmp_path, files)) == 3 * GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path):
    files = {"proc/meminfo": meminfo(6 * GIB), "proc/self/cgroup": "0::/\n", **group(GIB, 2 * GIB)}
    assert available_memory(write_tree(tmp_path, files)) == 0


def resident_kb(address: int, what: str = "Rss") -> int:
    """Kilobytes of the mapping at `address` that are in this process's resident memory."""
    text = Path("/proc/self/smaps").read_text()
    return int(re.search(rf"^{address:x}-(?:.*\n)+?{what}: +(\d+) kB", text, re.MULTILINE)[1])


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_pages_of_files_are_released_unless_something_was_written_to_them(tmp_path, written, writable):
    path = tmp_path / "library.so.1"
    path.write_bytes(bytes(range(256)) * 4096)
    with open(path, "r+b") as file:
        os.fsync(file)  # the kernel keeps what the disk does not have
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    address = view(np.frombuffer(mapping, np.uint8)).data_ptr()
    assert sum(mapping[::4096]) == 0  # touched
    if written:  # as the linker relocates addresses in what is read-only afterwards
        mapping[4096] = 1
    if not writable:
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), mmap.PROT_READ)
    assert resident_kb(address) == 1024
    release_library_pages()
    assert resident_kb(address) == (1024 if written else 0)
    assert sum(mapping[::4096]) == written


@pytest.mark.parametrize("access", ["r-xp", "r--p", "rw-p"])
@pytest.mark.parametrize(
    ("path", "anonymous", "swap", "released"),
    [
        ("/lib/libm.so.6", 0, 0, True),
        ("/lib/libm.so.6", 8, 0, False),
        ("/lib/libm.so.6", 0, 8, False),  # its own pages are there, only not in memory
        ("/models/smollm2.gguf", 0, 0, False),  # another thread may be about to unmap it
    ],
)
def test_which_mappings_are_released(path, anonymous, swap, released, access):
    fields = f"Size: 40 kB\nRss: 40 kB\nAnonymous:  {anonymous} kB\nLazyFree: 0 kB\nSwap:   {swap} kB\nSwapPss: 0 kB\n"
    other = "Size: 4 kB\nAnonymous: 4 kB\nSwap: 4 kB\n"
    smaps = f"7f00-7f40 {access} 00000000 fe:00 12   {path}\n{fields}7f40-7f44 rw-p 00000000 00:00 0\n{other}"
    assert _shared_mappings(smaps) == ([(0x7F00, 0x7F40, access == "rw-p")] if released else [])


ALLOCATES = """
from fastdeploy.device import open_device
from fastdeploy.kernels.launch import view
assert view(open_device().empty((2, 3), "bfloat16")).shape == (2, 3)
"""
COMPUTES = """
import paddle
assert paddle.to_tensor([1.0, 2.0]).sum().item() == 3.0
"""


@pytest.mark.parametrize("order", [(ALLOCATES,), (ALLOCATES, COMPUTES), (COMPUTES, ALLOCATES, COMPUTES)])
def test_a_cpu_needs_paddles_library_alone_and_the_package_works_before_and_after(order):
    code = "".join(order) + "import sys\nprint(sorted({'paddle', 'paddle.base.libpaddle'} & set(sys.modules)))"
    done = run_python(code)
    expected = ["paddle", "paddle.base.libpaddle"] if COMPUTES in order else ["paddle.base.libpaddle"]
    assert done.stdout.split("\n")[-2] == str(expected), done.stderr


def test_a_library_that_cannot_be_loaded_by_itself_is_left_to_the_package():
    code = (
        """
from importlib.machinery import ExtensionFileLoader
original = ExtensionFileLoader.exec_module

def fails_alone(self, module):
    import sys
    if self.name == "paddle.base.libpaddle" and "paddle" not in sys.modules:
        raise ImportError("libcudart.so: cannot open shared object file")
    original(self, module)

ExtensionFileLoader.exec_module = fails_alone
"""
        + ALLOCATES
        + "import sys; print('paddle' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout.split("\n")[-2] == "True", done.stderr


def test_memory_of_no_elements_and_of_unknown_types(device):
    assert view(device.empty((0, 4), "float32")).shape == (0, 4)
    with pytest.raises(ValueError, match="'float7' is no element type of Paddle; there are float32"):
        device.empty((1,), "float7")


def test_importing_paddle_leaves_the_root_logger_alone():
    done = run_python(
        "import logging, warnings; root = logging.getLogger(); before = root.level, list(root.handlers); "
        "import fastdeploy.device.quiet_paddle; assert (root.level, root.handlers) == before, root.handlers"
    )
    assert done.returncode == 0, done.stderr


STREAMLESS = """
import os, sys, tempfile
from pathlib import Path
from fastdeploy.text.renderer import RENDERER
from tests.models.test_families import CASES, open_llm
with tempfile.TemporaryDirectory() as folder, open_llm(Path(folder), CASES["llama"], chat_template="{{ 1 }}") as llm:
    assert len(llm.generate([3, 1, 4])) == 1
    assert RENDERER._pipe.fileno() > 2
    for name in ("stdout", "stderr"):
        getattr(sys, name).write("to nobody")
    assert open(os.devnull).fileno() > 2
    os._exit(7)
"""


def test_a_progress_bar_that_cannot_be_written_stops_no_work(monkeypatch):
    with open("/dev/full", "wb", buffering=0) as full:
        stream = io.TextIOWrapper(full, write_through=True)
        with pytest.raises(OSError, match="No space left"):
            stream.write("x")
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(total=2, mininterval=0) as bar:
            for _ in range(2):
                bar.update()
        assert bar.n == 2


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_an_llm_works_where_standard_streams_are_closed(closed):
    done = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "$0" {closed}', STREAMLESS], timeout=120)
    assert done.returncode == 7


@pytest.mark.parametrize("imports", ["import paddle, fastdeploy", "import fastdeploy, paddle; fastdeploy.LLM"])
def test_info_lines_are_unseen_until_asked_for_where_somebody_imported_paddle(imports):
    done = run_python(f"""
{imports}
import logging
logger = logging.getLogger("fastdeploy")
logger.info("unasked")
logger.warning("warned")
logging.basicConfig(level=logging.INFO)
fastdeploy.LLM
logger.info("asked for")
""")
    lines = done.stderr.splitlines()
    assert lines[-2:] == ["warned", "INFO:fastdeploy:asked for"] and "unasked" not in done.stderr


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    root.handlers = []
    yield root
    root.handlers = handlers
    root.setLevel(level)


def as_paddle_leaves_it(root):
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(PADDLES_FORMAT))
    root.addHandler(handler)
    root.setLevel(logging.INFO)


@pytest.mark.parametrize(
    "ask",
    [
        lambda root: logging.basicConfig(level=logging.INFO, force=True),
        lambda root: root.addHandler(logging.NullHandler()),
        lambda root: root.setLevel(logging.DEBUG),
        lambda root: root.handlers[0].setFormatter(None),
    ],
)
def test_a_root_logger_that_somebody_has_changed_since_paddle_did_is_left_alone(root_logger, ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "paddle", None)
    as_paddle_leaves_it(root_logger)
    ask(root_logger)
    before = root_logger.level, list(root_logger.handlers)
    undo_paddles_logging()
    assert (root_logger.level, root_logger.handlers) == before


def test_memory_that_was_freed_goes_back_to_the_system():
    def resident():
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

    blocks = [b"x" * 100_000 for _ in range(2000)]  # too small for mappings of their own
    kept, full = blocks[-1], resident()
    del blocks
    release_free_memory()
    assert resident() < full - 150 and len(kept) == 100_000


def test_this_machine_has_free_memory_and_the_cache_gets_a_part_of_it(device):
    assert 0 < device.cache_budget(0.9) < device.free_memory()


def test_the_description_names_processor_threads_and_memory(device):
    assert f"{device.num_threads()} threads" in device.describe() and "GiB free" in device.describe()


def test_a_device_works_on_another_thread_than_the_first():
    done = run_python("""
from concurrent.futures import ThreadPoolExecutor

def empty_on_a_device():
    from fastdeploy.device import open_device
    return open_device().empty((2, 3), "float32").shape

with ThreadPoolExecutor(1) as thread:
    print(list(thread.submit(empty_on_a_device).result()), list(empty_on_a_device()))
""")
    assert done.stdout.split("\n")[0] == "[2, 3] [2, 3]", done.stderr
