"""What the fuzz tests share: good files made bad, and what a reader may do with one.

@given(mutated(GOOD))               # bytes of a good file with up to four faults
def test_a_mutated_file_is_read_or_refused(content):
    path.write_bytes(content)
    assert_read_or_refused(lambda: read(path), path)

@given(mutated_json({"a": [1, 2]})) # a JSON value of which up to three parts are of another type or extreme
"""

import copy
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SECONDS = 10  # that one call may take; a reader of small files takes milliseconds, so no busy machine comes near
HEADROOM = 1 << 30  # bytes that one call may take beyond what the process has
FAULTS = 4
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**48, 2**62]
NUMBERS += [2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
LENGTHS = [1, 2, 3, 4, 8, 16, 64, 300, 5000]
WORDS = ["", "..", "../x", "/etc/hostname", "a/b", "\0", "\n\x1b[31m", "\ud800", "x" * 5000, "1", "nan", "float32"]
NESTED: Any = [[[[[[[[[[[[]]]]]]]]]]]]
SCALARS = [None, True, False, 0, 1, -1, 2, 3, 10**9, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 10**400]
SCALARS += [0.5, -0.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan")]
EXTREMES = [*SCALARS, *WORDS, [], {}, [None], [[]], [0] * 1000, [-1, "x"], {"": None}, {"a": {"a": {}}}, NESTED]

Fault = Callable[[bytearray], None]


def mutated(whole: bytes, first: int = 0, last: int | None = None) -> st.SearchStrategy[bytes]:
    """`whole` with one to FAULTS faults that begin in bytes [first, last), all by default: a bit flipped, the rest cut
    off, a range deleted, repeated, or moved over another, random bytes put in, a little-endian number replaced."""
    place = st.integers(first, max(first, (len(whole) if last is None else last) - 1))
    length = st.sampled_from(LENGTHS)
    faults = st.one_of(
        st.builds(_flip, place, st.integers(0, 7)),
        st.builds(_number, place, st.sampled_from([1, 2, 4, 8]), st.sampled_from(NUMBERS)),
        st.builds(_replace, place, length, st.just(b"")),
        st.builds(_replace, place, st.just(0), st.binary(min_size=1, max_size=16)),
        st.builds(_replace, place, length, st.binary(min_size=1, max_size=16)),
        st.builds(_copy, place, place, length, st.sampled_from([1, 1, 1, 2, 100])),
        st.builds(_cut, place),
    )
    return st.lists(faults, min_size=1, max_size=FAULTS).map(lambda chosen: _apply(whole, chosen))


def _apply(whole: bytes, faults: list[Fault]) -> bytes:
    content = bytearray(whole)
    for fault in faults:
        fault(content)
    return bytes(content)


def _flip(place: int, bit: int) -> Fault:
    def fault(content: bytearray) -> None:
        if place < len(content):
            content[place] ^= 1 << bit

    return fault


def _number(place: int, size: int, value: int) -> Fault:
    return _replace(place, size, (value % 256**size).to_bytes(size, "little"))


def _replace(place: int, length: int, by: bytes) -> Fault:
    def fault(content: bytearray) -> None:
        content[place : place + length] = by

    return fault


def _copy(source: int, place: int, length: int, times: int) -> Fault:
    def fault(content: bytearray) -> None:
        content[place:place] = content[source : source + length] * times

    return fault


def _cut(place: int) -> Fault:
    def fault(content: bytearray) -> None:
        del content[place:]

    return fault


def mutated_json(value: Any) -> st.SearchStrategy[Any]:
    """`value`, made of dicts, lists and scalars, with up to three of its parts, at any depth, replaced by an extreme of
    any type, left out, or given another key. json.dumps writes the result, NaN and Infinity included."""
    fault = st.tuples(st.sampled_from(["replace", "replace", "replace", "delete", "rename"]), st.floats(0, 1))
    faults = st.lists(st.tuples(fault, st.sampled_from(EXTREMES), st.sampled_from(WORDS)), min_size=1, max_size=3)
    return faults.map(lambda chosen: _apply_json(value, chosen))


def _apply_json(value: Any, faults: list[tuple[tuple[str, float], Any, str]]) -> Any:
    value = copy.deepcopy(value)
    for (kind, place), extreme, word in faults:
        parts = list(_parts(value))
        if not parts:
            return extreme
        container, key = parts[min(int(place * len(parts)), len(parts) - 1)]
        if kind == "replace":
            container[key] = copy.deepcopy(extreme)
        elif kind == "delete":
            del container[key]
        elif isinstance(container, dict):
            container[word] = container.pop(key)
    return value


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything within."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield value, key
        yield from _parts(part)


class Hung(BaseException):
    """Not an Exception: no reader may take it for the file's fault."""


@contextmanager
def bounded(seconds: int = SECONDS, headroom: int = HEADROOM) -> Iterator[None]:
    """Raises Hung if what is inside runs longer, and lets it have MemoryError if it takes `headroom` bytes more."""

    def hang(*_: Any) -> None:
        raise Hung(f"still running after {seconds} s")

    before, limits = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + headroom, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def assert_read_or_refused(read: Callable[[], Any], path: Path) -> bool:
    """Whether `read()` works. It may raise ValueError or FileNotFoundError with the name of `path` in a readable text;
    anything else it raises, or more than SECONDS and HEADROOM, fails the test."""
    with bounded():
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            assert str(path) in text, f"the error does not name {path}: {text[:500]!r}"
            assert len(text) < len(str(path)) + 4000, f"an error of {len(text)} characters: {text[:500]!r}"
            assert text.replace("\n", "").isprintable(), f"an error with control characters: {text[:500]!r}"
            return False
    return True
