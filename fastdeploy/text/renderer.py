"""Chat templates are rendered in a process of their own, which is ended if one takes too much.

Templates come with checkpoints, from anybody. Jinja's sandbox keeps them from Python's internals and from files, but
not from all time and memory: `'a' * 10**10`, loops within loops, lists of lists that are compared. There are too many
ways to stop each of them, and some can't be stopped from within. A process can be killed, and its memory limited. It
costs 0.1 ms a prompt, and 0.1 s for the first one.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

MAX_SECONDS = 10.0  # for a prompt; limits of its length and of memory are in `jinja_process.py`
START_SECONDS = 60.0  # for Python to start and to import Jinja: 0.1 s, unless the machine is busy
CRASHED = {"error": "the chat template crashes the process that renders it"}
ROOT = str(Path(__file__).parents[2])  # of this very package: the path may have changed since, or mean another folder
START = """
import sys
sys.path[:] = {path!r}
import fastdeploy
del sys.path[0]
from fastdeploy.text.jinja_process import main
main()
"""


class Renderer:
    """The process that runs `jinja_process.py`, from the first request on. Calls may come from several threads."""

    _process: subprocess.Popen | None
    _pipe: Connection | None

    def __init__(self) -> None:
        self.forget()

    def ask(self, request: bytes) -> dict[str, Any]:
        """The answer to a request; `jinja_process.py` describes both.

        Raises ValueError if the template goes over a limit or fails, RuntimeError if the process doesn't start.
        """
        with self._lock:
            try:
                # Twice, because the process may have been killed while it had nothing to do.
                reply = self._exchange(request) or self._exchange(request)
            except BaseException:  # Ctrl-C too: the next request may not get this one's answer
                self.end()
                raise
            answer = json.loads(reply) if reply else CRASHED
            if answer.get("exhausted"):
                self.end()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def _exchange(self, request: bytes) -> bytes | None:
        """None if the process has ended instead of answering."""
        pipe = self._pipe or self._start()
        try:
            pipe.send_bytes(request)
            if not pipe.poll(MAX_SECONDS):
                raise ValueError(f"the chat template takes longer than {MAX_SECONDS:g} s")
            return pipe.recv_bytes()
        except (EOFError, OSError):
            self.end()
            return None

    def _start(self) -> Connection:
        python = os.fsdecode(get_executable() or "")  # that of sys, or what a program that embeds Python named
        try:
            self._pipe, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [python, "-c", START.format(path=[ROOT, *map(str, sys.path)])],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for this process
                )
            if not self._pipe.poll(START_SECONDS):
                raise TimeoutError(f"no answer within {START_SECONDS:g} s")
            self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"{python!r} did not start the process that renders chat templates"
                f" ({str(error) or 'it ended at once'}): if it is no Python, name one to"
                " multiprocessing.set_executable(...)"
            ) from error
        return self._pipe

    def end(self) -> None:
        """End the process; the next request starts another one."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._pipe = self._process = None

    def forget(self) -> None:
        """Begin without a process; so does a forked child, which leaves it to its parent."""
        self._lock = threading.Lock()
        self._process = self._pipe = None


RENDERER = Renderer()
atexit.register(RENDERER.end)
os.register_at_fork(after_in_child=RENDERER.forget)
