"""An offline load: requests of unequal lengths, all known at the start. How long until the last one is answered?

    sh bench/peers/setup_transformers.sh                                  # once: the peer's own environment
    python -m bench.load --save bench/results/load.md

64 requests, prompts of 16-256 random tokens, outputs of 16-128 tokens (greedy, end-of-sequence ignored), both lengths
drawn uniformly once, from seed 0. Counted are the output tokens that were asked for:

    output = sum of the requests' output lengths / wall time of the whole load, prompts included

Our engine gets all requests in one `generate` and batches continuously: whoever has finished makes room for the next.
So do llama.cpp, OpenVINO and vLLM (`--peers`; each worker's docstring says how).
A peer without a scheduler takes them in the given order in static batches, prompts padded on the left to the batch's
longest, all of them generating to the batch's longest output (`bench/peers/transformers_worker.py`).
`--engines ENGINE:DTYPE:SEQUENCES`: SEQUENCES is the most requests that run at a time, or the size of a static batch.
Ours is 32 because it is fastest there on two cores (tok/s with 16, 32, 64: 154, 178, 163), and its KV cache holds 32 of
the longest requests. Every round draws new prompts of the same lengths, so that nothing can come from a prefix cache.
How engines run and are compared: `bench/side_by_side.py`. With three engines a round takes about three minutes.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from bench.side_by_side import Worker, add_engines, chosen, measure, parser, report, started

SEED = 0
PROMPT_LENGTHS, OUTPUT_LENGTHS = (16, 256), (16, 128)
LONGEST = PROMPT_LENGTHS[1] + OUTPUT_LENGTHS[1]  # tokens of a request
STATIC_BATCH = 16
ENGINES = ("fastdeploy:bfloat16:32", f"transformers:float32:{STATIC_BATCH}", f"transformers:bfloat16:{STATIC_BATCH}")
PEERS = {  # with --peers: as many requests at a time as each is fastest with
    "fastdeploy": "fastdeploy:auto:48",
    "llama_cpp": "llama_cpp:auto:8",
    "openvino": "openvino:auto:64",
    "vllm": "vllm:float32:32",
    "transformers": f"transformers:float32:{STATIC_BATCH}",
}


@dataclass(frozen=True)
class Load:
    """The lengths of all requests, in the order in which they are submitted."""

    prompt_lengths: Sequence[int]
    output_lengths: Sequence[int]
    name: str = "output"

    @classmethod
    def drawn(cls, requests: int, name: str = "output") -> "Load":
        source = random.Random(SEED)
        lengths = [(source.randint(*PROMPT_LENGTHS), source.randint(*OUTPUT_LENGTHS)) for _ in range(requests)]
        return cls([prompt for prompt, _ in lengths], [output for _, output in lengths], name)

    def warm_up(self, worker: Worker, vocabulary: int) -> None:
        """The whole load: the first step of a batch size takes longer, and shorter outputs don't make all of them."""
        worker.generate(self._prompts(-1, vocabulary), list(self.output_lengths))

    def tokens_per_second(self, worker: Worker, round_number: int, vocabulary: int) -> float:
        """Output tokens that were asked for per second of the whole load."""
        seconds = worker.generate(self._prompts(round_number, vocabulary), list(self.output_lengths))
        return sum(self.output_lengths) / seconds

    def _prompts(self, round_number: int, vocabulary: int) -> list[list[int]]:
        source = random.Random(f"{SEED} {round_number}")
        return [source.choices(range(vocabulary), k=length) for length in self.prompt_lengths]

    def described(self) -> list[str]:
        """What there is to do, and what padding makes of it."""
        prompts, outputs = (
            f"{sum(lengths)} (static batches of {STATIC_BATCH}: {padded(lengths, STATIC_BATCH)})"
            for lengths in (self.prompt_lengths, self.output_lengths)
        )
        return [
            f"{len(self.prompt_lengths)} requests, prompts of {'-'.join(map(str, PROMPT_LENGTHS))} tokens, outputs of "
            f"{'-'.join(map(str, OUTPUT_LENGTHS))}, uniform, seed {SEED}; the last part of an engine's name: most "
            "requests that run at a time",
            f"prompt tokens to compute: {prompts}; output tokens: {outputs}",
        ]


def padded(lengths: Sequence[int], batch: int) -> int:
    """Tokens in static batches of sequences that are all as long as the longest of their batch."""
    batches = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return sum(len(each) * max(each) for each in batches)


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, rounds=3)
    add_engines(options, ENGINES)
    options.add_argument("--requests", type=int, default=64)
    return options.parse_args()


def main() -> None:
    from fastdeploy.models.weights import open_checkpoint

    options = arguments()
    checkpoint = open_checkpoint(options.model)
    options.model = str(checkpoint.path)  # so that no peer's environment needs the package
    options.engines = chosen(options, PEERS)
    load = Load.drawn(options.requests)
    with started(options, STATIC_BATCH, LONGEST) as workers:
        results = measure(workers, [load], options.rounds, checkpoint.config.vocab_size)
        report(f"{options.requests} requests at once", workers, options, results, load.described())


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # an engine that isn't there or failed: its message says it all
        sys.exit(str(error))
