"""What neighbouring lanes of an index computation look like: are they neighbours in memory?

A vector load needs addresses that follow each other. Kernels of packed weights compute them with divisions and
remainders: `(n // 16) * (K * 8) + n % 16 * 4 + k // 4 * 64 + k % 4`. In n is a program's number, and K is known at run
time only. So NumPy evaluates the expression, all lanes of a vector at a time, on numbers of the form

    multiple * t + pattern[lane]            t: an integer that nobody knows, the same in all lanes

    program_id * 32 + arange(0, 16)         32 t + [0, 1, ..., 15]
                    ... // 16                2 t + [0, 0, ..., 0]       exact, because 16 divides 32
                    ... % 16                       [0, 1, ..., 15]      (a multiple of 0: known exactly)

What cannot be written so and differs between lanes is not known: no vector load. A result holds for every t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from .analysis import operand_index, splat_constant
from .ranges import keeps_number
from .ttir import Value


class Unknown(Exception):
    """The lanes of a value differ in a way that is not known."""


class Lanes(NamedTuple):
    """multiple * t + pattern[lane] for some integer t."""

    multiple: int
    pattern: np.ndarray
    nonnegative: bool = True

    @property
    def known(self) -> bool:
        return self.multiple == 0

    @property
    def uniform(self) -> bool:
        return bool((self.pattern == self.pattern[0]).all())

    @property
    def consecutive(self) -> bool:
        return bool((np.diff(self.pattern) == 1).all())


def exactly(pattern: np.ndarray) -> Lanes:
    return Lanes(0, pattern, bool((pattern >= 0).all()))


def row_of_lanes(count: int) -> tuple[Lanes, Lanes]:
    """The index (row, column) of `count` neighbours in any row, from a column on that is a multiple of `count`."""
    return Lanes(1, np.zeros(count, np.int64)), Lanes(count, np.arange(count))


def lanes(value: Value, index: tuple[Lanes, ...], origins: Mapping[Value, Value]) -> Lanes:
    """The lanes of an integer or pointer (in elements) tensor at `index`, one `Lanes` for each dimension.

    `origins` names, for pointer tensors that a loop moves as a whole, the tensor that they started as.
    """
    count = len(index[0].pattern)
    index = tuple(i if extent > 1 else exactly(np.zeros(count, np.int64)) for extent, i in zip(value.type.shape, index))
    return _Evaluation(count, origins).of(value, index)


class _Evaluation:
    def __init__(self, count: int, origins: Mapping[Value, Value]):
        self.zeros, self.origins = np.zeros(count, np.int64), origins
        self.zero = exactly(self.zeros)
        self.known: dict[tuple[Value, tuple[int, ...]], tuple[tuple[Lanes, ...], Lanes]] = {}

    def of(self, value: Value, index: tuple[Lanes, ...]) -> Lanes:
        """The lanes of `value`, by those of what it is computed from; once, as an index may use it many times."""
        value = self.origins.get(value, value)
        key = (value, tuple(map(id, index)))
        if key not in self.known:
            self.known[key] = index, self._of(value, index)  # with `index`, so that its ids stay its own
        return self.known[key][1]

    def _of(self, value: Value, index: tuple[Lanes, ...]) -> Lanes:
        op = value.op
        if op is None or op.name == "tt.get_program_id":
            if value.type.is_tensor:
                raise Unknown(f"{value} is an argument of a loop")
            return Lanes(1, self.zeros, nonnegative=op is not None)
        if op.name == "arith.constant":
            if (number := splat_constant(value)) is None:
                raise Unknown(f"{op.text} is no integer")
            return exactly(self.zeros + number)
        if op.name == "tt.make_range":
            return self._sum(index[0], exactly(self.zeros + op.attribute("start", 0)))
        if moved := operand_index(op, index, self.zero):
            return self.of(op.operands[0], moved)
        if op.name in ("tt.splat", "arith.extsi", "arith.index_cast") or (op.name in _CASTS and keeps_number(op)):
            return self.of(op.operands[0], index)
        is_pointwise = op.name.startswith("arith.") or op.name in ("tt.addptr", "tt.load")
        operands = [self.of(v, index) for v in op.operands] if is_pointwise else []
        found = _ARITHMETIC[op.name](self, *operands) if op.name in _ARITHMETIC else None
        if found is not None:
            return found
        if not value.type.is_tensor or (operands and all(operand.uniform for operand in operands)):
            return Lanes(1, self.zeros, nonnegative=False)
        raise Unknown(f"{op.name} of lanes that differ")

    # ---- arithmetic; None where the result has no such form -----------------------------------------------------
    def _sum(self, a: Lanes, b: Lanes) -> Lanes:
        return Lanes(math.gcd(a.multiple, b.multiple), a.pattern + b.pattern, a.nonnegative and b.nonnegative)

    def _difference(self, a: Lanes, b: Lanes) -> Lanes:
        return Lanes(math.gcd(a.multiple, b.multiple), a.pattern - b.pattern, False)

    def _product(self, a: Lanes, b: Lanes) -> Lanes | None:
        nonnegative = a.nonnegative and b.nonnegative
        if a.known or b.known:
            factor, other = (a, b) if a.known else (b, a)
            if other.known or factor.uniform:
                return Lanes(abs(int(factor.pattern[0])) * other.multiple, a.pattern * b.pattern, nonnegative)
        if not (a.uniform and b.uniform):
            return None
        x, y = int(a.pattern[0]), int(b.pattern[0])
        multiple = math.gcd(a.multiple * b.multiple, math.gcd(a.multiple * y, b.multiple * x))
        return Lanes(multiple, self.zeros + x * y, nonnegative)

    def _divided(self, a: Lanes, b: Lanes) -> tuple[int, int, np.ndarray, np.ndarray] | None:
        """divisor, unit, whole, rest of a = unit * (t + whole) + rest with 0 <= rest < unit; unit divides the divisor.

        If unit is less than the divisor, the quotient is known to be the same in all lanes only if `whole` is.
        """
        if not (b.known and b.uniform and b.pattern[0] > 0 and a.nonnegative):
            return None
        divisor = int(b.pattern[0])
        unit = math.gcd(a.multiple, divisor)
        whole, rest = np.divmod(a.pattern, unit)
        return (divisor, unit, whole, rest) if unit == divisor or (whole == whole[0]).all() else None

    def _quotient(self, a: Lanes, b: Lanes) -> Lanes | None:
        if not (parts := self._divided(a, b)):
            return None
        divisor, unit, whole, _ = parts
        return Lanes(a.multiple // divisor, whole) if unit == divisor else Lanes(1, self.zeros)

    def _remainder(self, a: Lanes, b: Lanes) -> Lanes | None:
        if not (parts := self._divided(a, b)):
            return None
        divisor, unit, _, rest = parts
        return Lanes(0 if unit == divisor else unit, rest)

    def _and(self, a: Lanes, b: Lanes) -> Lanes | None:
        if a.known and b.known:
            return exactly(a.pattern & b.pattern)
        mask = int(b.pattern[0]) if b.known and b.uniform else 0
        return self._remainder(a, exactly(self.zeros + mask + 1)) if mask > 0 and mask & (mask + 1) == 0 else None

    def _shifted_left(self, a: Lanes, b: Lanes) -> Lanes | None:
        return self._product(a, exactly(1 << b.pattern)) if b.known and b.nonnegative else None

    def _shifted_right(self, a: Lanes, b: Lanes) -> Lanes | None:
        return self._quotient(a, exactly(1 << b.pattern)) if b.known and b.nonnegative else None


_CASTS = ("arith.extui", "arith.trunci")
_ARITHMETIC: dict[str, Callable[..., Lanes | None]] = {
    "arith.addi": _Evaluation._sum,
    "tt.addptr": _Evaluation._sum,
    "arith.subi": _Evaluation._difference,
    "arith.muli": _Evaluation._product,
    "arith.divsi": _Evaluation._quotient,
    "arith.divui": _Evaluation._quotient,
    "arith.remsi": _Evaluation._remainder,
    "arith.remui": _Evaluation._remainder,
    "arith.andi": _Evaluation._and,
    "arith.shli": _Evaluation._shifted_left,
    "arith.shrsi": _Evaluation._shifted_right,
    "arith.shrui": _Evaluation._shifted_right,
}
