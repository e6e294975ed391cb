"""Tiny random checkpoints, one or more of each model family, awkward in every size: config.json and the tensors.

`make_families.py` asks transformers what it computes with them, `tests/models/test_families.py` compares. The tensors
are drawn from a seed, so that nothing but the answers is stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PROMPT_LENGTHS = (1, 5, 37)  # of the prompts of every model
NEW_TOKENS = 16

TINY = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA = {**TINY, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
MISTRAL = {**TINY, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
QWEN2 = {**TINY, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**TINY, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
ERNIE = {**TINY, "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "head_dim": 22}
QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 44,
    "norm_topk_prob": True,
}
ERNIE_MOE = {
    **ERNIE,
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "num_hidden_layers": 4,
    "moe_num_experts": 5,
    "moe_k": 3,
    "moe_intermediate_size": 36,
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}

CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, tied, 9 heads on 3, biases": {
        **LLAMA,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 90,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 500.0,
    },
    "llama, one KV head, head size of its own": {**LLAMA, "num_key_value_heads": 1, "head_dim": 26, "vocab_size": 77},
    "llama, linear scaling": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama, llama3 scaling": {
        **LLAMA,
        "head_dim": 32,
        "rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 64, "rope_theta": 5e5},
    },
    "mistral": {**MISTRAL, "head_dim": 14, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "mistral, yarn of other speeds": {
        **MISTRAL,
        "head_dim": 32,
        "rope_parameters": {
            **YARN, "rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False,
            "mscale": 1.0, "mscale_all_dim": 0.5,
        },
    },
    "qwen2": {**QWEN2, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2, yarn": {**QWEN2, "head_dim": 32, "hidden_size": 192, "rope_scaling": {**YARN, "type": "yarn"}},
    "qwen3": {**QWEN3, "rope_theta": 1e6, "sliding_window": 8},
    "qwen3, tied, biases, one KV head": {
        **QWEN3, "head_dim": 34, "num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True,
    },
    "ernie": ERNIE,
    "qwen3 moe": QWEN3_MOE,
    "qwen3 moe, some layers dense, weights as they are": {
        **QWEN3_MOE, "num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": False,
        "num_experts": 9, "num_experts_per_tok": 4, "hidden_size": 64, "moe_intermediate_size": 32,
    },
    "ernie moe": ERNIE_MOE,
    "ernie moe, every other layer": {
        **ERNIE_MOE, "num_hidden_layers": 6, "moe_layer_start_index": 2, "moe_layer_end_index": 4,
        "moe_layer_interval": 2, "moe_num_shared_experts": 1, "moe_k": 1, "num_key_value_heads": 1,
    },
    "ernie, untied, biases": {**ERNIE, "tie_word_embeddings": False, "use_bias": True, "num_key_value_heads": 1},
}  # fmt: skip


def prompts(config: dict[str, Any]) -> list[list[int]]:
    """Token ids, one prompt of each of PROMPT_LENGTHS."""
    generator = np.random.default_rng(1)
    return [generator.integers(0, config["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]


def write_checkpoint(directory: Path, config: dict[str, Any]) -> None:
    """config.json and model.safetensors, as a Hugging Face directory has them."""
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors(config), directory / "model.safetensors")


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint with this config.json, float32, under Hugging Face's names."""
    generator = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes(config).items():
        if "correction" in name:
            values = generator.normal(size=shape) * 0.1  # of probabilities near 0.2
        elif len(shape) == 2:  # sums of `shape[1]` products come out near 1
            values = generator.normal(size=shape) * (0.3 if "embed_tokens" in name else shape[1] ** -0.5)
        else:
            values = generator.normal(size=shape) if "bias" in name else generator.uniform(0.5, 1.5, size=shape)
        made[name] = values.astype(np.float32)
    return made


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config["num_hidden_layers"]):
        is_mixture = mixture_layers(config)[index]
        mlp = mixture_shapes(config) if is_mixture else mlp_shapes(config, "mlp", config["intermediate_size"])
        layer = {**attention_shapes(config), **mlp}
        layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", "ernie" in config["model_type"]):
        found["lm_head.weight"] = (vocabulary, hidden)
    return found


def attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, head_dim = (
        config["hidden_size"],
        config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
    )
    q_width, kv_width = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    found: dict[str, tuple[int, ...]] = {}
    for name, rows in {"q": q_width, "k": kv_width, "v": kv_width}.items():
        found[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if config["model_type"] == "qwen2" or config.get("attention_bias") or config.get("use_bias"):
            found[f"self_attn.{name}_proj.bias"] = (rows,)
    found["self_attn.o_proj.weight"] = (hidden, q_width)
    if config.get("attention_bias") or config.get("use_bias"):
        found["self_attn.o_proj.bias"] = (hidden,)
    if config["model_type"].startswith("qwen3"):
        found |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    return found


def mixture_layers(config: dict[str, Any]) -> list[bool]:
    """Which layers are mixtures of experts."""
    layers = range(config["num_hidden_layers"])
    if config["model_type"] == "qwen3_moe":
        step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
        return [index not in dense and (index + 1) % step == 0 for index in layers]
    if config["model_type"] == "ernie4_5_moe":
        first, last = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", len(layers))
        return [first <= index <= last and (index + 1) % config.get("moe_layer_interval", 1) == 0 for index in layers]
    return [False for _ in layers]


def mixture_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    is_ernie, width = config["model_type"] == "ernie4_5_moe", config["moe_intermediate_size"]
    count = config["moe_num_experts" if is_ernie else "num_experts"]
    found: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (count, config["hidden_size"])}
    for expert in range(count):
        found |= mlp_shapes(config, f"mlp.experts.{expert}", width)
    if is_ernie:
        found["mlp.moe_statics.e_score_correction_bias"] = (1, count)
        found |= mlp_shapes(config, "mlp.shared_experts", width * config.get("moe_num_shared_experts", 2))
    return found


def mlp_shapes(config: dict[str, Any], module: str, width: int) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
        found[f"{module}.{name}_proj.weight"] = shape
        if config.get("mlp_bias") or config.get("use_bias"):
            found[f"{module}.{name}_proj.bias"] = shape[:1]
    return found
