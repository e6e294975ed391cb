"""Every kernel over the shapes of real models, beside other libraries, on this machine's GPU or else its CPU.

    python -m bench.kernels --save bench/results/kernels.md           writes kernels.csv and two PNGs as well
    python -m bench.kernels --op linear attention --shape Llama-3-8B --providers ours torch flashinfer --compiled
    python -m bench.kernels --compare bench/results/kernels.csv       what became slower

Printed is the median over 11 replays, of a CUDA graph or of a recorded plan, with bytes and FLOPs counted from the
mathematics, as a share of the peak that bounds the case: a copy within the device or a large matrix product (on a CPU:
reading memory, multiply-add), measured in the same run. Inputs are used in turn, so many that no cache holds them; sets
that touch less than 4 MB (on a CPU 2 MB) stay in it all the same, as they do in a model, and so may what memory has too
little room for (rows of an embedding on a CPU). What a provider computes is compared
with the NumPy reference first. A provider or an operation that fails is a "-" with the reason. Ctrl-C (or `timeout -s
INT`) ends a run with the tables of what there is.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from bench.kernels.cases import Case, Tensors
from bench.kernels.machine import REPLAYS, Machine, Peaks, Unavailable, open_machine
from bench.kernels.providers import DEFAULT, PROVIDERS, opened
from bench.kernels.report import Measurement, Table, comparison, read_microseconds, report
from bench.kernels.selection import default, everything, goal, selected

PATIENCE = 0.1  # seconds for one turn of all inputs: a slow provider gets fewer of them
SHORTEST = 2e-6  # seconds that a call is thought to take at least, when it is decided how many make a graph


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parsed(arguments)
    before = read_microseconds(options.compare) if options.compare else {}
    machine = open_machine()
    cases = chosen(options, machine)
    names = [*(options.providers or DEFAULT[machine.kind]), *(["compiled"] if options.compiled else [])]
    providers, missing = opened(list(dict.fromkeys(names)), machine)
    if not providers:
        raise SystemExit(f"nothing to measure: {missing}")
    peaks = machine.peaks()
    facts = conditions(machine, peaks, missing)
    print("\n".join(facts), flush=True)
    found: list[Measurement] = []
    csv = Table(options.save and options.save.with_suffix(".csv"), facts)
    try:
        measure(machine, cases, providers, peaks, csv, found)
        facts.append(f"peaks at the end of the run: {described(machine.peaks())}")
    except KeyboardInterrupt:
        facts.append(f"stopped after {len({m.shape for m in found})} shapes")
    finally:
        csv.close()
        finish(options, machine, cases, [provider.name for provider in providers], peaks, facts, found, before)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", metavar="NAME", help="operations, such as linear; default: all")
    parser.add_argument("--shape", nargs="+", metavar="TEXT", help="shapes that contain one of these texts")
    parser.add_argument("--all", action="store_true", help="choose from all models and sizes: takes an hour or so")
    several = {"nargs": "+", "choices": [name for name in PROVIDERS if name != "compiled"]}
    parser.add_argument("--providers", **several, help="default: ours torch on a GPU, ours numpy paddle on a CPU")
    parser.add_argument("--compiled", action="store_true", help="PyTorch through torch.compile as well")
    parser.add_argument("--save", type=Path, metavar="FILE.md", help="tables; beside it go FILE.csv and two PNGs")
    parser.add_argument("--compare", type=Path, metavar="OLD.csv", help="say what became slower since that run")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace, machine: Machine) -> list[Case]:
    """The cases that `options` ask for. Ends the program, saying what there is, if there are none."""
    cases = everything(machine.kind) if options.all else default(machine.kind)
    try:
        return selected(cases, options.op, options.shape)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def conditions(machine: Machine, peaks: Peaks, missing: dict[str, str]) -> list[str]:
    """What a reader has to know: date, command, device, clocks, versions, peaks."""
    command = shlex.join(["python", "-m", "bench.kernels", *sys.argv[1:]])
    return [
        f"{date.today()}, `{command}`",
        *machine.facts(),
        f"peaks: {described(peaks)}; medians of {REPLAYS} replays",
        *(f"without {name}: {reason}" for name, reason in missing.items()),
    ]


def described(peaks: Peaks) -> str:
    """Peaks in words."""
    return f"{peaks.bandwidth / 1e9:.1f} GB/s, {peaks.arithmetic / 1e12:.4g} TFLOP/s"


def measure(
    machine: Machine, cases: Sequence[Case], providers: Sequence[Any], peaks: Peaks, csv: Table,
    found: list[Measurement],
) -> None:  # fmt: skip
    """All cases with all providers; every measurement is printed and written down before the next one begins."""
    started = time.perf_counter()
    for number, case in enumerate(cases, start=1):
        for measurement in measured(case, machine, providers, peaks):
            found.append(measurement)
            csv.add(measurement, peaks)
            progress = f"[{number}/{len(cases)} {time.perf_counter() - started:4.0f} s]"
            print(progress, measurement.line(peaks), flush=True)
        machine.release()


def measured(case: Case, machine: Machine, providers: Sequence[Any], peaks: Peaks) -> Iterator[Measurement]:
    """One case with each provider."""
    known = {"operation": case.operation, "shape": case.shape, **case.work()._asdict()}
    try:
        tensors = case.tensors(machine)
        reference = case.reference(machine, tensors)
    except Exception as error:
        yield Measurement(**known, provider="inputs", problem=described_error(machine, error))
        return
    for provider in providers:
        answers: dict[str, Any] = {}
        try:
            call = provider.prepare(case, one_set(case, machine, tensors, fresh=False))
            answers["error"] = reference.error(call(), provider.float64)
            if not answers["error"] <= case.tolerance:  # NaN is wrong, too
                answers["problem"] = f"wrong: relative error {answers['error']:.2g}"
            once = machine.once(call)
            calls = [call]
            for _ in range(rotation(case, machine, tensors, once) - 1):
                calls.append(provider.prepare(case, one_set(case, machine, tensors, fresh=True)))
            estimate = max(SHORTEST, once / 10, ideal_seconds(case, peaks))  # most of one small call is the host's
            samples = machine.seconds(calls, estimate, provider.replayable)
            answers |= {"seconds": statistics.median(samples), "least": min(samples), "greatest": max(samples)}
        except Exception as error:  # it is the libraries' business what they raise
            answers["problem"] = described_error(machine, error)
        yield Measurement(**known, provider=provider.name, **answers)


def described_error(machine: Machine, error: Exception) -> str:
    """One line. Raises RuntimeError if the device is lost: nothing that follows would work."""
    machine.wait()
    text = str(error).strip().partition("\n")[0][:200]
    return f"({text})" if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"


def one_set(case: Case, machine: Machine, tensors: Tensors, fresh: bool) -> Tensors:
    """A set of inputs: copies of everything if `fresh`, else of what calls change."""
    return {
        name: machine.clone(tensor) if fresh or name in case.mutates else tensor for name, tensor in tensors.items()
    }


def rotation(case: Case, machine: Machine, tensors: Tensors, once: float) -> int:
    """How many sets of inputs take turns: enough to overflow every cache, as far as memory and patience last."""
    allocated = sum(machine.view(tensor).nbytes for tensor in tensors.values())
    wanted = math.ceil(machine.rotation_bytes / case.work().bytes)
    most = min(machine.most_sets, machine.memory_bytes // allocated, math.ceil(PATIENCE / once))
    return max(1, min(wanted, most))


def ideal_seconds(case: Case, peaks: Peaks) -> float:
    """What the peaks allow."""
    work = case.work()
    return max(work.bytes / peaks.bandwidth, work.flops / peaks.arithmetic)


def finish(
    options: argparse.Namespace, machine: Machine, cases: Sequence[Case], providers: Sequence[str], peaks: Peaks,
    facts: Sequence[str], found: Sequence[Measurement], before: dict,
) -> None:  # fmt: skip
    """Tables to the terminal and, with pictures, to the files of --save."""
    goals = {(case.operation, case.shape): wanted for case in cases if (wanted := goal(case, machine.kind))}
    text = report(found, providers, goals, peaks)
    if before:
        text += f"\n\nAgainst `{options.compare}`: {comparison(before, found)}"
    print(f"\n{text}\n")
    if options.save is None:
        return
    title = f"Kernels on {facts[1].partition(',')[0]}"
    notes = "\n".join(f"- {fact}" for fact in facts)
    options.save.write_text(f"# {title}\n\n{text}\n\n{notes}\n", encoding="utf-8")
    with suppress(ImportError):  # the numbers are there, only the pictures are not
        from bench.kernels.plots import draw

        for path in draw(options.save.with_suffix(""), title, found, providers, peaks):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
