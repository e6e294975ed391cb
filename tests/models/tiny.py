"""Tiny random models, awkward in every size, as checkpoints in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastdeploy.config import ModelConfig
from fastdeploy.models.storage import StoredTensor
from fastdeploy.models.weights import Checkpoint
from tests.models.reference import stored

TIED = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=131,
    hidden_size=36,
    intermediate_size=52,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,  # 6 heads of 8: not the hidden size
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    rope_interleaved=False,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=None,
    eos_token_ids=(),
    pad_token_id=None,
    dtype="float32",
)
UNTIED = replace(TIED, tie_word_embeddings=False, num_heads=9, num_kv_heads=3, head_dim=16, hidden_size=80)
BIASED = replace(TIED, attention_bias=True, mlp_bias=True, num_heads=3, num_kv_heads=3, num_layers=3)
INTERLEAVED = replace(TIED, rope_interleaved=True, num_heads=4, num_kv_heads=1, head_dim=20, intermediate_size=96)
GROUPED = replace(TIED, num_heads=6, head_dim=16, hidden_size=64, intermediate_size=96)  # widths of whole groups of 32
QWEN3 = replace(GROUPED, architecture="Qwen3ForCausalLM", attention_bias=True)  # with a norm in every head
CONFIGS = {"tied": TIED, "untied": UNTIED, "biased": BIASED, "interleaved": INTERLEAVED, "qwen3": QWEN3}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint under Hugging Face's names, float32."""
    generator = np.random.default_rng(seed)
    hidden, intermediate, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_width, hidden, config.attention_bias),
        "self_attn.k_proj": (kv_width, hidden, config.attention_bias),
        "self_attn.v_proj": (kv_width, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, q_width, config.attention_bias),
        "mlp.gate_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.up_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, intermediate, config.mlp_bias),
    }
    tensors = {"model.embed_tokens.weight": generator.normal(size=(vocabulary, hidden))}
    for layer in (f"model.layers.{index}" for index in range(config.num_layers)):
        for name, (rows, columns, bias) in linears.items():
            tensors[f"{layer}.{name}.weight"] = generator.normal(size=(rows, columns)) * columns**-0.5
            if bias:
                tensors[f"{layer}.{name}.bias"] = generator.normal(size=rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = generator.uniform(0.5, 1.5, size=hidden)
        for name in ("q_norm", "k_norm") if config.architecture.startswith("Qwen3") else ():
            tensors[f"{layer}.self_attn.{name}.weight"] = generator.uniform(0.5, 1.5, size=config.head_dim)
    tensors["model.norm.weight"] = generator.uniform(0.5, 1.5, size=hidden)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = generator.normal(size=(vocabulary, hidden))
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def checkpoint(config: ModelConfig, tensors: dict[str, np.ndarray], dtype: str = "float32") -> Checkpoint:
    """A checkpoint of these tensors, stored in `dtype`, that needs no file."""
    entries = {}
    for name, tensor in tensors.items():
        rounded = stored(tensor, dtype).astype(np.float32)
        array = (rounded.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else rounded.astype(dtype)
        rows = lambda start, stop, array=array: array[start:stop]  # noqa: E731
        entries[name] = StoredTensor(array.shape, dtype, dtype, array.nbytes, rows)
    return Checkpoint(Path("tiny"), config, entries)
