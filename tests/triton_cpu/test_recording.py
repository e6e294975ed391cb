"""record() and replay(): exactly what was recorded, in order, as often as asked, on the memory as it is now."""

import threading

import numpy as np
import pytest
import triton
import triton.language as tl

from fastdeploy.triton_cpu.runtime import call, record, run_queued

from .arrays import Tensor, empty
from .programs import table


@triton.jit
def affine_kernel(x_ptr, scale, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i) * scale + shift)


def test_recorded_launches_run_in_order_and_only_when_replayed():
    x = Tensor(np.ones(64, np.int64))
    with record() as plan:
        affine_kernel[(4,)](x, 3, 2, 16)
        affine_kernel[(4,)](x, 5, 7, 16)
        affine_kernel[(0,)](x, 0, 0, 16)
        affine_kernel[(2,)](x, 2, 0, 16)
    assert len(plan) == 3
    assert (x.stored == 1).all()
    expected = np.ones(64, np.int64)
    for _ in range(5):
        plan.replay()
        expected = (expected * 3 + 2) * 5 + 7
        expected[:32] *= 2
        np.testing.assert_array_equal(x.stored, expected)
    x.stored[:] = 0  # new contents, same place
    plan.replay()
    np.testing.assert_array_equal(x.stored, np.where(np.arange(64) < 32, 34, 17))


def test_calls_are_made_in_their_place_between_launches():
    x = Tensor(np.ones(16, np.int64))
    seen = []
    with record() as plan:
        call(lambda: seen.append(x.stored[0]))
        affine_kernel[(1,)](x, 3, 0, 16)
        call(lambda: seen.append(x.stored[0]))
        affine_kernel[(1,)](x, 1, 1, 16)
        affine_kernel[(1,)](x, 2, 0, 16)
    assert seen == [] and len(plan) == 3
    plan.replay()
    plan.replay()
    assert seen == [1, 3, 8, 24] and (x.stored == 50).all()
    call(lambda: seen.append("at once"))
    assert seen[-1] == "at once"


def test_queued_launches_and_calls_have_run_in_order_when_the_queue_ends():
    x = Tensor(np.ones(64, np.int64))
    seen = []

    def launches():
        affine_kernel[(4,)](x, 3, 2, 16)
        affine_kernel[(4,)](x, 5, 7, 16)
        call(lambda: seen.append(x.stored[0]))
        affine_kernel[(0,)](x, 0, 0, 16)
        affine_kernel[(2,)](x, 2, 0, 16)

    run_queued(launches)
    assert seen == [32]
    np.testing.assert_array_equal(x.stored, np.where(np.arange(64) < 32, 64, 32))


def test_an_error_ends_the_queue_and_what_is_in_it_has_run():
    x = Tensor(np.ones(64, np.int64))

    def launches():
        affine_kernel[(4,)](x, 3, 0, 16)
        raise KeyError

    with pytest.raises(KeyError):
        run_queued(launches)
    assert (x.stored == 3).all()
    with record() as plan:
        run_queued(lambda: affine_kernel[(4,)](x, 2, 0, 16))
    assert len(plan) == 1 and (x.stored == 3).all()


def test_launches_after_the_recording_run_at_once():
    x = Tensor(np.ones(16, np.int64))
    with record():
        pass
    affine_kernel[(1,)](x, 3, 0, 16)
    assert (x.stored == 3).all()


def test_a_replay_gives_the_bits_of_direct_launches():
    direct, replayed = table(), table()
    with record() as plan:
        for program in replayed.values():
            program.kernel[program.grid](*program.arguments)
    plan.replay()
    for name, program in direct.items():
        program.kernel[program.grid](*program.arguments)
        for mine, other in zip(program.arguments, replayed[name].arguments):
            if isinstance(mine, Tensor):
                np.testing.assert_array_equal(mine.stored, other.stored, name)


def test_an_empty_recording_may_be_replayed():
    with record() as plan:
        pass
    plan.replay()
    assert len(plan) == 0


def test_a_recording_inside_a_recording_is_an_error_and_the_outer_one_goes_on():
    x = Tensor(np.ones(16, np.int64))
    with record() as plan:
        with pytest.raises(RuntimeError, match="recording"), record():
            pass
        affine_kernel[(1,)](x, 2, 0, 16)
    plan.replay()
    assert (x.stored == 2).all()


def test_an_error_ends_the_recording():
    x = Tensor(np.ones(16, np.int64))
    with pytest.raises(KeyError), record():
        raise KeyError
    affine_kernel[(1,)](x, 2, 0, 16)
    assert (x.stored == 2).all()


def test_a_plan_keeps_its_tensors_alive():
    def recorded():
        x = empty(1 << 20, "int64")
        x.stored[:] = 1
        with record() as plan:
            affine_kernel[(1 << 16,)](x, 2, 0, 16)
        return plan, x.stored[:4].copy  # a bound method of a copy: `x` itself is gone

    plan, _ = recorded()
    for _ in range(3):
        plan.replay()


def test_replays_and_launches_from_several_threads_do_not_mix():
    tensors = [Tensor(np.zeros(256, np.int64)) for _ in range(4)]
    plans = []
    for x in tensors:
        with record() as plan:
            for _ in range(10):
                affine_kernel[(16,)](x, 1, 1, 16)
        plans.append(plan)

    def work(x, plan):
        for _ in range(100):
            plan.replay()
            run_queued(lambda: [affine_kernel[(16,)](x, 1, shift, 16) for shift in (2, 3)])

    affine_kernel[(16,)](Tensor(np.zeros(256, np.int64)), 1, 5, 16)  # Python 3.11's ast.parse may fail in two threads
    threads = [threading.Thread(target=work, args=pair) for pair in zip(tensors, plans)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x in tensors:
        assert (x.stored == 1500).all()


def test_only_the_recording_thread_records():
    x, y = Tensor(np.ones(16, np.int64)), Tensor(np.ones(16, np.int64))
    with record() as plan:
        other = threading.Thread(target=lambda: affine_kernel[(1,)](y, 2, 0, 16))
        other.start()
        other.join()
        affine_kernel[(1,)](x, 2, 0, 16)
    assert len(plan) == 1 and (y.stored == 2).all() and (x.stored == 1).all()
