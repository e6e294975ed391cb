"""The thread pool: every program of every launch runs exactly once, whatever the number of threads."""

import os
import subprocess
from pathlib import Path

import pytest

from fastdeploy.triton_cpu import runtime
from fastdeploy.triton_cpu.toolchain import toolchain

from .arrays import run_python

STRESS = """
import numpy as np, os, sys
import triton, triton.language as tl
from fastdeploy import triton_cpu
triton_cpu.activate()
from fastdeploy.triton_cpu.runtime import num_threads, record
from tests.triton_cpu.arrays import Tensor
from tests.triton_cpu.pool_kernels import count_kernel

rng = np.random.default_rng(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
counts = Tensor(np.zeros(4096, np.int32))
expected = np.zeros(4096, np.int64)
plans = []
for _ in range(6):
    grids = [tuple(map(int, rng.integers(1, (40, 5, 4)))) for _ in range(int(rng.integers(1, 60)))]
    with record() as plan:
        for grid in grids:
            count_kernel[grid](counts)
    plans.append((plan, [int(np.prod(grid)) for grid in grids]))
for turn in range(ROUNDS):
    if turn % 3 == 0:
        plan, sizes = plans[int(rng.integers(len(plans)))]
        plan.replay()
    else:
        sizes = [int(rng.integers(0, 4096))] if turn % 3 == 1 else [int(rng.integers(1, 6))]
        count_kernel[(sizes[0],)](counts) if sizes[0] else None
    for size in sizes:
        expected[:size] += 1
    if turn % 100 == 0:
        assert (counts.stored == expected).all(), turn
assert (counts.stored == expected).all()
print(num_threads())
"""


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_program_runs_once(threads):
    done = run_python(STRESS.replace("ROUNDS", "3000" if threads < 8 else "1000"), FASTDEPLOY_NUM_THREADS=str(threads))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(threads)]


@pytest.mark.parametrize("sanitizer", [(), ("-fsanitize=thread", "-g")], ids=["plain", "thread-sanitizer"])
def test_a_plan_runs_all_programs_however_long_it_was_left_alone_and_no_field_is_raced_for(tmp_path, sanitizer):
    pool, driver = Path(runtime.__file__).with_name("pool.c"), Path(__file__).with_name("pool_driver.c")
    program = tmp_path / "driver"
    command = [
        *toolchain().compiler,
        "-O1",
        *sanitizer,
        f'-DPOOL="{pool}"',
        str(driver),
        "-o",
        str(program),
        "-pthread",
    ]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if sanitizer and compiled.returncode:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer can't run on this kernel")
    assert done.returncode == 0, done.stdout + done.stderr


FORK = """
import numpy as np, os
from fastdeploy import triton_cpu
triton_cpu.activate()
from fastdeploy.triton_cpu.runtime import record
from tests.triton_cpu.arrays import Tensor
from tests.triton_cpu.pool_kernels import count_kernel

counts = Tensor(np.zeros(1000, np.int32))
with record() as plan:
    count_kernel[(1000,)](counts)
    count_kernel[(500,)](counts)
for _ in range(10):
    plan.replay()
children = []
for _ in range(4):
    if not (child := os.fork()):
        counts.stored[:] = 0
        for _ in range(20):
            count_kernel[(1000,)](counts)
            plan.replay()
        os._exit(0 if (counts.stored == np.where(np.arange(1000) < 500, 60, 40)).all() else 3)
    children.append(child)
    plan.replay()
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
assert (counts.stored == np.where(np.arange(1000) < 500, 28, 14)).all()
"""


def test_a_forked_child_computes_and_the_parent_goes_on():
    done = run_python(FORK, FASTDEPLOY_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr


FORK_WHILE_BUSY = """
import numpy as np, os, threading
from fastdeploy import triton_cpu
triton_cpu.activate()
from fastdeploy.triton_cpu import runtime
from tests.triton_cpu.arrays import Tensor
from tests.triton_cpu.pool_kernels import count_kernel

counts = Tensor(np.zeros(100_000, np.int32))
with runtime.record() as plan:
    count_kernel[(100_000,)](counts)
busy = True

def replay():
    while busy:
        plan.replay()

thread = threading.Thread(target=replay)
thread.start()
try:
    for turn in range(20):
        lock = runtime._making_the_pool
        lock.acquire()  # as if another thread, which the child has not, were making the pool
        if child := os.fork():
            lock.release()
        else:
            counts.stored[:] = 0
            count_kernel[(1000,)](counts)
            plan.replay()
            os._exit(0 if (counts.stored == np.where(np.arange(100_000) < 1000, 2, 1)).all() else 3)
        assert os.waitpid(child, 0)[1] == 0
finally:
    busy = False
"""


def test_a_child_computes_that_was_forked_in_the_middle_of_another_threads_replay():
    done = run_python(FORK_WHILE_BUSY, FASTDEPLOY_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr


AFFINITY = """
import os
from fastdeploy.triton_cpu.runtime import thread_pool
before = os.sched_getaffinity(0)
thread_pool()
assert os.sched_getaffinity(0) == before
workers = [int(task) for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
cores = [os.sched_getaffinity(task) for task in workers]
pinned = [cores_ for cores_ in cores if len(cores_) == 1]
assert len(set.union(set(), *pinned)) == len(pinned)
print(len(pinned))
"""


def test_workers_are_pinned_only_where_that_is_asked_for():
    cores = len(os.sched_getaffinity(0))
    for threads, switch, expected in ((cores, "1", cores - 1), (cores, "", 0), (cores + 1, "1", 0)):
        done = run_python(AFFINITY, FASTDEPLOY_NUM_THREADS=str(threads), FASTDEPLOY_PIN_THREADS=switch)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(expected)]
