"""Triton's own tests on the CPU backend: nobody here wrote them, and none of them is kept here.

Fetch and run them by hand. A commit suits if it is about as old as the Triton wheel:

    git clone --filter=blob:none https://github.com/triton-lang/triton upstream
    git -C upstream checkout 192cdbe70    # June 2026, 3.7; f4fca2c0b (August 2026) is 3.9's
    python -m venv tests && tests/bin/pip install torch triton numpy scipy pytest
    tests/bin/pip install --no-deps -e .
    python -m bench.triton_tests upstream --python tests/bin/python --file bench/results/triton_tests.md

Other projects' tests run the same way: Liger-Kernel's with `liger test/transformers --options=`, in an environment that
has it, flash-linear-attention's with `fla tests/ops --options=`.

A file with more than `--sample` tests is sampled, with the same tests each time. Each `CHUNK` tests share a process. If
it ends or hangs, the test it was at is a crash or a hang, and a new process goes on behind it.

Not applicable is a test that upstream skips here, and a failing test that one of the `RULES` names: it needs what only
a GPU has. A test that passes counts as passed, whatever the rules say. Wrong: an assertion of the test failed.
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.markdown import conditions, publish, table

ROOT = Path(__file__).parents[1]
UNIT = "python/test/unit"
CHUNK = 150  # tests in a process: starting it takes 5 s
OUTSIDE = {"cuda", "instrumentation", "plugins"}  # folders that are a GPU's or LLVM's by name
Result = dict[str, Any]

# Why a failing test says nothing of a CPU: (reason, what its error says, what its source says, "" for anything). What
# the source says is never enough: tests that look at a GPU's assembly check results on the way.
RULES = (
    (
        "reads a GPU's assembly or layouts",
        r"KeyError: .*'(ptx|ttgir|llir|cubin|amdgcn|sass)'|make_ttgir|'ttgir' is",
        "",
    ),
    ("calls the CUDA or HIP driver", r"compiled with CUDA|NVIDIA driver|libcuda|No CUDA|_cuda\w*'|test_utils_src", ""),
    ("lists the fp8 formats of GPUs", "DID NOT RAISE", "supported_dtypes"),
    ("the front end alone, of another version", "CHECK|DID NOT RAISE", "CHECK-LABEL|atomic_poll"),
    ("inline PTX assembly", "inline_asm", "inline_asm_elementwise"),
    ("Gluon, a language for GPUs", "TranslatorTarget", ""),
    ("remarks of GPU passes", "in the remark|remark: Warning", "remark"),
    ("links LLVM bitcode", "assert False == True", "def test_link_extern_libs"),
    ("counts a line for each thread of a GPU", r"test_print\.<locals>\.<genexpr>", "num_warps|warp"),
    (
        "reads what a GPU's driver writes, which here is the error's text",
        "overflow detected.*driver_stderr_output=''",
        "",
    ),
    ("removed from Triton 3.9", "Block pointers have been removed", ""),
)


def applies(result: Result) -> str:
    """The rule that makes a failed test not applicable, or ""."""
    error, source = result.get("error") or result["text"], result.get("source", "")
    return next((why for why, says, does in RULES if re.search(says, error) and re.search(does, source)), "")


def kind(result: Result) -> str:
    """pass, n/a, wrong, error, crash or hang."""
    outcome = str(result["outcome"])
    if outcome in ("crash", "hang"):
        return outcome
    if outcome == "passed":
        return "pass"
    if outcome == "skipped" or applies(result):
        return "n/a"
    return "wrong" if "AssertionError" in result.get("error", "").partition(":")[0] else "error"


def cause(result: Result) -> str:
    """The error's most telling line without its numbers and paths: tests that fail alike share it."""
    lines = [line.strip() for line in (result.get("error") or result["text"]).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"not supported|can't|cannot|Mismatched|Error: \w| error: ", line)]
    line = re.sub(r"(cannot compile|Mismatched elements):.*", r"\1", (telling or lines or ["?"])[-1])
    return re.sub(r"0x[0-9a-f]+|-?\d+(\.\d+)?(e[+-]?\d+)?", "N", re.sub(r"/\S+/", "", line))[:200]


class Pytest:
    """Runs tests of one checkout in processes of their own."""

    def __init__(self, checkout: Path, python: str, options: Sequence[str], timeout: float) -> None:
        self.checkout, self.python, self.options, self.timeout = checkout.resolve(), python, options, timeout

    def _results(self, files: Sequence[str], selected: Sequence[str]) -> tuple[list[Result], str]:
        """What the plugin wrote, and how the process ended: "", "crash" or "hang". None selected: the files' ids."""
        plugin = ["-p", "bench.triton_tests_plugin", "-p", "no:cacheprovider", "-c", os.devnull, "--tb=short"]
        place = [f"--rootdir={self.checkout}", f"--confcutdir={self.checkout}"]
        what = [*files, *([] if selected else ["--collect-only"])]
        with tempfile.TemporaryDirectory() as folder:
            select, results = Path(folder, "select.json"), Path(folder, "results.jsonl")
            select.write_text(json.dumps(selected), encoding="utf-8")
            results.touch()
            variables = {"SELECT": str(select) if selected else "", "RESULTS": str(results)}
            path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
            process = subprocess.Popen(
                [self.python, "-m", "pytest", *plugin, *place, *self.options, *what],
                cwd=self.checkout,
                env=os.environ | variables | {"PYTHONPATH": path},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            ended = self._wait(process, results)
            return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()], ended

    def _wait(self, process: subprocess.Popen, results: Path) -> str:
        """A process that writes nothing for the timeout hangs."""
        while process.poll() is None:
            time.sleep(0.1)
            if time.time() - results.stat().st_mtime > self.timeout:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return "hang"
        return "" if process.returncode in range(6) else "crash"

    def collect(self, files: Sequence[str]) -> tuple[list[str], list[Result]]:
        """Ids of the files' tests, and a result for each file that can't be imported."""
        found, _ = self._results(files, [])
        return [test["id"] for test in found if "outcome" not in test], [test for test in found if "outcome" in test]

    def run(self, ids: Sequence[str]) -> list[Result]:
        """A result for each id."""
        done: dict[str, Result] = {}
        while left := [name for name in ids if name not in done]:
            found, ended = self._results(sorted({name.partition("::")[0] for name in left}), left)
            done |= {result["id"]: result for result in found if result["outcome"] != "started"}
            started = [result["id"] for result in found if result["id"] not in done]
            if not done.keys() & set(left):  # it never came to a test, or ended in the first
                started = started or left[:1]
            for name in started[-1:]:
                done[name] = {"id": name, "outcome": ended or "crash", "text": f"{ended or 'crash'} of the process"}
        return list(done.values())


def files(checkout: Path, paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        below = [checkout / path] if path.endswith(".py") else sorted((checkout / path).rglob("test_*.py"))
        yield from (str(file.relative_to(checkout)) for file in below if not OUTSIDE & set(file.parts))


def sampled(ids: Sequence[str], most: int) -> Iterator[str]:
    """At most so many of each file, the same each time, in their order. Every n-th would pick the same parameters."""
    for _, group in itertools.groupby(ids, lambda name: name.partition("::")[0]):
        of = list(group)
        picked = set(random.Random(0).sample(of, min(most or len(of), len(of))))
        yield from (name for name in of if name in picked)


def suite(test: str) -> str:
    """A row of the table: a folder, or test_core.py, which is larger than all others together."""
    path = Path(test.partition("::")[0])
    return str(path if path.name == "test_core.py" else path.parent)


def report(results: Sequence[Result], totals: Counter[str]) -> str:
    rows = []
    for name in sorted({suite(result["id"]) for result in results}):
        of = [result for result in results if suite(result["id"]) == name]
        kinds = Counter(map(kind, of))
        counts = [kinds[sort] for sort in ("pass", "n/a", "wrong", "error", "crash", "hang")]
        rows.append([name, f"{len(of)} of {totals[name]}", *map(str, counts)])
    return table(["suite", "run", "pass", "not applicable", "wrong", "error", "crash", "hang"], rows)


def groups(results: Sequence[Result]) -> str:
    """Failures by cause, the most frequent first, with an example each; then the reasons for not applicable."""
    failures: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    for result in results:
        if kind(result) == "n/a":
            skipped["skipped upstream" if result["outcome"] == "skipped" else applies(result)] += 1
        elif kind(result) != "pass":
            name = result["id"].partition("[")[0].rpartition("::")[2]
            failures[kind(result), name, cause(result)].append(result["id"])
    lines = [
        f"- {len(ids)} {sort}, `{name}`: `{why}`, as in `{ids[0].rpartition('/')[2]}`"
        for (sort, name, why), ids in sorted(failures.items(), key=lambda group: -len(group[1]))
    ]
    skips = [f"- {number}: {why}" for why, number in skipped.most_common()]
    return "\n".join(["Failures:", "", *lines, "", "Not applicable:", "", *skips])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("paths", nargs="*", default=[UNIT], help=f"files and folders in it; default: {UNIT}")
    parser.add_argument("--python", default=sys.executable, help="of the environment with PyTorch and pytest")
    parser.add_argument("--options", default="--device=cpu", help="further ones for pytest")
    parser.add_argument("--sample", type=int, default=1200, help="most tests of a file; 0: all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for a test")
    parser.add_argument("--results", type=Path, default=Path(os.devnull), help="every result as JSON, as it comes")
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()
    pytest = Pytest(args.checkout, args.python, args.options.split(), args.timeout)
    with ThreadPoolExecutor(args.jobs) as pool, args.results.open("w", buffering=1, encoding="utf-8") as log:
        ids, results = pytest.collect(list(files(args.checkout, args.paths)))
        totals = Counter(map(suite, [*ids, *(result["id"] for result in results)]))
        chosen = list(sampled(ids, args.sample))
        chunks = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
        log.writelines(json.dumps(result) + "\n" for result in results)
        for some in pool.map(pytest.run, chunks):
            log.writelines(json.dumps(result) + "\n" for result in some)
            results += some
    notes = conditions(f"upstream: {args.checkout.resolve().name}, Triton and PyTorch as in {args.python}")
    publish("Triton's own tests", report(results, totals), f"{groups(results)}\n\n{notes}", args.file)


if __name__ == "__main__":
    main()
