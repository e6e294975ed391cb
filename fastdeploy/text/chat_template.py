"""Chat templates: where they are found, which one is taken, and the prompt that it makes of a conversation.

A checkpoint's template is text, whatever it looks like; only what a caller gives may be the path of a file.
"""

from __future__ import annotations

import json
import logging
import os
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastdeploy.fields import Fields
from fastdeploy.models.storage import read_json
from fastdeploy.text.messages import checked_messages, plain
from fastdeploy.text.renderer import RENDERER

logger = logging.getLogger("fastdeploy")

Templates = str | dict[str, str] | None  # Jinja source; several by name, of which "default" is for plain conversations
MAX_FILE_BYTES = 2**22  # of a template: the longest published ones have 2^15
_warned: set[tuple[str, str]] = set()  # (source, variable) of the warnings that were given


def render(
    source: str,
    messages: object,
    variables: Mapping[str, Any],
    continue_final_message: bool = False,
    optional: Collection[str] = (),
) -> str:
    """The prompt for `messages`.

    source: Jinja source. variables: what else the template may use. continue_final_message: the prompt ends with the
    text of the last message. optional: those of `variables` that are worth a warning if the template never reads them.
    Raises TypeError or ValueError for what `checked_messages` refuses and for variables that JSON can't say; and
    ValueError, with the template's own message, if it is broken or refuses the conversation, if it takes more time or
    memory or writes more than `renderer.py` allows, or if it knows of no tools and there are some.
    """
    request = {
        "source": source,
        "messages": checked_messages(messages),
        "variables": {name: plain(f"variable {name!r}", value) for name, value in variables.items()},
        "continue_final_message": continue_final_message,
    }
    answer = RENDERER.ask(json.dumps(request).encode())
    for name in answer["unread"]:
        if name in optional and (source, name) not in _warned:
            _warned.add((source, name))
            unread = "the chat template has no variable %r: what chat_template_kwargs says of it does nothing"
            logger.warning(unread, name)
    return answer["prompt"]


def check(source: str) -> None:
    """Raises ValueError if `source` is no Jinja template."""
    RENDERER.ask(json.dumps({"source": source, "messages": None}).encode())


def given_source(given: object) -> str:
    """What a caller gave as chat_template=, Jinja source or the path of a file with it, as Jinja source.

    Raises TypeError if it is no str and no path, FileNotFoundError for a missing file, ValueError for one that is no
    text.
    """
    if not isinstance(given, (str, os.PathLike)):
        must = "must be a str, Jinja source or the path of a file"
        raise TypeError(f"a chat template {must}, found {type(given).__name__}: {reprlib.repr(given)}")
    path = os.path.expanduser(given)
    if os.path.isfile(path):
        return _text_of(Path(path))
    if isinstance(given, str) and "{" in given:
        return given
    shown = reprlib.repr(os.fspath(given))
    raise FileNotFoundError(f"chat_template {shown} is neither a Jinja template nor an existing file")


def choose(own: Templates, given: object, has_tools: bool) -> str:
    """The Jinja source to use, of the tokenizer's own templates and of what the caller gave, as transformers does it.

    `given`: as in `given_source`, or the name of one of several own templates. Without it "tool_use" is for a
    conversation with tools, "default" for all others. Raises what `given_source` does, and ValueError if there is none.
    """
    if isinstance(own, dict) and isinstance(given, str) and given in own:
        return own[given]
    if given is not None:
        return given_source(given)
    if own is None:
        raise ValueError("this tokenizer has no chat template; pass chat_template=, or use generate()")
    if isinstance(own, str):
        return own
    name = "tool_use" if has_tools and "tool_use" in own else "default"
    if name not in own:
        names = ", ".join(map(repr, sorted(own)))
        raise ValueError(f"none of this tokenizer's chat templates is the default: pass chat_template=, one of {names}")
    return own[name]


# --- where checkpoints have them ------------------------------------------------------------------------------------


def templates_of_directory(directory: Path, tokenizer_config: Mapping[str, Any]) -> Templates:
    """Of chat_template.jinja and additional_chat_templates/NAME.jinja; else of `tokenizer_config`, the content of
    tokenizer_config.json; else of chat_template.json. Raises ValueError, naming the file, for what is no template.
    """
    paths = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    main = directory / "chat_template.jinja"
    if main.exists():
        paths["default"] = main
    if paths:
        return _single({name: _text_of(_inside(path, directory)) for name, path in paths.items()})
    templates = _from_json(tokenizer_config, directory / "tokenizer_config.json")
    path = directory / "chat_template.json"
    if templates is None and path.exists():
        return _from_json(read_json(_inside(path, directory)), path)
    return templates


def _from_json(config: Mapping[str, Any], path: Path) -> Templates:
    given = config.get("chat_template")
    if given is None or isinstance(given, str):
        return given
    entries = given if isinstance(given, list) else []
    pairs: list[Any] = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    if not pairs or len(pairs) < len(entries) or not all(isinstance(text, str) for pair in pairs for text in pair):
        must = "must be a str or a list of {'name': str, 'template': str}"
        raise ValueError(f"{path}: chat_template {must}, found {reprlib.repr(given)}")
    return _single(dict(pairs))


def templates_of_gguf(metadata: Mapping[str, Any], source: str) -> Templates:
    """Of tokenizer.chat_template and tokenizer.chat_template.NAME. Raises ValueError for what is no text."""
    fields, key = Fields(metadata, source), "tokenizer.chat_template"
    others = {name.removeprefix(f"{key}."): name for name in metadata if name.startswith(f"{key}.")}
    templates = {name: fields.text(long) for name, long in {"default": key, **others}.items()}
    return _single({name: template for name, template in templates.items() if template is not None})


def _single(templates: dict[str, str]) -> Templates:
    """The template itself where the default is all there is."""
    return templates["default"] if list(templates) == ["default"] else templates or None


def _inside(path: Path, directory: Path) -> Path:
    """`path`, which leads to a file in `directory` or to one of the Hugging Face cache's blobs. Raises ValueError."""
    real = path.resolve()
    if not real.is_relative_to(directory.resolve()) and real.parent.name != "blobs":
        raise ValueError(f"{path}: a link out of its folder, to {real}: a checkpoint's files are inside")
    return path


def _text_of(path: Path) -> str:
    """The content of a file with a template. Raises ValueError if it is none: too long, no text, not a plain file."""
    if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: no file of at most {MAX_FILE_BYTES} bytes, as a chat template is")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a chat template is UTF-8 text: {error}") from None
