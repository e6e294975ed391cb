"""When a request ends, and what users get of it as dicts and on a console."""

import copy
import json

import pytest

from fastdeploy.engine.request import (
    CompletionOutput,
    Logprob,
    Record,
    Request,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from fastdeploy.sampling_params import SamplingParams, sampling_defaults
from fastdeploy.text.reasoning import ThinkingBudget

EOS = 99
DEFAULTS = sampling_defaults({})


def make_request(num_prompt: int = 2, **params: object) -> Request:
    resolved = SamplingParams(**{"max_tokens": 5, **params}).resolved(DEFAULTS, room=100, seed=0)
    prompt = list(range(num_prompt))
    return Request("a", prompt, prompt, resolved, frozenset([EOS]))


def say(request: Request, *token_ids: int) -> list[str | None]:
    """finish_reason after each token."""
    reasons = []
    for token_id in token_ids:
        request.append(token_id)
        reasons.append(request.finish_reason)
    return reasons


@pytest.mark.parametrize(
    ("params", "token_ids", "reason", "stop_reason"),
    [
        ({}, [7, 8, EOS], "stop", None),
        ({}, [7, 8, 9, 7, 8], "length", None),
        ({"max_tokens": 1}, [7], "length", None),
        ({"max_tokens": 2}, [7, EOS], "stop", None),
        ({"ignore_eos": True}, [7, EOS, 8, 9, 7], "length", None),
        ({"stop_token_ids": [6, 8]}, [7, 8], "stop", 8),
        ({"stop_token_ids": [EOS]}, [7, EOS], "stop", EOS),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [7, EOS], "stop", EOS),
        ({"min_tokens": 3}, [EOS, EOS, EOS], "stop", None),
        ({"min_tokens": 3, "stop_token_ids": [8]}, [8, 8, 8], "stop", 8),
        ({"min_tokens": 0}, [EOS], "stop", None),
    ],
)
def test_the_last_token_ends_a_request_and_no_other(
    params: dict, token_ids: list[int], reason: str, stop_reason: int | None
) -> None:
    request = make_request(**params)
    assert say(request, *token_ids) == [None] * (len(token_ids) - 1) + [reason]
    assert request.stop_reason == stop_reason and request.finished
    assert request.num_output_tokens == len(token_ids)


def test_concluding_again_changes_nothing() -> None:
    request = make_request(stop_token_ids=[8])
    request.conclude()
    assert not request.finished, "it has no output yet"
    say(request, 7)
    request.conclude()
    assert not request.finished
    say(request, 8)
    request.conclude()
    assert (request.finish_reason, request.stop_reason) == ("stop", 8)
    failed = make_request(max_tokens=1)
    failed.token_ids.append(7)
    failed.fail(500, "the device is gone")
    failed.conclude()
    assert (failed.finish_reason, failed.error_msg) == ("error", "the device is gone")


def logprobs_of(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, 1, [token_id], [-0.5])


def test_a_token_has_the_logprobs_it_was_appended_with_also_after_an_interrupt() -> None:
    request = make_request(logprobs=1)
    request.append(7, logprobs_of(7))
    request.logprobs.append(logprobs_of(8))  # and then Ctrl-C: token 8 did not get as far
    request.append(9, logprobs_of(9))
    assert [place.token_id for place in request.logprobs] == request.token_ids[2:] == [7, 9]


def test_prompt_logprobs_are_wanted_until_all_but_the_first_token_have_them() -> None:
    assert not make_request().wants_prompt_logprobs
    assert not make_request(num_prompt=1, prompt_logprobs=0).wants_prompt_logprobs
    request = make_request(num_prompt=3, prompt_logprobs=0)
    wanted = []
    for token_id in (1, 2):
        wanted.append(request.wants_prompt_logprobs)
        request.prompt_logprobs.append(logprobs_of(token_id))
    assert wanted == [True, True] and not request.wants_prompt_logprobs


def test_a_token_is_forced_when_the_budget_for_thinking_is_used_up() -> None:
    request = make_request(num_prompt=3)
    assert request.forced_token() is None
    request.thinking = ThinkingBudget(2, [1], [6], open_at_start=True)
    forced = [request.forced_token()]
    for token_id in (7, 8, 6):
        request.append(token_id)
        forced.append(request.forced_token())
    assert forced == [None, None, 6, None]


def test_metrics_of_a_request_of_three_steps() -> None:
    """Waits 2 s; a chunk of its prompt takes 1 s, the rest with the first token 2 s; 3 s of waiting; a token in 1 s."""
    metrics = RequestMetrics(arrival_time=100.0)
    metrics.record_step(102.0, 103.0, sampled=False)
    assert (metrics.time_in_queue, metrics.first_token_time, metrics.model_execute_time) == (2.0, None, None)
    metrics.record_step(103.0, 105.0, sampled=True)
    metrics.record_step(108.0, 109.0, sampled=True)
    assert metrics == RequestMetrics(100.0, 102.0, 2.0, 3.0, 4.0, 7.0)


# --- dicts --------------------------------------------------------------------------------------------------------

FULL = RequestOutput(
    request_id="a-b-c",
    prompt="Où est 中?",
    prompt_token_ids=[5, 6, 7],
    outputs=CompletionOutput(
        index=2,
        send_idx=1,
        token_ids=[8, 9],
        text="là",
        reasoning_content="hm",
        logprobs=[{8: Logprob(-0.25, 1, "l"), 3: Logprob(float("-inf"), 2, None)}, {9: Logprob(-1.5, 4, "à")}],
        finish_reason="stop",
        stop_reason="bas",
        delta="à",
        reasoning_delta="",
    ),
    finished=True,
    metrics=RequestMetrics(1.0, 2.0, 1.0, 0.5, 0.75, 1.0, 3),
    num_cached_tokens=2,
    error_code=400,
    error_msg="why",
    prompt_logprobs=[None, {6: Logprob(-0.125, 1, "x")}, {7: Logprob(-2.0, 9, "y"), 1: Logprob(-1.0, 1, "z")}],
)
MINIMAL = RequestOutput("a", [5], [5], CompletionOutput(0, 0, [], ""))


@pytest.mark.parametrize("record", [FULL, MINIMAL, FULL.outputs, FULL.metrics, Logprob(-1.0, 2, "x")])
def test_a_dict_and_its_json_say_all(record: Record) -> None:
    given = record.to_dict()
    through_json = json.loads(json.dumps(given))
    before = copy.deepcopy([given, through_json])
    assert type(record).from_dict(given) == type(record).from_dict(through_json) == record
    assert [given, through_json] == before, "the argument is only read"


def test_a_dict_shares_nothing_with_the_output() -> None:
    output = copy.deepcopy(FULL)
    given = output.to_dict()
    again = RequestOutput.from_dict(given)
    given["outputs"]["token_ids"].append(1)
    given["outputs"]["logprobs"][0].clear()
    given["prompt_token_ids"].append(1)
    given["metrics"]["preempted_count"] = 8
    assert again == output == FULL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finishd": True}, "RequestOutput has no keyword 'finishd': did you mean 'finished'?"),
        ({"outputs": {"index": 0}}, "CompletionOutput.from_dict: send_idx, token_ids, text missing in a dict of"),
        ({"metrics": {"zzz": 0}}, "RequestMetrics has no keyword 'zzz': it takes arrival_time"),
        ({"prompt_logprobs": [{"3": {"logprob": 0.0, "rank": 1, "x": 2}}]}, "Logprob has no keyword 'x'"),
    ],
)
def test_a_dict_with_other_keys_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        RequestOutput.from_dict(FULL.to_dict() | change)
    assert message in str(raised.value)


def test_reasoning_content_as_an_older_manual_spells_it() -> None:
    assert FULL.outputs.resoning_content == "hm" and MINIMAL.outputs.resoning_content is None


def test_a_repr_says_what_matters_and_fits_on_a_console() -> None:
    output = copy.deepcopy(FULL)
    output.prompt_token_ids = list(range(1000))
    output.outputs.text = "so " * 1000
    shown = repr(output)
    assert len(shown) < 1000
    for part in (
        "RequestOutput(request_id='a-b-c'",
        "prompt='Où est 中?'",
        "[0, 1, 2",
        "text='so so",
        "'stop'",
        "'why'",
    ):
        assert part in shown
    assert "None" not in repr(MINIMAL)
