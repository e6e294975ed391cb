"""What was measured, written down: a line and a CSV row at once, tables at the end, and what became slower."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from bench.kernels.machine import Peaks
from bench.kernels.selection import Goal
from bench.markdown import table

SLOWER = 1.05  # times the old median: less is noise
COLUMNS = ("operation", "shape", "provider", "microseconds", "least", "greatest", "bytes", "flops", "GB/s", "TFLOP/s",
           "percent of peak", "bound", "error", "problem")  # fmt: skip
Key = tuple[str, str, str]  # operation, shape, provider


@dataclass(frozen=True)
class Measurement:
    """One case with one provider.

    bytes, flops: of one call. seconds, least, greatest: per call, the median of all replays and their range; None where
    there was none. error: relative, against the reference. problem: why there is no time or why it is worth nothing;
    in brackets: the provider has no such operation.
    """

    operation: str
    shape: str
    provider: str
    bytes: int
    flops: int
    seconds: float | None = None
    least: float | None = None
    greatest: float | None = None
    error: float | None = None
    problem: str = ""

    @property
    def key(self) -> Key:
        """By which runs are compared."""
        return self.operation, self.shape, self.provider

    def bound(self, peaks: Peaks) -> str:
        """What limits the case on this machine: "memory" or "arithmetic"."""
        return "arithmetic" if self.flops / peaks.arithmetic > self.bytes / peaks.bandwidth else "memory"

    def share(self, peaks: Peaks) -> float | None:
        """Of the speed at which the peak that bounds it would allow it."""
        if not self.seconds:
            return None
        return max(self.flops / peaks.arithmetic, self.bytes / peaks.bandwidth) / self.seconds

    def rate(self, peaks: Peaks) -> str:
        """GB/s where memory is the bound, else TFLOP/s."""
        if not self.seconds:
            return "-"
        if self.bound(peaks) == "memory":
            return f"{self.bytes / self.seconds / 1e9:.1f} GB/s"
        return f"{self.flops / self.seconds / 1e12:.3g} TFLOP/s"

    def line(self, peaks: Peaks) -> str:
        """For the terminal."""
        start = f"{self.operation:16} {self.shape:60} {self.provider:10}"
        if not self.seconds:
            return f"{start}          -  {self.problem}"
        share = f"{100 * (self.share(peaks) or 0):5.1f} %"
        return f"{start} {1e6 * self.seconds:10.2f} us {self.rate(peaks):>15} {share}  {self.problem}".rstrip()

    def row(self, peaks: Peaks) -> list[str]:
        """For the CSV file, by `COLUMNS`."""
        found = [*self.key, *(_number(x and 1e6 * x) for x in (self.seconds, self.least, self.greatest))]
        found += [str(self.bytes), str(self.flops)]
        found += [_number(self.seconds and count / self.seconds / 10**scale) for count, scale in self._counts()]
        share = self.share(peaks)
        return [*found, _number(share and 100 * share), self.bound(peaks), _number(self.error), self.problem]

    def _counts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.bytes, 9), (self.flops, 12)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


class Table:
    """The CSV file, a row at a time, so that a run that is killed leaves what it had; None: there is no file."""

    def __init__(self, path: Path | None, facts: Sequence[str]) -> None:
        self.file: TextIO | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8", newline="")
        self.file.writelines(f"# {fact}\n" for fact in facts)
        self._write(COLUMNS)

    def add(self, measurement: Measurement, peaks: Peaks) -> None:
        """A row, on the disk when this returns."""
        if self.file:
            self._write(measurement.row(peaks))

    def _write(self, cells: Sequence[str]) -> None:
        assert self.file is not None  # the callers look
        csv.writer(self.file, lineterminator="\n").writerow(cells)
        self.file.flush()

    def close(self) -> None:
        """Nothing more comes."""
        if self.file:
            self.file.close()


def read_microseconds(path: Path) -> dict[Key, float]:
    """The medians of a CSV file that `Table` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            (row["operation"], row["shape"], row["provider"]): float(row["microseconds"])
            for row in rows
            if row["microseconds"]
        }


def slower(old: Mapping[Key, float], measurements: Iterable[Measurement]) -> list[tuple[Key, float, float]]:
    """(key, microseconds before, microseconds now) of what takes over `SLOWER` times as long, the worst first."""
    both = [(m.key, old[m.key], 1e6 * m.seconds) for m in measurements if m.seconds and m.key in old]
    return sorted((x for x in both if x[2] > SLOWER * x[1]), key=lambda x: x[1] / x[2])


def comparison(old: Mapping[Key, float], measurements: Sequence[Measurement]) -> str:
    """What became slower, in Markdown."""
    common = sum(m.seconds is not None and m.key in old for m in measurements)
    found = slower(old, measurements)
    said = f"{len(found)} of {common} measurements that both runs have take over {SLOWER} times as long."
    rows = [[" ".join(key), f"{was:.2f}", f"{now:.2f}", f"{now / was:.2f}"] for key, was, now in found]
    return f"{said}\n\n{table(['slower', 'before, us', 'now, us', 'ratio'], rows)}" if rows else said


def reached(goal: Goal, ours: Measurement, torch: Measurement | None, peaks: Peaks) -> float | None:
    """How far our kernel got, in the goal's measure; None if it or what it is compared with has no time."""
    if ours.seconds is None or ours.problem:
        return None
    if goal.measure == "us":
        return 1e6 * ours.seconds
    if goal.measure == "TFLOP/s":
        return ours.flops / ours.seconds / 1e12
    if goal.measure == "copy":
        return ours.bytes / ours.seconds / peaks.bandwidth
    return torch.seconds / ours.seconds if torch and torch.seconds else None


def goal_rows(goals: Mapping[tuple[str, str], Goal], found: Sequence[Measurement], peaks: Peaks) -> list[list[str]]:
    """A row for each goal, by operation and shape, of what our kernels have been measured for."""
    by_key = {m.key: m for m in found}
    rows = []
    for (operation, shape), goal in goals.items():
        ours = by_key.get((operation, shape, "ours"))
        if ours is None:
            continue
        value = reached(goal, ours, by_key.get((operation, shape, "torch")), peaks)
        if value is None:
            rows.append([f"{operation}, {shape}", str(goal), "-", "not measured"])
            continue
        said = f"{value:.1%}" if goal.measure in ("copy", "torch") else f"{value:.1f} {goal.measure}"
        rows.append([f"{operation}, {shape}", str(goal), said, "met" if goal.met(value) else "**missed**"])
    return rows


def result_tables(found: Sequence[Measurement], providers: Sequence[str], peaks: Peaks) -> Iterator[str]:
    """A table for each operation; a row has the first provider with its rate, then the others' microseconds."""
    by_key = {m.key: m for m in found}
    for operation in dict.fromkeys(m.operation for m in found):
        rows = []
        for shape in dict.fromkeys(m.shape for m in found if m.operation == operation):
            first, *others = (by_key.get((operation, shape, provider)) for provider in providers)
            share = first and first.share(peaks)
            cells = [_microseconds(first), first.rate(peaks) if first else "-", f"{share:.0%}" if share else "-"]
            rows.append([shape, *cells, *map(_microseconds, others)])
        yield table([operation, f"{providers[0]}, us", "rate", "of peak", *(f"{x}, us" for x in providers[1:])], rows)


def _microseconds(measurement: Measurement | None) -> str:
    if measurement is None or measurement.seconds is None:
        return "-"
    return f"{1e6 * measurement.seconds:.1f}{' (wrong)' if measurement.problem else ''}"


def report(
    found: Sequence[Measurement], providers: Sequence[str], goals: Mapping[tuple[str, str], Goal], peaks: Peaks
) -> str:
    """All tables, in Markdown: goals, results, problems."""
    parts = list(result_tables(found, providers, peaks))
    if rows := goal_rows(goals, found, peaks):
        parts.insert(0, table(["goal", "", "reached", ""], rows))
    problems = [f"- {' '.join(m.key)}: {m.problem}" for m in found if m.problem and not m.problem.startswith("(")]
    return "\n\n".join(parts + (["Problems:\n\n" + "\n".join(problems)] if problems else []))
