"""The ranks of a tensor-parallel model: how they find each other, and what they tell each other within a step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fastdeploy.device import PeerLost
from fastdeploy.device.quiet_paddle import compute_on_this_thread, paddle
from fastdeploy.kernels.launch import TensorView, expect

SILENCE_SECONDS = 30  # that a rank waits for another; for gloo's collectives Paddle has fixed the same


class Group:
    """The processes (ranks) that compute one model together, and what they tell each other in the middle of a step.

    rank: this process's number, from 0. size: how many there are. address: host and port where rank 0 listens. All
    ranks make their Group at the same time; it returns when they have found each other. patience: seconds to wait for
    that. Raises PeerLost if a rank does not come, and later at once if one dies, after 30 s if one is silent.

    One process may be in several groups. So this is Paddle's process group itself, not paddle.distributed's global one.
    Paddle keeps it, and the port, until the process ends.
    """

    def __init__(self, rank: int, size: int, address: tuple[str, int], patience: int = SILENCE_SECONDS) -> None:
        from paddle.base import core

        compute_on_this_thread()
        self.rank = rank
        self.size = size
        with _environment("PADDLE_TRAINER_ID", str(rank)):  # Paddle asks for it, to name the rank in its logs
            try:
                self._store = core.TCPStore(*address, rank == 0, size, patience)
                number = address[1]  # of the group; Paddle wants another one for each group of a process
                self._group = core.ProcessGroupGloo.create(self._store, rank, size, number)
            except (RuntimeError, SystemError) as error:
                raise PeerLost(f"not all of {size} ranks came to {address} within {patience} s: {error}") from error

    def publish(self, name: str, text: str) -> None:
        """Tell the other ranks something, outside of steps."""
        self._store.set(name, text)

    def published(self, name: str) -> str:
        """What a rank has published under this name; waits for it, 30 s at most."""
        return self._store.get(name).decode()

    def all_gather(self, out: TensorView, x: TensorView) -> None:
        """out [size, ...] = the `x` of all ranks, in their order. Recorded where launches are recorded."""
        from fastdeploy.triton_cpu import runtime

        expect("out", out, (self.size, *x.shape), x.dtype)
        expect("x", x, x.shape)
        # gloo gathers bytes rightly in any type (its sums of float16 are wrong, which is why nobody asks it for sums).
        everything, own = _bytes_of(out), _bytes_of(x)
        runtime.call(lambda: self._gather(everything, own))

    def _gather(self, out: paddle.Tensor, x: paddle.Tensor) -> None:
        try:
            self._group.all_gather_into_tensor(out, x, True).wait()
        except (RuntimeError, SystemError) as error:
            raise PeerLost(f"a rank did not take part in a step: {error}") from error


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for the length of the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _bytes_of(tensor: TensorView) -> paddle.Tensor:
    """The memory of a contiguous view on the host as a Paddle tensor."""
    array = np.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.pointer))
    return paddle.from_dlpack(array)
