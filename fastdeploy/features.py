"""What other families' configurations say, and ours must not overlook: fields that change what a model computes.

A configuration may carry any field, since formats are shared among families. One that changes the arithmetic of some
family, and that the family at hand does not read, has to be absent, null or neutral. Otherwise the model would run, and
say something else than it was trained to. Fields that come with tensors of their own are not listed: `Checkpoint.check`
finds those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdeploy.fields import Fields

ABSENT: tuple[Any, ...] = ()  # nothing but null is neutral
OFF, ON, ZERO, ONE, ZERO_OR_ONE = (False,), (True,), (0, False), (1,), (0, 1)
SILU = ("silu", "swish")


def _table(*groups: tuple[tuple[Any, ...], str]) -> dict[str, tuple[Any, ...]]:
    """Field -> its neutral values, of groups that share them."""
    return {name: neutral for neutral, names in groups for name in names.split()}


# config.json, by the classes of transformers
HUGGINGFACE_FIELDS = _table(
    # activations, and what clamps or caps values: Gemma, gpt-oss, Grok
    (SILU, "hidden_act hidden_activation activation_function mlp_hidden_act activation moe_gate_activation"),
    (ZERO, "attn_logit_softcapping final_logit_softcapping logits_soft_cap logit_softcapping router_logit_softcapping"),
    (ZERO, "attention_logit_cap moe_router_logit_softcapping swiglu_limit mlp_gate_softcap mlp_up_softcap softcap"),
    (ZERO, "output_logit_soft_cap swiglu_limits swiglu_limits_shared"),
    (ONE, "swiglu_alpha"),
    (ABSENT, "clip_qkv qk_l2_clip_threshold"),
    # factors: Granite, MiniCPM, Falcon-H1, Command-R, MiniMax, Gemma's embeddings
    (ONE, "embedding_multiplier residual_multiplier logits_scaling logit_scale embedding_scale residual_scale"),
    (ONE, "scale_emb lm_head_multiplier key_multiplier attention_in_multiplier attention_out_multiplier"),
    (ONE, "mlp_alpha_factor mlp_beta_factor full_attn_alpha_factor full_attn_beta_factor attention_value_scale"),
    (ONE, "logits_mup_width_multiplier output_multiplier qk_scale_factor compression_ratio"),
    (OFF, "scale_embedding normalize_embedding mup_enabled use_mup scale_attn_by_inverse_layer_idx"),
    (ABSENT, "scale_depth softmax_scale mlp_multipliers"),
    # routing of experts: DeepSeek, GLM, Hunyuan
    (ONE, "routed_scaling_factor router_scaling_factor route_scale"),
    (ONE, "moe_routed_scaling_factor moe_router_scaling_factor"),
    (ZERO_OR_ONE, "n_group topk_group num_expert_group"),
    (("softmax",), "scoring_func expert_selection_fn moe_gate_act score_func"),
    (OFF, "moe_apply_router_weight_on_input"),
    (ZERO, "zero_expert_num"),
    # positions: Phi, SmolLM3, Llama 4, ModernBERT's and Gemma 3's two bases, MPT's ALiBi
    (ONE, "rotary_pct rope_pct attn_factor extrapolation_factor"),
    (OFF, "rope_interleave rope_interleaved use_mem_rope use_mrope alibi attn_temperature_tuning"),
    (ZERO, "no_rope_layer_interval log_scaling_alpha llama_4_scaling_beta"),
    (ON, "use_rotary_embedding"),
    (("rope", "rotary", "default"), "position_embedding_type position_encoding_type"),
    (ABSENT, "no_rope_layers rope_local_base_freq layer_rope_theta rope_scaling_layers"),
    # attention and blocks: Falcon's parallel ones, OLMo 2's norms, Gemma 3n, encoders
    (OFF, "use_parallel_residual parallel_attn parallel_residual apply_residual_connection_post_layernorm"),
    (OFF, "norm_after use_post_norm use_sandwich_norm do_layer_norm_after use_attention_gate"),
    (OFF, "use_qk_norm qk_layernorm qk_norm attention_k_eq_v"),
    (OFF, "prefix_lm use_bidirectional_attention is_encoder_decoder add_cross_attention"),
    (ON, "is_causal causal use_rmsnorm scale_attn_weights"),
    (("rms_norm", "rmsnorm", "rms"), "norm_type normalization_type"),
    (ZERO, "num_kv_shared_layers attn_layer_period"),
    (ABSENT, "attention_chunk_size local_attention_window_len sliding_window_size"),
    (ABSENT, "altup_num_inputs laurel_rank activation_sparsity_pattern"),
)
# What a family always does, where others need a switch.
NORMALISES_HEADS = dict.fromkeys(("use_qk_norm", "qk_layernorm", "qk_norm"), ON)
NEIGHBOURS = dict.fromkeys(("rope_interleave", "rope_interleaved"), ON)
HUGGINGFACE_OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "Qwen3ForCausalLM": NORMALISES_HEADS,
    "Qwen3MoeForCausalLM": NORMALISES_HEADS,
    "Ernie4_5ForCausalLM": NEIGHBOURS,
    "Ernie4_5_MoeForCausalLM": {**NEIGHBOURS, "norm_topk_prob": ON},
}
# GGUF, without the architecture's prefix, by the constants of the gguf package
GGUF_FIELDS = _table(
    (SILU, "hidden_activation"),
    (ZERO, "attn_logit_softcapping router_logit_softcapping final_logit_softcapping swiglu_limit"),
    (ZERO, "attention.max_alibi_bias attention.clamp_kqv attention.temperature_length attention.temperature_scale"),
    (ZERO, "swiglu_clamp_exp swiglu_clamp_shexp attention.shared_kv_layers num_loops"),
    (ZERO, "rescale_every_n_layers full_attention_interval rope.scaling.yarn_log_multiplier attention.chunk_size"),
    (ZERO_OR_ONE, "logit_scale residual_scale embedding_scale attention.output_scale attention.value_scale"),
    (ZERO_OR_ONE, "expert_group_scale expert_group_count expert_group_used_count expert_gating_func"),
    (ZERO_OR_ONE, "expert_weights_scale rope.scaling.alpha"),
    (ONE, "rope.scaling.yarn_attn_factor"),
    ((-1, 1), "rope.scaling.yarn_ext_factor"),
    (OFF, "use_parallel_residual swin_norm"),
    (ON, "attention.causal expert_weights_norm"),
)


def check_features(
    fields: Fields, table: Mapping[str, tuple[Any, ...]], own: Mapping[str, tuple[Any, ...]], head_dim: int
) -> None:
    """Raises ValueError, naming field and value, unless the fields of `table` are neutral; `own` goes before it.

    The factor of attention's scores, under whatever name, is neutral where it says 1 / sqrt(head_dim). All elements of
    a head are rotated, and those of values are as many.
    """
    of_heads = {
        "query_pre_attn_scalar": (head_dim,),
        "rotary_dim": (head_dim,),
        "rope.dimension_count": (head_dim,),
        "attention.value_length": (head_dim,),
        "attention_multiplier": (head_dim**-0.5,),
        "attention.scale": (head_dim**-0.5, 0),
    }
    for name, neutral in {**table, **of_heads, **own}.items():
        value = fields.values.get(name)
        if value is None or value == {} or _is_neutral(value, neutral):
            continue
        must = f"only {' or '.join(map(repr, neutral))} is available" if neutral else "it is not available"
        raise fields.error(name, f"{must} for this architecture, whose results it would change")


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Numbers may differ by a float32's rounding, which GGUF stores; truth values are no numbers. Lists: each item."""
    if isinstance(value, list):
        return all(_is_neutral(item, neutral) for item in value)
    for each in neutral:
        if {type(value), type(each)} <= {int, float}:
            if abs(value - each) <= 1e-6 * abs(each):
                return True
        elif type(value) is type(each) and value == each:
            return True
    return False
