"""Where the time of a step goes, kernel by kernel, and what bounds it:

    python -m bench.profile MODEL.gguf... --save bench/results/profile.md

A model decodes batches and reads prompts, in chunks as the engine's. Each step is launched once, to see its launches;
then every launch is repeated by itself on the thread pool, under a clock. Rounds of these, of the step as one plan and
of the machine's peaks are interleaved; the tables have medians.

    bytes         what a launch has to move: weights once, activations, the keys and values that are visible
    operations    2 T N K of a linear layer, however many bytes an activation takes; 4 D for each visible pair of a
                  query head and a key
    bound         memory ("read"), or the peak of the operations' kind ("int8", "fp32"): whichever would take longer
    of bound      the time at that bound, in per cent of the time measured

Activations come from caches, so a kernel that moves nothing else can be above 100 % of what memory gives.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from bench.backend import Peaks, machine, seconds
from bench.markdown import conditions, publish, table
from fastdeploy.device import open_device
from fastdeploy.device.cpu import CPUDevice
from fastdeploy.kernels import launch as launching
from fastdeploy.kernels.attention import AttentionBatch, split_keys
from fastdeploy.kernels.formats import FORMATS
from fastdeploy.kernels.launch import ITEM_SIZES, TensorView, cdiv, view
from fastdeploy.models import load_model
from fastdeploy.models.decoder import Decoder, KVCache, StepInputs
from fastdeploy.models.weights import open_checkpoint
from fastdeploy.triton_cpu import runtime

BLOCK_SIZE = 64  # tokens of a KV block: the engine's default
CHUNK = CPUDevice.step_tokens
ROUNDS = 3  # at least
FORMAT_NAMES = {row.constants: name for name, row in reversed(FORMATS.items())}


# What a launch has to do


class Work(NamedTuple):
    """kind: what launches are grouped by. bytes, operations: None where nobody has counted them."""

    kind: str
    bytes: int | None = None
    operations: int | None = None
    in_integers: bool = False


Arguments = Mapping[str, Any]  # of a launch, by the kernel's own names


def tensor_bytes(arguments: Arguments) -> int:
    """Bytes of all tensors, each once."""
    return sum(value.nbytes for value in arguments.values() if isinstance(value, TensorView))


def linear_work(arguments: Arguments) -> Work:
    x, width, format_ = arguments["x"], arguments["K"], arguments.get("FORMAT")
    gated = "I" in arguments or arguments.get("GATED", False)
    features = arguments["I" if "I" in arguments else "N"] * (2 if gated else 1)
    stored = arguments["weight"].dtype if format_ is None else FORMAT_NAMES.get(format_, f"{format_[0]} bits")
    taken = "int8 + low" if arguments.get("x_low") is not None else x.dtype
    kind = f"linear {features} x {width}, {stored}, x {taken}{', SwiGLU' if gated else ''}"
    return Work(kind, tensor_bytes(arguments), 2 * x.shape[0] * features * width, x.dtype == "int8")


def attention_work(arguments: Arguments) -> Work:
    contexts = numbers(arguments["context_lens"])
    tokens = np.diff(numbers(arguments["cu_seqlens"])) if "cu_seqlens" in arguments else np.ones_like(contexts)
    if "DECODE" in arguments:  # decodes come first
        count = arguments["num_decodes"]
        mine = slice(0, count) if arguments["DECODE"] else slice(count, None)
        contexts, tokens = contexts[mine], tokens[mine]
    heads, kv_heads, width = (arguments[name] for name in ("HEADS", "KV_HEADS", "D"))
    pairs = heads * int((tokens * (contexts - tokens) + tokens * (tokens + 1) // 2).sum())
    scales = 2 * 4 if arguments["k_scales"] is not None else 0
    a_key = kv_heads * (2 * width * ITEM_SIZES[arguments["k_cache"].dtype] + scales)
    queries = int(tokens.sum()) * heads * width * ITEM_SIZES[arguments["qkv"].dtype]
    written = tensor_bytes({name: arguments.get(name) for name in ("out", "out_scales", "out_sums")})
    moved = int(contexts.sum()) * a_key + queries + written
    return Work("attention", moved, 4 * width * pairs, arguments.get("IN_INTEGERS", False))


def norm_work(arguments: Arguments) -> Work:
    residual = arguments["residual"]  # is read and written
    return Work("norm", tensor_bytes(arguments) + (0 if residual is None else residual.nbytes))


def rope_work(arguments: Arguments) -> Work:
    """qkv is read, its q written back; k and v go into the cache."""
    heads, kv_heads, width = (arguments[name] for name in ("HEADS", "KV_HEADS", "D"))
    qkv, cache = arguments["qkv"], arguments["k_cache"]
    a_token = (2 * heads + 2 * kv_heads) * ITEM_SIZES[qkv.dtype] + 2 * kv_heads * ITEM_SIZES[cache.dtype] + 4
    return Work("rope and cache", qkv.shape[0] * width * a_token)  # the last 4: half a cosine and half a sine


WORK: dict[str, Callable[[Arguments], Work]] = {
    "_int8_kernel": linear_work,
    "_gated_kernel": linear_work,
    "_float_kernel": linear_work,
    "_linear_kernel": linear_work,
    "_attention_kernel": attention_work,
    "_split_kernel": attention_work,
    "_rms_norm_kernel": norm_work,
    "_rope_and_cache_kernel": rope_work,
}


def work_of(kernel: Any, arguments: Sequence[Any], constants: Arguments) -> Work:
    """The work of a launch. Of kernels that are not in the table only the time is known."""
    values = [view(value) if hasattr(value, "__dlpack__") else value for value in arguments]
    count = WORK.get(kernel.__name__, lambda _: Work(kernel.__name__.strip("_").replace("_", " ")))
    return count({**dict(zip(kernel.arg_names, values)), **constants})


def numbers(tensor: TensorView) -> np.ndarray:
    """The contents of an int32 tensor in this process's memory, as int64."""
    return np.array((ctypes.c_int32 * prod(tensor.shape)).from_address(tensor.pointer), np.int64)


# Steps


@dataclass(frozen=True)
class Case:
    """Some sequences read `count` tokens each, after `past` ones, in steps of a chunk each."""

    name: str
    sequences: int
    past: int
    count: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.count

    @property
    def blocks(self) -> int:
        """KV blocks of a sequence."""
        return cdiv(self.past + self.count, BLOCK_SIZE)

    def steps(self) -> Iterator[StepInputs]:
        for start in range(0, self.count, CHUNK):
            yield self._step(self.past + start, min(CHUNK, self.count - start))

    def _step(self, past: int, count: int) -> StepInputs:
        position = np.arange(past, past + count, dtype=np.int32)
        tables = np.arange(self.sequences * self.blocks, dtype=np.int32).reshape(self.sequences, -1)
        slots = tables[:, position // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tokens = self.sequences * count
        batch = AttentionBatch(
            num_decodes=self.sequences if count == 1 else 0,
            num_seqs=self.sequences,
            max_query_len=count,
            num_splits=cdiv(past + count, split_keys()),
            cu_seqlens=view(np.arange(0, tokens + 1, count, dtype=np.int32)),
            context_lens=view(np.full(self.sequences, past + count, np.int32)),
            block_tables=view(tables),
        )
        ids = np.arange(tokens, dtype=np.int32) * 7 % 1009
        positions = np.tile(position, self.sequences)
        return StepInputs(view(ids), view(positions), view(slots.reshape(-1)), batch, tokens)


CASES = [Case(f"decode, batch {batch}", batch, 511, 1) for batch in (1, 8, 48)]
CASES += [Case(f"prompt of {length}", 1, 0, length) for length in (512, 4096)]


def filled_cache(model: Decoder, case: Case) -> KVCache:
    """Memory that nobody has written is one page of zeros, which would be read from a cache."""
    cache = model.allocate_cache(case.sequences * case.blocks, BLOCK_SIZE)
    for layer in cache.layers:
        for tensor in layer.tensors():
            if tensor is not None:
                ctypes.memset(tensor.pointer, 0x3C, tensor.nbytes)  # a small number in all types: 0.01 in bfloat16
    return cache


def runner(model: Decoder, case: Case) -> Callable[[], None]:
    """What launches all kernels of the case, up to the logits of every sequence's last token."""
    steps, cache = list(case.steps()), filled_cache(model, case)
    most = max(step.num_tokens for step in steps)
    memory = model.allocate_activations(most, case.sequences, case.past + case.count, case.sequences)
    logits = view(np.empty((case.sequences, model.embedding.out_features), np.float32))
    last = None if case.count == 1 else view(np.array([steps[-1].num_tokens - 1], np.int32))

    def run() -> None:
        for step in steps:
            model.attend(step, cache, memory)
        model.project(logits, last, memory)

    return run


# Measuring


class Launch(NamedTuple):
    work: Work
    function: int
    arguments: bytes
    grid: tuple[int, int, int]


def observed(run: Callable[[], None]) -> list[Launch]:
    """The launches of `run`, which makes them."""
    found: list[Launch] = []
    with runtime.observe() as seen, ExitStack() as patches:

        def noted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
            known = len(seen)
            launch(kernel, grid, *arguments, **constants)
            if len(seen) > known:
                found.append(Launch(work_of(kernel, arguments, constants), *seen[-1]))

        launch = launching.launch
        for name, module in list(sys.modules.items()):
            if name.startswith("fastdeploy.kernels.") and getattr(module, "launch", None) is launch:
                patches.enter_context(mock.patch.object(module, "launch", noted))
        run()
    return found


class Profile(NamedTuple):
    """Medians: seconds of all launches as one plan, and by kind of launch; peaks a second, by what is bounded."""

    launches: list[Launch]
    whole: float
    by_kind: dict[str, float]
    peaks: dict[str, float]


def profile(run: Callable[[], None], peaks: Peaks, duration: float) -> Profile:
    """Rounds for `duration` seconds, three at least."""
    run()  # compiles
    launches = observed(run)
    with runtime.record() as plan:
        run()
    samples: dict[str, list[float]] = defaultdict(list)
    measures = {"read": peaks.bandwidth, "int8": peaks.integers, "fp32": peaks.arithmetic}
    until = time.perf_counter() + duration
    while len(samples["whole"]) < ROUNDS or time.perf_counter() < until:
        for name, measure in measures.items():
            samples[name].append(measure())
        samples["whole"].append(seconds(plan.replay))
        for kind, taken in one_by_one(launches).items():
            samples[kind].append(taken)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    measured = {name: medians.pop(name) for name in measures}
    return Profile(launches, medians.pop("whole"), medians, measured)


def one_by_one(launches: Sequence[Launch]) -> dict[str, float]:
    """Seconds by kind of launch."""
    taken: dict[str, float] = defaultdict(float)
    launch = runtime.thread_pool().launch
    for work, function, arguments, grid in launches:
        started = time.perf_counter()
        launch(function, arguments, *grid)
        taken[work.kind] += time.perf_counter() - started
    return taken


# The table

HEADER = ["", "launches", "ms", "of the time", "MB", "GB/s", "GOP", "GOP/s", "bound", "of bound"]


def rows(title: str, found: Profile) -> list[list[str]]:
    """The case as a whole, its linear layers, then every kind of launch, the longest first."""
    works = [launch.work for launch in found.launches]
    linear = {kind: taken for kind, taken in found.by_kind.items() if kind.startswith("linear")}
    total = sum(found.by_kind.values())
    lines = [
        row(f"**{title}**", works, found.whole, found.whole, found.peaks),
        row(
            "all linear layers", [one for one in works if one.kind in linear], sum(linear.values()), total, found.peaks
        ),
    ]
    for kind, taken in sorted(found.by_kind.items(), key=lambda pair: -pair[1]):
        lines.append(row(kind, [one for one in works if one.kind == kind], taken, total, found.peaks))
    return lines


def row(name: str, works: Sequence[Work], taken: float, total: float, peaks: Mapping[str, float]) -> list[str]:
    """Several works as if they were one: operations of both kinds are held against the peak of integers."""
    moved = sum(work.bytes or 0 for work in works)
    operations = sum(work.operations or 0 for work in works)
    kind = "int8" if any(work.in_integers for work in works) else "fp32"
    bounds = {"read": moved / peaks["read"], kind: operations / peaks[kind]}
    bound = max(bounds, key=lambda name: bounds[name])
    cells = [name, str(len(works)), f"{taken * 1e3:.2f}", f"{taken / total:.0%}"]
    cells += [f"{moved / 1e6:.2f}", f"{moved / taken / 1e9:.1f}"] if moved else ["", ""]
    cells += [f"{operations / 1e9:.3f}", f"{operations / taken / 1e9:.0f}"] if operations else ["", ""]
    return [*cells, bound, f"{bounds[bound] / taken:.0%}"] if moved else [*cells, "", ""]


def model_table(path: str, peaks: Peaks, duration: float) -> tuple[str, list[dict[str, float]]]:
    """The profile of a model, and the peaks of each case."""
    model = load_model(
        open_checkpoint(path), open_device(), "auto", max(case.past + case.count for case in CASES), "auto", False
    )
    lines, measured = [], []
    for case in CASES:
        found = profile(runner(model, case), peaks, duration)
        measured.append(found.peaks)
        lines += rows(f"{case.name}: {case.tokens / found.whole:.0f} tokens/s", found)
    features = model.lm_head.out_features
    text = table(HEADER, lines).replace(f"linear {features} x", f"LM head {features} x")
    return f"## {Path(path).name}\n\n{text}", measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files")
    parser.add_argument("--seconds", type=float, default=4, help="of rounds for each case of a model; three at least")
    parser.add_argument("--save", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    open_device()
    peaks = Peaks()
    tables, measured = [], []
    for path in options.models:
        text, found = model_table(path, peaks, options.seconds)
        tables.append(text)
        measured += found
    units = {"read": "GB/s", "int8": "GOP/s", "fp32": "GFLOP/s"}
    medians = {name: statistics.median(one[name] for one in measured) / 1e9 for name in units}
    said = ", ".join(f"{name} {medians[name]:.1f} {unit}" for name, unit in units.items())
    notes = conditions(machine(), f"peaks: {said}", "decodes: 512 visible keys", f"prompts: in chunks of {CHUNK}")
    publish("Where the time goes", "\n\n".join(tables), notes, options.save)


if __name__ == "__main__":
    main()
