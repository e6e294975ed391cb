"""Seats: which row of the arrays that outlive a step belongs to which request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdeploy.engine.request import Request


class Seats:
    """Seats numbered from 0, at least as many as a step has requests.

    A request keeps its seat until somebody needs it: the finished leave first, then who has no part in the step.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._seat_of: dict[Request, int] = {}
        self._free = list(range(count))

    def take(self, requests: Sequence[Request]) -> tuple[np.ndarray, list[Request]]:
        """The seat of each request of a step, [requests] int64; and which of them had none before."""
        seat_of = self._seat_of
        newcomers = [request for request in requests if request not in seat_of]
        if len(newcomers) > len(self._free):
            self._vacate(requests, len(newcomers))
        for request in newcomers:
            seat_of[request] = self._free.pop()
        return np.array([seat_of[request] for request in requests], np.int64), newcomers

    def of(self, request: Request) -> int | None:
        """The seat of a request, if it has one."""
        return self._seat_of.get(request)

    def forget_all(self) -> None:
        """Take all seats back: whoever comes next is a newcomer."""
        self._seat_of.clear()
        self._free = list(range(self._count))

    def _vacate(self, requests: Sequence[Request], needed: int) -> None:
        leavers = [each for each in self._seat_of if each.finished]
        if len(self._free) + len(leavers) < needed:  # the others may come back: they sit out this step
            staying = set(requests)
            leavers = [each for each in self._seat_of if each not in staying]
        for leaver in leavers:
            self._free.append(self._seat_of.pop(leaver))
