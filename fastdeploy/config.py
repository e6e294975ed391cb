"""What a checkpoint says of itself: ModelConfig, read from config.json or from GGUF metadata."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastdeploy.features import GGUF_FIELDS, HUGGINGFACE_FIELDS, HUGGINGFACE_OWN, check_features
from fastdeploy.fields import Fields, known_ids

QWEN = {"use_sliding_window": False, "max_window_layers": 28}
ERNIE = {"rope_theta": 500000.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
# The architectures we have, by their names in config.json. For each, the fields that mean something else than usual
# where config.json doesn't give them: transformers leaves out what is its class's default.
HUGGINGFACE_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 4096},
    "Qwen2ForCausalLM": QWEN,
    "Qwen3ForCausalLM": {**QWEN, "head_dim": 128},
    "Qwen3MoeForCausalLM": {"use_sliding_window": False},
    "Ernie4_5ForCausalLM": {**ERNIE, "head_dim": 128},
    "Ernie4_5_ForCausalLM": ERNIE,
    "Ernie4_5_MoeForCausalLM": ERNIE,
}
SAME_ARCHITECTURES = {  # a Mistral without a sliding window is a Llama; Paddle's spelling of ERNIE
    "MistralForCausalLM": "LlamaForCausalLM",
    "Ernie4_5_ForCausalLM": "Ernie4_5ForCausalLM",
}
MODEL_TYPES = {  # "model_type" in config.json, for those without "architectures"
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
}
GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5-moe": "Ernie4_5_MoeForCausalLM",
}
DTYPE_KEY = "fastdeploy.dtype"  # in GGUF files of our own: a model's dtype, which quantised weights don't tell
# Names of the fields that `_sizes` reads.
HUGGINGFACE_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
GGUF_SIZES = ("embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length")
INTERLEAVED = ("Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM")  # whose rotary pairs are neighbours
DTYPES = ("float32", "bfloat16", "float16")
MAX_POSITIONS = 2**31 - 1  # an int32 in the kernels
ROPE_SCALINGS = {  # rope_type in config.json -> the numbers it can't do without
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
YARN_BETAS = {"fast": 32.0, "slow": 1.0}  # where a checkpoint names none
YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
# Control tokens that end an answer, by their spelling: many GGUF files name but one end, or the wrong one.
ENDS = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <|end_of_turn|> <end_of_turn> "
    "<|endoftext|> <|end_of_text|> <|eot|> <|eom|> <EOT> _<EOT> [EOT] [EOS] <eos> <|eos|> <end_of_utterance> "
    "<｜end▁of▁sentence｜> <|end_of_sentence|> <|END_OF_TURN_TOKEN|> <|endofturn|> <turn|> </s> [e~[".split()
)
CONTROL, USER_DEFINED = 3, 4  # types of tokens in GGUF; chat files have their ends in either


@dataclass(frozen=True)
class Mode:
    """What a value of `quantization` asks for; `models/loading.py` says what becomes of which weights."""

    keeps_quantised: bool  # weights that the file has quantised stay so
    floats_become: str | None  # the format, "Q4_1" or "Q8_0"
    int8_activations: bool


MODES = {
    None: Mode(False, None, False),
    "auto": Mode(True, None, True),
    "exact": Mode(True, None, False),
    "wint8": Mode(True, "Q8_0", False),
    "wint4": Mode(True, "Q4_1", False),
    "w8a8": Mode(True, "Q8_0", True),
    "w4a8": Mode(True, "Q4_1", True),
}
# What other engines want to be told of a quantised checkpoint -> its method: "auto" for it, an error for others.
METHODS = {name: name for name in "gguf gptq awq compressed-tensors fp8 fbgemm_fp8 mxfp4 modelopt".split()}
METHODS |= {"gptq_marlin": "gptq", "awq_marlin": "awq"}


@dataclass(frozen=True)
class MixtureConfig:
    """The layers whose feed-forward network is a mixture of experts.

    layers: their indices.  num_experts: in each of them.  intermediate_size: of one expert.
    shared_size: the intermediate size of the MLP that every token passes through besides; 0 for none.
    corrected: a correction that is learned apart takes part in the choice of experts.
    weight_floor: the weights of a token's experts are divided by their sum, or by this if that is less; None: they
        are left as the softmax over all experts gives them.
    """

    layers: frozenset[int]
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_size: int
    corrected: bool
    weight_floor: float | None


@dataclass(frozen=True)
class ModelConfig:
    """The facts about a decoder that its checkpoint fixes.

    `rope_scaling` is None or a dict: "rope_type", one of ROPE_SCALINGS, and its numbers as config.json names them; or
    {"rope_type": "divisors", "divisors": head_dim/2 numbers that divide the frequencies}, GGUF's form of "llama3".
    `sliding_window` is the fewest tokens that a layer's attention looks back to, itself included, None for all.
    `dtype` is what the checkpoint is stored in, "bfloat16" if it is quantised.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    rope_interleaved: bool  # rotates elements (2i, 2i + 1) of a head; otherwise (i, i + head_dim/2)
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str
    mixture: MixtureConfig | None = None
    sliding_window: int | None = None

    @property
    def length_limit(self) -> tuple[int, str]:
        """The most tokens a sequence may have, and why.

        Linear and yarn scaling stretch the original positions, as many times as their factor says; llama3's form states
        the stretched number. Within a sliding window, attention to all tokens is the same.
        """
        positions, scaling = self.max_position_embeddings, self.rope_scaling or {}
        if scaling.get("rope_type") in ("linear", "yarn"):
            original = scaling.get("original_max_position_embeddings", positions)
            positions = int(min(original * scaling["factor"], MAX_POSITIONS))
        if self.sliding_window is not None and self.sliding_window < positions:
            why = "the sliding window of this model's attention, as attention here is to all tokens"
            return self.sliding_window, why
        return positions, "the positions this model was made for"


def config_from_json(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], dtype: str, source: str
) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json.

    `dtype` is what the tensors have, used where config.json doesn't say; `source` names the file in errors.
    Raises ValueError for an architecture we don't have, a missing or mistyped field, or a feature we don't have.
    """
    architecture, fields = _huggingface_architecture(Fields(config, source))
    hidden_size, num_heads, num_kv_heads, head_dim = _sizes(fields, *HUGGINGFACE_SIZES)
    vocab_size = fields.integer("vocab_size")
    rope = fields.object("rope_parameters") or fields.object("rope_scaling") or {}
    everything = Fields({**fields.values, **rope}, source)
    check_features(everything, HUGGINGFACE_FIELDS, HUGGINGFACE_OWN.get(architecture, {}), head_dim)
    rope_theta, rope_scaling = _rope_from_json(everything, rope)
    generation = Fields(generation_config, f"{source}: generation config")  # its ends come first, as in transformers
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rope_interleaved=architecture in INTERLEAVED,
        max_position_embeddings=fields.integer("max_position_embeddings", default=2048),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=fields.flag("attention_bias", default=fields.flag("use_bias", default=False)),
        mlp_bias=fields.flag("mlp_bias", default=fields.flag("use_bias", default=False)),
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
        eos_token_ids=generation.token_ids("eos_token_id", vocab_size) or fields.token_ids("eos_token_id", vocab_size),
        pad_token_id=fields.token_id("pad_token_id", vocab_size),
        dtype=_dtype(fields) or dtype,
        mixture=MIXTURES[architecture](fields) if architecture in MIXTURES else None,
        sliding_window=_sliding_window(fields),
    )


def _qwen3_mixture(fields: Fields) -> MixtureConfig:
    count, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", default=1)
    dense = set(fields.list_of(int, "mlp_only_layers") or [])
    num_experts = fields.integer("num_experts", default=fields.integer("num_local_experts", default=128))
    return MixtureConfig(
        layers=frozenset(index for index in range(count) if (index + 1) % step == 0 and index not in dense),
        num_experts=num_experts,
        experts_per_token=_experts_per_token(fields, "num_experts_per_tok", num_experts, default=8),
        intermediate_size=fields.integer("moe_intermediate_size"),
        shared_size=0,
        corrected=False,
        weight_floor=0.0 if fields.flag("norm_topk_prob", default=False) else None,
    )


def _ernie_mixture(fields: Fields) -> MixtureConfig:
    count, step = fields.integer("num_hidden_layers"), fields.integer("moe_layer_interval", default=1)
    first = fields.integer("moe_layer_start_index", default=1, least=0)
    last = fields.integer("moe_layer_end_index", default=-1, least=-1)
    stop = count if last < 0 else min(last + 1, count)
    if fields.flag("use_bias", default=False):
        raise fields.error("use_bias", "mixtures of experts are available without biases")
    num_experts, size = fields.integer("moe_num_experts", default=64), fields.integer("moe_intermediate_size")
    return MixtureConfig(
        layers=frozenset(index for index in range(first, stop) if (index + 1) % step == 0),
        num_experts=num_experts,
        experts_per_token=_experts_per_token(fields, "moe_k", num_experts, default=6),
        intermediate_size=size,
        shared_size=size * fields.integer("moe_num_shared_experts", default=2, least=0),
        corrected=True,
        weight_floor=fields.number("moe_norm_min", default=1e-12),
    )


def _experts_per_token(fields: Fields, key: str, num_experts: int, default: int | None = None) -> int:
    count = fields.integer(key, default)
    if count > num_experts:
        raise fields.error(key, f"there are {num_experts} experts")
    return count


MIXTURES = {"Qwen3MoeForCausalLM": _qwen3_mixture, "Ernie4_5_MoeForCausalLM": _ernie_mixture}


def _sizes(fields: Fields, hidden: str, heads: str, kv_heads: str, head: str) -> tuple[int, int, int, int]:
    """(hidden_size, num_heads, num_kv_heads, head_dim), of the fields of these names."""
    hidden_size, num_heads = fields.integer(hidden), fields.integer(heads)
    num_kv_heads = fields.integer(kv_heads, default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(kv_heads, f"the {num_heads} heads must share KV heads evenly")
    head_dim = fields.integer(head, default=max(hidden_size // num_heads, 1))
    if fields.values.get(head) is None and hidden_size % num_heads:
        raise fields.error(head, f"it must be given, as hidden size {hidden_size} is no multiple of {num_heads} heads")
    if head_dim % 2:
        raise fields.error(head, f"rotary embeddings need an even head size, not {head_dim}")
    return hidden_size, num_heads, num_kv_heads, head_dim


def _dtype(fields: Fields) -> str | None:
    for key in ("dtype", "torch_dtype"):
        name = (fields.text(key) or "").removeprefix("torch.").removeprefix("auto")
        if name and name not in DTYPES:
            raise fields.error(key, f"weights can be {', '.join(DTYPES)}")
        if name:
            return name
    return None


def _huggingface_architecture(config: Fields) -> tuple[str, Fields]:
    """Our name of the architecture, which is the first of "architectures" or, where there are none, what "model_type"
    means; and all fields, with what it has where config.json doesn't give them."""
    name = MODEL_TYPES.get(config.text("model_type") or "")
    if name is None or config.values.get("architectures") is not None:
        architectures = config.required("architectures")
        name = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if not isinstance(name, str) or name not in HUGGINGFACE_ARCHITECTURES:
        raise config.error("architectures", f"the architectures we have are {', '.join(HUGGINGFACE_ARCHITECTURES)}")
    fields = Fields({**HUGGINGFACE_ARCHITECTURES[name], **config.values}, config.source)
    return SAME_ARCHITECTURES.get(name, name), fields


def _sliding_window(fields: Fields) -> int | None:
    """The sliding window, if it is that of any layer: as each layer says, or of those from max_window_layers on."""
    layers = fields.list_of(str, "layer_types") or []
    if not set(layers) <= {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", "only full and sliding attention are available")
    first = fields.integer("max_window_layers", default=0, least=0)
    slides = fields.flag("use_sliding_window", default=True) and first < fields.integer("num_hidden_layers")
    if layers:
        slides = "sliding_attention" in layers
    return fields.integer("sliding_window") if slides and fields.values.get("sliding_window") is not None else None


def _rope_from_json(fields: Fields, rope: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from `rope`, which is `rope_parameters` or the older `rope_scaling`; `fields` are these and all
    others."""
    if any(isinstance(value, dict) for value in rope.values()):
        raise fields.error("rope_parameters", "layers with rotary embeddings of their own are not available")
    theta = fields.number("rope_theta", default=10000.0)
    if fields.number("partial_rotary_factor", default=1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "only whole heads can be rotated")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    scaling = {key: value for key, value in rope.items() if key not in ("type", "rope_theta", "partial_rotary_factor")}
    scaling["rope_type"] = rope_type
    if rope_type in ("llama3", "yarn"):
        original = fields.integer("original_max_position_embeddings", fields.integer("max_position_embeddings", 2048))
        scaling["original_max_position_embeddings"] = original
    return theta, _checked_scaling(scaling, fields.source)


def _checked_scaling(scaling: dict[str, Any], source: str) -> dict[str, Any]:
    fields = Fields(scaling, f"{source}: rope scaling")
    if fields.text("rope_type") not in ROPE_SCALINGS:
        raise fields.error("rope_type", f"the types we have are default, {', '.join(ROPE_SCALINGS)}")
    for key in ROPE_SCALINGS[scaling["rope_type"]]:
        fields.required(key)
        fields.number(key, default=1.0)
    for key in YARN_OPTIONS:
        if fields.values.get(key) != 0:  # which stands for none
            fields.number(key, default=1.0)
    return scaling


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    rope_divisors: tuple[float, ...] | None,
    dtype: str,
    source: str,
) -> ModelConfig:
    """The ModelConfig in GGUF metadata. What GGUF leaves unsaid (ties, biases) follows from the tensors that are there.

    `tensor_names` are Hugging Face names, `rope_divisors` the values of rope_freqs.weight, `dtype` that of the large
    tensors. Raises ValueError for an architecture or a feature we don't have, and a missing or mistyped field.
    """
    general = Fields(metadata, source)
    architecture, fields = _gguf_architecture(general)
    hidden_size, num_heads, num_kv_heads, head_dim = _sizes(fields, *GGUF_SIZES)
    check_features(fields, GGUF_FIELDS, {}, head_dim)
    vocab_size = fields.integer("vocab_size", default=len(general.list_of(str, "tokenizer.ggml.tokens") or ()))
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=fields.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", default=1e-5),
        rope_theta=fields.number("rope.freq_base", default=10000.0),
        rope_scaling=_rope_scaling_from_gguf(fields, rope_divisors),
        rope_interleaved=architecture in INTERLEAVED,  # llama's rows are put in half-split order while they are read
        max_position_embeddings=fields.integer("context_length"),
        tie_word_embeddings="lm_head.weight" not in tensor_names,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in tensor_names,
        mlp_bias="model.layers.0.mlp.gate_proj.bias" in tensor_names,
        bos_token_id=general.token_id("tokenizer.ggml.bos_token_id", vocab_size),
        eos_token_ids=gguf_eos_token_ids(general, vocab_size),
        pad_token_id=general.token_id("tokenizer.ggml.padding_token_id", vocab_size),
        dtype=dtype,
        mixture=_mixture_from_gguf(architecture, fields, tensor_names),
        sliding_window=fields.integer("attention.sliding_window", default=0, least=0) or None,
    )


def _gguf_architecture(general: Fields) -> tuple[str, Fields]:
    """Our name of the architecture, and its own fields without the prefix "llama."."""
    name = general.text("general.architecture")
    if name not in GGUF_ARCHITECTURES:
        raise general.error("general.architecture", f"the architectures we have are {', '.join(GGUF_ARCHITECTURES)}")
    own = {key.removeprefix(f"{name}."): value for key, value in general.values.items() if key.startswith(f"{name}.")}
    return GGUF_ARCHITECTURES[name], Fields(own, f"{general.source}: {name}")


def gguf_eos_token_ids(metadata: Fields, vocab_size: int) -> tuple[int, ...]:
    """All that ends an answer: end of sequence, of turn and of message, and the special tokens that are spelled so.

    Those of gpt-oss and Solar end a part of an answer with <|end|>: not where there are tokens for the whole of it.
    """
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    named = [token_id for key in keys for token_id in metadata.token_ids(key, vocab_size)]
    tokens = metadata.list_of(str, "tokenizer.ggml.tokens") or []
    types = metadata.list_of(int, "tokenizer.ggml.token_type") or []
    marked = (token_id for token_id, kind in enumerate(types[: len(tokens)]) if kind in (CONTROL, USER_DEFINED))
    spelled = {tokens[token_id]: token_id for token_id in marked if tokens[token_id] in ENDS}
    if {"<|return|>", "<|call|>"} <= spelled.keys() or {"<|flush|>", "<|calls|>"} <= spelled.keys():
        spelled.pop("<|end|>", None)
    return known_ids([*named, *spelled.values()], vocab_size, metadata.source)


def _mixture_from_gguf(architecture: str, fields: Fields, tensor_names: Collection[str]) -> MixtureConfig | None:
    if architecture not in MIXTURES:
        if fields.integer("expert_count", default=0, least=0):
            raise fields.error("expert_count", "mixtures of experts of this architecture are not available")
        return None
    layers = range(fields.integer("block_count"))
    num_experts, size = fields.integer("expert_count"), fields.integer("expert_feed_forward_length")
    return MixtureConfig(
        layers=frozenset(index for index in layers if f"model.layers.{index}.mlp.gate.weight" in tensor_names),
        num_experts=num_experts,
        experts_per_token=_experts_per_token(fields, "expert_used_count", num_experts),
        intermediate_size=size,
        shared_size=size * fields.integer("expert_shared_count", default=0, least=0),
        corrected=any(name.endswith("moe_statics.e_score_correction_bias") for name in tensor_names),
        weight_floor=1e-12,  # llama.cpp always normalises in these families
    )


def _rope_scaling_from_gguf(fields: Fields, divisors: tuple[float, ...] | None) -> dict[str, Any] | None:
    """As llama.cpp reads it: a factor without a type is linear, "rope.scale_linear" its old name, and 0 none."""
    given = {key.removeprefix("rope.scaling."): value for key, value in fields.values.items() if value != 0}
    own = Fields(given, f"{fields.source}: rope.scaling")
    kind = own.text("type") or "linear"
    factor = own.number("factor", default=own.number("rope.scale_linear", default=1.0))
    attention = own.number("attn_factor", default=1.0)
    if kind != "yarn" and attention != 1.0:
        raise own.error("attn_factor", "it is available for the type 'yarn'")
    if divisors is not None:  # llama.cpp's converter works Llama 3's numbers out and stores them as a tensor
        if kind not in ("none", "linear"):
            raise own.error("type", "rope_freqs.weight is there, too, which is another kind of scaling")
        stretch = factor if kind == "linear" else 1.0
        return {"rope_type": "divisors", "divisors": tuple(divisor * stretch for divisor in divisors)}
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn" or "original_context_length" in given:
        original = own.integer("original_context_length", default=fields.integer("context_length"))
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        scaling |= {f"beta_{end}": own.number(f"yarn_beta_{end}", value) for end, value in YARN_BETAS.items()}
        if attention != 1.0:  # it multiplies YaRN's own, see `yarn_length` in kernels/rope.py
            scaling["attention_factor"] = attention * (1.0 + 0.1 * math.log(max(factor, 1.0)))
    return _checked_scaling(scaling, fields.source)
