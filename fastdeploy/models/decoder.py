"""The transformer decoder that the model families share.

    x = embedding[ids]                                            residual stream, [T, hidden]
    for every layer:
        h = norm(x);  q, k, v = h Wqkv;  rotate q, k;  write k, v to the cache
        x = x + attention(q, cache) Wo
        h = norm(x);  x = x + (silu(h Wgate) * h Wup) Wdown
    logits = norm(x)[rows] Wlm_head                               [R, vocabulary]

T is the number of tokens of the step, of all sequences one after the other, R the number of rows that need logits. The
sums x + ... are done by the norm that follows them (`add_rms_norm`), so a layer is nine launches.

T is cut to R after the last layer's attention, where the other rows have done their work: the keys and values are in
the cache. So a step is `attend`, and then `project` for the rows whose logits are wanted, all at once or slab by slab.

Both do nothing but launch kernels on memory that was allocated before: a step can be recorded and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod, sqrt

from fastdeploy.config import ModelConfig
from fastdeploy.device import DTYPE_BYTES, Device
from fastdeploy.kernels.activation import silu_mul
from fastdeploy.kernels.attention import AttentionBatch, paged_attention, workspace_shape
from fastdeploy.kernels.embedding import embedding, gather_rows
from fastdeploy.kernels.launch import TensorView, view
from fastdeploy.kernels.linear import LinearWeight, linear
from fastdeploy.kernels.norm import add_rms_norm, rms_norm
from fastdeploy.kernels.rope import HeadLayout, rope_and_cache, rope_tables
from fastdeploy.models.loading import WeightLoader


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
    qkv: LinearWeight  # [(heads + 2 kv heads) * head_dim, hidden]: the rows of q, then k, then v
    attention_output: LinearWeight  # [hidden, heads * head_dim]
    mlp_norm: TensorView  # [hidden] float32
    gate_up: LinearWeight  # [2 * intermediate, hidden]: the rows of gate, then up
    down: LinearWeight  # [hidden, intermediate]


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all tokens, in blocks of block_size, per layer.

    keys[layer]    [num_blocks, kv heads, head_dim, block_size]   transposed: q.k reads along tokens
    values[layer]  [num_blocks, kv heads, block_size, head_dim]
    """

    keys: list[TensorView]
    values: list[TensorView]


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

    hidden: TensorView  # a norm's output, [T, hidden]
    residual: TensorView  # the residual stream, [T, hidden]
    delta: TensorView  # what a layer adds to it, [T, hidden]
    qkv: TensorView  # [T, (heads + 2 kv heads) * head_dim]
    attended: TensorView  # [T, heads * head_dim]
    gate_up: TensorView  # [T, 2 * intermediate]
    activated: TensorView  # [T, intermediate]
    kept_attended: TensorView  # the rows of `attended` that `project` was asked for, [R, heads * head_dim]
    kept_residual: TensorView  # the rows of `residual` that it was asked for, [R, hidden]
    workspace: TensorView  # attention's float32 scratch for contexts split over programs

    def rows(self, count: int) -> Activations:
        """The same memory, the parts with a row per token cut to `count` rows."""
        per_token = ("hidden", "residual", "delta", "qkv", "attended", "gate_up", "activated")
        return replace(self, **{name: getattr(self, name).rows(count) for name in per_token})


class Decoder:
    """A decoder-only transformer; a family is a subclass that says what differs.

    Args:
        config: what the checkpoint says of itself.
        weights: gives the memory of every weight, to be filled once the whole model has been declared.
        max_positions: the longest sequence in tokens, for the rotary tables.
    """

    def __init__(self, config: ModelConfig, weights: WeightLoader, max_positions: int) -> None:
        self.config = config
        self.device: Device = weights.device
        self.dtype = weights.dtype
        self.heads = HeadLayout(config.num_heads, config.num_kv_heads, config.head_dim, config.rope_interleaved)
        self.scale = 1.0 / sqrt(config.head_dim)
        self.embedding = weights.linear(["model.embed_tokens"], config.hidden_size, [config.vocab_size])
        self.layers = [self.read_layer(f"model.layers.{index}", weights) for index in range(config.num_layers)]
        self.final_norm = weights.vector(["model.norm.weight"], [config.hidden_size])
        self.lm_head = self.embedding
        if not config.tie_word_embeddings:
            self.lm_head = weights.linear(["lm_head"], config.hidden_size, [config.vocab_size])
        tables = rope_tables(config.head_dim, max_positions, config.rope_theta, config.rope_scaling)
        self.cos, self.sin = (view(self.device.from_numpy(table)) for table in tables)

    def biases(self) -> Biases:
        """Which linear layers add a bias. A family overrides this where it differs."""
        return Biases()

    def read_layer(self, prefix: str, weights: WeightLoader) -> Layer:
        """Read the weights of the layer whose tensors' names begin with `prefix`."""
        config, heads, biases = self.config, self.heads, self.biases()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        q_width, kv_width = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = [f"{attention}.{name}_proj" for name in "qkv"]
        gate_up = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        return Layer(
            attention_norm=weights.vector([f"{prefix}.input_layernorm.weight"], [hidden]),
            qkv=weights.linear(qkv, hidden, [q_width, kv_width, kv_width], biases.qkv),
            attention_output=weights.linear([f"{attention}.o_proj"], q_width, [hidden], biases.attention_output),
            mlp_norm=weights.vector([f"{prefix}.post_attention_layernorm.weight"], [hidden]),
            gate_up=weights.linear(gate_up, hidden, [intermediate, intermediate], biases.mlp),
            down=weights.linear([f"{mlp}.down_proj"], intermediate, [hidden], biases.mlp),
        )

    # Memory

    def cache_bytes_per_block(self, block_size: int) -> int:
        """Bytes that one block of `block_size` tokens takes in the KV cache, all layers together."""
        per_token = 2 * self.heads.num_kv_heads * self.heads.head_dim * DTYPE_BYTES[self.dtype]
        return self.config.num_layers * block_size * per_token

    def allocate_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """The KV cache, contents unspecified: attention reads no slot that was not written."""
        kv_heads, head_dim = self.heads.num_kv_heads, self.heads.head_dim
        layers = range(self.config.num_layers)
        key_shape = (num_blocks, kv_heads, head_dim, block_size)
        value_shape = (num_blocks, kv_heads, block_size, head_dim)
        keys = [view(self.device.empty(key_shape, self.dtype)) for _ in layers]
        values = [view(self.device.empty(value_shape, self.dtype)) for _ in layers]
        return KVCache(keys, values)

    def allocate_activations(self, max_tokens: int, max_seqs: int, max_context: int, max_rows: int) -> Activations:
        """Memory for steps of up to `max_tokens` tokens and `max_seqs` sequences of up to `max_context` tokens, and for
        the logits of up to `max_rows` rows at a time."""
        config, heads, device = self.config, self.heads, self.device
        dtype = device.activation_dtype(self.dtype)

        def matrix(rows: int, width: int) -> TensorView:
            return view(device.empty((rows, width), dtype))

        q_width = heads.num_heads * heads.head_dim
        return Activations(
            hidden=matrix(max_tokens, config.hidden_size),
            residual=matrix(max_tokens, config.hidden_size),
            delta=matrix(max_tokens, config.hidden_size),
            qkv=matrix(max_tokens, heads.qkv_width),
            attended=matrix(max_tokens, q_width),
            gate_up=matrix(max_tokens, 2 * config.intermediate_size),
            activated=matrix(max_tokens, config.intermediate_size),
            kept_attended=matrix(max_rows, q_width),
            kept_residual=matrix(max_rows, config.hidden_size),
            workspace=view(device.empty((prod(workspace_shape(max_seqs, heads, max_context)),), "float32")),
        )

    # The forward pass

    def attend(self, step: StepInputs, cache: KVCache, memory: Activations) -> None:
        """Launch the kernels of one step up to the last layer's attention. They write the cache, and leave what
        `project` goes on from in `memory`."""
        memory = memory.rows(step.num_tokens)
        embedding(memory.residual, step.ids, self.embedding)
        rms_norm(memory.hidden, memory.residual, self.layers[0].attention_norm, self.config.rms_norm_eps)
        for index, layer in enumerate(self.layers):
            self._attend(layer, step, cache.keys[index], cache.values[index], memory)
            if layer is not self.layers[-1]:
                self._finish_layer(layer, self.layers[index + 1].attention_norm, memory)

    def project(self, logits: TensorView, rows: TensorView | None, memory: Activations) -> None:
        """Launch the kernels from the last layer's attention to `logits`, [R, vocabulary] float32.

        rows: [R] int32, ascending, whose logits these are; None for the step's first R tokens, all there are. With
            None it can be called but once, as it works on the rows where they lie.
        """
        count = logits.shape[0]
        attended, residual = memory.attended.rows(count), memory.residual.rows(count)
        if rows is not None:
            attended, residual = memory.kept_attended.rows(count), memory.kept_residual.rows(count)
            gather_rows(attended, memory.attended, rows)
            gather_rows(residual, memory.residual, rows)
        memory = replace(memory.rows(count), attended=attended, residual=residual)
        self._finish_layer(self.layers[-1], self.final_norm, memory)
        linear(logits, memory.hidden, self.lm_head)

    def _attend(
        self, layer: Layer, step: StepInputs, keys: TensorView, values: TensorView, memory: Activations
    ) -> None:
        """hidden -> attended, and the tokens' keys and values into the cache."""
        linear(memory.qkv, memory.hidden, layer.qkv)
        rope_and_cache(memory.qkv, step.positions, step.slots, self.cos, self.sin, keys, values, self.heads)
        paged_attention(
            memory.attended, memory.qkv, keys, values, step.attention, self.heads, self.scale, memory.workspace
        )

    def _finish_layer(self, layer: Layer, following_norm: TensorView, memory: Activations) -> None:
        """What follows a layer's attention: attended -> residual, and hidden for the next layer."""
        linear(memory.delta, memory.attended, layer.attention_output)
        self._add_and_norm(memory, layer.mlp_norm)
        self._feed_forward(layer, memory)
        self._add_and_norm(memory, following_norm)

    def _feed_forward(self, layer: Layer, memory: Activations) -> None:
        """hidden -> delta."""
        linear(memory.gate_up, memory.hidden, layer.gate_up)
        silu_mul(memory.activated, memory.gate_up)
        linear(memory.delta, memory.activated, layer.down)

    def _add_and_norm(self, memory: Activations, weight: TensorView) -> None:
        """residual += delta; residual -> hidden."""
        add_rms_norm(memory.hidden, memory.residual, memory.delta, weight, self.config.rms_norm_eps)
