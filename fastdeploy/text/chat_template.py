"""Renders a conversation with a model's Jinja chat template.

Templates come with checkpoints, from anybody: they run in Jinja's sandbox, which gives them no way to Python's
internals, files or modules. Options, filters and functions are those that templates written for transformers expect:
https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(template: str, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
    """The prompt for `messages`.

    `template`: Jinja source, or the path of a file with it. `variables`: what else the template may use.
    Raises TypeError or ValueError for messages that aren't dicts with "role" and "content", FileNotFoundError for a
    missing file, and ValueError with the template's own message if it is broken or refuses the conversation, or if it
    knows of no tools and there are some.
    """
    check_messages(messages)
    jinja_template = compiled(template)
    if variables.get("tools") and "tools" not in _source(template):
        raise ValueError("the chat template has no place for tools: pass a chat_template that has, or no tools")
    try:
        return jinja_template.render({**variables, "messages": messages})
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error.message}") from error
    except Exception as error:  # whatever the template's expressions raise: TypeError, OverflowError, RecursionError...
        raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error


def compiled(template: Any) -> jinja2.Template:
    """`template`, Jinja source or the path of a file with it, ready to render.

    Raises TypeError if it isn't a str, FileNotFoundError for a missing file, ValueError for a broken template.
    """
    source = _source(template)
    try:
        return _compile(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is broken: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise ValueError(f"the chat template is broken: {error}") from error


def check_messages(messages: Any) -> None:
    """Raises TypeError or ValueError, naming the index, unless `messages` is a non-empty list of chat messages."""
    if not isinstance(messages, list):
        raise TypeError(f"messages must be a list of dicts with 'role' and 'content', found {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty; a conversation needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise TypeError(f"messages[{index}] must be a dict with 'role' and 'content', found {kind}: {message!r}")
        optional = {"content"} if message.get("tool_calls") else set()  # a call of a tool may stand without text
        for key in ("role", "content"):
            value = message.get(key)
            if key not in message and key not in optional:
                raise ValueError(f"messages[{index}] has no {key!r}; found the keys {list(message)}")
            if not isinstance(value, str) and not (value is None and key in optional):
                raise TypeError(f"messages[{index}][{key!r}] must be a str, found {type(value).__name__}: {value!r}")


def _source(template: Any) -> str:
    if not isinstance(template, str):
        raise TypeError(f"a chat template must be a str, found {type(template).__name__}")
    if "{" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise FileNotFoundError(f"chat_template {template!r} is neither a Jinja template nor an existing file")
    return path.read_text(encoding="utf-8")


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


class GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words for training; here it's only its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 looks for a set)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes <, > and & for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
