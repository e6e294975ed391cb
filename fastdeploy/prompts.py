"""PromptReader: whatever callers pass as prompts, checked and turned into token ids.

    str, list[int], {"prompt": either}, {"prompt_token_ids": list[int]}      one prompt; of both keys the ids count
    a list of these                                                          several, or none
    list[dict] with "role" and "content", or a list of such lists            conversations, for chat

Every error names the place, as in "prompts[3][17] is -1".
"""

from __future__ import annotations

import numbers
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdeploy.text.tokenizer import Tokenizer

MOST_CHARACTERS = 256  # of a token, in vocabularies that we know of: 128 spaces


@dataclass(frozen=True)
class Prompt:
    """What the caller will see as `RequestOutput.prompt`, the ids that the model sees, and the name for errors.

    continues: it ends in the middle of an answer, which the output goes on with.
    """

    name: str
    given: str | list[int]
    token_ids: list[int]
    continues: bool = False


class PromptReader:
    """Reads prompts for a model with `vocab_size` ids and room for max_model_len tokens, prompt and output together.

    Raises TypeError or ValueError if anything in a prompt is wrong.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    def read(self, prompts: object) -> list[Prompt]:
        """What `LLM.generate` takes. Text is tokenised as it is, without special tokens and chat template."""
        if isinstance(prompts, (str, Mapping)):
            return [self._prompt("prompts", prompts)]
        if not isinstance(prompts, (list, tuple)):
            must = "must be text, a list of token ids, a dict, or a list of these"
            raise TypeError(f"prompts {must}, not {type(prompts).__name__}: {reprlib.repr(prompts)}")
        if prompts and isinstance(prompts[0], numbers.Number):
            return [self._prompt("prompts", prompts)]
        return [self._prompt(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]

    def read_chat(
        self, messages: object, chat_template: str | os.PathLike | None, variables: Mapping[str, Any]
    ) -> list[Prompt]:
        """Conversations, one or several; `variables`: see `template_variables`."""
        if not isinstance(messages, (list, tuple)):
            must = "must be a conversation, a list of {'role': ..., 'content': ...}, or a list of conversations"
            raise TypeError(f"messages {must}, not {type(messages).__name__}: {reprlib.repr(messages)}")
        if not messages:
            raise ValueError("messages is an empty list: pass at least one message")
        if not isinstance(messages[0], (list, tuple)):
            return [self._conversation("messages", messages, chat_template, variables)]
        return [
            self._conversation(f"messages[{index}]", conversation, chat_template, variables)
            for index, conversation in enumerate(messages)
        ]

    def _prompt(self, name: str, prompt: object) -> Prompt:
        if isinstance(prompt, Mapping):
            return self._prompt_of_dict(name, prompt)
        if isinstance(prompt, str):
            return Prompt(name, prompt, self._encoded(name, prompt))
        if isinstance(prompt, (list, tuple)):
            token_ids = self._checked(name, prompt)
            return Prompt(name, token_ids, token_ids)
        must = "must be text, a list of token ids, or a dict with one of them"
        raise TypeError(f"{name} {must}, not {type(prompt).__name__}: {reprlib.repr(prompt)}")

    def _prompt_of_dict(self, name: str, prompt: Mapping[Any, Any]) -> Prompt:
        ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
        if ids is None and text is None:
            found = reprlib.repr(list(prompt))
            raise ValueError(f"{name} must have either the key 'prompt' or 'prompt_token_ids', it has {found}")
        key = "prompt" if ids is None else "prompt_token_ids"
        for other in prompt:
            if other not in ("prompt_token_ids", "prompt"):
                raise ValueError(f"{name} has the key {other!r}: a dict prompt has {key!r} and nothing else")
        place = f"{name}[{key!r}]"
        if ids is None:
            if isinstance(text, Mapping):
                raise TypeError(f"{place} must be text or a list of token ids, not {type(text).__name__}")
            return self._prompt(place, text)
        if not isinstance(ids, (list, tuple)):
            raise TypeError(f"{place} must be a list of token ids, not {type(ids).__name__}: {reprlib.repr(ids)}")
        token_ids = self._checked(place, ids)
        return Prompt(place, text if isinstance(text, str) and text else token_ids, token_ids)

    def _conversation(
        self, name: str, messages: object, chat_template: str | os.PathLike | None, variables: Mapping[str, Any]
    ) -> Prompt:
        if not isinstance(messages, (list, tuple)):
            must = "must be a conversation, a list of {'role': ..., 'content': ...}, as messages[0] is"
            raise TypeError(f"{name} {must}, not {type(messages).__name__}: {reprlib.repr(messages)}")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), chat_template=chat_template, **variables)
        except (TypeError, ValueError) as error:
            if name == "messages":
                raise
            # Its text says "messages[0]" of a message in this conversation.
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"in {name}: {error}") from error
        return Prompt(name, text, self._encoded(name, text), variables.get("continue_final_message", False))

    def _encoded(self, name: str, text: str) -> list[int]:
        """The ids of a text, which is not tokenised if it is far too long: 100 MB take minutes and gigabytes."""
        if len(text) > MOST_CHARACTERS * self._max_model_len:
            raise ValueError(
                f"{name} has {len(text)} characters, far too many for max_model_len={self._max_model_len}: shorten it"
            )
        return self._checked(name, self._tokenizer.encode(text))

    def _checked(self, name: str, ids: Sequence[Any]) -> list[int]:
        """A copy of a prompt's ids, which the model can take and answer."""
        if not ids:
            raise ValueError(f"{name} is empty: a prompt has at least one token")
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < self._vocab_size:
            wrong: Iterable[tuple[int, Any]] = ()  # nearly always, and a tenth of the time
        else:
            wrong = enumerate(ids)
        for position, token_id in wrong:
            if isinstance(token_id, bool) or not isinstance(token_id, numbers.Integral):
                must = f"must be a token id, an integer, not {type(token_id).__name__}"
                raise TypeError(f"{name}[{position}] {must}: {reprlib.repr(token_id)}")
            if not 0 <= int(token_id) < self._vocab_size:
                raise ValueError(f"{name}[{position}] is {token_id}: token ids run from 0 to {self._vocab_size - 1}")
        if len(ids) >= self._max_model_len:
            raise ValueError(
                f"{name} has {len(ids)} tokens; max_model_len={self._max_model_len}, for prompt and output together, "
                f"leaves it {self._max_model_len - 1} at most: shorten it or raise max_model_len"
            )
        return [int(token_id) for token_id in ids]


def template_variables(
    chat_template_kwargs: object = None,
    tools: object = None,
    add_generation_prompt: object = None,
    continue_final_message: object = False,
) -> dict[str, Any]:
    """What `Tokenizer.apply_chat_template` takes besides the messages, from these arguments of `LLM.chat`.

    Raises TypeError or ValueError if anything in them is wrong.
    """
    given = {} if chat_template_kwargs is None else chat_template_kwargs
    if not isinstance(given, Mapping):
        raise TypeError(f"chat_template_kwargs must be a dict, not {type(given).__name__}")
    own = {"tools": _tools(tools), **_ending(add_generation_prompt, continue_final_message)}
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"chat_template_kwargs has the key {name!r}: a template's variables have names of type str")
        if name in ("tools", "add_generation_prompt", "continue_final_message"):
            raise ValueError(f"chat_template_kwargs has the key {name!r}: pass it as chat({name}=...)")
        if name in ("self", "messages", "chat_template"):
            raise ValueError(f"chat_template_kwargs has the key {name!r}, which is not a variable to set there")
    return {**given, **own}


def _ending(add_generation_prompt: object, continue_final_message: object) -> dict[str, bool]:
    """How prompts end: with the beginning of an answer, unless the last message is to be continued."""
    flags = {"continue_final_message": continue_final_message}
    if add_generation_prompt is not None:
        flags["add_generation_prompt"] = add_generation_prompt
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, not {type(flag).__name__}: {flag!r}")
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt and continue_final_message are both True: a prompt has one end")
    if continue_final_message:
        return {"continue_final_message": True, "add_generation_prompt": False}
    return {"add_generation_prompt": add_generation_prompt is not False}


def _tools(given: object) -> list[Mapping[str, Any]] | None:
    """The functions that a model may call, each as {"type": "function", "function": {"name": ..., ...}}."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return [_tool("tools", given)]
    if not isinstance(given, (list, tuple)):
        must = "must be a dict {'type': 'function', 'function': {...}}, or a list of such dicts"
        raise TypeError(f"tools {must}, not {type(given).__name__}: {reprlib.repr(given)}")
    return [_tool(f"tools[{index}]", tool) for index, tool in enumerate(given)] or None


def _tool(name: str, tool: object) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping):
        must = "must be a dict {'type': 'function', 'function': {...}}"
        raise TypeError(f"{name} {must}, not {type(tool).__name__}: {reprlib.repr(tool)}")
    if tool.get("type", "function") != "function":
        raise ValueError(f"{name}['type'] is {reprlib.repr(tool['type'])}: it must be 'function'")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        must = "must have the key 'function', a dict with 'name', 'description' and 'parameters'"
        raise ValueError(f"{name} {must}, it has {reprlib.repr(dict(tool))}")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{name}['function'] must have a 'name', a str; it has {reprlib.repr(dict(function))}")
    for key, kind in {"description": str, "parameters": Mapping}.items():
        if function.get(key) is not None and not isinstance(function[key], kind):
            must = f"must be a {'str' if kind is str else 'dict, a JSON schema'}"
            raise TypeError(f"{name}['function'][{key!r}] {must}, not {type(function[key]).__name__}")
    return {"type": "function", **tool}
