"""python -m fastdeploy: a chat, and a file of requests that survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion

from fastdeploy.__main__ import batch_parser, chat_parser, main
from fastdeploy.batch import BatchRun, Line
from fastdeploy.engine.request import CompletionOutput, RequestOutput
from fastdeploy.sampling_params import SamplingParams
from fastdeploy.terminal import Conversation
from fastdeploy.text.tokenizer import load_tokenizer
from tests.smollm2 import MODEL, needs_smollm2

ENGINE = ["--quantization", "auto", "--max-model-len", "256", "--max-num-seqs", "4"]


# Options


def test_fields_are_options_of_the_same_name_with_their_docstring_as_help() -> None:
    given = vars(chat_parser().parse_args(["m", "--max-model-len", "none", "--top-p", "0.5", "--ignore-eos", "true"]))
    assert given == {"model": "m", "system": None, "max_model_len": None, "top_p": 0.5, "ignore_eos": True}
    assert "keep the k most probable tokens" in " ".join(chat_parser().format_help().split())
    assert "--max-num-batched-tokens" in batch_parser().format_help()


@pytest.mark.parametrize("word", ["--top-p=much", "--max-tokens=1.5", "--ignore-eos=maybe", "--no-such-option=1"])
def test_a_wrong_option_ends_the_program_with_status_2(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["m", word])
    assert ending.value.code == 2
    assert word.partition("=")[0] in capsys.readouterr().err


def test_a_wrong_value_is_an_error_message_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("")
    assert main(["run", "no-such-model", "--input", str(source), "--output", "o", "--top-p", "7"]) == 1
    assert "top_p=7" in capsys.readouterr().err
    assert main(["run", "m", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "o")]) == 1
    assert "none" in capsys.readouterr().err


# The chat


class ScriptedLLM:
    """Answers with given pieces of text, raises a piece that is an exception, keeps the conversations it was asked."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.asked: list[list[dict[str, str]]] = []

    def chat(self, messages: list[dict[str, str]], params: SamplingParams, stream: bool) -> Iterator[RequestOutput]:
        assert stream
        self.asked.append([dict(message) for message in messages])
        return self._stream(self.answers.pop(0))

    @staticmethod
    def _stream(pieces: list[Any]) -> Iterator[RequestOutput]:
        text = ""
        for piece in pieces:
            if isinstance(piece, BaseException):
                raise piece
            text += piece
            yield RequestOutput("id", "", [], CompletionOutput(0, 0, [], text, delta=piece))


def said(llm: ScriptedLLM, system: str | None = None) -> Conversation:
    return Conversation(llm, SamplingParams(), system)  # type: ignore[arg-type]


def test_a_turn_is_printed_as_it_grows_and_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    llm = ScriptedLLM(["Hel", "lo."], ["Fine."])
    conversation = said(llm, "Be kind.")
    conversation.turn("Hi")
    conversation.turn("How are you?")
    assert capsys.readouterr().out == "Hello.\nFine.\n"
    texts = [(message["role"], message["content"]) for message in llm.asked[1]]
    assert texts == [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "How are you?")]


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is() -> None:
    llm = ScriptedLLM(["One, ", "two, ", KeyboardInterrupt()], ["three."])
    conversation = said(llm)
    conversation.turn("Count!")
    conversation.turn("Go on!")
    assert [message["content"] for message in llm.asked[1]] == ["Count!", "One, two, ", "Go on!"]


def test_a_question_that_fails_is_reported_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = said(ScriptedLLM([ValueError("too long")], ["Yes."]))
    conversation.turn("A long one")
    assert "too long" in capsys.readouterr().out and conversation.messages == []
    conversation.turn("A short one")
    assert len(conversation.messages) == 2
    conversation.reset()
    assert conversation.messages == []


@needs_smollm2
def test_a_chat_over_a_pipe() -> None:
    """Two turns, a reset, and a turn that can know nothing of the first."""
    lines = "My name is Ada. What is my name?\n/reset\n\nWhat is 2 + 2?\n/exit\nnot read\n"
    command = [sys.executable, "-m", "fastdeploy", MODEL, *ENGINE[:4], "--temperature", "0", "--max-tokens", "12"]
    ended = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    shown = ended.stdout.splitlines()
    assert len(shown) == 4 and "/reset" in shown[0] and shown[2] == "A new conversation." and shown[1] and shown[3]


# A file of requests

LINES = [
    {"prompt": "Once upon a time", "max_tokens": 6},
    "not JSON",
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "n": 2, "custom_id": "two"},
    "",
    {"prompt_token_ids": [1, 2, 3], "logprobs": 1, "temperature": 0.5, "seed": 3},
    {"prompt": "x", "temprature": 1},
    {"prompt": "x" * 2000},
    {"messages": [[{"role": "user", "content": "Hi"}]]},
    {
        "custom_id": "chat",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "x", "messages": [{"role": "user", "content": "2 + 2?"}], "max_completion_tokens": 4},
    },
    {"custom_id": "text", "url": "/v1/completions", "body": {"prompt": "The sea", "max_tokens": 3, "stop": None}},
    {"custom_id": "bad", "url": "/v1/embeddings", "body": {"input": "x"}},
    "[" * 100_000,
    {"custom_id": "\ud800", "prompt": "x", "max_tokens": 1},  # half of a character
]


def write_lines(path: Path, lines: list[Any]) -> None:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n")


def answers(path: Path) -> dict[int, dict[str, Any]]:
    """By the number of the line that they answer, each once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({answer["line"] for answer in found}) == len(found)
    return {answer["line"]: answer for answer in found}


def run(source: Path, results: Path, *options: str) -> int:
    words = [*ENGINE, "--temperature", "0", "--max-tokens", "4", *options]
    return main(["run", MODEL, "--input", str(source), "--output", str(results), *words])


@needs_smollm2
def test_good_lines_are_answered_and_bad_ones_get_an_error(tmp_path: Path) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, LINES)
    assert run(source, results) == 0
    found = answers(results)
    assert sorted(found) == [1, 2, 3, *range(5, 14)]  # line 4 is blank
    assert found[1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    assert found[1]["choices"][0]["finish_reason"] == "length" and found[1]["choices"][0]["text"]
    assert found[3]["custom_id"] == "two" and [choice["index"] for choice in found[3]["choices"]] == [0, 1]
    assert len(found[5]["choices"][0]["logprobs"]) == 4  # the command line's max_tokens
    complaints = {2: "not JSON", 6: "temperature", 7: "max_model_len", 8: "conversation", 12: "not JSON"}
    for number, part in complaints.items():
        assert found[number]["error"]["code"] == 400 and part in found[number]["error"]["message"]
    chat, text, bad = (found[number] for number in (9, 10, 11))
    assert chat["response"]["status_code"] == 200
    assert chat["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert chat["response"]["body"]["usage"]["completion_tokens"] <= 4
    assert text["response"]["body"]["choices"][0]["text"] and text["custom_id"] == "text"
    assert bad["response"]["status_code"] == 400 and "url" in bad["response"]["body"]["error"]["message"]


@needs_smollm2
def test_a_killed_run_goes_on_without_redoing_or_losing_a_line(tmp_path: Path) -> None:
    """And answers as an uninterrupted one: lines draw from seeds of their own."""
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, [{"prompt": "Number", "max_tokens": 40} for _ in range(40)])
    options = ["--temperature", "1", "--ignore-eos", "true"]
    files = ["--input", str(source), "--output", str(results)]
    command = [sys.executable, "-m", "fastdeploy", "run", MODEL, *ENGINE, *options, *files]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    try:
        while not (results.exists() and results.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1].decode()
            time.sleep(0.01)
        assert run(source, results) == 1  # another run has the file
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    before = results.read_bytes()
    before = before[: before.rindex(b"\n") + 1]
    with results.open("ab") as file:
        file.write(b'{"line": 40, "dig')  # as a kill in the middle of a line would leave it
    assert before.count(b"\n") < 40, "the run was over before the kill: make it longer"
    assert run(source, results, *options) == 0
    assert results.read_bytes().startswith(before)
    assert sorted(answers(results)) == list(range(1, 41))
    whole = tmp_path / "whole.jsonl"
    assert run(source, whole, *options) == 0
    assert answers(whole) == answers(results)
    assert len({answer["choices"][0]["text"] for answer in answers(whole).values()}) > 35
    again = results.read_bytes()
    assert run(source, results) == 0 and results.read_bytes() == again  # nothing left to do


def test_an_output_of_another_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, [{"prompt": "b"}])
    strangers = ['{"text": "b"}\n', "[]\n", '{"line": [1], "digest": "0123"}\n', "no end of a line"]
    for content in ('{"line": 1, "digest": "0123"}\n', '{"line": 9, "digest": "0123"}\n', *strangers):
        results.write_text(content)
        assert run(source, results) == 1
        assert str(results) in capsys.readouterr().err
        assert results.read_text() == content


DEEP = "[" * 900 + "]" * 900
HOSTILE = [
    '{"prompt": "x", "n": 1000000000}',
    '{"prompt": ["x", "y"], "n": 10000}',
    '{"prompt": "x", "temperature": 1e400}',
    '{"prompt": "x", "max_tokens": 1e400}',
    '{"prompt": "x", "seed": ' + "9" * 5000 + "}",
    '{"prompt": "x", "top_k": ' + "9" * 400 + "}",
    '{"prompt": "\\ud800"}',
    '{"prompt": "x", "stop": "\\udfff"}',
    b'{"prompt": "\xff\xfe"}',
    b'\xff\xfe{\x00"\x00',
    "null",
    "NaN",
    '{"prompt": ["x", ["y"]]}',
    '{"prompt": []}',
    '{"prompt": "x", "self": 1}',
    '{"prompt": "x", "logits_processors": ["print"]}',
    '{"messages": ' + DEEP + "}",
    '{"messages": [{"role": "user", "content": ' + DEEP + "}]}",
    '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": 1}}',
    '{"messages": [], "prompt": "x"}',
    '{"url": [], "body": {}}',
    '{"url": "/v1/completions", "body": ' + DEEP + "}",
    '{"prompt": "' + "x" * 1_000_000 + '"}',
    '{"prompt": ' + str([1] * 300) + "}",
]


@needs_smollm2
def test_one_bad_line_never_costs_another(tmp_path: Path) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = b'{"prompt": "x\\u0000", "max_tokens": 1}'
    lines = [good, *(line if isinstance(line, bytes) else line.encode() for line in HOSTILE), good]
    lines += [b'{"prompt": "x", "custom_id": ' + DEEP.encode() + b"}"]  # may be read, but perhaps not be written
    source.write_bytes(b"\n".join(lines))
    assert run(source, results) == 0
    found = answers(results)
    assert sorted(found) == list(range(1, len(lines) + 1))
    last = len(HOSTILE) + 2
    assert found[1]["error"] is found[last]["error"] is None
    for number, line in enumerate(HOSTILE, start=2):
        error = found[number].get("error") or found[number]["response"]["body"]["error"]
        assert error["message"], line


@needs_smollm2
def test_several_prompts_of_a_line_have_their_choices_one_after_the_other(tmp_path: Path) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["The capital of France is", "2 + 2 =", "The capital of France is"]
    lines: list[dict[str, Any]] = [{"prompt": prompt, "temperature": 0} for prompt in prompts]
    lines += [{"prompt": prompts, "n": 2, "temperature": 0}, {"prompt": prompts, "n": 2, "temperature": 1}]
    lines += [{"prompt": "shown", "prompt_token_ids": [1, 2, 3], "temperature": 0}]
    write_lines(source, lines)
    assert run(source, results, "--max-tokens", "8") == 0
    found = answers(results)
    alone = [found[number]["choices"][0]["text"] for number in (1, 2, 3)]
    assert [choice["index"] for choice in found[4]["choices"]] == list(range(6))
    assert [choice["text"] for choice in found[4]["choices"]] == [text for text in alone for _ in range(2)]
    assert len({choice["text"] for choice in found[5]["choices"]}) == 6, "each draws with a seed of its own"
    assert found[4]["usage"]["prompt_tokens"] == sum(found[number]["usage"]["prompt_tokens"] for number in (1, 2, 3))
    assert found[4]["usage"]["completion_tokens"] == 48 and found[6]["usage"]["prompt_tokens"] == 3


@needs_smollm2
def test_openai_answers_are_what_the_openai_package_takes(tmp_path: Path) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": "Say 你好 and 👩"}]
    chat = {"messages": messages, "n": 2, "max_completion_tokens": 8, "logprobs": True, "top_logprobs": 2}
    bodies = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {"messages": messages, "response_format": {"type": "text"}, "model": "given"}),
        ("/v1/completions", {"prompt": ["Greetings 你好 你", "2 + 2"], "n": 2, "logprobs": 2, "max_tokens": 8}),
        ("/v1/completions", {"prompt": "x", "logprobs": 0, "echo": False, "best_of": 1, "stream": False}),
        ("/v1/completions", {"prompt": "x", "echo": True}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}),
    ]
    write_lines(source, [{"custom_id": str(i), "url": url, "body": body} for i, (url, body) in enumerate(bodies)])
    assert run(source, results) == 0
    found = answers(results)
    for number, (url, body) in enumerate(bodies, start=1):
        line, response = found[number], found[number]["response"]
        assert line["custom_id"] == str(number - 1) and isinstance(line["id"], str) and line["error"] is None
        assert isinstance(response["request_id"], str)
        if number > 4:
            assert response["status_code"] == 400
            error = ErrorObject.model_validate(response["body"]["error"], strict=True)
            assert ("echo" in error.message) == (number == 5) and error.type == "invalid_request_error"
            continue
        kind = ChatCompletion if "chat" in url else Completion
        completion = kind.model_validate(response["body"], strict=True)
        assert completion.model == body.get("model", MODEL) and abs(completion.created - time.time()) < 3600
        assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
        assert all(choice.finish_reason in ("stop", "length") for choice in completion.choices)
        assert not completion.model_extra and all(set(c.model_extra) <= {"stop_reason"} for c in completion.choices)
    for choice in found[1]["response"]["body"]["choices"]:
        content = ChatCompletion.model_validate(found[1]["response"]["body"]).choices[choice["index"]].logprobs.content
        assert [len(place.top_logprobs) for place in content] == [2] * len(content)
        said = b"".join(bytes(place.bytes) for place in content).decode(errors="replace")
        assert said.removesuffix("<|im_end|>") == choice["message"]["content"]
    for choice in Completion.model_validate(found[3]["response"]["body"]).choices:
        told = choice.logprobs
        for token, logprob, tops, offset in zip(
            told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
        ):
            assert choice.text[offset:].startswith(token) or "\ufffd" in token
            assert logprob <= max(tops.values()) and 1 <= len(tops) <= 3


class FakePanic(BaseException):
    """As what a library in Rust raises is none of Exception."""


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), KeyError("x"), FakePanic("at lib.rs")])
def test_whatever_a_line_raises_is_its_answer(error: BaseException, tmp_path: Path) -> None:
    with (tmp_path / "out.jsonl").open("w+b") as file:
        assert batch_run(error, file).answer([Line(1, b'{"prompt": "x"}')], 1) == 1
        file.seek(0)
        assert type(error).__name__ in json.loads(file.read())["error"]["message"]


def test_ctrl_c_while_a_line_is_read_ends_the_run(tmp_path: Path) -> None:
    with (tmp_path / "out.jsonl").open("w+b") as file, pytest.raises(KeyboardInterrupt):
        batch_run(KeyboardInterrupt(), file).answer([Line(1, b'{"prompt": "x"}')], 1)


def batch_run(error: BaseException, file: Any) -> BatchRun:
    """A run with a tokenizer that raises."""

    def read(prompts: object) -> None:
        raise error

    config = SimpleNamespace(max_num_seqs=2, chat_template=None)
    engine = SimpleNamespace(run=lambda requests, partial: iter([]))
    llm = SimpleNamespace(config=config, engine=engine, reader=SimpleNamespace(read=read))
    return BatchRun(llm, {}, file)  # type: ignore[arg-type]


@needs_smollm2
def test_a_line_may_say_how_its_prompt_ends(tmp_path: Path) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "The answer is"}]
    endings: list[dict[str, Any]] = [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": 1},
    ]
    write_lines(source, [{"messages": messages, "max_tokens": 1, **ending} for ending in endings])
    assert run(source, results) == 0
    found = answers(results)
    tokenizer = load_tokenizer(MODEL)
    prompts = [tokenizer.apply_chat_template(messages, **ending) for ending in endings[:3]]
    assert prompts[2].endswith("assistant\nThe answer is")
    assert [found[number]["usage"]["prompt_tokens"] for number in (1, 2, 3)] == [
        len(tokenizer.encode(prompt)) for prompt in prompts
    ]
    assert "both True" in found[4]["error"]["message"]
    assert "continue_final_message must be True or False" in found[5]["error"]["message"]


@needs_smollm2
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_run_needs_no_standard_error(tmp_path: Path, redirection: str) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, [{"prompt": "hi", "max_tokens": 1}])
    command = f"{sys.executable} -m fastdeploy run {MODEL} --max-model-len 64 --input {source} --output {results}"
    assert subprocess.run(f"{command} {redirection}", shell=True, timeout=300).returncode == 0
    assert answers(results)[1]["error"] is None
