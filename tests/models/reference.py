"""A decoder written down plainly in NumPy and float64: what the models must compute."""

from __future__ import annotations

import numpy as np

from fastdeploy.config import ModelConfig


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """The values after a round trip through storage in `dtype` (rounded to nearest, ties to even), as float64."""
    if dtype == "bfloat16":
        bits = np.asarray(values, np.float32).view(np.uint32)
        bits = bits + 0x7FFF + ((bits >> 16) & 1) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    return np.asarray(values).astype(dtype).astype(np.float64)


def logits(
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    dtype: str,
    token_ids: list[int],
    inputs: dict[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Logits after every token of one sequence, [T, vocabulary] float64.

    `tensors` has Hugging Face's names. Matrices, keys and values are rounded to `dtype`, nothing else.
    `inputs` is filled with what each module reads, [T, in_features].
    """
    weight = {name: stored(tensor, dtype if tensor.ndim == 2 else "float32") for name, tensor in tensors.items()}

    def linear(x: np.ndarray, module: str) -> np.ndarray:
        if inputs is not None:
            inputs[module] = x
        return x @ weight[f"{module}.weight"].T + weight.get(f"{module}.bias", 0.0)

    def norm(x: np.ndarray, module: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * weight[f"{module}.weight"]

    def head_norm(x: np.ndarray, module: str) -> np.ndarray:
        if f"{module}.weight" not in weight:
            return x
        return norm(x.reshape(len(x), -1, config.head_dim), module).reshape(x.shape)

    x = weight["model.embed_tokens.weight"][token_ids]
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        q, k = head_norm(q, f"{layer}.self_attn.q_norm"), head_norm(k, f"{layer}.self_attn.k_norm")
        x = x + linear(attention(config, dtype, q, k, v), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = linear(h, f"{layer}.mlp.gate_proj"), linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.down_proj")
    lm_head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return norm(x, "model.norm") @ weight[f"{lm_head}.weight"].T


def attention(config: ModelConfig, dtype: str, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of a whole sequence, [T, heads * head_dim]; query head h reads KV head h // group."""
    length, group = len(q), config.num_heads // config.num_kv_heads
    q = rotate(config, q.reshape(length, config.num_heads, config.head_dim))
    k = stored(rotate(config, k.reshape(length, config.num_kv_heads, config.head_dim)), dtype)
    v = stored(v.reshape(length, config.num_kv_heads, config.head_dim), dtype)
    out = np.empty_like(q)
    for head in range(config.num_heads):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(config.head_dim)
        scores[np.triu_indices(length, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[:, head // group]
    return out.reshape(length, -1)


def rotate(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """Rotary embedding of x [T, heads, head_dim] at positions 0 .. T-1."""
    half = config.head_dim // 2
    angles = np.arange(len(x))[:, None] * config.rope_theta ** (-np.arange(half) / half)  # [T, half]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = slice(half), slice(half, None)
    if config.rope_interleaved:
        first, second = slice(0, None, 2), slice(1, None, 2)
    out = np.empty_like(x)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out
