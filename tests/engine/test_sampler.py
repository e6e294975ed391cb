"""The host's side of sampling: what the edit lists say of a request's tokens, and who holds which slot."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from fastdeploy.device import open_device
from fastdeploy.device.cpu import CPUDevice
from fastdeploy.engine.request import Request
from fastdeploy.engine.sampler import HELD, IN_PROMPT, EditList, Sampler
from fastdeploy.engine.scheduler import FAILED, NO_NUMBERS
from fastdeploy.engine.seats import Seats
from fastdeploy.kernels.launch import view
from fastdeploy.sampling_params import SamplingParams, sampling_defaults

VOCABULARY = 50


def make_request(prompt: list[int], banned=(), eos=frozenset(), **params) -> Request:
    resolved = SamplingParams(**params).resolved(sampling_defaults({}), room=100, seed=0)
    request = Request("r", prompt, prompt, resolved, eos)
    request.banned = list(banned)
    return request


def new_list(request: Request) -> tuple[EditList, list[np.ndarray]]:
    arrays = [np.full(VOCABULARY, -7, dtype) for dtype in ("int32", "float32", "int32")]
    return EditList(request, *arrays), arrays


def edits(request: Request) -> dict[int, tuple[float, int]]:
    """The specification: token id -> (bias, seen)."""
    params, output = request.sampling_params, request.token_ids[len(request.prompt_token_ids) :]
    bias = {token: float(np.float32(value)) for token, value in params.logit_bias.items()}
    seen: Counter[int] = Counter()
    for *head, last in request.banned:
        if not head or output[-len(head) :] == head:
            bias[last] = -math.inf
        else:
            bias.setdefault(last, 0.0)
    if params.min_tokens:
        for token in request.eos_token_ids | request.stop_token_ids:
            seen[token] += HELD
    if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0):
        for token in set(request.prompt_token_ids):
            seen[token] += IN_PROMPT
        seen.update(output)
    return {token: (bias.get(token, 0.0), seen[token]) for token in bias.keys() | seen.keys()}


@pytest.mark.parametrize("seed", range(30))
def test_an_edit_list_says_what_its_request_asks_for(seed):
    rng = random.Random(seed)

    def some(most: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, most))]

    request = make_request(
        some(20) or [3],
        banned=[tuple(some(2) + [rng.randrange(5)]) for _ in range(rng.randint(0, 4))],
        eos=frozenset(some(2)),
        logit_bias={token: rng.uniform(-3, 3) for token in some(4)},
        stop_token_ids=some(2),
        min_tokens=rng.choice([0, 3]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.4]),
        frequency_penalty=rng.choice([0.0, -0.4]),
    )
    request.token_ids += some(3)  # it may have been preempted
    found, (ids, bias, seen) = new_list(request)
    for _ in range(30):
        rows = zip(ids[: len(found)].tolist(), bias.tolist(), seen.tolist(), strict=False)
        assert {token: (value, flags) for token, value, flags in rows} == edits(request)
        request.token_ids += [rng.randrange(8) for _ in range(rng.randint(1, 2))]
        if found.follows_output:
            found.update(request)


def test_a_request_that_edits_nothing_has_an_empty_list():
    found, _ = new_list(make_request([1, 2, 3]))
    assert len(found) == 0 and not found.follows_output


class SeatedSampler(Sampler):
    """A sampler whose requests take their seats as the runner's do."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.seats = Seats(3)

    def sample(self, requests: list[Request]) -> tuple[list[int], dict[int, str]]:
        seats, newcomers = self.seats.take(requests)
        for request in newcomers:
            self.enter(request, self.seats.of(request))
        return self.launch(requests, seats, np.array([len(request.token_ids) for request in requests]))()


def new_sampler(device=None) -> tuple[SeatedSampler, object]:
    device = device or open_device()
    logits = device.empty((3, VOCABULARY), "float32")
    return SeatedSampler(device, logits, 3, 40), logits


@pytest.fixture
def sampler() -> tuple[SeatedSampler, object]:
    return new_sampler()


def write(logits, values: np.ndarray) -> None:
    open_device().write(view(logits).rows(len(values)), values.astype(np.float32))


def test_more_requests_than_slots_take_turns_and_keep_their_parameters(sampler, rng):
    sampler, logits = sampler
    requests = [make_request([token], logit_bias={token: 100.0}, temperature=0) for token in range(9)]
    for _ in range(20):
        step = random.Random(int(rng.integers(1000))).sample(requests, 3)
        write(logits, rng.standard_normal((3, VOCABULARY)))
        assert sampler.sample(step) == ([request.prompt_token_ids[0] for request in step], {})


def test_penalties_follow_the_tokens_of_a_running_request(sampler):
    sampler, logits = sampler
    request = make_request([0], frequency_penalty=1.0, temperature=0)
    values = np.array([[4.0, 3.5, 0.0]])
    row = np.pad(values, ((0, 0), (0, VOCABULARY - 3)), constant_values=-9)
    write(logits, row)
    drawn = []
    for _ in range(6):
        drawn += sampler.sample([request])[0]
        request.append(drawn[-1])
    assert drawn == [0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(np.from_dlpack(logits)[0], row[0].astype(np.float32))


def test_a_logits_processor_sees_the_tokens_and_may_change_its_row_in_place_or_anew(sampler, rng):
    sampler, logits = sampler
    seen = []

    def in_place(token_ids, row):
        seen.append(token_ids)
        row[7] = 50.0

    def anew(token_ids, row):
        return np.where(np.arange(VOCABULARY) == 9, 0.0, -np.inf)

    requests = [make_request([1, 2], logits_processors=[each], temperature=0) for each in (in_place, anew)]
    values = rng.standard_normal((2, VOCABULARY)).astype(np.float32)
    write(logits, values)
    assert sampler.sample(requests) == ([7, 9], {})
    assert seen == [[1, 2]]
    np.testing.assert_array_equal(np.from_dlpack(logits)[:2], values)


def test_a_logits_processor_that_fails_spoils_its_own_row_alone(sampler, rng):
    sampler, logits = sampler
    values = rng.standard_normal((3, VOCABULARY)).astype(np.float32)
    write(logits, values)

    def failing(token_ids, row):
        row[:] = np.nan
        raise KeyError("no such token")

    cut = make_request([1], logits_processors=[lambda token_ids, row: row[:-1]])
    requests = [cut, make_request([1], temperature=0), make_request([1], logits_processors=[failing])]
    tokens, errors = sampler.sample(requests)
    assert tokens == [FAILED, values[1].argmax(), FAILED]
    assert "returned shape (49,), expected (50,)" in errors[0] and "KeyError: 'no such token'" in errors[2]
    np.testing.assert_array_equal(np.from_dlpack(logits)[:3], values)


@pytest.mark.parametrize("made", [np.nan, np.inf, 1e300])
def test_numbers_that_a_logits_processor_spoils_are_its_own_fault_and_not_the_models(sampler, rng, made):
    sampler, logits = sampler
    values = rng.standard_normal((2, VOCABULARY))
    values[1, 3] = np.nan
    write(logits, values)
    spoil, keep = lambda token_ids, row: row.astype(np.float64) + made, lambda token_ids, row: row
    tokens, errors = sampler.sample([make_request([1], logits_processors=[each]) for each in (spoil, keep)])
    assert tokens == [FAILED, NO_NUMBERS]
    assert list(errors) == [0] and "became NaN or +inf" in errors[0]


class UploadsCounted(CPUDevice):
    """Notes which rows its stagings upload."""

    def staging(self, fields):
        made = super().staging(fields)
        upload = lambda rows=None: self.uploads.append((next(iter(fields)), rows))  # noqa: E731
        made.upload = upload
        return made

    uploads: list = []


def test_only_what_has_changed_is_uploaded_of_the_slots_and_their_edits(rng):
    device = UploadsCounted()
    device.uploads = []
    sampler, logits = new_sampler(device)
    write(logits, rng.standard_normal((3, VOCABULARY)))
    plain, biased = make_request([1]), make_request([2], logit_bias={3: 1.0})
    penalised = make_request([3], frequency_penalty=1.0)
    uploads = []
    for requests in ([plain], [plain, biased], [plain, biased], [plain, biased, penalised], [biased, penalised]):
        device.uploads.clear()
        sampler.sample(requests)
        uploads.append(device.uploads.copy())
    parameters, rows = ("temperature", None), ("slots", None)
    seats = {request: [sampler.seats.of(request)] for request in (biased, penalised)}
    assert uploads == [
        [parameters, rows],
        [parameters, ("edit_ids", seats[biased]), rows],
        [rows],
        [parameters, ("edit_ids", seats[penalised]), rows],
        [parameters, ("edit_ids", seats[penalised]), rows],
    ]


class Coarse(CPUDevice):
    """Has plans for 3 rows only."""

    def plan_sizes(self, most):
        return [3]


def test_padding_rows_change_nothing(sampler, rng):
    sampler, logits = sampler
    padded, its_logits = new_sampler(Coarse())
    values = rng.standard_normal((3, VOCABULARY))
    values[2] = np.nan  # what the row of padding has
    for tensor in (logits, its_logits):
        write(tensor, values)

    def some(count):
        return [make_request([token], seed=token, logit_bias={token: 3.0}) for token in range(count)]

    for count in (1, 2, 3):
        assert padded.sample(some(count)) == sampler.sample(some(count))
    assert list(padded._plans) == [3]
