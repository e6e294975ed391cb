"""Fields: a JSON object or GGUF metadata whose values are checked as they are read."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger("fastdeploy")

MOST = dict.fromkeys(  # of what something is made for each; no model comes near
    "num_hidden_layers block_count num_attention_heads attention.head_count num_experts num_local_experts"
    " moe_num_experts moe_num_shared_experts expert_count expert_shared_count".split(),
    10_000,
)
MOST |= {"vocab_size": 1 << 22, "max_position_embeddings": 1 << 24, "context_length": 1 << 24}  # other fields: 2^31 - 1


class Fields:
    """A JSON object or GGUF metadata whose values are checked as they are read; `source` names it in errors."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source

    def required(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ValueError(f"{self.source}: required field {key!r} is missing")
        return self.values[key]

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An int of at least `least`; without a default the field is required."""
        value = self.required(key) if default is None else self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(key, f"must be an integer of at least {least}")
        if value > (most := MOST.get(key, 2**31 - 1)):
            raise self.error(key, f"must be {most} at most")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Those of a token id or a list of them that the vocabulary has; -1 and null stand for none."""
        value = self._get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(not isinstance(token_id, int) or isinstance(token_id, bool) for token_id in ids):
            raise self.error(key, "must be a token id or a list of them")
        return known_ids((token_id for token_id in ids if token_id != -1), vocab_size, f"{self.source}: {key}")

    def token_id(self, key: str, vocab_size: int) -> int | None:
        return next(iter(self.token_ids(key, vocab_size)), None)

    def text(self, key: str) -> str | None:
        value = self._get(key, None)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "must be text")
        return value

    def list_of(self, item_type: type, key: str) -> list | None:
        """A list, each item an instance of `item_type`; None if there is none."""
        value = self._get(key, None)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, item_type) for item in value)):
            raise self.error(key, f"must be a list of {item_type.__name__}")
        return value

    def object(self, key: str) -> dict[str, Any] | None:
        value = self._get(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "must be an object")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)  # config.json writes null for "not set"
        return default if value is None else value

    def error(self, key: str, rule: str) -> ValueError:
        """For the caller to raise: which value of which file breaks which rule."""
        return ValueError(f"{self.source}: {key!r} is {reprlib.repr(self.values.get(key))}; {rule}")


def known_ids(ids: Iterable[int], vocab_size: int, source: str) -> tuple[int, ...]:
    """Those of `ids` that a vocabulary of `vocab_size` has, each once; a warning names `source` and the others.

    Every token id that a file names goes through here. One without a logit can end nothing, and the sampler, which
    leaves it out, would have an edit fewer for the request.
    """
    found, known = dict.fromkeys(ids), range(vocab_size)
    unknown = [token_id for token_id in found if token_id not in known]
    if unknown:
        logger.warning("%s: dropped %s, as token ids run from 0 to %d", source, reprlib.repr(unknown), vocab_size - 1)
    return tuple(token_id for token_id in found if token_id in known)
