"""Tensor parallelism: ranks, processes that hold a part of every weight each and compute every step together.

    rank 0, the caller's process                              ranks 1, 2, ...
    scheduler, sampler, texts
    Runner, its part of the model  -- Leader.tell --pipe-->   `serve` -> their Runner, their part of the model
                                  <== all-gathers in a step ==>

Rank 0 decides all: it sends every step's inputs and which launches to make, and all ranks make the same launches, each
with its own weights. So between steps nobody waits in a collective, which would give up after 30 s.

`LLM(model, tensor_parallel_size=N)` starts the other N - 1 processes, on this machine. `python -m
paddle.distributed.launch script.py` has started N of them, perhaps on several machines, and each runs the script: on
the other ranks `LLM` does not return then, but serves rank 0, and ends the process when rank 0 closes its own.

A rank that ends, for whatever reason, closes its pipe and its sockets, and so the others notice at once: rank 0 ends
them all and raises one `RankFailed` that names the rank and the cause; the others end themselves when rank 0's end of
the pipe closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any, NoReturn

from fastdeploy.engine_config import ResolvedConfig

if TYPE_CHECKING:
    from fastdeploy.device import Group
    from fastdeploy.models.decoder import Decoder

START_SECONDS = 120  # to import Paddle and to load, between two signs of life
END_SECONDS = 5  # for a rank to end by itself
LEADER = "fastdeploy/leader"  # under which rank 0 says where to call


class RankFailed(RuntimeError):
    """A rank of a tensor-parallel model has failed, and the model with it."""


class Leader:
    """Starts the other ranks and tells them what to do. Everything here is for rank 0.

    config: its model is loaded by all ranks.

    processes: of the other ranks, by rank.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self._failure: str | None = None
        self._pipes: dict[int, Connection] = {}
        self.processes: dict[int, subprocess.Popen] = {}
        self.size = config.tensor_parallel_size
        for rank in range(1, self.size):
            self._pipes[rank], theirs = Pipe()
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "fastdeploy.engine.parallel", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for rank 0 alone, which tells the others
            )
            theirs.close()
            self._pipes[rank].send((config, rank))

    def group(self) -> Group:
        """What the ranks talk through within a step. Raises RankFailed if one has not come so far."""
        from fastdeploy.device import Group

        address = ("127.0.0.1", free_port())
        with self._all_or_nothing():
            self._await_all()  # the other ranks have imported Paddle
            self.tell("join", address)
            return Group(0, self.size, address)

    def await_runners(self, config: ResolvedConfig) -> None:
        """Have the other ranks, which have been loading their parts of the model, make runners of this configuration,
        which names the number of KV blocks; returns when they have."""
        with self._all_or_nothing():
            self.tell("run", config)
            self._await_all()

    def tell(self, method: str, *arguments: Any) -> None:
        """Have every other rank call this method of its Runner. Does not wait until they have."""
        for pipe in self._pipes.values():
            pipe.send((method, arguments))

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """What all ranks do together is done in such a block, and not interrupted: Ctrl-C waits for its end.

        Raises RankFailed if a rank fails meanwhile, and ever after.
        """
        with uninterrupted(), self._all_or_nothing():
            yield

    def close(self) -> None:
        """End the other ranks."""
        for pipe in self._pipes.values():
            pipe.close()  # which they take for the end
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()
            process.wait()
        self._pipes.clear()
        self.processes.clear()

    def _await_all(self) -> None:
        """Wait for a sign of life of each rank."""
        for rank, pipe in self._pipes.items():
            if not pipe.poll(START_SECONDS):
                raise TimeoutError(f"rank {rank} has not answered for {START_SECONDS} s")
            failure = pipe.recv()
            if failure is not None:
                raise RankFailed(f"rank {rank}: {failure}")

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        if self._failure is not None:
            raise RankFailed(self._failure)
        try:
            yield
        except BaseException as error:
            self._failure = self._cause(error)
            self.close()
            raise RankFailed(self._failure) from error

    def _cause(self, error: BaseException) -> str:
        """Which rank failed, and why: what it said itself, else how its process ended, else what rank 0 met."""
        if isinstance(error, RankFailed):
            return str(error)
        for rank, pipe in self._pipes.items():
            with contextlib.suppress(EOFError, OSError):
                while pipe.poll():
                    failure = pipe.recv()
                    if failure is not None:
                        return f"rank {rank}: {failure}"
        for rank, process in self.processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired):  # a rank whose sockets are closed ends soon
                return f"rank {rank} (process {process.pid}) {ending(process.wait(1))}"
        return f"rank 0: {type(error).__name__}: {error}"


class LaunchedLeader(Leader):
    """Leads ranks that paddle.distributed.launch has started."""

    def __init__(self, config: ResolvedConfig) -> None:
        self._failure = None
        self._pipes = {}
        self.processes = {}
        self.size = config.tensor_parallel_size

    def group(self) -> Group:
        """Meets the other ranks where the launcher said, and has them call back."""
        from fastdeploy.device import Group

        with self._all_or_nothing():
            group = Group(0, self.size, meeting_point())
            key = secrets.token_bytes(32)
            with Listener((own_host(), 0), authkey=key) as listener:
                group.publish(LEADER, json.dumps([*listener.address, key.hex()]))
                for _ in range(1, self.size):
                    pipe = listener.accept()
                    self._pipes[pipe.recv()] = pipe
            return group


def lead_ranks(config: ResolvedConfig) -> Leader:
    """The leader of the ranks that share this model; on another rank than 0 it does not return."""
    rank = launched_rank(config)
    if rank is None:
        return Leader(config)
    if rank > 0:
        follow_launched(config, rank)
    return LaunchedLeader(config)


def launched_rank(config: ResolvedConfig) -> int | None:
    """This process's rank, if paddle.distributed.launch has started it for a model of as many ranks; else None."""
    size = os.environ.get("PADDLE_TRAINERS_NUM", "1")
    return int(os.environ["PADDLE_TRAINER_ID"]) if size == str(config.tensor_parallel_size) != "1" else None


def meeting_point() -> tuple[str, int]:
    """Host and port that the launcher has reserved for rank 0."""
    host, _, port = os.environ["PADDLE_MASTER"].rpartition(":")
    return host, int(port)


def own_host() -> str:
    """The address by which other machines know this one."""
    return os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]


def follow_launched(config: ResolvedConfig, rank: int) -> NoReturn:
    """Serve rank 0 as long as it likes, then end the process."""
    from fastdeploy.device import Group

    group = Group(rank, config.tensor_parallel_size, meeting_point())
    host, port, key = json.loads(group.published(LEADER))
    pipe = Client((host, port), authkey=bytes.fromhex(key))
    pipe.send(rank)
    serve(pipe, lambda: group, config)


def ending(status: int) -> str:
    """How a process ended, in words."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C within the block strikes at its end: a rank that left a step halfway would leave the others waiting."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is ever interrupted
        yield
        return
    pending: list[Any] = []
    handler = signal.signal(signal.SIGINT, lambda *received: pending.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending and callable(handler):
            handler(*pending[0])


def serve(pipe: Connection, join: Callable[[], Group], config: ResolvedConfig) -> NoReturn:
    """The life of another rank than 0: join the group, load, and do as told until the pipe closes."""
    from fastdeploy.engine.runner import Runner  # imports Paddle

    try:
        model = load_part(config, join())
        _, (config,) = pipe.recv()  # as rank 0 has it: with the number of KV blocks
        runner = Runner(model, config)
        pipe.send(None)
        while True:
            method, arguments = pipe.recv()
            getattr(runner, method)(*arguments)
    except EOFError:  # rank 0 is done, or gone
        sys.exit(0)
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send(f"{type(error).__name__}: {error}")
        sys.exit(1)


def load_part(config: ResolvedConfig, group: Group) -> Decoder:
    """This rank's part of the model."""
    from fastdeploy.device import open_device
    from fastdeploy.models import load_model, open_model

    checkpoint, device = open_model(config.model, config.load_format, config.seed), open_device(group.size)
    return load_model(
        checkpoint, device, config.dtype, config.max_model_len, config.quantization, group.rank == 0, group
    )


def main() -> NoReturn:
    """A rank that a `Leader` has started."""
    pipe = Connection(int(sys.argv[1]))
    config, rank = pipe.recv()

    def join() -> Group:
        from fastdeploy.device import Group  # imports Paddle

        pipe.send(None)
        _, (address,) = pipe.recv()
        return Group(rank, config.tensor_parallel_size, address)

    serve(pipe, join, config)


if __name__ == "__main__":
    main()
