"""What every tokenizer asks of the `tokenizers` library: BOS, steps of bounded growth, and failures that are errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tokenizers
from tokenizers import processors

GROWTH = 1 << 14  # characters that a tokenizer's steps may make of one; those of published ones make a dozen


@contextmanager
def failures_as_errors(what: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raises ValueError, beginning with `what`, for whatever the library fails with, but for exceptions of `passing`.

    It raises plain Exceptions; what it did not foresee is a Rust panic, which is no Exception and would pass by those
    who guard a request.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # which no module exports; Ctrl-C is another BaseException
        if isinstance(error, passing) or not (isinstance(error, Exception) or is_panic):
            raise
        readable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error)[:500])
        raise ValueError(f"{what}: {readable} (tokenizers {tokenizers.__version__})") from None


def check_growth(backend: tokenizers.Tokenizer, source: str) -> None:
    """Raises ValueError, naming `source`, if the steps around the vocabulary may make a text so long that it fills the
    memory: forty that replace "a" by "aa"."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        step = getattr(backend, part)
        growth = 1 if step is None else _growth(json.loads(step.__getstate__()))
        if growth > GROWTH:
            raise ValueError(f"{source}: its {part} may make more than {GROWTH} characters of one; pass tokenizer=")


def _growth(step: Any) -> int:
    """The most characters that a step of a tokenizer, as JSON, makes of one; of a list, one step after the other."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    own = {"ByteLevel": 2, "BPEDecoder": 2, "Replace": len(step.get("content", ""))}.get(step.get("type", ""), 1)
    return max(own, 1) * _growth(list(step.values()))


def add_bos(backend: tokenizers.Tokenizer, named_tokens: Mapping[str, str]) -> None:
    """Have `encode(add_special_tokens=True)` begin with the "bos_token", if there is one."""
    bos = named_tokens.get("bos_token")
    if bos is not None:
        special_tokens = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=special_tokens)
