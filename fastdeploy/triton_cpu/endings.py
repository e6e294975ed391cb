"""Sums that go from registers straight to where the kernel stores them.

    for k0 in range(0, K, BLOCK_K):                         a loop as in registers.py
        sums = tl.dot(a, b, sums)
    sums += tl.load(bias + n, mask=n < N)[None, :]          nothing but computation,
    tl.store(y_tile, sums, mask=...)                        and one store

A store to memory that is not in a cache has to wait for it. At the end of a program a whole tile's stores come at
once, and the core stops. A block's few wait while the next block is computed. (64 x 32 sums of 4-bit products, K = 576,
on a core: 355 GOP/s, as a tile 282.)

So the store moves up, to the end of each block. Nothing that is still to be read may be overwritten by it: all that is
read must come by other arguments of the kernel than the one that is written. What the kernel does between the loop and
the store is done before the loop, unless it is computed from the sums.
"""

from __future__ import annotations

from typing import NamedTuple

from .analysis import Apart, is_lazy, must_be_apart
from .ttir import Op, walk


class Ending(NamedTuple):
    """What follows a loop, up to the store of its sums."""

    before: list[Op]  # what may be done before the loop, in order
    after: list[Op]  # what is computed from the sums, and last the store
    apart: Apart

    @property
    def store(self) -> Op:
        return self.after[-1]


def ending_of(loop: Op) -> Ending | None:
    """The ending of a loop, if there is one and nothing else is made of what the loop carries."""
    sums, ending = set(loop.results), Ending([], [], set())
    following = loop.block.ops[loop.block.ops.index(loop) + 1 :]
    for op in following:
        of_sums = not sums.isdisjoint(op.operands)
        if not is_lazy(op) and not (of_sums and op.name == "tt.store"):
            return None
        (ending.after if of_sums else ending.before).append(op)
        if op.name == "tt.store":
            break
        if of_sums:
            sums.update(op.results)
    if not ending.after or ending.store.name != "tt.store" or ending.store.operands[0] in sums:
        return None
    if any(user not in ending.after for value in sums for user in value.uses):
        return None
    kernel = loop.block
    while kernel.parent is not None:
        kernel = kernel.parent.block
    for load in walk(kernel):  # all loads: one from before the loop may be evaluated in it
        if load.name == "tt.load":
            apart = must_be_apart(load.operands[0], ending.store.operands[0], in_place=False)
            if apart is None:
                return None
            ending.apart.update(apart)
    return ending
