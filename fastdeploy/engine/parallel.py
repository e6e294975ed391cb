"""Tensor parallelism: ranks, processes that hold a part of every weight each and compute every step together.

    rank 0, the caller's process                              ranks 1, 2, ...
    scheduler, sampler, texts
    Runner, its part of the model  -- Leader.tell --pipe-->   `serve` -> their Runner, their part of the model
                                  <== all-gathers in a step ==>

Rank 0 decides all: it sends every step's inputs and which launches to make, and all ranks make the same launches, each
with its own weights. So between steps nobody waits in a collective, which would give up after 30 s.

`LLM(model, tensor_parallel_size=N)` starts the other N - 1 processes, on this machine. `python -m
paddle.distributed.launch script.py` has started N of them, perhaps on several machines, and each runs the script: on
the other ranks `LLM` does not return then, but serves rank 0, and ends the process when rank 0 closes its own. Several
machines have to trust their network: what they send each other is not encrypted, and who can reach the launcher's port
can join, unless all have the same secret in $FASTDEPLOY_GROUP_KEY.

On the pipe, rank 0 speaks first:      (config, rank) -> None        sent once Paddle is imported
                                       ("join", (address,))          where the process group meets; then all load
                                       ("run", (config,)) -> None    with the number of KV blocks; sent once loaded
                                       (method of Runner, arguments) step by step, no answer
A rank that fails sends its error, a str, in place of what it should have sent, and ends.

A rank that ends, for whatever reason, closes its pipe and its sockets, and so the others notice at once: rank 0 ends
them all and raises one `RankFailed` that names the rank and the cause; the others end themselves when rank 0's end of
the pipe closes. A rank that is merely silent, stopped by a debugger say, is given up after 30 s, and named.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastdeploy.config import MODES
from fastdeploy.engine_config import ResolvedConfig

if TYPE_CHECKING:
    from fastdeploy.device.group import Group
    from fastdeploy.models.decoder import Decoder
    from fastdeploy.models.weights import Checkpoint
    from fastdeploy.text.tokenizer import Tokenizer

START_SECONDS = 120  # to import Paddle and to load, between two signs of life
SILENCE_SECONDS = 30  # that rank 0 waits for another to take what it is told, as in a collective
END_SECONDS = 5  # for a rank to end by itself
PEER_LOST = 3  # exit status of a rank that ends because another one did
LEADER = "fastdeploy/leader"  # under which rank 0 says where to call
START_RANK = "import sys; sys.path[:] = {path!r}; from fastdeploy.engine.parallel import main; main()"


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
        self._end = weakref.finalize(self, end_ranks, self._pipes, self.processes, os.getpid())
        self._start(config)

    def _start(self, config: ResolvedConfig) -> None:
        for rank in range(1, self.size):
            self._pipes[rank], theirs = Pipe()
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-c", START_RANK.format(path=sys.path), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for rank 0 alone, which tells the others
            )
            theirs.close()
            limit_silence(self._pipes[rank])
            self._pipes[rank].send((config, rank))

    def group(self) -> Group:
        """What the ranks talk through within a step. Raises RankFailed if one has not come so far."""
        from fastdeploy.device.group import Group

        with self._all_or_nothing(), reserved_port() as port:
            self._await_all()  # the other ranks have imported Paddle
            self.tell("join", ("127.0.0.1", port))
            return Group(0, self.size, ("127.0.0.1", port))

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
        """End the other ranks, as also happens to a Leader that is dropped, and when the program ends."""
        self._end()

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
        except (KeyboardInterrupt, SystemExit):  # while the ranks were starting; steps are not interrupted
            self._failure = "rank 0 was interrupted"
            self.close()
            raise
        except BaseException as error:
            self._failure = self._cause(error)
            self.close()
            raise RankFailed(self._failure) from error

    def _cause(self, error: BaseException) -> str:
        """Which rank failed first, and why. The others then fail, too, for want of it: that is no cause."""
        if isinstance(error, RankFailed):
            return str(error)
        said, gone, ended = {}, [], {}
        for rank, pipe in self._pipes.items():
            try:
                while pipe.poll():
                    said[rank] = pipe.recv()
            except (EOFError, OSError):
                gone.append(rank)
        for rank, process in self.processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired):  # a rank whose sockets are closed ends soon
                ended[rank] = process.wait(1)
        pids = {rank: process.pid for rank, process in self.processes.items()}
        endings = {rank: f"rank {rank} (process {pids[rank]}) {ending(status)}" for rank, status in ended.items()}
        causes = [
            *(endings[rank] for rank, status in ended.items() if status < 0),
            *(f"rank {rank}: {failure}" for rank, failure in said.items() if failure is not None),
            *(endings[rank] for rank, status in ended.items() if status not in (0, PEER_LOST)),
            *(f"rank {rank} has gone without a word" for rank in gone if rank not in ended),
            *silence(error, {rank: pid for rank, pid in pids.items() if rank not in ended}),
            f"rank 0: {type(error).__name__}: {error}",
        ]
        return causes[0]


def limit_silence(pipe: Connection) -> None:
    """Have `send` raise BlockingIOError where the other end takes nothing for too long, instead of waiting for ever."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SILENCE_SECONDS, 0))


def silence(error: BaseException, running: dict[int, int]) -> list[str]:
    """What there is to say of ranks that are there and don't answer, if `error` is for want of an answer; most telling
    first. running: the processes of those that have not ended, by rank."""
    from fastdeploy.device import PeerLost

    names = {pid: f"rank {rank} (process {pid})" for rank, pid in running.items()}
    stopped = [f"{name} is stopped, by SIGSTOP or a debugger" for pid, name in names.items() if is_stopped(pid)]
    if isinstance(error, PeerLost | BlockingIOError):  # the ranks that waited for the silent one, too, have ended
        return [*stopped, *(f"{name} is silent: it did not take part in a step" for name in names.values())]
    return stopped if isinstance(error, TimeoutError) else []


def is_stopped(pid: int) -> bool:
    """Whether a process is there, but not running until it gets SIGCONT."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def end_ranks(pipes: dict[int, Connection], processes: dict[int, subprocess.Popen], leader: int) -> None:
    """Let all ranks end, and see to it that they do.

    leader: the process whose ranks they are; another one, which it has forked, leaves them alone.
    """
    if os.getpid() != leader:
        return
    for pipe in pipes.values():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)  # they take it for the end, even where a forked child has the pipe, too
        pipe.close()
    deadline = time.monotonic() + END_SECONDS
    for process in processes.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()
    pipes.clear()
    processes.clear()


class LaunchedLeader(Leader):
    """Leads ranks that paddle.distributed.launch has started. A script can have one: the other ranks end with it."""

    exists = False

    def _start(self, config: ResolvedConfig) -> None:
        if LaunchedLeader.exists:
            raise RuntimeError(
                "a script under paddle.distributed.launch can make one LLM: its ranks have ended with it"
            )
        LaunchedLeader.exists = True

    def group(self) -> Group:
        """Meets the other ranks where the launcher said, and has them call back."""
        from fastdeploy.device.group import Group

        with self._all_or_nothing():
            group = Group(0, self.size, meeting_point(), START_SECONDS)
            key, published = group_key()
            with Listener((own_host(), 0), authkey=key) as listener:
                group.publish(LEADER, json.dumps([*listener.address, published]))
                while len(self._pipes) < self.size - 1:
                    with contextlib.suppress(AuthenticationError, EOFError):  # somebody else's call
                        pipe = listener.accept()
                        self._pipes[pipe.recv()] = pipe
                        limit_silence(pipe)
            return group


def group_key() -> tuple[bytes, str]:
    """What ranks show each other to be admitted, and what of it is published: nothing, if all have it anyway."""
    secret = os.environ.get("FASTDEPLOY_GROUP_KEY")
    if secret:
        return secret.encode(), ""
    key = secrets.token_hex(32)
    return key.encode(), key


def lead_ranks(config: ResolvedConfig) -> Leader | None:
    """The leader of the ranks that share this model, if it is shared; on another rank than 0 it does not return."""
    rank = launched_rank(config)
    if rank is None:
        return Leader(config) if config.tensor_parallel_size > 1 else None
    if rank > 0:
        follow_launched(config, rank)
    return LaunchedLeader(config)


def launched_rank(config: ResolvedConfig) -> int | None:
    """This process's rank, if paddle.distributed.launch has started it; else None.

    Raises ValueError if it has started another number of them than the model is to be divided among.
    """
    launched, wanted = os.environ.get("PADDLE_TRAINERS_NUM", "1"), config.tensor_parallel_size
    if launched == "1":
        return None
    if launched != str(wanted):
        raise ValueError(f"tensor_parallel_size={wanted}: paddle.distributed.launch has started {launched} ranks")
    return int(os.environ["PADDLE_TRAINER_ID"])


def ranks_here(config: ResolvedConfig) -> int:
    """How many of the model's ranks share this machine."""
    if launched_rank(config) is None:
        return config.tensor_parallel_size
    return int(os.environ.get("PADDLE_LOCAL_SIZE", config.tensor_parallel_size))


def meeting_point() -> tuple[str, int]:
    """Host and port that the launcher has reserved for rank 0."""
    host, _, port = os.environ["PADDLE_MASTER"].rpartition(":")
    return host, int(port)


def own_host() -> str:
    """The address by which other machines know this one."""
    return os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]


def follow_launched(config: ResolvedConfig, rank: int) -> NoReturn:
    """Serve rank 0 as long as it likes, then end the process."""
    from fastdeploy.device.group import Group

    group = Group(rank, config.tensor_parallel_size, meeting_point(), START_SECONDS)
    host, port, published = json.loads(group.published(LEADER))
    pipe = Client((host, port), authkey=published.encode() or group_key()[0])
    pipe.send(rank)
    serve(pipe, lambda: group, config)


def ending(status: int) -> str:
    """How a process ended, in words."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else gets within the block, but that Paddle's store, which reuses addresses, may listen on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


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
        if handler is not None:  # None: it was not Python that set it
            signal.signal(signal.SIGINT, handler)
        if pending and callable(handler):
            handler(*pending[0])


def serve(pipe: Connection, join: Callable[[], Group], config: ResolvedConfig) -> NoReturn:
    """The life of another rank than 0: join the group, load, and do as told until the pipe closes."""
    from fastdeploy.device import PeerLost
    from fastdeploy.engine.runner import Runner  # imports Paddle
    from fastdeploy.models import open_model
    from fastdeploy.text.tokenizer import load_tokenizer

    try:
        checkpoint, group = open_model(config.model, config.load_format, config.seed), join()
        model = load_part(checkpoint, config, group, lambda: load_tokenizer(config.tokenizer or checkpoint))
        _, (final_config,) = pipe.recv()
        runner = Runner(model, final_config)
        pipe.send(None)
        while True:
            method, arguments = pipe.recv()
            getattr(runner, method)(*arguments)
    except (EOFError, ConnectionError):  # rank 0 is done, or gone
        sys.exit(0)
    except PeerLost:
        sys.exit(PEER_LOST)
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send(f"{type(error).__name__}: {error}")
        sys.exit(1)


def load_part(
    checkpoint: Checkpoint, config: ResolvedConfig, group: Group | None, tokenizer: Callable[[], Tokenizer]
) -> Decoder:
    """This rank's part of the model, on its device; all of it without a group. tokenizer: asked for if weights are
    calibrated, which all ranks then do on the same text."""
    from fastdeploy.device import open_device
    from fastdeploy.models import load_model

    device, progress = open_device(ranks_here(config)), group is None or group.rank == 0
    text = None
    if MODES[config.quantization].floats_become == "Q4_1" and config.load_format != "dummy":
        from fastdeploy.models.calibration import calibration_sequences

        text = calibration_sequences(tokenizer(), checkpoint.config.vocab_size)
    arguments = (device, config.dtype, config.max_model_len, config.quantization, progress, group, text)
    return load_model(checkpoint, *arguments)


def main() -> NoReturn:
    """A rank that a `Leader` has started."""
    pipe = Connection(int(sys.argv[1]))
    config, rank = pipe.recv()

    def join() -> Group:
        from fastdeploy.device.group import Group  # imports Paddle

        pipe.send(None)
        _, (address,) = pipe.recv()
        return Group(rank, config.tensor_parallel_size, address)

    serve(pipe, join, config)
