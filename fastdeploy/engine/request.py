"""Request: one sequence on its way through the engine. RequestOutput: what the user gets of it.

A request's tokens are one list, prompt then output, and two numbers say how far it is:

    token_ids    | prompt .................... | output ........ |
    computed     | keys and values are in block_table's blocks |     |
                 0                            num_computed    len(token_ids)

A decode step computes the last token; a prefill computes many; after a preemption num_computed is 0 and the same
prefill path computes prompt and output again. So there are no phases to keep track of.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastdeploy.sampling_params import SamplingParams

UNSERVABLE = 400  # error_code: the request asks for more than this engine has
INTERNAL_ERROR = 500  # error_code: the engine could not do what it should have done


@dataclass
class RequestMetrics:
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


@dataclass(eq=False, slots=True)
class Request:
    """One sequence. The scheduler owns block_table and num_computed; a token is added by `append` alone.

    prompt is what the user gave, prompt_token_ids what became of it. sampling_params is a resolved copy: nothing in it
    is None. index is the request's place among the results of the call that made it.
    """

    request_id: str
    prompt: str | list[int]
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    index: int = 0

    token_ids: list[int] = field(init=False)  # prompt and output
    stop_token_ids: frozenset[int] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0

    finish_reason: str | None = None  # "stop", "length" or "error"
    stop_reason: int | None = None
    error_code: int = 200
    error_msg: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.stop_token_ids = frozenset(self.sampling_params.stop_token_ids or ())
        if self.sampling_params.ignore_eos:
            self.eos_token_ids = frozenset()

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    def append(self, token_id: int) -> None:
        """Add an output token; finish if it is a stop token or the last one allowed."""
        self.token_ids.append(token_id)
        self.conclude()

    def conclude(self) -> None:
        """Finish if the last output token says so."""
        last = self.token_ids[-1]
        if last in self.stop_token_ids:
            self.stop_reason = last
            self.finish_reason = "stop"
        elif last in self.eos_token_ids:
            self.finish_reason = "stop"
        elif self.num_output_tokens == self.sampling_params.max_tokens:
            self.finish_reason = "length"

    def fail(self, code: int, message: str) -> None:
        """Finish with an error; the tokens so far are kept."""
        self.error_code = code
        self.error_msg = message
        self.finish_reason = "error"


@dataclass
class CompletionOutput:
    """What the model has written so far.

    index: place of this output in the list that the call returns: tells the requests of a stream apart.
    send_idx: how many outputs of this request were handed out before this one.
    token_ids: the output tokens; the end-of-sequence or stop token included.
    text: their text, whole characters only; without the end-of-sequence or stop token.
    delta: the part of text that no earlier output of this request had. All of it where the call does not stream.
    reasoning_content: None without a reasoning parser.
    finish_reason: None while unfinished; "stop" (end of sequence, stop token), "length" (max_tokens), "error".
    stop_reason: the id among stop_token_ids that ended the output; None for an end-of-sequence token.
    """

    index: int
    send_idx: int
    token_ids: list[int]
    text: str
    delta: str = ""
    reasoning_content: str | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass
class RequestOutput:
    """A request and what became of it so far.

    prompt: what the caller passed to generate (text or ids); for chat the text that the chat template made.
    outputs: one CompletionOutput (not a list).
    num_cached_tokens: prompt tokens whose keys and values were taken from an earlier request.
    error_code, error_msg: 200 and None, or why this request alone failed (400: it asks for more than the engine has;
        500: the model gave no valid token).
    """

    request_id: str
    prompt: str | list[int]
    prompt_token_ids: list[int]
    outputs: CompletionOutput
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0
    error_code: int = 200
    error_msg: str | None = None
