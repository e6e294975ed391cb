"""Answer a file of requests: `python -m fastdeploy run MODEL --input prompts.jsonl --output results.jsonl`.

A line of the input is a JSON object:

    {"prompt": "Once upon a time", "max_tokens": 32}                  text, a list of token ids, or a list of prompts
    {"messages": [{"role": "user", "content": "Hi"}], "seed": 7}      with "tools" and others of CHAT_KEYS if wanted
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}      a line of OpenAI's batches

All other keys are fields of SamplingParams, but for "custom_id", which comes back. An answer is a line of the output,
written as soon as it is finished, so in no order; "line" counts the input's lines from 1:

    {"line": 1, "digest": "5f0c...", "custom_id": ..., "error": null, "usage": {"prompt_tokens": 4, ...},
     "choices": [{"index": 0, "text": "...", "finish_reason": "length"}]}

Several prompts have their choices one after the other, each with its n. A line that can't be answered, whatever is
wrong with it, has {"error": {"code": 400, "message": ...}} and no choices; to have it tried again, delete it from the
output. OpenAI's lines are answered in OpenAI's form, which has all this in "response" (openai_form.py).

Killed and started again, it answers the lines that the output does not have yet. What makes this safe: an answer is
written whole or, if the kill strikes there, its line lacks the end and is cut off; and each answer has a digest of the
line that it answers, so that an input that has changed is noticed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fastdeploy.device.host import progress_bar, tell
from fastdeploy.engine.request import INTERNAL_ERROR, UNSERVABLE, Request, RequestOutput
from fastdeploy.intake import Requests
from fastdeploy.llm import LLM
from fastdeploy.openai_form import CHAT, ChoiceWriter, openai_body, openai_error, openai_request
from fastdeploy.prompts import Prompt, template_variables
from fastdeploy.sampling_params import MAX_N, SamplingParams

logger = logging.getLogger("fastdeploy")

INPUTS = ("prompt", "prompt_token_ids", "messages")
# Keys beside "messages", arguments of `LLM.chat`.
CHAT_KEYS = ("chat_template_kwargs", "tools", "add_generation_prompt", "continue_final_message")
BEGINNING = b'{"line": '  # of every answer


def answer_file(engine: Mapping[str, Any], sampling: Mapping[str, Any], input: str, output: str) -> int:
    """Answer the lines of the file `input` that the file `output` has no answer to; append these to it.

    engine: fields of EngineConfig. sampling: fields of SamplingParams, for lines that don't name them. Returns the exit
    status: 0, also if some lines were answered with an error. Raises OSError for files that can't be read or written,
    ValueError if `output` belongs to another input or is being written by another run.
    """
    SamplingParams(**sampling)  # wrong for all lines: an error of its own, before the model is loaded
    lines = read_lines(Path(input))
    with Path(output).open("a+b") as file:
        lock(file)
        done = finished_lines(file, lines)
        missing = [line for line in lines if line.number not in done]
        tell(f"{input}: {len(lines)} lines, {len(done)} of them answered in {output}")
        if not missing:
            return 0
        with LLM(**engine) as llm:
            num_errors = BatchRun(llm, sampling, file).answer(missing, len(lines))
    tell(f"{output}: all lines answered" + (f", {num_errors} of them with an error" if num_errors else ""))
    return 0


@dataclass(frozen=True)
class Line:
    """A line of the input: its number from 1, and its bytes."""

    number: int
    content: bytes

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.content, digest_size=8).hexdigest()

    def seed(self, origin: int) -> int:
        """For a line that names none: a function of its number and the engine's seed."""
        digest = hashlib.blake2b(f"{origin}/{self.number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


@dataclass
class Task:
    """A line on its way: what it asks for, and what is there of its answer."""

    line: Line
    given: Mapping[str, Any] = field(default_factory=dict)  # the line's JSON, if it is an object
    requests: Requests | None = None
    choices: list[dict[str, Any]] = field(default_factory=list)  # in the order in which they were finished
    num_output_tokens: int = 0
    error: dict[str, Any] | None = None  # {"code": ..., "message": ...}

    @property
    def is_openai(self) -> bool:
        return "body" in self.given

    @property
    def is_chat(self) -> bool:
        return self.given.get("url") == CHAT

    @property
    def sorted_choices(self) -> list[dict[str, Any]]:
        return sorted(self.choices, key=lambda choice: choice["index"])

    @property
    def usage(self) -> dict[str, int]:
        orders = () if self.requests is None else self.requests.orders
        num_prompt, num_output = sum(len(order.prompt.token_ids) for order in orders), self.num_output_tokens
        return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}

    def fail(self, error: BaseException) -> None:
        """Take an exception, of whatever kind, for the answer."""
        self.error = {"code": UNSERVABLE, "message": str(error)}
        if not isinstance(error, (ValueError, TypeError)):  # those say what is wrong with the line
            logger.warning("line %d can't be answered", self.line.number, exc_info=error)
            self.error = {"code": INTERNAL_ERROR, "message": f"{type(error).__name__}: {error}"}


def read_lines(path: Path) -> list[Line]:
    """The lines of the input that are not blank."""
    with path.open("rb") as file:
        lines = (Line(number, content.strip()) for number, content in enumerate(file, start=1))
        return [line for line in lines if line.content]


def lock(file: BinaryIO) -> None:
    """Keep the file for this run. Raises ValueError if another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file.name} is being written by another run") from None


def finished_lines(file: BinaryIO, lines: list[Line]) -> set[int]:
    """The numbers of the lines that the output has an answer to; an incomplete last line is cut off.

    Raises ValueError if the output has answers to other lines than these.
    """
    digests = {line.number: line.digest for line in lines}
    done = set()
    file.seek(0)
    end = 0
    for content in file:
        stranger = f"{file.name} has a line that is no answer of this program: {content[:80]!r}"
        if not content.endswith(b"\n"):
            if not content.startswith(BEGINNING) and not BEGINNING.startswith(content):
                raise ValueError(stranger)
            break
        end += len(content)
        try:
            answer = json.loads(content)
            number, digest = answer["line"], answer["digest"]
            is_known = digests.get(number) == digest
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(stranger) from None
        if not is_known:
            raise ValueError(
                f"{file.name} has the answer to another line {number} than the input has now: name another output"
            )
        done.add(number)
    file.truncate(end)
    file.seek(end)
    return done


class BatchRun:
    """Answers lines in the order of the input, twice as many at a time as the engine computes in a step."""

    def __init__(self, llm: LLM, sampling: Mapping[str, Any], file: BinaryIO) -> None:
        self._llm = llm
        self._sampling = sampling
        self._file = file
        self._num_errors = 0

    def answer(self, lines: list[Line], num_lines: int) -> int:
        """Answer `lines`, which are what is left of `num_lines`; returns how many got an error."""
        with progress_bar(total=num_lines, initial=num_lines - len(lines), desc="Lines", dynamic_ncols=True) as bar:
            for task in self._finished(iter(lines)):
                self._write(task)
                bar.update()
        return self._num_errors

    def _finished(self, lines: Iterator[Line]) -> Iterator[Task]:
        """The tasks of the lines, each when it is finished.

        Lines are queued in slices of as many as fit in a step. The next slice is queued as soon as what is unfinished
        would no longer fill two steps, so that the engine never waits for lines.
        """
        size = self._llm.config.max_num_seqs
        slices: list[Iterator[list[Task]]] = []
        unfinished, more = 0, True
        while more or slices:
            while more and unfinished < 2 * size:
                tasks = [self._task(line) for line in itertools.islice(lines, size)]
                more = len(tasks) == size
                unfinished += len(tasks)
                slices.append(self._run(tasks))
            for steps in list(slices):
                found = next(steps, None)
                if found is None:
                    slices.remove(steps)
                    continue
                unfinished -= len(found)
                yield from found

    def _run(self, tasks: list[Task]) -> Iterator[list[Task]]:
        """The tasks that each step finishes; first of all those that have failed already."""
        yield [task for task in tasks if task.requests is None]
        owners: dict[str, tuple[Task, SamplingParams]] = {}  # of the requests that are made
        for outputs in self._llm.engine.run(_made(tasks, owners), partial=False):
            finished = []
            for output in outputs:
                task, params = owners.pop(output.request_id)
                choice: dict[str, Any] = {}
                if output.error_msg is not None:  # this request alone failed; the line has no answer then
                    task.error = {"code": output.error_code, "message": output.error_msg}
                elif task.is_openai:
                    choice = ChoiceWriter(task.is_chat, params, self._llm.tokenizer).choice(output)
                else:
                    choice = own_choice(output)
                task.choices.append(choice)
                task.num_output_tokens += len(output.outputs.token_ids)
                if task.requests is not None and len(task.choices) == len(task.requests):
                    finished.append(task)
            yield finished

    def _task(self, line: Line) -> Task:
        """The line, read and checked; with an error if it can't be answered."""
        task = Task(line)
        try:
            task.given = parsed(line.content)
            request = openai_request(task.given) if task.is_openai else dict(task.given)
            request.pop("custom_id", None)
            task.requests = self._requests(request, line)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # the one gate: whatever a line does, to a library that panics too
            task.fail(error)
        return task

    def _requests(self, request: dict[str, Any], line: Line) -> Requests:
        """What the engine has to run for a line. Raises TypeError or ValueError for a bad one."""
        prompts = self._prompts(request)
        params = SamplingParams(**{**self._sampling, **request})
        if len(prompts) * params.n > MAX_N:  # its choices are held until all are there
            raise ValueError(f"{len(prompts)} prompts with n={params.n}: a line has at most {MAX_N} choices")
        if params.seed is not None:
            return self._llm.intake.requests(prompts, params)
        # Not the engine's next seed: a run that goes on would draw those of its beginning again.
        params = dataclasses.replace(params, seed=line.seed(self._llm.config.seed))
        seeds = [params.for_sample(place * params.n).seed for place in range(len(prompts))]
        return self._llm.intake.requests(prompts, [dataclasses.replace(params, seed=seed) for seed in seeds])

    def _prompts(self, request: dict[str, Any]) -> list[Prompt]:
        """Takes the prompts out of a request."""
        reader, template = self._llm.reader, self._llm.config.chat_template
        found = {key: request.pop(key) for key in INPUTS if key in request}
        if "messages" in found and len(found) == 1:
            messages = found["messages"]
            variables = template_variables(**{key: request.pop(key) for key in CHAT_KEYS if key in request})
            if isinstance(messages, list) and messages and isinstance(messages[0], list):
                raise TypeError("'messages' is several conversations: a line is one, a list of messages")
            return reader.read_chat(messages, template, variables)
        if "messages" in found or not found:
            raise ValueError(f"a line has one of {', '.join(map(repr, INPUTS))}, this one has {list(found) or 'none'}")
        prompts = reader.read(found if "prompt_token_ids" in found else found["prompt"])
        if not prompts:
            raise ValueError("'prompt' is an empty list: a line has at least one prompt")
        return prompts

    def _write(self, task: Task) -> None:
        """Append the answer, whole or not at all as far as a kill lets it."""
        try:
            content = self._written(task)
        except Exception as error:  # a custom_id that JSON can be read from, but not written to: too deep
            task.given = {}
            task.fail(error)
            content = self._written(task)
        self._num_errors += task.error is not None
        self._file.write(content + b"\n")
        self._file.flush()
        task.choices.clear()  # thousands, perhaps, and the others of its slice may take long

    def _written(self, task: Task) -> bytes:
        answer = openai_answer(task, self._llm.config.model) if task.is_openai else own_answer(task)
        try:
            return json.dumps(answer, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair, in a custom_id say
            return json.dumps(answer).encode()


def _made(tasks: list[Task], owners: dict[str, tuple[Task, SamplingParams]]) -> Iterator[Request]:
    """The requests of the tasks, each noted in `owners`."""
    for task in tasks:
        for request in task.requests or ():
            owners[request.request_id] = (task, request.sampling_params)
            yield request


def parsed(content: bytes) -> dict[str, Any]:
    """The JSON object that a line is. Raises ValueError if it is none."""
    try:
        given = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"a line is a JSON object, not {type(given).__name__}")
    return given


def own_answer(task: Task) -> dict[str, Any]:
    """A line of the output."""
    answer = _heading(task) | {"error": task.error}
    return answer if task.error else {**answer, "usage": task.usage, "choices": task.sorted_choices}


def openai_answer(task: Task, model: str) -> dict[str, Any]:
    """A line of the output in the form of OpenAI's batches; "line" and "digest" come on top.

    model: what is named where the line names none.
    """
    if task.error is not None:
        status, body = task.error["code"], openai_error(task.error)
    else:
        asked = task.given["body"].get("model")
        named = asked if isinstance(asked, str) else model
        status, body = 200, openai_body(task.is_chat, named, task.sorted_choices, task.usage)
    number = uuid.uuid4().hex
    response = {"status_code": status, "request_id": number, "body": body}
    return {**_heading(task), "id": f"batch_req_{number}", "response": response, "error": None}


def _heading(task: Task) -> dict[str, Any]:
    named = {"custom_id": task.given["custom_id"]} if "custom_id" in task.given else {}
    return {"line": task.line.number, "digest": task.line.digest, **named}


def own_choice(output: RequestOutput) -> dict[str, Any]:
    """What the model said, with what was asked for besides."""
    said = output.outputs
    extras = {"reasoning_content": said.reasoning_content, "stop_reason": said.stop_reason}
    if said.logprobs is not None:
        extras["logprobs"] = said.to_dict()["logprobs"]
    if output.prompt_logprobs is not None:
        extras["prompt_logprobs"] = output.to_dict()["prompt_logprobs"]
    named = {name: value for name, value in extras.items() if value is not None}
    return {"index": said.index, "text": said.text, "finish_reason": said.finish_reason, **named}
