"""What config.json and GGUF metadata say of a model: how long it may go, what it must not overlook, ends of answers."""

import json
import os

import numpy as np
import pytest

from fastdeploy.config import config_from_gguf, config_from_json
from fastdeploy.models.weights import open_checkpoint
from tests.smollm2 import MODEL, needs_smollm2
from tests.test_weights import CONFIG_JSON, HEAD_DIM, LAYERS, VOCABULARY, random_weights, write_directory
from tests.test_weights import LLAMA_METADATA as WRITTEN

LLAMA_CONFIG = config_from_json(CONFIG_JSON, {}, "float32", "c")
LLAMA_METADATA = {"general.architecture": "llama"} | WRITTEN  # as a writer completes it


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 500000}, 500000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}, 7e4, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_parameters": {"rope_theta": 5e5} | LLAMA3}, 5e5, LLAMA3),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 512},
            10000.0,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        ),
    ],
)
def test_old_and_new_rope_fields(rope, theta, scaling):
    config = config_from_json(CONFIG_JSON | rope, {}, "float32", "config.json")
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_generation_config_decides_where_answers_end():
    assert config_from_json(CONFIG_JSON, {}, "float32", "c").eos_token_ids == (2,)
    assert config_from_json(CONFIG_JSON, {"eos_token_id": [5, 6]}, "float32", "c").eos_token_ids == (5, 6)
    assert config_from_json(CONFIG_JSON | {"eos_token_id": None}, {}, "float32", "c").eos_token_ids == ()


def test_model_type_tells_the_architecture_where_none_is_named():
    unnamed = {key: value for key, value in CONFIG_JSON.items() if key != "architectures"}
    assert config_from_json(unnamed | {"model_type": "qwen3"}, {}, "float32", "c").architecture == "Qwen3ForCausalLM"
    with pytest.raises(ValueError, match="architectures.*missing"):
        config_from_json(unnamed | {"model_type": "bert"}, {}, "float32", "c")


def test_a_mixture_is_in_the_layers_that_the_steps_reach():
    moe = {"num_hidden_layers": 6, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    qwen = CONFIG_JSON | moe | {"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}
    mixture = config_from_json(qwen | {"mlp_only_layers": [3]}, {}, "float32", "c").mixture
    assert (mixture.layers, mixture.weight_floor, mixture.shared_size) == ({1, 5}, None, 0)
    ernie = CONFIG_JSON | moe | {"architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": 4, "moe_k": 2}
    mixture = config_from_json(ernie, {}, "float32", "c").mixture
    assert (mixture.layers, mixture.weight_floor, mixture.shared_size) == ({1, 2, 3, 4, 5}, 1e-12, 16)
    for change, message in {"moe_k": "moe_k.*5; there are 4 experts", "use_bias": "use_bias.*without biases"}.items():
        with pytest.raises(ValueError, match=message):
            config_from_json(ernie | {change: 5 if change == "moe_k" else True}, {}, "float32", "c")


@pytest.mark.parametrize("name", ["Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"])
def test_what_an_ernie_does_not_say(name):
    ernie = config_from_json(CONFIG_JSON | {"architectures": [name]}, {}, "float32", "c")
    assert (ernie.architecture, ernie.rope_theta, ernie.rope_interleaved) == ("Ernie4_5ForCausalLM", 500000.0, True)
    assert ernie.tie_word_embeddings and not ernie.attention_bias and not ernie.mlp_bias
    biased = config_from_json(CONFIG_JSON | {"architectures": [name], "use_bias": True}, {}, "float32", "c")
    assert biased.attention_bias and biased.mlp_bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel.*architectures we have are LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None}, "architectures.*missing"),
        ({"architectures": [3]}, "architectures"),
        ({"hidden_size": None}, "hidden_size.*missing"),
        ({"hidden_size": "big"}, "hidden_size.*'big'"),
        ({"num_hidden_layers": True}, "num_hidden_layers.*True"),
        ({"num_attention_heads": 0}, "num_attention_heads.*0"),
        ({"num_key_value_heads": 2}, "num_key_value_heads.*2; the 3 heads must share"),
        ({"head_dim": None}, "head_dim.*hidden size 64 is no multiple of 3 heads"),
        ({"head_dim": 7}, "head_dim.*even head size, not 7"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor.*missing"),
        ({"rope_scaling": "linear"}, "rope_scaling.*must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor.*0.5"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers.*1000000000; must be 10000 at most"),
        ({"vocab_size": 10**12}, "vocab_size.*must be 4194304 at most"),
        ({"hidden_size": 2**31}, "hidden_size.*must be 2147483647 at most"),
    ],
)
def test_config_we_cannot_use_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(CONFIG_JSON | change, {}, "float32", "config.json")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '"text"',
        "\xff\xfe",
        "[" * 100_000,
        '{"a":' * 70 + "1" + "}" * 70,
        '{"a": NaN}',
        '{"a": -Infinity}',
    ]
    + ['{"a": 1e999}', f'{{"a": {"9" * 309}}}', f'{{"a": {"9" * 9999}}}'],
)
def test_config_json_that_is_no_object_is_refused(tmp_path, content):
    write_directory(tmp_path, random_weights())
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json: expected"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_directory_or_a_device_is_no_json(tmp_path, name):
    write_directory(tmp_path, random_weights())
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: expected a file, found a directory"):
        open_checkpoint(tmp_path)
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: expected a file, found a device"):
        open_checkpoint(tmp_path)


def test_json_of_more_bytes_than_any_model_has_is_not_read(tmp_path):
    write_directory(tmp_path, random_weights())
    with open(tmp_path / "config.json", "ab") as file:
        file.truncate((1 << 25) + 1)
    with pytest.raises(ValueError, match="config.json: has 33554433 bytes; such a file may have 33554432"):
        open_checkpoint(tmp_path)


def test_layers_that_a_config_does_not_have_are_in_no_mixture():
    moe = {"num_hidden_layers": 6, "moe_intermediate_size": 8, "moe_num_experts": 4, "moe_k": 2}
    ernie = CONFIG_JSON | moe | {"architectures": ["Ernie4_5_MoeForCausalLM"], "moe_layer_end_index": 10**9}
    assert config_from_json(ernie, {}, "float32", "c").mixture.layers == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        (
            "config.json",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes",
        ),
        ("config.json", {"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ("config.json", {"quantization_config": {"quant_method": "hqq", "quant_config": {}}}, "hqq"),
        ("config.json", {"quantization_config": {"quant_method": "exl2", "bits": 4.0}}, "exl2"),
        ("config.json", {"quantization_config": {"dense_quant_type": "wint8", "moe_quant_type": "w4w2"}}, "wint8"),
        ("config.json", {"quantization_config": {"dense_quant_type": None, "moe_quant_type": "w4w2"}}, "w4w2"),
        ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ("config.json", {key: {"group_size": 64, "bits": 4} for key in ("quantization_config", "quantization")}, "mlx"),
        ("config.json", {"quantization_config": ["x"] * 10_000}, "a method without a name"),
        ("config.json", {"quantization_config": {"bits": 4}}, "a method without a name .*bits"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}},
            "gptq.*marlin",
        ),
        ("config.json", {"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "awq, version 'gemv'"),
        ("config.json", {"quantization_config": {"quant_method": "awq", "version": 4}}, "awq, version 4"),
        ("config.json", {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fp8, fmt 'e5m2'"),
        (
            "config.json",
            {"compression_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
            "compressed-tensors, format 'nvfp4",
        ),
        ("config.json", {"quantization_config": {"quant_method": "auto-round", "bits": 4}}, "auto-round"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "modelopt.*NVFP4",
        ),
        ("quant_config.json", {"w_bit": 4, "version": "GEMV"}, "awq.*GEMV"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "modelopt, quant_algo 'NVFP4'"),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "W4A8_AWQ"}}, "modelopt.*W4A8"),
    ],
)
def test_quantised_checkpoints_are_refused_before_their_shards_are_opened(tmp_path, file, content, method):
    (tmp_path / "model.safetensors").write_bytes(b"no shard")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON | content if file == "config.json" else CONFIG_JSON))
    if file != "config.json":
        (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"/{file}.* quantised, by {method}.*unquantised checkpoint.*wint4.*GGUF"):
        open_checkpoint(tmp_path)


def length_limit(config, **changes):
    return config_from_json(config | changes, {}, "float32", "c").length_limit


def test_a_sliding_window_bounds_the_length_and_is_a_llama_within():
    mistral = CONFIG_JSON | {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}
    assert config_from_json(mistral, {}, "float32", "c").architecture == "LlamaForCausalLM"
    assert length_limit(mistral, sliding_window=None)[0] == length_limit(mistral, sliding_window=8192)[0] == 8192
    assert length_limit(mistral)[0] == 4096  # its default
    limit, why = length_limit(mistral, sliding_window=1024)
    assert limit == 1024 and "sliding window" in why


def test_a_qwen_has_the_window_that_any_of_its_layers_has():
    qwen = CONFIG_JSON | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 1}
    whole = [{}, {"use_sliding_window": True, "max_window_layers": LAYERS}, {"layer_types": ["full_attention"] * 2}]
    assert [length_limit(qwen, **changes)[0] for changes in whole] == [2048] * 3
    for slides in ({"use_sliding_window": True}, {"layer_types": ["full_attention", "sliding_attention"]}):
        assert length_limit(qwen, **slides)[0] == 64
    with pytest.raises(ValueError, match="layer_types.*linear_attention.*only full and sliding"):
        length_limit(qwen, layer_types=["full_attention", "linear_attention"])


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"type": "linear", "factor": 4.0}, 2048 * 4),
        ({"type": "linear", "factor": 2.5}, 5120),
        ({"rope_type": "yarn", "factor": 4.0}, 2048 * 4),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 2048),  # stated scaled
        (LLAMA3, 2048),
        (None, 2048),
    ],
)
def test_scaled_rope_reaches_as_far_as_it_stretches(rope, limit):
    assert length_limit(CONFIG_JSON, rope_scaling=rope) == (limit, "the positions this model was made for")


FOREIGN = {  # fields that change what other families compute: a value that does, and one that does not
    "swiglu_limit": (7.0, 0.0),
    "attn_logit_softcapping": (50.0, None),
    "final_logit_softcapping": (30.0, 0),
    "embedding_multiplier": (12.0, 1.0),
    "attention_multiplier": (0.0078125, 8**-0.5),
    "query_pre_attn_scalar": (256, 8),
    "logits_scaling": (8.0, 1),
    "scale_emb": (12, 1),
    "hidden_activation": ("gelu_pytorch_tanh", "silu"),
    "use_parallel_residual": (True, False),
    "is_encoder_decoder": (True, False),
    "use_qk_norm": (True, False),
    "attention_chunk_size": (8192, None),
    "no_rope_layers": ([1, 1, 1, 0], []),
    "rope_interleaved": (True, False),
    "routed_scaling_factor": (2.5, 1.0),
    "rope_scaling": ({"rope_type": "default", "llama_4_scaling_beta": 0.1}, {"rope_type": "default", "attn_factor": 1}),
}


@pytest.mark.parametrize("field", FOREIGN)
def test_a_field_that_changes_another_familys_results_is_neutral_or_refused(field):
    changing, neutral = FOREIGN[field]
    assert config_from_json(CONFIG_JSON | {field: neutral}, {}, "float32", "c") == LLAMA_CONFIG
    named = "llama_4_scaling_beta" if field == "rope_scaling" else field
    with pytest.raises(ValueError, match=f"^c: '{named}' is .*available for this architecture"):
        config_from_json(CONFIG_JSON | {field: changing}, {}, "float32", "c")


def test_a_switch_for_what_a_family_always_does_must_be_on():
    qwen = CONFIG_JSON | {"architectures": ["Qwen3ForCausalLM"]}
    assert config_from_json(qwen | {"use_qk_norm": True}, {}, "float32", "c").architecture == "Qwen3ForCausalLM"
    with pytest.raises(ValueError, match="use_qk_norm.*False; only True"):
        config_from_json(qwen | {"use_qk_norm": False}, {}, "float32", "c")


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token_id": -1},
        {"torch_dtype": "auto"},
        {"bos_token_id": -1},
        {"pretraining_tp": 2},
        {"quantization_config": {"quant_type": None, "weight_quantize_algo": None, "shift": False}},
    ],
)
def test_what_changes_no_token_is_accepted(changes):
    assert config_from_json(CONFIG_JSON | changes, {}, "float32", "c") == LLAMA_CONFIG


def test_ids_that_the_vocabulary_lacks_are_dropped_with_a_warning(caplog):
    changes = {"eos_token_id": [2, VOCABULARY, -7, 10**12], "bos_token_id": VOCABULARY, "pad_token_id": 10**6}
    config = config_from_json(CONFIG_JSON | changes, {"eos_token_id": [10**6]}, "float32", "c.json")
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((2,), None, None)
    dropped = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("c.json: eos_token_id: dropped" in line and str(VOCABULARY) in line for line in dropped)
    assert len(dropped) == 4


# --- GGUF ---------------------------------------------------------------------------------------------------------


def gguf_config(**changes):
    """Of LLAMA_METADATA with changes: __ in a name stands for the dot in a key of the architecture."""
    own = {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    metadata = {key: value for key, value in (LLAMA_METADATA | own).items() if value is not None}
    return config_from_gguf(metadata, [], None, "float32", "m.gguf")


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope__scale_linear": 2.0, "rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scaling__factor": 0.0}, None),
        ({"rope__scaling__factor": 1.0}, None),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear"}, None),
    ],
)
def test_a_rope_factor_in_gguf_is_linear_unless_a_type_says_otherwise(rope, scaling):
    config = gguf_config(**rope)
    assert config.rope_scaling == scaling
    assert config.length_limit[0] == 128 * (scaling or {}).get("factor", 1)


def test_yarn_in_gguf_with_all_its_numbers():
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    config = gguf_config(**yarn, rope__scaling__original_context_length=64)
    assert config.rope_scaling["original_max_position_embeddings"] == 64 and config.length_limit[0] == 256
    assert "attention_factor" not in config.rope_scaling
    betas = {"rope__scaling__yarn_beta_fast": 16.0, "rope__scaling__yarn_beta_slow": 2.0}
    scaling = gguf_config(**yarn, **betas, rope__scaling__attn_factor=0.5).rope_scaling
    assert (scaling["beta_fast"], scaling["beta_slow"]) == (16.0, 2.0)
    assert scaling["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * np.log(4.0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention__causal": False}, "attention.causal.*only True"),
        ({"rope__scaling__attn_factor": 2.0}, "attn_factor.*'yarn'"),
        ({"rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": 0.0625}, "logit_scale"),
        ({"embedding_scale": 12.0}, "embedding_scale"),
        ({"attention__scale": 0.5}, "attention.scale"),
        ({"swiglu_clamp_exp": [0.0, 7.0]}, "swiglu_clamp_exp"),
        ({"rope__scaling__type": "longrope", "rope__scaling__factor": 4.0}, "longrope.*types we have"),
    ],
)
def test_gguf_that_computes_something_else_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"m.gguf: llama.*{message}"):
        gguf_config(**changes)


def test_neutral_values_in_gguf_are_accepted():
    scale = float(np.float32(HEAD_DIM**-0.5))
    neutral = {"attention__causal": True, "attention__scale": scale, "logit_scale": 0.0, "swiglu_clamp_exp": [0.0, 0.0]}
    assert gguf_config(**neutral, rope__scaling__attn_factor=1.0, expert_gating_func=0) == gguf_config()
    # ERNIE's files say how many layers lie from one mixture to the next; the tensors tell which layers are mixtures.
    assert gguf_config(interleave_moe_layer_step=1, leading_dense_block_count=1) == gguf_config()


def test_a_sliding_window_in_gguf_bounds_the_length():
    assert gguf_config(attention__sliding_window=64).length_limit[0] == 64
    assert gguf_config(attention__sliding_window=0).length_limit[0] == 128


SPELLED = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "</s>",
]


def ends(tokens, types=None, **ids):
    """The ends in a GGUF of these tokens, all of them control tokens unless types says otherwise."""
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types or [3] * len(tokens)}
    named = {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in ids.items()}
    own = LLAMA_METADATA | {"llama.vocab_size": len(tokens), "tokenizer.ggml.eos_token_id": None} | metadata | named
    given = {key: value for key, value in own.items() if value is not None}
    return config_from_gguf(given, [], None, "float32", "m.gguf").eos_token_ids


@pytest.mark.parametrize("spelling", SPELLED)
def test_control_tokens_spelled_as_ends_end_an_answer(spelling):
    tokens = ["<s>", "a", spelling, "b"]
    assert ends(tokens) == (2,)
    assert ends(tokens, eos=1) == (1, 2)
    assert ends(tokens, types=[3, 1, 4, 1]) == (2,)  # as chat models made of others have theirs
    assert ends(tokens, types=[3, 1, 1, 1]) == ()  # text that happens to be spelled so


def test_ends_of_turns_and_messages_are_read_by_name():
    assert ends(["<s>", "a", "b", "c"], eos=1, eot=2, eom=3) == (1, 2, 3)
    assert ends(["<s>", "a", "b", "c"], eos=1, eot=4, eom=10**6) == (1,)


def test_an_end_of_a_part_is_none_where_there_is_one_of_the_whole():
    assert ends(["<|end|>", "<|return|>", "<|call|>"]) == (1, 2)
    assert ends(["<|end|>", "<|return|>"]) == (0, 1)


@needs_smollm2
def test_smollm2_stops_where_it_did_if_its_file_names_the_wrong_end():
    checkpoint = open_checkpoint(MODEL)
    wrong = {**checkpoint.metadata, "tokenizer.ggml.eos_token_id": 0}
    config = config_from_gguf(wrong, checkpoint.names(), None, "bfloat16", "m.gguf")
    assert set(config.eos_token_ids) == set(checkpoint.config.eos_token_ids) == {0, 2}
