"""transformers' continuous batching on a GPU, for bench.throughput: the same prompts, a share of each output.

Its manager runs in a thread; requests with lengths of their own are added one by one. The first run captures CUDA
graphs and is not counted, as with ours.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM


def build(config: dict[str, Any]) -> Qwen3ForCausalLM:
    """The model of a config.json, with random weights, in bfloat16 on the GPU."""
    fields = {name: value for name, value in config.items() if name not in ("architectures", "torch_dtype")}
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**fields, attn_implementation="sdpa")).to(torch.bfloat16)
    return model.eval()


def output_rate(config: dict[str, Any], lengths: tuple[Sequence[int], Sequence[int]], share: float) -> float:
    """Output tokens a second of a run in which every output has `share` of its length."""
    model = build(config)
    settings = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=-1, max_new_tokens=max(lengths[1]))
    outputs = [max(1, int(length * share)) for length in lengths[1]]
    source = random.Random(1)
    prompts = [[source.randint(0, 10000) for _ in range(length)] for length in lengths[0]]
    with torch.no_grad(), model.continuous_batching_context_manager(generation_config=settings, timeout=5) as manager:
        started = time.perf_counter()
        for prompt, length in zip(prompts, outputs, strict=True):
            manager.add_request(prompt, max_new_tokens=length)
        done = tokens = 0
        while done < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done += 1
                tokens += len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' batching ended early")
        return tokens / (time.perf_counter() - started)
