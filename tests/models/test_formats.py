"""One model in several formats: whatever the file, the same logits, bit for bit."""

import re

import gguf
import numpy as np
import pytest

from fastdeploy.device import open_device
from fastdeploy.models import load_model
from fastdeploy.models.weights import open_checkpoint
from tests.models.test_decoder import Steps
from tests.models.test_paddle import paddle_tensors, write
from tests.references.families import CASES, prompts, tensors

IN_GGUF = {  # Hugging Face's modules -> llama.cpp's names
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.": "ffn_gate_inp.",
    "mlp.": "ffn_",
    "_proj": "",
}
ARCHITECTURES = {"mistral": "llama", "qwen3_moe": "qwen3moe", "ernie4_5_moe": "ernie4_5-moe"}  # others: model_type
GGUF_CASES = [
    "llama",
    "llama, tied, 9 heads on 3, biases",
    "llama, linear scaling",
    "mistral",
    "qwen2",
    "qwen2, yarn",
    "qwen3",
    "qwen3, tied, biases, one KV head",
    "ernie",
    "ernie, untied, biases",
    "qwen3 moe",
    "ernie moe",
    "ernie moe, every other layer",
]


def stacked(weights):
    """Tensors as llama.cpp has them of mixtures: those of all experts in one, shared experts by another name."""
    found = {}
    for name, array in weights.items():
        match = re.fullmatch(r"(.*\.mlp)\.experts\.\d+\.(\w+)_proj\.weight", name)
        if match:
            found.setdefault(f"{match[1]}.{match[2]}_exps.weight", []).append(array)
        elif name.endswith("e_score_correction_bias"):
            found[name] = array.reshape(-1)
        else:
            found[re.sub(r"shared_experts\.(\w+)_proj", r"\1_shexp", name)] = array
    return {name: np.stack(value) if isinstance(value, list) else value for name, value in found.items()}


def add_mixture(writer, config):
    """What llama.cpp's converter writes of a mixture of experts, of which qwen3moe's weights are always normalised."""
    if config["model_type"] == "qwen3_moe":
        assert config["norm_topk_prob"]
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    else:
        writer.add_expert_count(config["moe_num_experts"])
        writer.add_expert_used_count(config["moe_k"])
        writer.add_expert_shared_count(config.get("moe_num_shared_experts", 2))
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def write_gguf(path, config, weights):
    """A GGUF of float32 tensors, as llama.cpp's converter writes it of this config.json."""
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    theta = 500000.0 if architecture.startswith("ernie4_5") else 10000.0
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", theta)))
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "factor" in rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "moe_intermediate_size" in config:
        add_mixture(writer, config)
    for name, array in stacked(weights).items():
        if architecture == "llama" and any(f".{part}_proj." in name for part in "qk"):
            count = heads if ".q_proj." in name else kv_heads
            array = array.reshape(count, 2, array.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in IN_GGUF.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path, config, quantization=None):
    model = load_model(open_checkpoint(path), open_device(), "auto", 64, quantization, progress=False)
    return Steps(model).run((0, 0, prompts(config)[-1]))


@pytest.mark.parametrize("name", GGUF_CASES)
def test_a_gguf_gives_the_logits_of_the_directory(name, tmp_path):
    config, weights = CASES[name], tensors(CASES[name])
    directory = write(tmp_path / "directory", config, weights)
    np.testing.assert_array_equal(
        logits(write_gguf(tmp_path / "model.gguf", config, weights), config), logits(directory, config)
    )


@pytest.mark.parametrize("ending", [".safetensors", ".pdparams"])
@pytest.mark.parametrize("name", ["ernie", "ernie, untied, biases", "ernie moe"])
def test_both_flavours_of_ernie_give_the_same_logits(name, ending, tmp_path):
    config, weights = CASES[name], tensors(CASES[name])
    ours = write(tmp_path / "PT", config, weights)
    paddles = {**config, "architectures": [config["architectures"][0].replace("4_5", "4_5_").replace("__", "_")]}
    theirs = write(tmp_path / "Paddle", paddles, paddle_tensors(weights), ending)
    np.testing.assert_array_equal(logits(theirs, config), logits(ours, config))


@pytest.mark.parametrize("quantization", ["wint8", "w4a8"])
def test_both_flavours_are_quantised_alike(quantization, tmp_path):
    config = {**CASES["ernie"], "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    weights = tensors(config)
    ours = write(tmp_path / "PT", config, weights)
    theirs = write(tmp_path / "Paddle", config, paddle_tensors(weights))
    np.testing.assert_array_equal(logits(theirs, config, quantization), logits(ours, config, quantization))
