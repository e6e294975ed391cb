"""Is it the fastest engine that one can pip install on a CPU? The goals, and what we and the best peer reach.

    sh bench/peers/setup_llama_cpp.sh; sh bench/peers/setup_openvino.sh; sh bench/peers/setup_vllm.sh         # once
    python -m bench.cpu --save bench/results/cpu.md                                        # about a quarter of an hour

The peers compute as we do in the same part of the table: with the 4-bit weights of the file and quantised activations,
or all in float32. Cases: `bench/engine.py`, `bench/load.py`; how engines take turns: `bench/side_by_side.py`. A ratio
is the quotient of medians, ours to the best peer's; for memory it is ours to llama.cpp's.
Host time is what a step of greedy requests costs outside its kernels, in CPU time of its thread (`bench/host.py`).
"""

import argparse
import os
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import host
from bench.engine import needed, standard_cases
from bench.load import LONGEST, OUTPUT_LENGTHS, PROMPT_LENGTHS, SEED, Load
from bench.markdown import conditions, publish, spread, table
from bench.side_by_side import Case, Results, Worker, disturbed, measure, parser, started
from fastdeploy import LLM

STEPS, REQUESTS = 64, 64
LOAD, MEMORY = "offline load", "peak memory, MiB"


@dataclass(frozen=True)
class Comparison:
    """Engines that compute with the same weights.

    engines: name and the most requests at a time in the offline load, with which each is fastest; ours first.
    goals: least ratio of our speed to the best peer's, by case, in the order of the rows.
    memory: the peer that our peak memory is compared with, and the greatest ratio; None: no goal.
    """

    title: str
    engines: dict[str, int]
    goals: dict[str, float]
    memory: tuple[str, float] | None = None


FOUR_BITS = Comparison(
    "4-bit weights",
    {"fastdeploy:auto": 48, "llama_cpp:auto": 8, "openvino:auto": 64},
    {"decode, batch 1": 1.5, "decode, batch 8": 1.5, "prefill of 512": 1.1, LOAD: 1.3},
    ("llama_cpp:auto", 1.2),
)
FLOAT32 = Comparison(
    "float32",
    {"fastdeploy:float32": 32, "vllm:float32": 32},
    {"decode, batch 1": 1.0, "decode, batch 8": 1.0, "prefill of 512": 1.0, LOAD: 1.0},
)
HOST_GOALS = {1: 0.3, 64: 1.5}  # most milliseconds of a decode step outside its kernels, by batch


@dataclass
class Measured:
    """What a comparison found. peaks: MiB by engine; versions: each engine's own words."""

    results: Results
    peaks: dict[str, float]
    versions: list[str]


def compare(comparison: Comparison, options: argparse.Namespace, vocabulary: int) -> Measured:
    """Both parts, each with engines started anew: they set memory aside for what is to come."""
    cases = standard_cases(STEPS)
    options.engines = list(comparison.engines)
    with started(options, *needed(cases)) as workers:
        found = Measured(measure(workers, cases, options.rounds, vocabulary), peaks(workers), versions(workers))
    load: Sequence[Case] = [Load.drawn(REQUESTS, name=LOAD)]
    options.engines = [f"{name}:{sequences}" for name, sequences in comparison.engines.items()]
    with started(options, max(comparison.engines.values()), LONGEST) as workers:
        results = measure(workers, load, options.load_rounds, vocabulary)
    found.results.disturbance += results.disturbance
    found.results.values[LOAD] = {name.rpartition(":")[0]: rates for name, rates in results.values[LOAD].items()}
    return found


def peaks(workers: Sequence[Worker]) -> dict[str, float]:
    return {worker.name: worker.peak_mebibytes() for worker in workers}


def versions(workers: Sequence[Worker]) -> list[str]:
    return [str(worker.facts["engine"]) for worker in workers]


def written(comparison: Comparison, found: Measured) -> str:
    """The comparison as a table."""
    ours, *peers = comparison.engines
    rows = []
    for case, goal in comparison.goals.items():
        rates = found.results.values[case]
        medians = {name: statistics.median(values) for name, values in rates.items()}
        ratio = medians[ours] / max(medians[peer] for peer in peers)
        rows.append(judged(f"{case}, tok/s", [spread(rates[name]) for name in comparison.engines], ratio, goal))
    sizes = [f"{found.peaks[name]:.0f}" for name in comparison.engines]
    if comparison.memory:
        peer, most = comparison.memory
        rows.append(judged(MEMORY, sizes, found.peaks[ours] / found.peaks[peer], most, less=True))
    else:
        rows.append([MEMORY, *sizes, "", "", ""])
    return table([comparison.title, *comparison.engines, "ratio", "goal", ""], rows)


def host_time(options: argparse.Namespace) -> str:
    """A table of what a step of greedy requests costs outside its kernels."""
    os.environ["FASTDEPLOY_NUM_THREADS"] = str(options.threads)
    with LLM(options.model, quantization="auto", max_num_seqs=max(HOST_GOALS), max_model_len=host.MAX_MODEL_LEN) as llm:
        stopwatch, source = host.Stopwatch(), random.Random(0)
        found: dict[int, list[float]] = {batch: [] for batch in HOST_GOALS}
        for _ in range(1 + options.load_rounds):  # the first is a warm-up
            for batch, values in found.items():
                host.decode(llm, batch, host.SETTINGS["greedy"], False, source)
                parts = stopwatch.means(batch)
                values.append(sum(parts[part] for part in host.HOST))
    rows = []
    for batch, goal in HOST_GOALS.items():
        milliseconds = statistics.median(found[batch][1:])
        reached = "met" if milliseconds <= goal else "missed"
        rows.append([f"decode, batch {batch}, ms", f"{milliseconds:.3f}", f"<= {goal}", reached])
    return table(["host time of a step", "fastdeploy:auto", "goal", ""], rows)


def judged(label: str, values: Sequence[str], ratio: float, goal: float, less: bool = False) -> list[str]:
    """A row with its goal, and whether it is reached."""
    reached = ratio <= goal if less else ratio >= goal
    return [label, *values, f"{ratio:.2f}", f"{'<=' if less else '>='} {goal}", "met" if reached else "missed"]


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--load-rounds", type=int, default=3, help="rounds of the offline load")
    return options.parse_args()


def main() -> None:
    from fastdeploy.models.weights import open_checkpoint

    options = arguments()
    checkpoint = open_checkpoint(options.model)
    options.model = str(checkpoint.path)  # so that no peer's environment needs the package
    vocabulary = checkpoint.config.vocab_size
    comparisons = (FOUR_BITS, FLOAT32)
    all_found = [compare(comparison, options, vocabulary) for comparison in comparisons]
    tables = [written(comparison, found) for comparison, found in zip(comparisons, all_found, strict=True)]
    tables.append(host_time(options))
    disturbance = [value for found in all_found for value in found.results.disturbance]
    engines = dict.fromkeys(version for found in all_found for version in found.versions)
    at_a_time = ", ".join(f"{name} {most}" for each in comparisons for name, most in each.engines.items())
    notes = conditions(
        f"{'; '.join(engines)}; model {Path(options.model).name}; {options.threads} threads each",
        f"median (least-greatest) of {options.rounds} interleaved rounds, {options.load_rounds} of the offline load",
        f"decode: {STEPS} steps after a prompt of 16 tokens; peak memory: start and all cases but the offline load",
        f"offline load: {REQUESTS} requests, prompts of {'-'.join(map(str, PROMPT_LENGTHS))} tokens, outputs of "
        f"{'-'.join(map(str, OUTPUT_LENGTHS))}, uniform, seed {SEED}; most at a time: {at_a_time}",
        "ratio: our speed to that of the fastest peer; our memory to llama.cpp's",
        disturbed(disturbance),
    )
    publish(f"{Path(options.model).stem} on a CPU: the goals", "\n\n".join(tables), notes, options.save)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # an engine that isn't there or failed: its message says it all
        sys.exit(str(error))
