"""The messages of a conversation: checked where they come in, and given the form that a chat template expects.

OpenAI's form is what people have: fields that are None, the arguments of a tool call as JSON text, a text in parts.
Templates are written for transformers, where a field that says nothing is absent and arguments are an object.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

# transformers' own, which a few templates look for. Its space shows whether the template trims what it is given.
MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """A copy of the messages as JSON has them; each may be a dict, or an object of the `openai` package.

    Raises TypeError or ValueError, naming the place, for anything else, and unless each has a "role" and a "content",
    text or a list of {"type": "text", "text": ...}. A message with "tool_calls" needs no content.
    """
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages must be a list of dicts with 'role' and 'content', found {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty; a conversation needs at least one message")
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _checked_message(name: str, given: object) -> dict[str, Any]:
    message = plain(name, given)
    if not isinstance(message, dict):
        raise TypeError(f"{name} must be a dict with 'role' and 'content', found {_described(message)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise TypeError(f"{name}['tool_calls'] must be a list of dicts, found {_described(calls)}")
    for key in ("role",) if calls else ("role", "content"):
        if key not in message:
            raise ValueError(f"{name} has no {key!r}; found the keys {list(message)}")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str):
        raise TypeError(f"{name}['role'] must be a str, found {_described(role)}")
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(f"{name}['content'][{index}]", part)
    elif not isinstance(content, str) and not (content is None and calls):
        must = "must be a str or a list of {'type': 'text', 'text': ...}"
        raise TypeError(f"{name}['content'] {must}, found {_described(content)}")
    return message


def _check_part(name: str, part: Any) -> None:
    if not isinstance(part, dict):
        raise TypeError(f"{name} must be a dict {{'type': 'text', 'text': ...}}, found {_described(part)}")
    if part.get("type") != "text":
        raise ValueError(f"{name} is of type {reprlib.repr(part.get('type'))}: this engine takes 'text' only")
    if not isinstance(part.get("text"), str):
        raise TypeError(f"{name}['text'] must be a str, found {_described(part.get('text'))}")


def _described(value: object) -> str:
    return f"{type(value).__name__}: {reprlib.repr(value)}"


def plain(name: str, value: object) -> Any:
    """A copy of `value` as JSON has it, which is all that a template may see.

    Mappings and objects of pydantic become dicts. Raises TypeError or ValueError with `name` if JSON can't say it.
    """
    try:
        return json.loads(json.dumps(value, default=_as_dict))
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be made of what JSON has: {error}") from None


def _as_dict(value: Any) -> dict:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump()
    raise TypeError(f"found {_described(value)}")


def adapted(given: dict[str, Any], takes_parts: bool, asks_for_none: bool) -> dict[str, Any]:
    """A checked message as a template expects it; what is in `given` may be changed.

    takes_parts: the template looks into a content that is a list; for others a text in parts is joined by line breaks.
    asks_for_none: it tells a tool call without text by a content that is none; otherwise fields that are None go.
    """
    message = Message({key: value for key, value in given.items() if value is not None})
    if asks_for_none:
        message.setdefault("content", None)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = Parts(content) if takes_parts else str(Parts(content))
    for call in message.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = read_arguments(function["arguments"])
    return message


class Message(dict):
    """A message with or without content: Qwen3's template, like many, adds its text to others without looking whether
    there is one."""

    def __missing__(self, key: str) -> str:
        if key == "content":
            return ""
        raise KeyError(key)


class _AlsoText:
    """Is text, too, where a template writes it out or adds text to it."""

    def __add__(self, other: Any) -> str:
        return str(self) + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return other + str(self) if isinstance(other, str) else NotImplemented


class Parts(_AlsoText, list):  # type: ignore[misc]  # + with text gives text
    """The content of a message in parts. Templates that look into a user's parts expect text of the system, say."""

    def __str__(self) -> str:
        return "\n".join(part["text"] for part in self)


class Arguments(_AlsoText, dict):
    """The arguments of a tool call. Some templates look into them, others write them out as the JSON text they were."""

    def __init__(self, values: dict[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text


def read_arguments(text: str) -> dict[str, Any] | str:
    """The object that `text` is, no arguments if it is empty, and `text` itself if it is no JSON object."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return Arguments(values, text or "{}") if isinstance(values, dict) else text


class Unrenderable(ValueError):
    """A template and a conversation don't fit; the text says all."""


def mark_end(message: dict[str, Any]) -> str:
    """Append MARK to the text of an adapted message; returns the text that it had. Raises Unrenderable for none."""
    content = message.get("content")
    if not isinstance(content, str) and not content:
        raise Unrenderable("continue_final_message: the last message has no content to continue")
    if isinstance(content, str):
        message["content"] = content + MARK
        return content
    last = content[-1]
    text, last["text"] = last["text"], last["text"] + MARK
    return text


def cut_at_mark(prompt: str, text: str) -> str:
    """`prompt` up to the end of the last message's text. Raises Unrenderable if it doesn't have this text."""
    end = prompt.rfind(MARK.rstrip())
    if end < 0 or text.strip() not in prompt:
        raise Unrenderable(
            "continue_final_message: the chat template doesn't write the last message as it is, "
            "so there is no end to continue from"
        )
    trimmed = "" if prompt.startswith(MARK, end) else text[len(text.rstrip()) :]
    return prompt[:end].removesuffix(trimmed)
