"""os.fork(): a child goes on with an LLM that was at rest, and is told at once of one that was not, or can't be."""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastdeploy import LLM, SamplingParams
from fastdeploy.engine.engine import Engine
from fastdeploy.engine.scheduler import Scheduler
from tests.engine.test_engine import FakeRunner, finished, make_request
from tests.models.test_families import CASES, open_llm

PROMPT = [3, 1, 4, 1, 5]
PATIENCE = 60  # seconds, after which a child hangs


def in_child(work: Callable[[], object]) -> None:
    """Runs `work` in a forked child; an AssertionError if it raises there, or hangs."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + PATIENCE
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert ended[1] == 0, "the child failed"


def make_engine(runner: FakeRunner, forkable: bool = True) -> Engine:
    return Engine(Scheduler(20, 2, 4, 16), runner, forkable=forkable)


def tokens(engine: Engine) -> list[int]:
    (output,) = finished(list(engine.run([make_request("a")])))
    return output.outputs.token_ids


def expect_refusal(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=r"forked process.*Make the LLM in the child.*spawn"):
        call()


def test_a_child_goes_on_with_an_engine_at_rest_and_with_its_own_streams() -> None:
    engine = make_engine(FakeRunner())
    stream = engine.run([make_request("begun")])
    next(stream)

    def work() -> None:
        assert tokens(engine) == [10, 11, 12, 13]
        assert list(stream)[-1][0].outputs.token_ids == [10, 11, 12, 13]
        engine.close()

    in_child(work)
    assert tokens(engine) == [10, 11, 12, 13]


@contextmanager
def busy(engine: Engine, runner: FakeRunner) -> Iterator[None]:
    """Another thread is in the middle of a step for the length of the block."""
    reached, go_on = threading.Event(), threading.Event()

    def say(request: object, count: int) -> int:
        reached.set()
        go_on.wait()
        return 10 + count

    runner.say = say
    thread = threading.Thread(target=tokens, args=[engine])
    thread.start()
    reached.wait()
    try:
        yield
    finally:
        go_on.set()
        thread.join()


def test_a_child_is_told_of_an_engine_that_was_in_a_step_of_another_thread() -> None:
    engine = make_engine(runner := FakeRunner())
    stream = engine.run([make_request("begun")])
    next(stream)

    def work() -> None:
        expect_refusal(lambda: next(stream))
        stream.close()
        expect_refusal(lambda: tokens(engine))
        expect_refusal(engine.check_open)
        engine.close()
        in_child(lambda: expect_refusal(engine.check_open))  # and so is its own child
        assert tokens(make_engine(FakeRunner())) == [10, 11, 12, 13]  # the remedy

    with busy(engine, runner):
        in_child(work)
    assert tokens(engine) == [10, 11, 12, 13]
    stream.close()


def test_a_child_is_told_of_an_engine_whose_device_it_has_not() -> None:
    engine = make_engine(FakeRunner(), forkable=False)
    in_child(lambda: expect_refusal(lambda: tokens(engine)))
    assert tokens(engine) == [10, 11, 12, 13]


def generate(llm: LLM, **params: object) -> list[int]:
    sampling = SamplingParams(temperature=0, ignore_eos=True, **{"max_tokens": 9, **params})
    return llm.generate(PROMPT, sampling, use_tqdm=False)[0].outputs.token_ids


def test_an_llm_in_children_at_rest_and_while_another_thread_generates(tmp_path: Path) -> None:
    with open_llm(tmp_path, CASES["llama"]) as llm:
        expected = generate(llm)
        in_child(lambda: generate(llm) == expected or pytest.fail())
        done = threading.Event()

        def generate_until_done() -> None:
            while not done.is_set():
                generate(llm, max_tokens=50)

        def work() -> None:
            try:
                assert generate(llm) == expected
            except RuntimeError:  # far more often: the fork was in the middle of a step
                assert generate(open_llm(tmp_path, CASES["llama"])) == expected

        thread = threading.Thread(target=generate_until_done)
        thread.start()
        try:
            for _ in range(5):
                in_child(work)
        finally:
            done.set()
            thread.join()
        assert generate(llm) == expected


def test_a_child_leaves_the_parents_ranks_alone(tmp_path: Path) -> None:
    with open_llm(tmp_path, CASES["llama"], tensor_parallel_size=2) as llm:
        expected = generate(llm)

        def work() -> None:
            expect_refusal(lambda: generate(llm))
            llm.close()
            assert llm._leader is not None
            llm._leader._end()  # as the end of a program does

        in_child(work)
        assert generate(llm) == expected
