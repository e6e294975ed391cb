"""Our engine beside others: the same work, the same machine, the same run.

    sh bench/peers/setup_transformers.sh                                  # once: the peer's own environment
    python -m bench.engine --save bench/results/engine.md
    python -m bench.engine --peers llama_cpp openvino                     # or no names: all that have an environment

What is measured is the same for all: t(N), the wall time of one greedy `generate` of N tokens after random prompts, as
a batch, end-of-sequence ignored, prompts never used twice (nothing can come from a prefix cache).

    decode  = batch * (N - 1) / (t(N) - t(1))      prompts of 16 tokens; t(1) takes prefill and per-call overhead out
    prefill = 512 / t(1)                           one prompt of 512 tokens; t(1) is the time to first token
    peak memory = VmHWM of the engine's process    start, weights, compilation and all cases; not its child processes

"weights read" is parameters * bytes * decode steps per second at batch 1: to be compared with the memory bandwidth.
How engines run and are compared, and how to add one: `bench/side_by_side.py`.
"""

import argparse
import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.side_by_side import Results, Worker, add_engines, chosen, compared, measure, parser, report, started

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 96.4 / 134.5}  # auto: as in SmolLM2's file, packed
ENGINES = ("fastdeploy:bfloat16", "transformers:float32", "transformers:bfloat16")
PEERS = {  # with --peers: the file's own 4-bit weights where an engine can
    "fastdeploy": "fastdeploy:auto",
    "llama_cpp": "llama_cpp:auto",
    "openvino": "openvino:auto",
    "vllm": "vllm:float32",
    "transformers": "transformers:float32",
}
DECODE_CONTEXT, PREFILL_LENGTH, WARM_UP_TOKENS = 16, 512, 5


@dataclass(frozen=True)
class Case:
    """One kind of work: `batch` prompts of `context` tokens and `steps` decode steps after the first token."""

    name: str
    batch: int
    context: int
    steps: int = 0

    def warm_up(self, worker: Worker, vocabulary: int) -> None:
        worker.generate(next(self._prompts(-1, vocabulary)), WARM_UP_TOKENS if self.steps else 1)

    def tokens_per_second(self, worker: Worker, round_number: int, vocabulary: int) -> float:
        """Decoded tokens per second; prompt tokens per second where there is nothing to decode."""
        prompts = self._prompts(round_number, vocabulary)
        first = worker.generate(next(prompts), 1)
        if not self.steps:
            return self.batch * self.context / first
        return self.batch * self.steps / (worker.generate(next(prompts), 1 + self.steps) - first)

    def _prompts(self, round_number: int, vocabulary: int) -> Iterator[list[list[int]]]:
        """Batches of random prompts, each new."""
        source = random.Random(f"{self.name} {round_number}")
        while True:
            yield [[source.randrange(vocabulary) for _ in range(self.context)] for _ in range(self.batch)]


def standard_cases(steps: int) -> list[Case]:
    """What every engine has to do."""
    return [
        Case("decode, batch 1", 1, DECODE_CONTEXT, steps),
        Case("decode, batch 8", 8, DECODE_CONTEXT, steps),
        Case(f"prefill of {PREFILL_LENGTH}", 1, PREFILL_LENGTH),
    ]


def needed(cases: Sequence[Case]) -> tuple[int, int]:
    """Most sequences at a time, and most tokens of one."""
    return max(case.batch for case in cases), max(case.context + case.steps + 1 for case in cases)


def weights_read(workers: Sequence[Worker], single: Case, results: Results, parameters: int) -> list[str]:
    """The row of GB/s in a decode of one sequence."""
    steps = {name: statistics.median(values) for name, values in results.values[single.name].items()}
    size = {worker.name: parameters * BYTES.get(worker.dtype, math.nan) for worker in workers}
    read = {name: f"{size[name] * steps[name] / 1e9:.1f}" for name in steps}
    return compared("weights read at batch 1, GB/s", read, {})


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, rounds=7)
    add_engines(options, ENGINES)
    options.add_argument("--steps", type=int, default=64, help="decode steps of a measurement")
    return options.parse_args()


def main() -> None:
    from fastdeploy.models.weights import open_checkpoint

    options = arguments()
    checkpoint = open_checkpoint(options.model)
    parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    options.model = str(checkpoint.path)  # so that no peer's environment needs the package
    options.engines = chosen(options, PEERS)
    cases = standard_cases(options.steps)
    sequences, length = needed(cases)
    with started(options, sequences, length) as workers:
        results = measure(workers, cases, options.rounds, checkpoint.config.vocab_size)
        read = weights_read(workers, cases[0], results, parameters)
        work = [f"decode: {options.steps} steps after a prompt of {DECODE_CONTEXT} tokens"]
        report("engines side by side", workers, options, results, work, [read])


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # an engine that isn't there or failed: its message says it all
        sys.exit(str(error))
