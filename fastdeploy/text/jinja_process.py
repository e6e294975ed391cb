"""The process that renders chat templates; `renderer.py` starts it and says why there is one.

Templates run in Jinja's sandbox, which gives them no way to Python's internals, files or modules. Options, filters and
functions are those that templates written for transformers expect:
https://huggingface.co/docs/transformers/chat_templating_writing

A request is a JSON object, and so is the answer:

    {"source": str, "messages": [...], "variables": {...}, "continue_final_message": bool}
    {"prompt": str, "unread": [variables that the template has no word of]}      or {"error": str, "exhausted": bool}

Without messages the template is only compiled.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastdeploy.text.messages import Unrenderable, adapted, cut_at_mark, mark_end

MAX_CHARS = 2**24  # of a prompt
MAX_MEMORY = 2**30  # bytes, above what the process has when it starts
MAX_ERROR_CHARS = 2000
ORPHAN_SECONDS = 60  # for an answer: `Renderer` waits less long, but may be killed while it does


class TooLongError(Exception):
    """The prompt has more characters than is allowed."""


@dataclass(frozen=True)
class Compiled:
    """A template, and what it has to do with the messages and variables that it gets."""

    template: jinja2.Template
    reads: frozenset[str]  # the variables that it has a word of
    takes_parts: bool  # see `messages.adapted`
    asks_for_none: bool


def main() -> None:
    """Answers the requests that come through standard input, a socket, until it closes."""
    connection = Connection(sys.stdin.fileno())
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MAX_MEMORY
    _, own_limit = resource.getrlimit(resource.RLIMIT_AS)
    if own_limit != resource.RLIM_INFINITY:
        limit = min(limit, own_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, whatever it is doing
    connection.send_bytes(b"ready")
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:  # the other process has ended
            return
        signal.alarm(ORPHAN_SECONDS)
        connection.send_bytes(json.dumps(answer(request)).encode())
        signal.alarm(0)


def answer(request: bytes) -> dict[str, Any]:
    """The answer to a request, whatever the template does."""
    try:
        return _rendered(json.loads(request))
    except TooLongError:
        return {"error": f"the chat template writes more than {MAX_CHARS} characters", "exhausted": True}
    except MemoryError:
        return {"error": f"the chat template takes more than {MAX_MEMORY >> 20} MiB of memory", "exhausted": True}
    except Unrenderable as error:
        return {"error": str(error)[:MAX_ERROR_CHARS]}
    except Exception as error:  # in making the text of an error
        return {"error": f"the chat template fails: {type(error).__name__}"}


def _rendered(given: dict[str, Any]) -> dict[str, Any]:
    compiled = _compiled(given["source"])
    if given["messages"] is None:
        return {}
    unread = [name for name in given["variables"] if name not in compiled.reads]
    if given["variables"].get("tools") and "tools" in unread:
        raise Unrenderable("the chat template has no place for tools: pass a chat_template that has, or no tools")
    try:
        return {"prompt": _prompt(compiled, given), "unread": unread}
    except (TooLongError, MemoryError, Unrenderable):
        raise
    except jinja2.TemplateError as error:
        raise Unrenderable(f"the chat template refuses these messages: {error.message}") from error
    except Exception as error:  # whatever the template's expressions raise: TypeError, OverflowError, RecursionError...
        raise Unrenderable(f"the chat template fails: {type(error).__name__}: {error}") from error


def _prompt(compiled: Compiled, given: dict[str, Any]) -> str:
    messages = [adapted(message, compiled.takes_parts, compiled.asks_for_none) for message in given["messages"]]
    last_text = mark_end(messages[-1]) if given["continue_final_message"] else None
    pieces, length = [], 0
    for piece in compiled.template.generate({**given["variables"], "messages": messages}):
        length += len(piece)
        if length > MAX_CHARS:
            raise TooLongError
        pieces.append(piece)
    prompt = "".join(pieces)
    return prompt if last_text is None else cut_at_mark(prompt, last_text)


@lru_cache(maxsize=16)
def _compiled(source: str) -> Compiled:
    """Raises Unrenderable for a broken template."""
    try:
        tree = ENVIRONMENT.parse(source)
        content = _names_of_content(tree)
        return Compiled(
            ENVIRONMENT.from_string(tree),
            frozenset(jinja2.meta.find_undeclared_variables(tree)),
            _takes_parts(tree, content),
            _asks_for_none(tree, content),
        )
    except MemoryError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise Unrenderable(f"the chat template is broken: line {error.lineno}: {error.message}") from error
    except Exception as error:  # of constants that are computed already, or nested too deeply
        raise Unrenderable(f"the chat template is broken: {type(error).__name__}: {error}") from error


# --- what a template does with a message's content -----------------------------------------------------------------


def _names_of_content(tree: nodes.Template) -> frozenset[str]:
    """Names of variables, keys and parameters under which the template has contents of messages."""
    names, size = {"content"}, 0
    values = list(_named_values(tree))
    while len(names) > size:
        size = len(names)
        names.update(name for name, value in values if _is_one_of(names, value))
    return frozenset(names)


def _named_values(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    """What `set` gives to variables, and calls to the parameters of macros."""
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            yield assign.target.name, assign.node
        elif isinstance(assign.target, nodes.NSRef):
            yield assign.target.attr, assign.node
    macros = {macro.name: [parameter.name for parameter in macro.args] for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            yield from zip(macros[call.node.name], call.args)
            yield from ((keyword.key, keyword.value) for keyword in call.kwargs)


def _is_one_of(names: Collection[str], node: nodes.Node | None) -> bool:
    """Whether an expression is the value under one of `names`, or what is left of it by a slice or a filter."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr in names
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_one_of(names, node.node)
    if isinstance(node, nodes.Getitem):
        return _is_const_of(names, node.arg)
    if isinstance(node, nodes.Call):
        is_get = isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
        return is_get and any(_is_const_of(names, argument) for argument in node.args[:1])
    if isinstance(node, nodes.CondExpr):
        return _is_one_of(names, node.expr1) or _is_one_of(names, node.expr2)
    if isinstance(node, (nodes.Or, nodes.And)):
        return _is_one_of(names, node.left) or _is_one_of(names, node.right)
    return isinstance(node, nodes.Filter) and _is_one_of(names, node.node)


def _is_const_of(names: Collection[str], node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value in names


FILTERS_OF_ITEMS = ("map", "select", "selectattr", "reject", "rejectattr")


def _takes_parts(tree: nodes.Template, content: Collection[str]) -> bool:
    """Whether the template goes through a content's parts, by a loop or a filter, or looks into one of them."""
    loops = (loop.iter for loop in tree.find_all(nodes.For))
    filters = (item.node for item in tree.find_all(nodes.Filter) if item.name in FILTERS_OF_ITEMS)
    accesses = tree.find_all((nodes.Getattr, nodes.Getitem))
    parts = (access.node for access in accesses if _key(access) in ("type", "text"))  # type: ignore[attr-defined]
    elements = (part.node for part in parts if isinstance(part, nodes.Getitem) and isinstance(_key(part), int))
    return any(_is_one_of(content, node) for node in chain(loops, filters, elements))


def _asks_for_none(tree: nodes.Template, content: Collection[str]) -> bool:
    """Whether the template tests if a content is none, as DeepSeek-R1's does, and knows of no empty one besides."""
    tests = any(_is_one_of(content, test.node) for test in tree.find_all(nodes.Test) if test.name == "none")
    compared = [compare.ops[0].expr for compare in tree.find_all(nodes.Compare) if _is_one_of(content, compare.expr)]
    return tests and not any(isinstance(other, nodes.Const) and other.value == "" for other in compared)


def _key(node: nodes.Node) -> Any:
    if isinstance(node, nodes.Getitem):
        return node.arg.value if isinstance(node.arg, nodes.Const) else None
    return node.attr if isinstance(node, nodes.Getattr) else None


# --- Jinja as transformers sets it up ------------------------------------------------------------------------------


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


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


ENVIRONMENT = _environment()
