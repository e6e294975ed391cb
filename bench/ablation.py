"""What is each optimisation worth? Our engine, whole, and with one of them switched off at a time.

    python -m bench.ablation --save bench/results/ablation.md                              # about six minutes
    python -m bench.ablation --only bfloat16                            # variants with that in their name or switch

Every variant is a process of its own, by the switch that a user has, too: an environment variable or a keyword of
`LLM`. Cases as in `bench/engine.py`, and one more that shows the prefix cache: a prompt of 512 tokens that came before.
The table has each variant's share of the whole engine's speed, a quotient of medians over interleaved rounds: 0.50 is
half as fast, so the optimisation doubles it.
"""

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from bench.engine import PREFILL_LENGTH, needed, standard_cases
from bench.markdown import conditions, publish, spread, table
from bench.side_by_side import Case, Results, Worker, disturbed, measure, parser

STEPS = 64


@dataclass(frozen=True)
class Variant:
    """Our engine with something switched off, and what one writes to have it so."""

    name: str
    spec: str = "fastdeploy:auto"
    variables: Mapping[str, str] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def switch(self) -> str:
        """As in a shell or in a call of LLM."""
        said = [f"`{name}={value}`" for name, value in self.variables.items()]
        said += [f"`{name}={value!r}`" for name, value in self.keywords.items()]
        return ", ".join(said) or f"`{self.spec}`"


WHOLE = Variant("everything on")
VARIANTS = [
    WHOLE,
    Variant("sums in registers over whole loops: off", variables={"FASTDEPLOY_REGISTER_TILES": "0"}),
    Variant("rows that nobody stores: computed", variables={"FASTDEPLOY_LIVE_ROWS": "0"}),
    Variant("sums stored from registers: off", variables={"FASTDEPLOY_DIRECT_STORES": "0"}),
    Variant("prefetch: off", variables={"FASTDEPLOY_PREFETCH": "0"}),
    Variant("AVX-512 and VNNI: off, AVX2 instead", variables={"FASTDEPLOY_INSTRUCTION_SET": "avx2"}),
    Variant("vectors: off, the compiler's baseline", variables={"FASTDEPLOY_INSTRUCTION_SET": "baseline"}),
    Variant("activations in int8: off, float32", "fastdeploy:exact"),
    Variant("4-bit weights: off, bfloat16", "fastdeploy:bfloat16"),
    Variant("the same, products of bfloat16 in pairs", "fastdeploy:bfloat16", {"FASTDEPLOY_BF16_PRODUCTS": "1"}),
    Variant("4-bit weights: off, float32", "fastdeploy:float32"),
    Variant("keys and values in bfloat16: off, float32", keywords={"kv_cache_dtype": "float32"}),
    Variant("keys and values in bfloat16: off, int8", keywords={"kv_cache_dtype": "int8"}),
    Variant("recorded decode steps: off", keywords={"enforce_eager": True}),
    Variant("batching: off, one request at a time", "fastdeploy:auto:1"),
    Variant("prefix cache: off", keywords={"enable_prefix_caching": False}),
    Variant("second thread: off", variables={"FASTDEPLOY_NUM_THREADS": "1"}),
    Variant("threads free to wander: off, pinned", variables={"FASTDEPLOY_PIN_THREADS": "1"}),
]


class SeenBefore:
    """A prompt that has just been computed comes again: its prefill is the prefix cache's work."""

    name = f"prefill of {PREFILL_LENGTH}, seen before"

    def warm_up(self, worker: Worker, vocabulary: int) -> None:
        self.tokens_per_second(worker, -1, vocabulary)

    def tokens_per_second(self, worker: Worker, round_number: int, vocabulary: int) -> float:
        source = random.Random(f"{self.name} {round_number}")
        prompt = source.choices(range(vocabulary), k=PREFILL_LENGTH)
        worker.generate([prompt], 1)
        return PREFILL_LENGTH / worker.generate([prompt], 1)


def written(results: Results, variants: Sequence[Variant]) -> str:
    """A row for each variant: its switch, and its share of the whole engine's speed in each case."""
    rows = []
    for variant in variants:
        cells = []
        for values in results.values.values():
            share = statistics.median(values[variant.name]) / statistics.median(values[WHOLE.name])
            cells.append(f"{spread(values[WHOLE.name])} tok/s" if variant is WHOLE else f"{share:.2f}")
        rows.append([variant.name, variant.switch(), *cells])
    return table(["", "switch", *results.values], rows)


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--only", default="", help="part of the name or the switch of the variants to measure")
    return options.parse_args()


def main() -> None:
    from fastdeploy.models.weights import open_checkpoint

    options = arguments()
    checkpoint = open_checkpoint(options.model)
    cases = standard_cases(STEPS)
    everything: list[Case] = [*cases, SeenBefore()]
    variants = [one for one in VARIANTS if one is WHOLE or options.only in f"{one.name} {one.switch()}"]
    with ExitStack() as stack:
        workers = []
        for variant in variants:
            worker = Worker(variant.spec, options, *needed(cases), variant.variables, variant.keywords)
            stack.callback(worker.close)
            worker.name = variant.name
            workers.append(worker)
        results = measure(workers, everything, options.rounds, checkpoint.config.vocab_size)
    notes = conditions(
        f"{workers[0].facts['engine']}; model {checkpoint.path.name}; {options.threads} threads, but for one row",
        f"medians of {options.rounds} interleaved rounds; decode: {STEPS} steps after a prompt of 16 tokens",
        disturbed(results.disturbance),
    )
    publish(f"{checkpoint.path.stem}: what each optimisation is worth", written(results, variants), notes, options.save)


if __name__ == "__main__":
    main()
