"""The engine under a full load: how many tokens a second come out of many requests, given all at once?

    python -m bench.throughput --save bench/results/throughput.md                (Paddle's device: a GPU, or the CPU)
    python -m bench.throughput --torch                                           (a GPU under PyTorch)

256 requests, prompts and outputs of 100 to 1024 tokens, both drawn uniformly from seed 0, end-of-sequence ignored: the
load by which compact engines are compared (nano-vllm's). The model has Qwen3-0.6B's shapes and random weights, which
take the same time. Counted are output tokens over the wall time of the whole load, prompts included. The first run
compiles and is not counted; each of the others has new prompts of the same lengths, so that none comes from a cache.

`--peer 0.25`: transformers' own continuous batching on the same prompts, with a quarter of each output, since it takes
its time; the shorter contexts are in its favour.

The roofline: bytes that must be read, at the copy bandwidth measured in the same run: the weights once a decode step,
the keys and values of each sequence once for each of its tokens; and 2 FLOPs a weight and prompt token at the
arithmetic peak.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.markdown import conditions, publish, table
from fastdeploy import LLM, SamplingParams

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 40960, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "attention_bias": False, "eos_token_id": 151645, "bos_token_id": 151643,
}  # fmt: skip
LENGTHS = (100, 1024)
MAX_MODEL_LEN = 2 * LENGTHS[1]


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint directory without weights: config.json, and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models

    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    return folder


def drawn_lengths(requests: int) -> tuple[list[int], list[int]]:
    """Prompt and output lengths, as nano-vllm's bench.py draws them."""
    source = random.Random(0)
    prompts = []
    for _ in range(requests):
        length = source.randint(*LENGTHS)
        prompts.append(length)
        for _ in range(length):  # the tokens of that prompt, which the script draws in between
            source.randint(0, 10000)
    return prompts, [source.randint(*LENGTHS) for _ in range(requests)]


def run_once(llm: LLM, lengths: tuple[Sequence[int], Sequence[int]], seed: int, setting: dict[str, Any]) -> float:
    """Seconds for the whole load."""
    source = random.Random(seed)
    prompts = [[source.randint(0, 10000) for _ in range(length)] for length in lengths[0]]
    params = [SamplingParams(max_tokens=length, ignore_eos=True, **setting) for length in lengths[1]]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    if [len(output.outputs.token_ids) for output in outputs] != list(lengths[1]):
        raise RuntimeError("an output has another length than was asked for")
    return seconds


def decode_bytes(lengths: tuple[Sequence[int], Sequence[int]], config: dict[str, Any]) -> tuple[float, float]:
    """Bytes that decode steps read if each request decodes from the first step on: weights, and keys and values."""
    width = config["head_dim"] * (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    layer = config["hidden_size"] * (width + 3 * config["intermediate_size"])
    weights = 2 * (config["num_hidden_layers"] * layer + config["vocab_size"] * config["hidden_size"])
    per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    read = sum(sum(range(prompt + 1, prompt + output)) for prompt, output in zip(*lengths, strict=True))
    return weights * (max(lengths[1]) - 1), per_token * read


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=QWEN3["num_hidden_layers"], help="fewer, to try it on a CPU")
    parser.add_argument("--torch", action="store_true", help="on a GPU under PyTorch")
    parser.add_argument("--peer", type=float, metavar="SHARE", help="transformers, too, with SHARE of each output")
    parser.add_argument("--bandwidth", type=float, help="bytes a second of a copy, for the roofline")
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--save", type=Path, help="also write the table to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.torch:
        from bench.torch_device import use_torch

        use_torch()
    config = QWEN3 | {"num_hidden_layers": options.layers}
    lengths = drawn_lengths(options.requests)
    setting = {"temperature": options.temperature, "top_p": options.top_p}
    keywords = {"max_num_seqs": options.requests, "max_num_batched_tokens": options.max_num_batched_tokens}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = str(write_model(Path(folder), config))
        llm = LLM(path, load_format="dummy", max_model_len=MAX_MODEL_LEN, **keywords)
        ready = time.perf_counter() - started
    run_once(llm, lengths, 0, setting)
    seconds = [run_once(llm, lengths, 1 + number, setting) for number in range(options.rounds)]
    rates = [sum(lengths[1]) / each for each in seconds]
    weights, cache = decode_bytes(lengths, config)
    rows = [
        ["output tokens/s", f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"],
        ["seconds", f"{statistics.median(seconds):.2f}"],
        ["prompt tokens, output tokens", f"{sum(lengths[0])}, {sum(lengths[1])}"],
        ["bytes that decoding reads, TB: weights, keys and values", f"{weights / 1e12:.2f}, {cache / 1e12:.2f}"],
        ["LLM ready, s", f"{ready:.1f}"],
    ]
    if options.bandwidth:
        share = (weights + cache) / options.bandwidth / statistics.median(seconds)
        rows.append(["of the memory roofline of decoding", f"{share:.1%}"])
    if options.peer:
        from bench.peers.transformers_batching import output_rate

        llm.close()
        peer = output_rate(config, lengths, options.peer)
        text = f"{peer:.0f}; ours is {statistics.median(rates) / peer:.1f} times as fast"
        rows.append([f"transformers' continuous batching, {options.peer:.0%} of each output, tokens/s", text])
    facts = ", ".join(f"{name} {value}" for name, value in llm.facts.items())
    publish("Throughput", table(["what", "measured"], rows), conditions(facts, llm.statistics.describe()), options.save)


if __name__ == "__main__":
    main()
