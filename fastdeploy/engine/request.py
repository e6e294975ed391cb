"""Request: one sequence on its way through the engine. RequestOutput: what the user gets of it.

A request's tokens are one list, prompt then output, and two numbers say how far it is:

    token_ids    | prompt .................... | output ........ |
    computed     | keys and values are in block_table's blocks |     |
                 0                            num_computed    len(token_ids)

A decode step computes the last token; a prefill computes many; after a preemption num_computed is 0 and the same
prefill path computes prompt and output again. So there are no phases to keep track of.
"""

from __future__ import annotations

import dataclasses
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from fastdeploy.checks import unknown_keyword
from fastdeploy.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from fastdeploy.engine.transcript import Transcript
    from fastdeploy.text.reasoning import ThinkingBudget

UNSERVABLE = 400  # error_code: the request asks for more than this engine has
INTERNAL_ERROR = 500  # error_code: the engine could not do what it should have done


# --- what users see -----------------------------------------------------------------------------------------------

_brief = reprlib.Repr()
_brief.maxstring = 80
_brief.maxlist = 8
_brief.maxother = 1000  # a CompletionOutput within a RequestOutput, abbreviated already

Readers = Mapping[str, Callable[[Any], Any]]
OwnType = TypeVar("OwnType", bound="Record")


class Record:
    """What the dataclasses below have in common: dicts that JSON can hold, and a repr that fits on a console."""

    __slots__ = ()

    _readers: ClassVar[Readers] = {}  # of the fields that JSON does not hold as they are

    def to_dict(self) -> dict[str, Any]:
        """All fields, nested ones too, as plain dicts and lists: `json.dumps` takes it, `from_dict` reads it."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[OwnType], given: Mapping[str, Any]) -> OwnType:
        """What `to_dict` came from, also by way of JSON, which makes strings of integer keys.

        `given` is only read. Raises TypeError if it is no dict, ValueError for unknown keys and for missing ones.
        """
        if not isinstance(given, Mapping):
            raise TypeError(f"{cls.__name__}.from_dict takes a dict, not {type(given).__name__}")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in given:
            if name not in fields:
                raise ValueError(unknown_keyword(cls.__name__, name, list(fields)))
        missing = [name for name, f in fields.items() if name not in given and _is_required(f)]
        if missing:
            raise ValueError(f"{cls.__name__}.from_dict: {', '.join(missing)} missing in a dict of {list(given)}")
        return cls(**{name: cls._readers.get(name, _copied)(value) for name, value in given.items()})

    def __repr__(self) -> str:
        """What one wants to see on a console, long texts and lists abbreviated; `to_dict` has the rest."""
        shown = [f.name for f in dataclasses.fields(self) if f.repr]  # type: ignore[arg-type]
        values = {name: getattr(self, name) for name in shown}
        parts = [f"{name}={_brief.repr(value)}" for name, value in values.items() if value is not None]
        return f"{type(self).__name__}({', '.join(parts)})"


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _read_logprobs(given: list[dict[Any, Any] | None] | None) -> list[dict[int, Logprob] | None] | None:
    if given is None:
        return None
    return [
        None if place is None else {int(token_id): Logprob.from_dict(entry) for token_id, entry in place.items()}
        for place in given
    ]


@dataclass(repr=False, slots=True)  # there may be one for each token of the vocabulary, at each place
class Logprob(Record):
    """One token at one place.

    logprob: natural logarithm of its probability under the model's own distribution, before any sampling parameter.
    rank: 1 for the most probable token; of equally probable ones the lower id goes first.
    decoded_token: its text; U+FFFD for a part of a character, None if unknown.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(repr=False)
class RequestMetrics(Record):
    """When things happened to a request, and how long they took. Seconds all; a None has not happened yet.

    arrival_time: Unix time at which the request was queued.
    inference_start_time: Unix time at which the first step that computes its tokens began.
    time_in_queue: inference_start_time - arrival_time.
    first_token_time: from inference_start_time to the first output token (with time_in_queue: time to first token).
    model_forward_time: sum of the durations of the model runs that computed tokens of this request.
    model_execute_time: from inference_start_time to the latest output token: model runs, all between them, and the
        wait and the recomputation after a preemption.
    preempted_count: how often its KV blocks were taken away and computed again.
    """

    arrival_time: float = 0.0
    inference_start_time: float | None = None
    time_in_queue: float | None = None
    first_token_time: float | None = None
    model_forward_time: float = 0.0
    model_execute_time: float | None = None
    preempted_count: int = 0

    def record_step(self, started: float, ended: float, sampled: bool) -> None:
        """A model run from `started` to `ended` computed tokens of this request, and `sampled` one if it says so."""
        if self.inference_start_time is None:
            self.inference_start_time = started
            self.time_in_queue = started - self.arrival_time
        self.model_forward_time += ended - started
        if sampled:
            self.model_execute_time = ended - self.inference_start_time
            if self.first_token_time is None:
                self.first_token_time = self.model_execute_time


@dataclass(repr=False)
class CompletionOutput(Record):
    """What the model has written so far.

    index: place of this output in the list that the call returns: tells the requests of a stream apart.
    send_idx: how many outputs of this request were handed out before this one.
    token_ids: the output tokens, all of them: the end-of-sequence or stop token and those of a stop text included.
    text: their text, whole characters only; cut off where a stop text begins, without the end-of-sequence or stop
        token (see SamplingParams.include_stop_str_in_output), without what reasoning_content has.
    reasoning_content: what the model thought before it answered; None without a reasoning parser.
    logprobs: where asked for, one dict for each token of token_ids: id -> Logprob of the n most probable tokens, most
        probable first, and of the token itself in any case.
    finish_reason: None while unfinished; "stop" (end of sequence, stop token, stop text), "length" (max_tokens),
        "error".
    stop_reason: the id among stop_token_ids or the text among stop that ended the output; None for an end of sequence
        that is neither.
    delta, reasoning_delta: the parts of text and reasoning_content that no earlier output of this request had. All of
        them where the call does not stream.
    """

    index: int
    send_idx: int
    token_ids: list[int]
    text: str
    reasoning_content: str | None = None
    logprobs: list[dict[int, Logprob]] | None = field(default=None, repr=False)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    delta: str = field(default="", repr=False)
    reasoning_delta: str = field(default="", repr=False)

    _readers: ClassVar[Readers] = {"logprobs": _read_logprobs}

    @property
    def resoning_content(self) -> str | None:
        """reasoning_content, as an older manual spells it."""
        return self.reasoning_content


@dataclass(repr=False)
class RequestOutput(Record):
    """A request and what became of it so far.

    prompt: what the caller passed to generate (text or ids); for chat the text that the chat template made.
    outputs: one CompletionOutput (not a list).
    num_cached_tokens: prompt tokens whose keys and values were taken from an earlier request.
    error_code, error_msg: 200 and None, or why this request alone failed (400: it asks for more than the engine has;
        500: the model gave no valid token).
    prompt_logprobs: where asked for, None for the first token of the prompt, which nothing predicts, then a dict for
        each of the others as in CompletionOutput.logprobs.
    """

    request_id: str
    prompt: str | list[int]
    prompt_token_ids: list[int]
    outputs: CompletionOutput
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics, repr=False)
    num_cached_tokens: int = 0
    error_code: int = 200
    error_msg: str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = field(default=None, repr=False)

    _readers: ClassVar[Readers] = {
        "outputs": CompletionOutput.from_dict,
        "metrics": RequestMetrics.from_dict,
        "prompt_logprobs": _read_logprobs,
    }


# --- what the engine works on -------------------------------------------------------------------------------------


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one place as the runner gives them; the transcript makes dicts of them.

    token_id, logprob, rank: of the sampled token, or the one that the prompt has there; rank from 1.
    top_ids, top_logprobs: the n most probable tokens, most probable first, ties by lower id.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: Sequence[int] | np.ndarray
    top_logprobs: Sequence[float] | np.ndarray


@dataclass(eq=False, slots=True)
class Request:
    """One sequence. The scheduler owns block_table and num_computed; `append` alone adds a token.

    prompt is what the user gave, prompt_token_ids what became of it. sampling_params is a resolved copy, see
    `SamplingParams.resolved`. index is the request's place among the results of the call that made it. banned are
    token sequences that must not occur in the output, those of bad_words and bad_words_token_ids.
    """

    request_id: str
    prompt: str | list[int]
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    index: int = 0
    banned: list[tuple[int, ...]] = field(default_factory=list)
    thinking: ThinkingBudget | None = None  # for reasoning_max_tokens
    transcript: Transcript | None = None  # announces itself; stop texts are found in it

    token_ids: list[int] = field(init=False)  # prompt and output
    stop_token_ids: frozenset[int] = field(init=False)
    most_tokens: int = field(init=False)  # of prompt and output
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    foreseeable: bool = False  # what `next_step_is_foreseeable` said when it was queued
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache had when the request was first admitted

    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of each output token if asked for, else empty
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens 1, 2, ... so far

    finish_reason: str | None = None  # "stop", "length" or "error"
    stop_reason: int | str | None = None
    error_code: int = 200
    error_msg: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    _ends: frozenset[int] = field(init=False, repr=False)  # tokens that may end the output
    _has_stop_texts: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.stop_token_ids = frozenset(self.sampling_params.stop_token_ids or ())
        if self.sampling_params.ignore_eos:
            self.eos_token_ids = frozenset()
        self._ends = self.eos_token_ids | self.stop_token_ids
        self._has_stop_texts = bool(self.sampling_params.stop)
        most = self.sampling_params.max_tokens
        self.most_tokens = sys.maxsize if most is None else len(self.prompt_token_ids) + most

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logprobs are still to be computed: what they come from must not be taken from the cache."""
        wanted = self.sampling_params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.prompt_token_ids) - 1

    def next_step_is_foreseeable(self) -> bool:
        """Whether all but the id is known of the step that computes a token before the token is: nothing that the host
        does for the next one depends on it. (Where the token ends the output, there is no such step.)"""
        params = self.sampling_params
        reads_logits = params.logprobs is not None or params.prompt_logprobs is not None or params.logits_processors
        penalises = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        return not (reads_logits or penalises or self.banned or self.thinking is not None)

    def forced_token(self) -> int | None:
        """The token that must come next, to end a thinking that has used up its tokens; None: any may come."""
        if self.thinking is None:
            return None
        return self.thinking.forced(self.token_ids, len(self.prompt_token_ids))

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Add an output token; finish if it is the last one: see `conclude`."""
        if logprobs is not None:
            self.logprobs[self.num_output_tokens :] = [logprobs]  # an interrupted append may have left its own there
        self.token_ids.append(token_id)
        # Asked 256 times a step: `conclude` would double its cost.
        if token_id in self._ends or len(self.token_ids) >= self.most_tokens or self._has_stop_texts:
            self.conclude()

    def conclude(self) -> None:
        """Finish if the last output token says so; to be called again if an exception struck in the middle of it."""
        if self.finish_reason is not None:
            return
        last = self.token_ids[-1]
        found = self.transcript.find_stop() if self._has_stop_texts and self.transcript is not None else None
        if found is not None or self.ends_by_token():
            self.stop_reason = last if last in self.stop_token_ids else found  # before what says that it is there
            self.finish_reason = "stop"
        elif self.num_output_tokens == self.sampling_params.max_tokens:
            self.finish_reason = "length"

    def ends_by_token(self) -> bool:
        """Whether the last token is a stop or end-of-sequence token of the output that comes late enough to end it."""
        return self.token_ids[-1] in self._ends and self.num_output_tokens >= max(self.sampling_params.min_tokens, 1)

    def fail(self, code: int, message: str) -> None:
        """Finish with an error; the tokens so far are kept."""
        self.error_code = code
        self.error_msg = message
        self.finish_reason = "error"
