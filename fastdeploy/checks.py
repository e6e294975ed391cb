"""Checks of what users pass: unknown names, wrong types, values out of range.

Every error reads `Owner(field=value): what it must be`, so that the reader sees the name, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

Class = TypeVar("Class")


def complaint(owner: str, field: str, value: object, must: str) -> str:
    """The text of an error about one argument; long values are abbreviated."""
    return f"{owner}({field}={reprlib.repr(value)}): {must}"


def check_int(owner: str, field: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int within [low, high]. Booleans are a TypeError: they are integers only by accident of history."""
    bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
    must = f"must be an integer {bounds}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(complaint(owner, field, value, f"{must}, not {type(value).__name__}"))
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(complaint(owner, field, value, must))
    return number


def check_number(owner: str, field: str, value: object, low: float, high: float = math.inf) -> float:
    """`value` as a finite float within [low, high]."""
    must = "must be a finite number " + (f"of at least {low}" if high == math.inf else f"from {low} to {high}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(complaint(owner, field, value, f"{must}, not {type(value).__name__}"))
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(complaint(owner, field, value, must))
    return number


def unknown_keyword(owner: str, name: str, known: list[str]) -> str:
    """The text of a TypeError about a keyword nobody knows; suggests the nearest one, or lists all."""
    nearest = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"it takes {', '.join(known)}"
    return f"{owner} has no keyword {name!r}: {remedy}"


def suggesting_keywords(owner: str) -> Callable[[type[Class]], type[Class]]:
    """Decorate a dataclass so that an unknown keyword is a TypeError that suggests the nearest field.

    `owner` is what the user called, which need not be the class itself.
    """

    def decorate(cls: type[Class]) -> type[Class]:
        known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
        build = cls.__init__

        @functools.wraps(build)
        def checked(self: Class, *args: Any, **keywords: Any) -> None:
            for name in keywords:
                if name not in known:
                    raise TypeError(unknown_keyword(owner, name, known))
            build(self, *args, **keywords)

        cls.__init__ = checked  # type: ignore[method-assign, assignment]
        return cls

    return decorate
