"""What the engine itself costs: everything of a step but the model run, measured with a model that answers at once.

    python -m bench.scheduler --save bench/results/scheduler.md

256 requests run; prompts of 100 tokens, nothing in common. What is measured is the time from the end of one model run
to the beginning of the next: `Scheduler.update`, metrics, handing the news to the caller, `Scheduler.schedule`. It is
CPU time of the one thread that does all of it, so other programs on the machine disturb it little. The runner's share,
filling the arrays of a step, is not in it, nor is the text of outputs, which is made when a caller asks for it.

    decode    all 256 came at once and have 100 tokens to go: the median step. Nobody comes or goes.
    traffic   1,024 requests with 50 to 150 output tokens follow each other: the mean over all steps that serve
              256 requests, with all admissions and ends.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.markdown import conditions, publish, spread, table
from fastdeploy import SamplingParams
from fastdeploy.engine.engine import Engine
from fastdeploy.engine.request import Request
from fastdeploy.engine.scheduler import ScheduledBatch, Scheduler, StepOutput

NUM_RUNNING = 256
PROMPT_LENGTH = 100
BLOCK_SIZE = 64  # the default of LLM
BUDGET = 8192  # tokens of a step
VOCABULARY = 49_152
STEP_MS = (5.0, 530.0)


@dataclass
class Stopwatch:
    """A runner that answers at once, and notes the time that passed since its last answer."""

    seconds: list[float] = field(default_factory=list)
    num_served: list[int] = field(default_factory=list)
    answered: float = field(default_factory=time.thread_time)

    def run(self, batch: ScheduledBatch) -> StepOutput:
        self.seconds.append(time.thread_time() - self.answered)
        self.num_served.append(len(batch.items))
        output = StepOutput([item.start if item.samples else None for item in batch.items])
        self.answered = time.thread_time()
        return output

    def full_steps(self) -> list[float]:
        """Microseconds before each step that served as many requests as can run."""
        return [1e6 * seconds for seconds, served in zip(self.seconds, self.num_served) if served == NUM_RUNNING]


def watched_run(lengths: Iterable[int], enable_prefix_caching: bool) -> Stopwatch:
    """Serve a request for each of these output lengths."""
    rng = random.Random(0)
    num_blocks = NUM_RUNNING * 5  # enough that nobody is preempted
    scheduler = Scheduler(num_blocks, BLOCK_SIZE, NUM_RUNNING, BUDGET, enable_prefix_caching)
    requests = []
    for index, length in enumerate(lengths):
        prompt = [rng.randrange(VOCABULARY) for _ in range(PROMPT_LENGTH)]
        params = SamplingParams(max_tokens=length, ignore_eos=True).resolved(SamplingParams(), room=length, seed=0)
        requests.append(Request(str(index), prompt, prompt, params))
    stopwatch = Stopwatch()
    for _ in Engine(scheduler, stopwatch).run(requests):
        pass
    if scheduler.statistics.num_preemptions:
        raise RuntimeError("blocks ran out: the times are of something else")
    return stopwatch


def decode(enable_prefix_caching: bool) -> float:
    """Microseconds of a step in which everybody decodes."""
    steps = watched_run([100] * NUM_RUNNING, enable_prefix_caching).full_steps()
    return statistics.median(steps)


def traffic(enable_prefix_caching: bool) -> float:
    """Microseconds of a step while requests come and go."""
    rng = random.Random(1)
    lengths = [rng.randint(50, 150) for _ in range(4 * NUM_RUNNING)]
    return statistics.mean(watched_run(lengths, enable_prefix_caching).full_steps())


def measure(rounds: int) -> dict[str, list[float]]:
    """Microseconds of a step by case, a value for each round; interleaved, so that a disturbance hits all alike."""
    values: dict[str, list[float]] = {}
    for _ in range(rounds):
        for workload in (decode, traffic):
            for caching in (True, False):
                name = f"{workload.__name__}, prefix caching {'on' if caching else 'off'}"
                values.setdefault(name, []).append(workload(caching))
    return values


def rows(values: dict[str, list[float]], step_ms: Sequence[float]) -> list[list[str]]:
    """A row of the table for each case."""
    found = []
    for name, microseconds in values.items():
        median = statistics.median(microseconds)
        shares = [f"{median / (1e3 * each):.2%}" for each in step_ms]
        found.append([name, spread(microseconds), f"{median / NUM_RUNNING:.2f}", *shares])
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--step-ms",
        type=float,
        nargs="+",
        default=STEP_MS,
        help="what a step takes altogether; default: a fast GPU with a small model, and 256 sequences at the "
        "482 tok/s of bench/results/engine.md on two CPU cores",
    )
    parser.add_argument("--save", type=Path, help="also write the table to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    header = ["", "us a step", "us a step and request", *(f"of a step of {each:g} ms" for each in options.step_ms)]
    numbers = table(header, rows(measure(options.rounds), options.step_ms))
    notes = conditions(
        f"{NUM_RUNNING} running requests, prompts of {PROMPT_LENGTH} tokens, blocks of {BLOCK_SIZE}",
        f"median (least-greatest) of {options.rounds} interleaved rounds",
    )
    publish("Scheduler and bookkeeping", numbers, notes, options.save)


if __name__ == "__main__":
    main()
