"""How fast a model is loaded, and how much memory that takes beyond the model itself.

    python -m bench.loading --save bench/results/loading.md

A checkpoint of a Llama of 0.53 G weights is written to a temporary directory, in every layout that is read in its own
way, and loaded by a process of its own that has done nothing else, a second time after a first that compiled the
kernels. The files have just been written, so they come from the page cache: what is measured is our part, and a disk
that is slower than it bounds the rate.

    rate    bytes of the file / time of `load_model`, from the open checkpoint to the last weight in its place
    peak    most memory that the process held at a time, less what it held before / the model's bytes in memory
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.markdown import conditions, publish, table

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
CASES = (  # layout of the file, dtype in the file, dtype in memory
    ("Hugging Face", "bfloat16", "bfloat16"),
    ("Hugging Face", "float16", "float16"),
    ("Hugging Face", "bfloat16", "float32"),
    ("Paddle", "bfloat16", "bfloat16"),
)
PERIOD = (1 << 22) + 7  # numbers that are drawn; the tensors repeat them


def shapes(layout: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of CONFIG's model."""
    hidden, intermediate = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    q_rows, kv_rows = (CONFIG[heads] * CONFIG["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    prefix = "model" if layout == "Hugging Face" else "ernie"
    yield f"{prefix}.embed_tokens.weight", (CONFIG["vocab_size"], hidden)
    yield f"{prefix}.norm.weight", (hidden,)
    for layer in (f"{prefix}.layers.{index}" for index in range(CONFIG["num_hidden_layers"])):
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if layout == "Paddle":
            yield f"{layer}.self_attn.qkv_proj.weight", (hidden, q_rows + 2 * kv_rows)
            yield f"{layer}.self_attn.o_proj.weight", (q_rows, hidden)
            yield f"{layer}.mlp.up_gate_proj.weight", (hidden, 2 * intermediate)
            yield f"{layer}.mlp.down_proj.weight", (intermediate, hidden)
            continue
        for part, rows in {"q": q_rows, "k": kv_rows, "v": kv_rows}.items():
            yield f"{layer}.self_attn.{part}_proj.weight", (rows, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q_rows)
        for part in ("gate", "up"):
            yield f"{layer}.mlp.{part}_proj.weight", (intermediate, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, intermediate)


def write_checkpoint(directory: Path, layout: str, dtype: str) -> None:
    """config.json and model.safetensors, tensor by tensor: the whole would not fit every machine's memory."""
    drawn = np.random.default_rng(0).normal(scale=0.02, size=PERIOD).astype(np.float32)
    values = (drawn.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else drawn.astype(dtype)
    header, end = {}, 0
    for name, shape in shapes(layout):
        begin, end = end, end + int(np.prod(shape)) * values.itemsize
        header[name] = {
            "dtype": {"bfloat16": "BF16", "float16": "F16"}[dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in shapes(layout):
            np.resize(values, shape).tofile(file)


def load_here(path: str, dtype: str) -> None:
    """In a process of its own: load twice, and print the second one's GB/s and its memory over the model's."""
    from fastdeploy.device import open_device
    from fastdeploy.models import load_model
    from fastdeploy.models.weights import open_checkpoint

    device = open_device()
    for _ in range(2):
        checkpoint = open_checkpoint(path)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, start = memory("VmRSS"), time.perf_counter()
        model = load_model(checkpoint, device, dtype, 64, progress=False)
        seconds = time.perf_counter() - start
        peak, held = memory("VmHWM") - before, memory("VmRSS") - before
        rate = checkpoint.nbytes / seconds / 1e9
        del model, checkpoint
    print(json.dumps({"rate": rate, "held": held / 1e9, "peak": peak / held}))


def memory(field: str) -> int:
    """Bytes, as the kernel counts them: "VmRSS" now, "VmHWM" at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def measure(rounds: int, directory: Path) -> list[list[str]]:
    """A row of the table for each case; the rounds interleave."""
    paths = {}
    for layout, stored, _ in CASES:
        path = directory / f"{layout} {stored}"
        if path not in paths.values():
            write_checkpoint(path, layout, stored)
        paths[layout, stored] = path
    found: list[list[dict[str, float]]] = [[] for _ in CASES]
    for _ in range(rounds):
        for (layout, stored, dtype), results in zip(CASES, found):
            command = [sys.executable, "-m", "bench.loading", "--load", str(paths[layout, stored]), dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    rates = [[result["rate"] for result in results] for results in found]
    return [
        [
            f"{layout}, {stored}",
            dtype,
            f"{results[0]['held']:.2f}",
            f"{statistics.median(rate):.2f} ({min(rate):.2f}-{max(rate):.2f})",
            f"{statistics.median(result['peak'] for result in results):.2f}",
        ]
        for (layout, stored, dtype), results, rate in zip(CASES, found, rates)
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--save", type=Path)
    options.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.load:
        load_here(*chosen.load)
        return
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(chosen.rounds, Path(directory))
    header = ["file", "in memory", "GB in memory", "rate, GB/s", "peak / model"]
    notes = conditions(f"median (range) of {chosen.rounds} rounds; files in the page cache")
    publish("Loading a checkpoint of 1.07 GB", table(header, rows), notes, chosen.save)


if __name__ == "__main__":
    main()
