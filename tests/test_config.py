"""What config.json and GGUF metadata say of a model: how long it may go, what it must not overlook, ends of answers."""

import numpy as np
import pytest

from fastdeploy.config import config_from_gguf, config_from_json
from fastdeploy.models.weights import open_checkpoint
from tests.smollm2 import MODEL, needs_smollm2
from tests.test_weights import CONFIG_JSON, HEAD_DIM, LAYERS, LLAMA3, VOCABULARY
from tests.test_weights import LLAMA_METADATA as WRITTEN

LLAMA_CONFIG = config_from_json(CONFIG_JSON, {}, "float32", "c")
LLAMA_METADATA = {"general.architecture": "llama"} | WRITTEN  # as a writer completes it


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
}


@pytest.mark.parametrize("field", FOREIGN)
def test_a_field_that_changes_another_familys_results_is_neutral_or_refused(field):
    changing, neutral = FOREIGN[field]
    assert config_from_json(CONFIG_JSON | {field: neutral}, {}, "float32", "c") == LLAMA_CONFIG
    with pytest.raises(ValueError, match=f"^c: '{field}' is .*available for this architecture"):
        config_from_json(CONFIG_JSON | {field: changing}, {}, "float32", "c")


def test_a_switch_for_what_a_family_always_does_must_be_on():
    qwen = CONFIG_JSON | {"architectures": ["Qwen3ForCausalLM"]}
    assert config_from_json(qwen | {"use_qk_norm": True}, {}, "float32", "c").architecture == "Qwen3ForCausalLM"
    with pytest.raises(ValueError, match="use_qk_norm.*False; only True"):
        config_from_json(qwen | {"use_qk_norm": False}, {}, "float32", "c")


@pytest.mark.parametrize(
    "changes", [{"pad_token_id": -1}, {"torch_dtype": "auto"}, {"bos_token_id": -1}, {"pretraining_tp": 2}]
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
    neutral = {"attention__causal": True, "attention__scale": scale, "logit_scale": 1.0, "swiglu_clamp_exp": [0.0, 0.0]}
    assert gguf_config(**neutral, rope__scaling__attn_factor=1.0, expert_gating_func=0) == gguf_config()


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
