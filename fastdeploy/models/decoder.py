"""The transformer decoder that the model families share.

    x = embedding[ids]                                            residual stream, [T, hidden]
    for every layer:
        h = norm(x);  q, k, v = h Wqkv;  (norm and) rotate q, k;  write k, v to the cache
        x = x + attention(q, cache) Wo
        h = norm(x);  x = x + feed_forward(h)                 an MLP, (silu(h Wgate) * h Wup) Wdown, or a mixture
    logits = norm(x)[rows] Wlm_head                               [R, vocabulary]

T is the number of tokens of the step, of all sequences one after the other, R the number of rows that need logits. The
sums x + ... are done by the norm that follows them (`add_rms_norm`), so a layer is nine launches.

T is cut to R after the last layer's attention, where the other rows have done their work: the keys and values are in
the cache. So a step is `attend`, and then `project` for the rows whose logits are wanted, all at once or slab by slab.

Both do nothing but launch kernels, and gather what other ranks have computed, on memory that was allocated before: a
step can be recorded and replayed. How ranks divide a model among them: `sharding.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import TYPE_CHECKING

from fastdeploy.config import ModelConfig
from fastdeploy.device import Device
from fastdeploy.kernels.attention import AttentionBatch, paged_attention, workspace_shape
from fastdeploy.kernels.collective import join_columns, sum_parts
from fastdeploy.kernels.embedding import embedding, gather_rows
from fastdeploy.kernels.launch import ITEM_SIZES, TensorView, target, view
from fastdeploy.kernels.linear import Weight, linear
from fastdeploy.kernels.norm import add_rms_norm, rms_norm
from fastdeploy.kernels.quantised import GROUP, QuantisedRows
from fastdeploy.kernels.rope import HeadLayout, HeadNorms, KVBlocks, cache_fields, rope_and_cache, rope_tables
from fastdeploy.models.feed_forward import (
    MLP,
    Allocator,
    LinearInput,
    LinearOperand,
    Mixture,
    MixtureMemory,
    MLPMemory,
)
from fastdeploy.models.loading import WeightLoader

if TYPE_CHECKING:
    from fastdeploy.device.group import Group


@dataclass(frozen=True)
class Biases:
    """Which linear layers of a family add a bias."""

    qkv: bool = False
    attention_output: bool = False
    mlp: bool = False


@dataclass(frozen=True)
class Layer:
    """The weights of one layer."""

    attention_norm: TensorView  # [hidden] float32
    qkv: Weight  # [(heads + 2 kv heads) * head_dim, hidden]: the rows of q, then k, then v
    head_norms: HeadNorms | None
    attention_output: Weight  # [hidden, heads * head_dim]
    mlp_norm: TensorView  # [hidden] float32
    feed_forward: MLP | Mixture


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all tokens, in the same blocks in each layer, stored in `dtype`."""

    layers: list[KVBlocks]
    dtype: str


@dataclass(frozen=True)
class StepInputs:
    """What the kernels read of one step. All tensors are on the device.

    ids, positions  [T] int32; slots [T] int64: where in the cache a token's key and value go (-1: nowhere)
    """

    ids: TensorView
    positions: TensorView
    slots: TensorView
    attention: AttentionBatch
    num_tokens: int


@dataclass(frozen=True)
class Activations:
    """The memory that a step computes in, [rows, width] each, allocated once for the largest step."""

    hidden: LinearInput  # a norm's output, [T, hidden]
    residual: TensorView  # the residual stream, [T, hidden]
    delta: TensorView  # what a layer adds to it, [T, hidden]
    qkv: TensorView  # [T, (heads + 2 kv heads) * head_dim]
    attended: LinearInput  # [T, heads * head_dim]
    mlp: MLPMemory
    mixture: MixtureMemory | None  # where the model has any
    kept_attended: TensorView  # the rows of `attended` that `project` was asked for, [R, heads * head_dim]
    kept_residual: TensorView  # the rows of `residual` that it was asked for, [R, hidden]
    workspace: TensorView  # attention's float32 scratch for contexts split over programs
    own_logits: TensorView | None  # this rank's columns of the logits, [R, vocabulary / ranks] float32
    parts: TensorView | None  # what all ranks have computed, side by side: of delta, or of the logits

    def rows(self, count: int) -> Activations:
        """The same memory, the parts with a row per token cut to `count` rows."""
        per_token = ("hidden", "residual", "delta", "qkv", "attended", "mlp")
        mixture = self.mixture and self.mixture.rows(count)
        return replace(self, **{name: getattr(self, name).rows(count) for name in per_token}, mixture=mixture)


class Decoder:
    """A decoder-only transformer; a family is a subclass that says what differs.

    normalises_heads: whether every head of q and k has an RMS norm (self_attn.q_norm, k_norm) before it is rotated.

    Args:
        config: what the checkpoint says of itself.
        weights: gives the memory of every weight, to be filled once the whole model has been declared.
        max_positions: the longest sequence in tokens, for the rotary tables.
        group: the ranks that share the model, of which the weights are one's; None for one that has all of it.
    """

    normalises_heads = False

    def __init__(
        self, config: ModelConfig, weights: WeightLoader, max_positions: int, group: Group | None = None
    ) -> None:
        self.config = config
        self.group = group
        self.device: Device = weights.device
        self.dtype = weights.dtype
        self.mode = weights.mode
        self.places = weights.places
        shard = weights.shard
        num_heads, num_kv_heads = len(shard.of(config.num_heads)), len(shard.of_kv_heads(config.num_kv_heads))
        self.heads = HeadLayout(num_heads, num_kv_heads, config.head_dim, config.rope_interleaved)
        self.scale = 1.0 / sqrt(config.head_dim)
        self.shard = shard
        self.tokens = shard.of_vocabulary(config.vocab_size)
        self.embedding = self.read_table("model.embed_tokens", weights)
        self.layers = [self.read_layer(index, weights) for index in range(config.num_layers)]
        self.final_norm = weights.vector(["model.norm.weight"], [config.hidden_size])
        self.lm_head = self.embedding
        if not config.tie_word_embeddings:
            self.lm_head = self.read_table("lm_head", weights)
        self.ordered, self.all_floats = weights.ordered, weights.all_floats
        tables = rope_tables(config.head_dim, max_positions, config.rope_theta, config.rope_scaling)
        self.cos, self.sin = (view(self.device.from_numpy(table)) for table in tables)

    def biases(self) -> Biases:
        """Which linear layers add a bias. A family overrides this where it differs."""
        return Biases()

    def read_table(self, module: str, weights: WeightLoader) -> Weight:
        """Read a matrix with a row for every token."""
        size = self.config.vocab_size
        width = weights.shard.vocabulary_width(size)
        return weights.linear(
            [module], self.config.hidden_size, [size], rows=[self.tokens], padded_rows=width, wide_inputs=True
        )

    def read_layer(self, index: int, weights: WeightLoader) -> Layer:
        """Read the weights of a layer."""
        config, shard, biases = self.config, weights.shard, self.biases()
        hidden, head_dim = config.hidden_size, config.head_dim
        q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
        q_rows = features(shard.of(config.num_heads), head_dim)
        kv_rows = features(shard.of_kv_heads(config.num_kv_heads), head_dim)
        prefix = f"model.layers.{index}"
        attention = f"{prefix}.self_attn"
        qkv = [f"{attention}.{name}_proj" for name in "qkv"]
        widths, rows = [q_width, kv_width, kv_width], [q_rows, kv_rows, kv_rows]
        return Layer(
            attention_norm=weights.vector([f"{prefix}.input_layernorm.weight"], [hidden]),
            qkv=weights.linear(qkv, hidden, widths, biases.qkv, rows, wide_inputs=True),
            head_norms=self.read_head_norms(attention, weights) if self.normalises_heads else None,
            attention_output=weights.linear(
                [f"{attention}.o_proj"], q_width, [hidden], biases.attention_output, columns=q_rows
            ),
            mlp_norm=weights.vector([f"{prefix}.post_attention_layernorm.weight"], [hidden]),
            feed_forward=self.read_feed_forward(index, weights),
        )

    def read_feed_forward(self, index: int, weights: WeightLoader) -> MLP | Mixture:
        """Read what follows the attention of a layer."""
        config, module = self.config, f"model.layers.{index}.mlp"
        if config.mixture is not None and index in config.mixture.layers:
            return Mixture.read(weights, module, config.hidden_size, config.mixture)
        return MLP.read(weights, module, config.hidden_size, config.intermediate_size, self.biases().mlp)

    def read_head_norms(self, attention: str, weights: WeightLoader) -> HeadNorms:
        """Read the norms of the heads of q and k, in the module `attention`."""
        query, key = (weights.vector([f"{attention}.{name}_norm.weight"], [self.heads.head_dim]) for name in "qk")
        return HeadNorms(query, key, self.config.rms_norm_eps)

    # Memory

    def cache_dtype(self, kv_cache_dtype: str) -> str:
        """What the KV cache is stored in. "auto" is what float weights are stored in, or int8 where a CPU multiplies
        the weights that it meets in integers, too: keys and values then lose less than activations do. Not where keys
        have a bias: it may be large in a few elements, with which the others share a scale (Qwen2)."""
        if kv_cache_dtype != "auto":
            return kv_cache_dtype
        in_integers = self.mode.int8_activations and not self.all_floats and not self.biases().qkv
        return "int8" if in_integers and target().is_cpu and self.heads.head_dim % 16 == 0 else self.dtype

    def cache_bytes_per_block(self, block_size: int, kv_cache_dtype: str = "auto") -> int:
        """Bytes that one block of `block_size` tokens takes in the KV cache, all layers together."""
        fields = cache_fields(self.heads, 1, block_size, self.cache_dtype(kv_cache_dtype)).values()
        return self.config.num_layers * sum(prod(shape) * ITEM_SIZES[dtype] for shape, dtype in fields)

    def allocate_cache(self, num_blocks: int, block_size: int, kv_cache_dtype: str = "auto") -> KVCache:
        """The KV cache, contents unspecified: attention reads no slot that was not written."""
        dtype = self.cache_dtype(kv_cache_dtype)
        fields = cache_fields(self.heads, num_blocks, block_size, dtype).items()

        def layer() -> KVBlocks:
            memory = {name: view(self.device.empty(shape, type_)) for name, (shape, type_) in fields}
            return KVBlocks(memory["k_cache"], memory["v_cache"], memory.get("k_scales"), memory.get("v_scales"))

        return KVCache([layer() for _ in range(self.config.num_layers)], dtype)

    def allocate_activations(self, max_tokens: int, max_seqs: int, max_context: int, max_rows: int) -> Activations:
        """Memory for steps of up to `max_tokens` tokens and `max_seqs` sequences of up to `max_context` tokens, and for
        the logits of up to `max_rows` rows at a time."""
        config, heads, device = self.config, self.heads, self.device
        dtype = device.activation_dtype(self.dtype)
        input_dtype = device.linear_input_dtype(self.dtype) if self.all_floats else dtype
        allocator = Allocator(device, dtype, input_dtype, self.mode.int8_activations, self.ordered)
        hidden, q_width, mixture = config.hidden_size, heads.num_heads * heads.head_dim, config.mixture
        ranks = 1 if self.group is None else self.group.size
        logits_width = self.embedding.out_features
        parts = max(max_tokens * hidden, max_rows * logits_width)
        return Activations(
            hidden=allocator.linear_input(max_tokens, hidden, wide=True),
            residual=allocator.matrix(max_tokens, hidden),
            delta=allocator.matrix(max_tokens, hidden),
            qkv=allocator.matrix(max_tokens, heads.qkv_width),
            attended=allocator.linear_input(max_tokens, q_width),
            mlp=MLPMemory.allocate(allocator, max_tokens, len(self.shard.of(config.intermediate_size))),
            mixture=MixtureMemory.allocate(allocator, max_tokens, hidden, mixture, self.shard) if mixture else None,
            kept_attended=allocator.input_floats(max_rows, q_width),
            kept_residual=allocator.matrix(max_rows, hidden),
            workspace=view(device.empty((prod(workspace_shape(max_seqs, heads, max_context)),), "float32")),
            own_logits=None if ranks == 1 else view(device.empty((max_rows, logits_width), "float32")),
            parts=None if ranks == 1 else view(device.empty((ranks * parts,), "float32")),
        )

    # The forward pass

    def attend(self, step: StepInputs, cache: KVCache, memory: Activations) -> None:
        """Launch the kernels of one step up to the last layer's attention. They write the cache, and leave what
        `project` goes on from in `memory`."""
        memory = memory.rows(step.num_tokens)
        embedding(memory.residual, step.ids, self.embedding, self.tokens.start, len(self.tokens))
        self._sum_over_ranks(memory.residual, memory)
        first = self.layers[0]
        rms_norm(memory.hidden.of(first.qkv), memory.residual, first.attention_norm, self.config.rms_norm_eps)
        for layer, following, blocks in zip(self.layers, self.layers[1:], cache.layers):
            attended = memory.attended.of(layer.attention_output)
            if self.heads.head_dim % GROUP:  # attention can't write groups that heads share
                attended = memory.attended.floats
            self._attend(attended, layer, step, blocks, memory)
            self._finish_layer(attended, layer, following.attention_norm, following.qkv, memory)
        self._attend(memory.attended.floats, self.layers[-1], step, cache.layers[-1], memory)

    def project(self, logits: TensorView, rows: TensorView | None, memory: Activations) -> None:
        """Launch the kernels from the last layer's attention to `logits`, [R, vocabulary] float32.

        rows: [R] int32, ascending, whose logits these are; None for the step's first R tokens, all there are. With
            None it can be called but once, as it works on the rows where they lie.
        """
        count = logits.shape[0]
        attended, residual = memory.attended.rows(count), memory.residual.rows(count)
        if rows is not None:
            attended = replace(attended, floats=memory.kept_attended.rows(count))
            residual = memory.kept_residual.rows(count)
            gather_rows(attended.floats, memory.attended.floats, rows)
            gather_rows(residual, memory.residual, rows)
        memory = replace(memory.rows(count), attended=attended, residual=residual)
        self._finish_layer(attended.floats, self.layers[-1], self.final_norm, self.lm_head, memory)
        if self.group is None:
            linear(logits, memory.hidden.of(self.lm_head), self.lm_head)
        else:
            assert memory.own_logits is not None  # there is a group
            own_logits = memory.own_logits.rows(count)
            linear(own_logits, memory.hidden.of(self.lm_head), self.lm_head)
            join_columns(logits, self._of_all_ranks(own_logits, memory))

    def watch_layer(
        self,
        layer: Layer,
        step: StepInputs,
        cache: KVBlocks,
        memory: Activations,
        watch: Callable[[str, TensorView], None],
    ) -> None:
        """One layer by itself, in floats: residual -> residual, of a step's tokens.

        watch: is shown what "qkv", "attention_output" and "feed_forward" read, before they write over anything. The
            layer's own memory, `memory.mlp` or `memory.mixture`, is as the layer leaves it.
        """
        hidden, attended = memory.hidden.floats, memory.attended.floats
        rms_norm(hidden, memory.residual, layer.attention_norm, self.config.rms_norm_eps)
        watch("qkv", hidden)
        self._attend(attended, layer, step, cache, memory)
        watch("attention_output", attended)
        self._add_attention(attended, layer, memory)
        watch("feed_forward", hidden)
        self._feed_forward(layer, memory)
        add_rms_norm(hidden, memory.residual, memory.delta, layer.mlp_norm, self.config.rms_norm_eps)

    def _attend(
        self, attended: LinearOperand, layer: Layer, step: StepInputs, cache: KVBlocks, memory: Activations
    ) -> None:
        """hidden -> attended, and the tokens' keys and values into the cache."""
        memory.hidden.linear(memory.qkv, layer.qkv)
        inputs = (memory.qkv, step.positions, step.slots, self.cos, self.sin)
        rope_and_cache(*inputs, cache, self.heads, layer.head_norms)
        paged_attention(attended, memory.qkv, cache, step.attention, self.heads, self.scale, memory.workspace)

    def _finish_layer(
        self, attended: LinearOperand, layer: Layer, next_norm: TensorView, next_linear: Weight, memory: Activations
    ) -> None:
        """What follows a layer's attention: attended -> residual, and hidden for the linear layer that comes next."""
        self._add_attention(attended, layer, memory)
        self._feed_forward(layer, memory)
        self._add_and_norm(memory, next_norm, next_linear)

    def _add_attention(self, attended: LinearOperand, layer: Layer, memory: Activations) -> None:
        """attended -> residual, and hidden for the feed-forward network."""
        if not isinstance(attended, QuantisedRows):
            memory.attended.quantised_of(layer.attention_output)
        memory.attended.linear(memory.delta, layer.attention_output)
        self._sum_over_ranks(memory.delta, memory)
        self._add_and_norm(memory, layer.mlp_norm, layer.feed_forward.first)

    def _feed_forward(self, layer: Layer, memory: Activations) -> None:
        """hidden -> delta, what the layer adds to the residual stream last."""
        if isinstance(layer.feed_forward, MLP):
            layer.feed_forward.launch(memory.delta, memory.hidden, memory.mlp)
        elif memory.mixture is not None:
            layer.feed_forward.launch(memory.delta, memory.hidden, memory.mixture)
        self._sum_over_ranks(memory.delta, memory)

    def _sum_over_ranks(self, x: TensorView, memory: Activations) -> None:
        """x = the sum of all ranks' x."""
        if self.group is not None:
            sum_parts(x, self._of_all_ranks(x, memory))

    def _of_all_ranks(self, x: TensorView, memory: Activations) -> TensorView:
        """Every rank's x, [ranks, ...], in memory that the next call uses again."""
        assert self.group is not None and memory.parts is not None
        parts = memory.parts.rows(self.group.size * prod(x.shape)).reshape(self.group.size, *x.shape)
        self.group.all_gather(parts, x)
        return parts

    def _add_and_norm(self, memory: Activations, norm: TensorView, following: Weight) -> None:
        """residual += delta; residual -> hidden, as the linear layer `following` reads it."""
        hidden = memory.hidden.of(following)
        add_rms_norm(hidden, memory.residual, memory.delta, norm, self.config.rms_norm_eps)


def features(heads: range, head_dim: int) -> range:
    """The features of these heads, `head_dim` each, one head after the other."""
    return range(heads.start * head_dim, heads.stop * head_dim)
