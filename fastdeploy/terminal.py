"""A chat in the terminal: answers stream, the conversation goes on until /reset, Ctrl-C stops an answer.

    > Who wrote Hamlet?
    William Shakespeare.
    > When?                     the model sees what was said before

Standard input need not be a terminal: each line of it is a turn.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from fastdeploy.llm import LLM
from fastdeploy.sampling_params import SamplingParams

HELP = "/reset begins a new conversation, /exit or Ctrl-D ends the chat, Ctrl-C stops an answer"
PROMPT = "> "


def chat(engine: Mapping[str, Any], sampling: Mapping[str, Any], system: str | None = None) -> int:
    """Talk until the input ends. engine, sampling: fields of EngineConfig and of SamplingParams. Returns 0."""
    params = SamplingParams(**sampling)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its line editing and history)

    with LLM(**{"max_num_seqs": 1, **engine}) as llm:
        conversation = Conversation(llm, params, system)
        show(f"{llm.config.model} on {llm.facts['device']}. {HELP}.\n")
        while (line := next_line()) is not None:
            command = line.strip()
            if command in ("/exit", "/quit"):
                break
            if command == "/reset":
                conversation.reset()
                show("A new conversation.\n")
            elif command.startswith("/"):
                show(f"{HELP}.\n")
            elif command:
                conversation.turn(line)
    return 0


def next_line() -> str | None:
    """What the user says next; None at the end. Ctrl-C leaves the line and asks again."""
    while True:
        try:
            return input(PROMPT if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            show(f"\n{HELP}.\n")
        except EOFError:
            if sys.stdin.isatty():
                show("\n")
            return None


def show(text: str) -> None:
    print(text, end="", flush=True)


class Conversation:
    """The messages so far, and how the next one is answered.

    system: the message that every conversation begins with, or None.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self._params = params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._faint, self._plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self._opening)

    def turn(self, question: str) -> None:
        """Answer `question`, printing the answer as it grows.

        Ctrl-C stops the answer: what there is of it stays in the conversation. A question that can't be answered, say
        because the conversation is too long by now, is reported and forgotten.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            answer = self._streamed()
        except ValueError as error:
            self.messages.pop()
            show(f"{error}\n/reset begins a new conversation.\n")
        else:
            self.messages.append({"role": "assistant", "content": answer})

    def _streamed(self) -> str:
        """The answer to the last message, printed delta by delta; thoughts are faint and no part of it."""
        answer = ""
        stream = self._llm.chat(self.messages, self._params, stream=True)
        try:
            with contextlib.closing(stream):  # type: ignore[type-var]
                for output in stream:
                    if output.error_msg:
                        raise ValueError(output.error_msg)
                    if output.outputs.reasoning_delta:
                        show(f"{self._faint}{output.outputs.reasoning_delta}{self._plain}")
                    show(output.outputs.delta)
                    answer = output.outputs.text
        except KeyboardInterrupt:
            show(" ...")
        show("\n")
        return answer
