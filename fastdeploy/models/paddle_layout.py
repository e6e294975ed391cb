"""Checkpoints that Paddle's model libraries wrote, under Hugging Face's names and with its shapes.

    ernie.layers.0.self_attn.qkv_proj.weight  [in, q + k + v]  ->  model.layers.0.self_attn.q_proj.weight  [q, in] ...
    ernie.layers.0.mlp.up_gate_proj.weight    [in, gate + up]  ->  model.layers.0.mlp.gate_proj.weight  [gate, in] ...
    ernie.layers.0.mlp.down_proj.weight       [in, out]        ->  model.layers.0.mlp.down_proj.weight  [out, in]
    ernie.embed_tokens.weight                 [vocabulary, hidden], as it is

The gate comes first in up_gate_proj, its name notwithstanding. The "-PT" flavour of the same models is Hugging Face's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fastdeploy.config import ModelConfig
from fastdeploy.models.storage import StoredTensor

# What the names of a model's tensors begin with. Fused q, k and v lie one after the other in ERNIE only: elsewhere they
# are sorted by KV head, and stay unknown to the models.
PREFIXES = ("ernie", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
INNER_NAME = re.compile(rf"^({'|'.join(PREFIXES)})\.")


def is_paddle_layout(names: Iterable[str]) -> bool:
    """Whether tensors of these names come from Paddle's libraries."""
    return any(INNER_NAME.match(name) for name in names)


def huggingface_layout(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """The same tensors, renamed, split and transposed. Nothing is read."""
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        is_linear = len(tensor.shape) == 2 and name.endswith(".weight") and ".embed_tokens." not in name
        inner = INNER_NAME.sub("model.", name, count=1)
        renamed |= _split(inner, tensor.transposed() if is_linear else tensor, config, name.startswith("ernie."))
    return renamed


def _split(name: str, tensor: StoredTensor, config: ModelConfig, is_ernie: bool) -> dict[str, StoredTensor]:
    """The layers that are fused in one tensor, each by its own name."""
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {}
    if is_ernie and ".qkv_proj." in name:
        parts = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    if is_ernie and ".up_gate_proj." in name:
        parts = dict.fromkeys(("gate_proj", "up_proj"), tensor.num_rows // 2)
    if tensor.num_rows == 0 or sum(parts.values()) != tensor.num_rows:
        return {name: tensor}
    found, first = {}, 0
    for part, rows in parts.items():
        found[re.sub(r"qkv_proj|up_gate_proj", part, name)] = tensor.part(first, rows)
        first += rows
    return found
