"""The loop with a fake model: finish reasons, metrics, threads, and what is left after an exception.

Every test runs twice: with steps one after the other, and with steps that overlap.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType

import pytest

from fastdeploy.engine.engine import Engine
from fastdeploy.engine.request import Request, RequestOutput
from fastdeploy.engine.scheduler import ScheduledBatch, ScheduledRequest, Scheduler, StepOutput
from fastdeploy.engine.transcript import Transcript
from fastdeploy.sampling_params import SamplingParams, sampling_defaults

EOS = 99
DEFAULTS = sampling_defaults({})


def make_request(name: str, num_prompt: int = 3, max_tokens: int = 4, **params: object) -> Request:
    prompt = list(range(num_prompt))
    resolved = SamplingParams(temperature=0.0, max_tokens=max_tokens, **params).resolved(DEFAULTS, room=1000, seed=0)
    request = Request(name, prompt, prompt, resolved, frozenset([EOS]))
    Transcript(request, SpellingDetokenizer(), str)
    return request


overlapping = False  # what `make_engine` makes, see the fixture


@pytest.fixture(params=[False, True], ids=["", "overlapping"], autouse=True)
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(sys.modules[__name__], "overlapping", request.param)
    return request.param


class FakeRunner:
    """Says a function of (request, number of output tokens so far); may be told to raise before a step."""

    def __init__(self, say: Callable[[Request, int], int] = lambda request, count: 10 + count) -> None:
        self.say = say
        self.raise_in: dict[int, BaseException] = {}
        self.raise_after: dict[int, BaseException] = {}  # when the step is waited for
        self.num_steps = 0
        self.num_waited = 0

    def run(self, batch: ScheduledBatch) -> StepOutput:
        return self.launch(batch)()

    def launch(self, batch: ScheduledBatch) -> Callable[[], StepOutput]:
        self.num_steps += 1
        if self.num_steps in self.raise_in:
            raise self.raise_in[self.num_steps]
        output = StepOutput([self.speak(item) if item.samples else None for item in batch.items])
        return partial(self.wait, self.num_steps, output)

    def wait(self, step: int, output: StepOutput) -> StepOutput:
        self.num_waited += 1
        if step in self.raise_after:
            raise self.raise_after[step]
        return output

    def speak(self, item: ScheduledRequest) -> int:
        return self.say(item.request, item.request.num_output_tokens + (item.row >= 0))


class SpellingDetokenizer:
    """Spells token 10 as <10>."""

    def add(self, token_id: int) -> str:
        return f"<{token_id}>"

    def finish(self) -> str:
        return ""

    def held(self) -> str:
        return ""

    def hidden(self, texts: Sequence[str]) -> dict[int, str]:
        return {}

    def fresh(self) -> "SpellingDetokenizer":
        return SpellingDetokenizer()


def make_engine(runner: FakeRunner, num_blocks: int = 20, max_num_seqs: int = 4, budget: int = 16) -> Engine:
    return Engine(Scheduler(num_blocks, 2, max_num_seqs, budget), runner, overlapping)


def run(engine: Engine, requests: list[Request]) -> list[list[RequestOutput]]:
    steps = []
    for outputs in engine.run(requests):
        engine.scheduler.check_integrity()
        steps.append(outputs)
    assert_empty(engine)
    return steps


def finished(steps: list[list[RequestOutput]]) -> list[RequestOutput]:
    return [output for outputs in steps for output in outputs if output.finished]


def assert_empty(engine: Engine) -> None:
    assert not engine.scheduler.has_requests and engine.scheduler.pending is None and engine._flight is None
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


@pytest.mark.parametrize(
    ("params", "reason", "stop_reason", "num_tokens", "text"),
    [
        ({}, "stop", None, 3, "<10><11>"),
        ({"ignore_eos": True}, "length", None, 5, "<10><11><99><13><14>"),
        ({"max_tokens": 2}, "length", None, 2, "<10><11>"),
        ({"max_tokens": 3}, "stop", None, 3, "<10><11>"),
        ({"stop_token_ids": [5, 11]}, "stop", 11, 2, "<10>"),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, "stop", EOS, 3, "<10><11>"),
        ({"stop": ["0><11"]}, "stop", "0><11", 2, "<1"),
        ({"stop": "1>", "include_stop_str_in_output": True}, "stop", "1>", 2, "<10><11>"),
    ],
)
def test_finish_reasons(params: dict, reason: str, stop_reason: int | str | None, num_tokens: int, text: str) -> None:
    engine = make_engine(FakeRunner(lambda request, count: EOS if count == 2 else 10 + count))
    (output,) = finished(run(engine, [make_request("a", **{"max_tokens": 5, **params})]))
    assert (output.outputs.finish_reason, output.outputs.stop_reason) == (reason, stop_reason)
    assert len(output.outputs.token_ids) == num_tokens
    assert output.outputs.text == text
    assert output.error_code == 200 and output.error_msg is None


def test_requests_are_shown_when_and_only_when_they_change() -> None:
    engine = make_engine(FakeRunner(), budget=8)
    steps = run(engine, [make_request("short", 2, 3), make_request("long", 20, 2)])
    names = [[output.request_id for output in outputs] for outputs in steps]
    assert names == [["short"], ["short"], ["short", "long"], ["long"]]  # long's prompt: 6 + 7 + 7 tokens
    assert [outputs[0].outputs.token_ids for outputs in steps] == [[10], [10, 11], [10, 11, 12], [10, 11]]
    assert [len(finished([outputs])) for outputs in steps] == [0, 0, 1, 1]


def test_a_call_that_wants_no_partial_outputs_gets_one_of_each_request() -> None:
    engine = make_engine(FakeRunner(), budget=8)
    steps = list(engine.run([make_request("short", 2, 3), make_request("long", 20, 2)], partial=False))
    assert [[output.request_id for output in outputs] for outputs in steps] == [[], [], ["short"], ["long"]]
    assert steps[2][0].outputs.send_idx == 0 and steps[2][0].outputs.delta == "<10><11><12>"


def test_invalid_logits_fail_one_request_and_spare_the_others() -> None:
    engine = make_engine(FakeRunner(lambda request, count: -1 if (request.request_id, count) == ("bad", 1) else 10))
    bad, good = make_request("bad"), make_request("good")
    run(engine, [bad, good])
    assert (bad.finish_reason, bad.error_code, bad.num_output_tokens) == ("error", 500, 1)
    assert "NaN" in str(bad.error_msg)
    assert (good.finish_reason, good.num_output_tokens) == ("length", 4)


def test_a_request_that_outgrows_the_blocks_fails_alone_and_keeps_its_tokens() -> None:
    engine = make_engine(FakeRunner(), num_blocks=4)
    endless, good, too_long = make_request("endless", 2, 50), make_request("good"), make_request("too long", 9, 1)
    outputs = {output.request_id: output for output in finished(run(engine, [endless, good, too_long]))}
    assert (endless.finish_reason, endless.error_code, len(endless.token_ids)) == ("error", 400, 9)
    assert (too_long.finish_reason, too_long.num_output_tokens) == ("error", 0)
    assert good.finish_reason == "length"
    assert outputs["endless"].error_msg and len(outputs["endless"].outputs.token_ids) == 7


def test_metrics_add_up() -> None:
    engine = make_engine(FakeRunner(), num_blocks=4, max_num_seqs=2)
    first, second, third = make_request("first", 3, 6), make_request("second", 3, 5), make_request("third", 2, 1)
    run(engine, [first, second, third])
    for request in (first, second, third):
        metrics = request.metrics
        assert metrics.inference_start_time - metrics.arrival_time == metrics.time_in_queue >= 0
        assert 0 < metrics.first_token_time <= metrics.model_execute_time
        assert 0 < metrics.model_forward_time <= metrics.model_execute_time
    assert third.metrics.time_in_queue > first.metrics.time_in_queue, "third had to wait for a place"
    assert third.metrics.first_token_time == third.metrics.model_execute_time, "it had one token"
    assert (first.metrics.preempted_count, second.metrics.preempted_count) == (0, 1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_exception_frees_what_the_call_queued_and_the_engine_goes_on(kind: type[BaseException]) -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    runner.raise_in = {3: kind("the device is gone")}  # made here: a parameter would keep its traceback's requests
    with pytest.raises(kind):
        run(engine, [make_request(str(index)) for index in range(10)])
    assert_empty(engine)
    after = make_request("after")
    run(engine, [after])
    assert after.finish_reason == "length"


def test_an_exception_of_a_step_in_flight_loses_nothing_of_another_call() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    outer = make_request("outer", max_tokens=9)
    steps = engine.run([outer])
    next(steps)
    runner.raise_after = {3: RuntimeError("the kernel has failed")}
    with pytest.raises(RuntimeError, match="the kernel has failed"):
        list(engine.run([make_request("inner", max_tokens=5)]))
    list(steps)
    assert outer.token_ids[3:] == [10 + count for count in range(9)]
    assert_empty(engine)


def test_steps_are_launched_before_the_tokens_of_the_one_before_are_there(overlap: bool) -> None:
    engine = make_engine(runner := FakeRunner())
    steps = engine.run([make_request("a", max_tokens=9)])
    for count in range(1, 9):
        next(steps)
        assert (runner.num_steps, runner.num_waited) == (count + overlap, count)
    engine.close()
    assert runner.num_waited == runner.num_steps, "nothing computes in memory that is given back"


def test_a_token_that_ends_a_request_makes_its_part_of_the_step_in_flight_void(overlap: bool) -> None:
    engine = make_engine(runner := FakeRunner(lambda request, count: EOS if count == 2 else 10 + count))
    stops, goes_on = make_request("stops"), make_request("goes on", max_tokens=6, ignore_eos=True)
    run(engine, [stops, goes_on])
    assert stops.token_ids[3:] == [10, 11, EOS] and goes_on.token_ids[3:] == [10, 11, EOS, 13, 14, 15]
    assert goes_on.metrics.model_forward_time <= goes_on.metrics.model_execute_time, "no second counts twice"
    assert runner.num_steps == 6 and engine.scheduler.statistics.num_served == 9
    run(engine, [make_request("stops alone")])
    assert runner.num_steps == 9 + overlap, "the step that was launched in vain has not been waited for"
    assert runner.num_waited == 9 and engine.scheduler.statistics.num_served == 12


def test_a_closed_engine_says_so_to_calls_under_way_and_to_later_ones() -> None:
    engine = make_engine(FakeRunner())
    steps = engine.run([make_request("under way", max_tokens=50)])
    next(steps)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(steps)
    with pytest.raises(RuntimeError, match="closed"):
        next(engine.run([make_request("later")]))
    with pytest.raises(RuntimeError, match="closed"):
        engine.check_open()
    assert engine.runner is None
    assert_empty(engine)


def test_a_call_from_within_a_step_is_refused_and_the_step_goes_on() -> None:
    """As a logits processor might."""
    engine = make_engine(runner := FakeRunner())
    stream = engine.run([make_request("stream", max_tokens=3)])
    next(stream)

    errors = []

    def say(request: Request, count: int) -> int:
        for inner in (engine.run([make_request("inner")]), stream):
            try:
                next(inner, None)
            except RuntimeError as error:
                errors.append(str(error))
        return 10 + count

    runner.say = say
    request = make_request("a", max_tokens=1)
    run(engine, [request])
    assert request.token_ids[3:] == [10]
    assert len(errors) >= 2 and all("within its own step" in error for error in errors)


def test_leaving_the_iterator_early_frees_its_requests() -> None:
    engine = make_engine(FakeRunner())
    steps = engine.run([make_request(str(index), max_tokens=50) for index in range(10)])
    next(steps)
    steps.close()
    assert_empty(engine)


def test_an_iterator_that_was_never_started_queues_nothing() -> None:
    engine = make_engine(FakeRunner())
    engine.run([make_request("a")])
    assert_empty(engine)


def test_a_call_within_an_unfinished_call_disturbs_neither() -> None:
    engine = make_engine(FakeRunner())
    outer, inner = make_request("outer", max_tokens=9), make_request("inner", max_tokens=5)
    steps = engine.run([outer])
    next(steps)
    run_inner = [[output.request_id for output in outputs] for outputs in engine.run([inner])]
    assert run_inner == [["inner"]] * 5
    (output,) = next(steps)
    # Its tokens of the meantime come at once: one more where a step was in flight that `inner` was late for.
    assert output.outputs.delta == "<11><12><13><14><15>" + "<16>" * overlapping
    assert len(list(steps)) == 3 - overlapping and outer.num_output_tokens == 9
    assert_empty(engine)


def test_an_exception_in_one_call_leaves_the_requests_of_another_whole() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    outer = make_request("outer", max_tokens=9)
    steps = engine.run([outer])
    next(steps)
    runner.raise_in = {3: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        list(engine.run([make_request("inner", max_tokens=5)]))
    assert engine.scheduler.has_requests
    list(steps)
    assert outer.token_ids[3:] == [10 + count for count in range(9)]
    assert_empty(engine)


STEPPING = ("engine.py", "scheduler.py", "request.py", "transcript.py")


def interrupt_at_line(number: int, within: tuple[str, ...] = (), but_not_within: tuple[str, ...] = ()) -> Callable:
    """A trace function: Ctrl-C before the number-th line of the engine's modules that is run.

    Counted are lines in functions of these names and what they call; `but_not_within`: not in these nor below them.
    """
    countdown = iter(range(number, -1, -1))

    def trace(frame: FrameType, event: str, argument: object) -> Callable | None:
        name = frame.f_code.co_name
        if name in but_not_within or not frame.f_code.co_filename.endswith(STEPPING):
            return None
        if event == "line" and next(countdown) == 0:
            raise KeyboardInterrupt
        return trace

    def wait(frame: FrameType, event: str, argument: object) -> Callable | None:
        return trace(frame, event, argument) if frame.f_code.co_name in within else None

    return wait if within else trace


def test_an_interrupt_between_any_two_lines_of_a_step_loses_nothing_of_another_call() -> None:
    number = 0
    interrupted = True
    while interrupted:
        engine = make_engine(FakeRunner(), num_blocks=6)
        outer = [make_request("a", 2, 5), make_request("b", 2, 8, stop="2><13"), make_request("c", 9, 20)]
        steps = engine.run(outer)
        text = {output.request_id: output.outputs.delta for output in next(steps)}
        tracer = sys.gettrace()
        sys.settrace(interrupt_at_line(number, but_not_within=("_recover", "restart", "run", "abort")))
        try:
            list(engine.run([make_request("inner", 2, 2), make_request("too long", 13, 1)]))
            interrupted = False
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracer)
        engine.scheduler.check_integrity()
        for outputs in steps:
            for output in outputs:
                text[output.request_id] = text.get(output.request_id, "") + output.outputs.delta
        assert [request.finish_reason for request in outer] == ["length", "stop", "error"]
        assert outer[0].token_ids[2:] == [10, 11, 12, 13, 14] and outer[1].token_ids[2:] == [10, 11, 12, 13]
        assert text["a"] == "<10><11><12><13><14>" and text["b"] == "<10><11><1"
        assert_empty(engine)
        number += 1
    assert number > 300, "the interrupts came where they should"


def test_a_second_interrupt_between_any_two_lines_of_the_recovery_loses_nothing_either() -> None:
    number = 0
    interrupted = True
    while interrupted:
        engine = make_engine(runner := FakeRunner(), num_blocks=6)
        outer = [make_request("a", 2, 5), make_request("b", 2, 8, stop="2><13")]
        steps = engine.run(outer)
        next(steps)
        runner.raise_in = {3: ZeroDivisionError()}
        tracer = sys.gettrace()
        sys.settrace(interrupt_at_line(number, within=("_recover", "restart", "rewind")))
        try:
            list(engine.run([make_request("inner", 2, 9)]))
        except KeyboardInterrupt:
            pass
        except ZeroDivisionError:
            interrupted = False
        finally:
            sys.settrace(tracer)
        engine.scheduler.check_integrity()
        list(steps)
        assert outer[0].token_ids[2:] == [10, 11, 12, 13, 14] and outer[1].token_ids[2:] == [10, 11, 12, 13]
        assert_empty(engine)
        number += 1
    assert number > 10, "the interrupts came where they should"


def test_calls_of_several_threads_get_their_own_tokens() -> None:
    def say(request: Request, count: int) -> int:
        time.sleep(1e-4)  # lets the other threads run, as a native call does
        return 1000 * int(request.request_id) + count

    engine = make_engine(FakeRunner(say))
    calls = [
        [make_request(str(10 * call + index), max_tokens=9, stop="8><never") for index in range(3)] for call in range(4)
    ]
    with ThreadPoolExecutor(len(calls)) as threads:
        shown = list(threads.map(lambda requests: list(engine.run(requests)), calls))
    for requests, steps in zip(calls, shown):
        for request in requests:
            ids = [1000 * int(request.request_id) + count for count in range(9)]
            mine = [output.outputs for step in steps for output in step if output.request_id == request.request_id]
            assert mine[-1].token_ids == ids
            assert "".join(output.delta for output in mine) == "".join(f"<{token_id}>" for token_id in ids)
    assert_empty(engine)


def test_an_iterator_closed_in_the_middle_of_a_step_is_freed_after_it() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    abandoned = engine.run([make_request("abandoned", max_tokens=50)])
    next(abandoned)

    def say(request: Request, count: int) -> int:
        abandoned.close()  # as the garbage collector does, when it likes
        return 10 + count

    runner.say = say
    request = make_request("a", max_tokens=3)
    run(engine, [request])
    assert request.token_ids[3:] == [10, 11, 12]


@pytest.mark.parametrize("seed", range(20))
def test_random_calls_interrupts_and_early_exits_leave_the_engine_empty(seed: int) -> None:
    rng = random.Random(seed)
    runner = FakeRunner(lambda request, count: EOS if rng.random() < 0.1 else 10)
    engine = make_engine(runner, rng.randint(3, 12), max_num_seqs=rng.randint(1, 6), budget=rng.randint(1, 9))
    for _ in range(15):
        count = rng.randint(1, 9)
        requests = [make_request(str(index), rng.randint(1, 8), rng.randint(1, 8)) for index in range(count)]
        runner.raise_in = {runner.num_steps + rng.randint(1, 20): KeyboardInterrupt()} if rng.random() < 0.5 else {}
        steps = engine.run(requests)
        try:
            for _ in steps:
                engine.scheduler.check_integrity()
                if rng.random() < 0.05:
                    steps.close()
                    break
            else:
                assert all(request.finished for request in requests)
        except KeyboardInterrupt:
            pass
        assert_empty(engine)
