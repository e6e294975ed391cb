"""How measurements are written down: a table, and below it what it was measured on."""

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

INSTRUCTION_SETS = {"avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Names on the left, numbers on the right."""
    return "\n".join(map(row, [header, ["---"] + ["---:"] * (len(header) - 1), *rows]))


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float]) -> str:
    """Median, and the range in brackets."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def conditions(*facts: str) -> str:
    """Date, command and machine; then the `facts`, one a line."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = cpuinfo.partition("model name")[2].partition(":")[2].partition("\n")[0].strip() or platform.machine()
    features = " ".join(sorted(INSTRUCTION_SETS & set(cpuinfo.split())))
    command = shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    lines = [
        f"{date.today()}, `{command}`",
        f"{model}, {os.cpu_count()} cores ({features}), {platform.platform()}, Python {platform.python_version()}",
        *facts,
    ]
    return "\n".join(f"- {line}" for line in lines)


def publish(title: str, numbers: str, notes: str, file: Path | None) -> None:
    """Print table and notes; into `file`, if there is one, they go with a title."""
    text = f"{numbers}\n\n{notes}\n"
    print(text)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {title}\n\n{text}", encoding="utf-8")
