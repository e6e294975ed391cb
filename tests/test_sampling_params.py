import copy
import dataclasses
import logging

import numpy as np
import pytest

from fastdeploy import SamplingParams
from fastdeploy.sampling_params import sampling_defaults

DEFAULTS = SamplingParams(temperature=0.6, top_p=0.9)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", 1e39, ValueError),
        ("temperature", "1", TypeError),
        ("temperature", True, TypeError),
        ("top_p", 1.01, ValueError),
        ("top_p", -1, ValueError),
        ("top_p", [0.5], TypeError),
        ("max_tokens", 0, ValueError),
        ("max_tokens", 2.0, TypeError),
        ("max_tokens", False, TypeError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
        ("seed", 1.5, TypeError),
        ("ignore_eos", 1, TypeError),
        ("stop_token_ids", 5, TypeError),
        ("stop_token_ids", "5", TypeError),
        ("stop_token_ids", [3, -1], ValueError),
        ("stop_token_ids", [3, "x"], TypeError),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"SamplingParams\({field}.*=") as raised:
        SamplingParams(**{field: value})
    shown = value[1] if isinstance(value, list) and len(value) > 1 else value
    assert repr(shown) in str(raised.value)


def test_an_integer_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SamplingParams\(temperature=1000.*must be a finite number"):
        SamplingParams(temperature=10**400)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("temprature", "did you mean 'temperature'?"), ("max_token", "'max_tokens'"), ("zzz", "it takes")],
)
def test_an_unknown_keyword_is_a_type_error_that_suggests_a_name(name: str, remedy: str) -> None:
    with pytest.raises(TypeError) as raised:
        SamplingParams(**{name: 1})
    assert repr(name) in str(raised.value) and remedy in str(raised.value)


@pytest.mark.parametrize("value", [0, 0.0, 1, np.float32(0.5), np.int64(1)])
def test_numbers_of_any_kind_are_taken(value: float) -> None:
    params = SamplingParams(temperature=value, top_p=value)
    assert params.temperature == params.top_p == float(value) and type(params.temperature) is float


def test_a_list_that_changes_later_does_not_change_the_parameters() -> None:
    ids = [1, 2]
    params = SamplingParams(stop_token_ids=ids)
    ids.append(3)
    assert params.stop_token_ids == [1, 2]


def test_resolved_fills_what_is_open_and_leaves_the_original_alone() -> None:
    params = SamplingParams()
    before = copy.deepcopy(params)
    resolved = params.resolved(DEFAULTS, room=100, seed=7)
    assert params == before
    assert None not in dataclasses.asdict(resolved).values()
    assert (resolved.temperature, resolved.top_p, resolved.max_tokens, resolved.seed) == (0.6, 0.9, 100, 7)


def test_resolved_keeps_what_is_named_and_clips_max_tokens() -> None:
    params = SamplingParams(temperature=0, top_p=0, max_tokens=300, seed=0)
    resolved = params.resolved(DEFAULTS, room=100, seed=7)
    assert (resolved.temperature, resolved.top_p, resolved.max_tokens, resolved.seed) == (0, 0, 100, 0)
    assert params.max_tokens == 300
    assert SamplingParams(max_tokens=5).resolved(DEFAULTS, room=100, seed=7).max_tokens == 5


def test_resolved_checks_what_was_assigned_since() -> None:
    params = SamplingParams()
    params.temperature = -1
    with pytest.raises(ValueError, match="temperature=-1"):
        params.resolved(DEFAULTS, room=100, seed=7)


@pytest.mark.parametrize(
    ("config", "temperature", "top_p"),
    [
        ({}, 1.0, 0.7),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, 0.6, 0.95),
        ({"temperature": 0.6}, 0.6, 0.7),
        ({"temperature": None, "top_p": None}, 1.0, 0.7),
    ],
)
def test_defaults_come_from_the_generation_config_and_are_logged(
    config: dict, temperature: float, top_p: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        defaults = sampling_defaults(config)
    assert (defaults.temperature, defaults.top_p) == (temperature, top_p)
    assert f"temperature {temperature:g}, top_p {top_p:g}" in caplog.text


def test_a_bad_generation_config_is_named() -> None:
    with pytest.raises(ValueError, match=r"generation_config .*top_p=7"):
        sampling_defaults({"top_p": 7})
