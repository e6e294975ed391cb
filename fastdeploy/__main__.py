"""The command line.

    python -m fastdeploy MODEL                                                   chat in the terminal
    python -m fastdeploy run MODEL --input prompts.jsonl --output results.jsonl  answer a file of requests

Every field of `EngineConfig` and every simple field of `SamplingParams` is an option of the same name: --max-model-len,
--temperature. What is given for sampling holds for all answers; a line of a file may say otherwise for itself. --seed
is the engine's, from which every answer's own seed is made.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from fastdeploy.device.host import open_standard_streams, tell
from fastdeploy.engine_config import EngineConfig
from fastdeploy.sampling_params import SamplingParams

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
SIMPLE = (int, float, str, bool)  # what one word of a command line can say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. arguments: None for those of the process."""
    open_standard_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_batch = words[:1] == ["run"]
    given = vars(batch_parser().parse_args(words[1:]) if is_batch else chat_parser().parse_args(words))
    engine = {field.name: given.pop(field.name) for field in dataclasses.fields(EngineConfig) if field.name in given}
    if is_batch:
        engine.setdefault("max_num_seqs", 32)  # a file is about throughput, a chat has one request at a time
    sampling = {f.name: given.pop(f.name) for f in dataclasses.fields(SamplingParams) if f.name in given}
    try:
        if is_batch:
            from fastdeploy.batch import answer_file

            return answer_file(engine, sampling, **given)
        from fastdeploy.terminal import chat

        return chat(engine, sampling, **given)
    except KeyboardInterrupt:
        tell("\nstopped" + (": the same command goes on from here" if is_batch else ""))
        return INTERRUPTED
    except (OSError, ValueError, TypeError, MemoryError, RuntimeError) as error:
        tell(f"error: {error}")
        return 1


def chat_parser() -> argparse.ArgumentParser:
    """Options of the chat."""
    parser = argparse.ArgumentParser(
        "python -m fastdeploy",
        description="Chat with a model in the terminal. To answer a file of requests: python -m fastdeploy run --help",
    )
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message, which begins every conversation")
    add_fields(parser, EngineConfig, "engine", without=("model",))
    add_fields(parser, SamplingParams, "sampling", without=("n", "seed", "logprobs", "prompt_logprobs"))
    return parser


def batch_parser() -> argparse.ArgumentParser:
    """Options of `run`."""
    parser = argparse.ArgumentParser(
        "python -m fastdeploy run", description="Answer a file of requests. How its lines look: fastdeploy/batch.py"
    )
    add_model(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help="requests, one JSON object a line")
    parser.add_argument(
        "--output", required=True, metavar="FILE",
        help="answers, one a line, appended as they are finished; lines of the input that it has already are skipped",
    )  # fmt: skip
    add_fields(parser, EngineConfig, "engine", without=("model",))
    add_fields(parser, SamplingParams, "sampling, where a line says nothing", without=("seed",))
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a .gguf file, a checkpoint directory, or a package that carries a .gguf file"
    )


def add_fields(parser: argparse.ArgumentParser, cls: type, title: str, without: Sequence[str]) -> None:
    """An option for each field of the dataclass that one word can say; its help is what the docstring says of it."""
    group = parser.add_argument_group(title)
    hints, texts = typing.get_type_hints(cls, localns={"LogitsProcessor": object}), documented(cls)
    for field in dataclasses.fields(cls):
        kinds = [kind for kind in (typing.get_args(hints[field.name]) or (hints[field.name],)) if kind in SIMPLE]
        if kinds and field.name not in without:
            group.add_argument(
                "--" + field.name.replace("_", "-"), dest=field.name, type=reader(kinds), default=argparse.SUPPRESS,
                metavar=kinds[0].__name__.upper(), help=texts[field.name].replace("%", "%%"),
            )  # fmt: skip


def reader(kinds: Sequence[type]) -> Callable[[str], Any]:
    """What makes a value of an option's word: the first of `kinds` that takes it; "none" is None."""

    def read(word: str) -> Any:
        if word.lower() == "none":
            return None
        if bool in kinds and word.lower() in ("true", "false"):
            return word.lower() == "true"
        for kind in kinds:
            try:
                return kind(word) if kind is not bool else int("not a truth value")
            except ValueError:
                continue
        raise argparse.ArgumentTypeError(f"{word!r} is no {' or '.join(kind.__name__ for kind in kinds)}")

    return read


def documented(cls: type) -> dict[str, str]:
    """What the class's docstring says of each field, in lines `name: text` or `name, other: text`."""
    paragraphs = re.split(r"\n(?=    \w+(?:, \w+)*: )", cls.__doc__ or "")
    found: dict[str, str] = {}
    for paragraph in paragraphs[1:]:
        names, _, text = paragraph.partition(":")
        words = " ".join(text.split("\n\n")[0].split())
        found |= dict.fromkeys(names.replace(",", " ").split(), words)
    return found


if __name__ == "__main__":
    sys.exit(main())
