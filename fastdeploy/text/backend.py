"""What every tokenizer asks of the `tokenizers` library: special tokens, BOS, and failures that are errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers
from tokenizers import AddedToken, processors


@contextmanager
def failures_as_errors(what: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raises ValueError, beginning with `what`, for whatever the library fails with, but for exceptions of `passing`.

    It raises plain Exceptions; what it did not foresee is a Rust panic, which is no Exception and would pass by those
    who guard a request.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, passing) or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        readable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error)[:500])
        raise ValueError(f"{what}: {readable} (tokenizers {tokenizers.__version__})") from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # which no module exports; Ctrl-C is another BaseException


def add_bos(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Have `encode(add_special_tokens=True)` begin with this token."""
    special_tokens = [(bos, backend.token_to_id(bos))]
    backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=special_tokens)


def special(text: str) -> AddedToken:
    """A token that is looked for in the text before it is cut, and that no output shows."""
    return AddedToken(text, special=True, normalized=False)
