"""What matters in the inputs of linear layers: the mean of x^2 of every input feature over a short text.

Weights that become four bits are chosen such that errors count by it (`kernels/search.py`). The text is calibration.txt:
prose, conversation, code and tables in a dozen languages, written for this purpose.

The model runs over it in floats, a layer at a time: a layer's weights are read, all sequences pass through it, the
weights are let go. So the pass needs the memory of one layer in floats, and of one sequence's activations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdeploy.config import MODES
from fastdeploy.device.host import progress_bar
from fastdeploy.kernels.attention import AttentionBatch, split_keys
from fastdeploy.kernels.embedding import embedding
from fastdeploy.kernels.launch import TensorView, cdiv, view
from fastdeploy.kernels.linear import pack
from fastdeploy.kernels.norm import rms_norm, add_rms_norm
from fastdeploy.kernels.rope import rope_tables
from fastdeploy.models.decoder import Activations, Decoder, KVCache, Layer, StepInputs
from fastdeploy.models.feed_forward import MLP
from fastdeploy.models.loading import WeightLoader, as_float32
from fastdeploy.models.storage import RawTensor
from fastdeploy.models.weights import Checkpoint

if TYPE_CHECKING:
    from fastdeploy.text.tokenizer import Tokenizer

TEXT = Path(__file__).with_name("calibration.txt")
LENGTH = 512  # tokens of a sequence
BLOCK_SIZE = 64
MOST = 4096

def calibration_ids(tokenizer: Tokenizer, vocab_size: int) -> list[np.ndarray]:
    """The text as sequences of at most LENGTH token ids, int32."""
    ids = np.array(tokenizer.encode(TEXT.read_text(encoding="utf-8")), np.int32)
    ids = ids[ids < vocab_size][:MOST]
    return [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]


class FloatLayers(WeightLoader):
    """Reads a model's layers one by one, in floats."""

    def __init__(self, model: Decoder, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, model.device, model.dtype, None, model.shard)
        self._model = model

    def layer(self, index: int) -> Layer:
        layer = self._model.read_layer(index, self)
        self.read_all()
        return layer

    def table(self, ids):
        source = self._checkpoint
        weight = self._allocate_floats(len(ids), source.config.hidden_size, None, self.dtype)
        rows = [source.read_rows("model.embed_tokens.weight", i, i + 1) for i in ids.tolist()]
        array = np.concatenate([row.array for row in rows])
        pack(weight.data, view(self.device.from_numpy(array), rows[0].dtype), 0)
        return weight

    def _refuse_above(self, needed: int) -> None:
        """There is but one layer at a time."""


def mean_squares(model: Decoder, checkpoint: Checkpoint, sequences: Sequence[np.ndarray], progress: bool, layers_of=None):
    """name of weight -> [in_features] float32"""
    twin = in_floats(model)
    loader = FloatLayers(twin, checkpoint)
    unique, ids = np.unique(np.concatenate(sequences), return_inverse=True)
    total = len(ids)
    device = model.device
    memory = twin.allocate_activations(LENGTH, 1, LENGTH, 1)
    cache = twin.allocate_cache(LENGTH // BLOCK_SIZE, BLOCK_SIZE)
    residuals = view(device.empty((total, model.config.hidden_size), memory.residual.dtype))
    embedding(residuals, view(device.from_numpy(ids.astype(np.int32))), loader.table(unique), 0, len(unique))
    found = {}
    with progress_bar(total=model.config.num_layers, desc="Calibrating", disable=not progress) as bar:
        for index in range(model.config.num_layers):
            layer = loader.layer(index)
            start = 0
            sums = Sums(device)
            for sequence in sequences:
                count = len(sequence)
                part = replace(memory.rows(count), residual=residuals.rows(count, start))
                run_layer(twin, layer, part, cache, count, sums)
                start += count
            for names, values in sums.sums.items():
                for name in names:
                    found[f"model.layers.{index}.{name}.weight"] = (values / total).astype(np.float32)
            bar.update(1)
    return found

class Sums:
    def __init__(self, device):
        self.device=device; self.sums={}
    def add(self, names, x):
        rows = as_float32(RawTensor(x.dtype, self.device.to_numpy(x)))
        self.sums[names] = self.sums.get(names, 0.0) + np.einsum("tk,tk->k", rows, rows)

def run_layer(model, layer, memory, cache, count, sums):
    device = model.device
    positions = np.arange(count, dtype=np.int32)
    attention = AttentionBatch(
        num_decodes=0,
        num_seqs=1,
        max_query_len=count,
        num_splits=cdiv(count, split_keys()),
        cu_seqlens=view(np.array([0, count], np.int32)),
        context_lens=view(np.array([count], np.int32)),
        block_tables=view(np.arange(LENGTH // BLOCK_SIZE, dtype=np.int32)[None]),
    )
    ids = view(positions)
    step = StepInputs(ids, view(positions), view(positions.astype(np.int64)), attention, count)
    attended = memory.attended.floats
    rms_norm(memory.hidden.floats, memory.residual, layer.attention_norm, model.config.rms_norm_eps)
    sums.add(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), memory.hidden.floats)
    model._attend(attended, layer, step, cache.layers[0], memory)
    sums.add(("self_attn.o_proj",), attended)
    model._add_attention(attended, layer, memory)
    sums.add(("mlp.gate_proj", "mlp.up_proj"), memory.hidden.floats)
    model._feed_forward(layer, memory)
    if isinstance(layer.feed_forward, MLP):
        sums.add(("mlp.down_proj",), memory.mlp.activated.floats)
    model._add_and_norm(memory, layer.mlp_norm, layer.feed_forward.first)

def in_floats(model):
    twin = copy.copy(model)
    twin.mode = MODES[None]
    twin.config = replace(model.config, num_layers=1)
    tables = rope_tables(model.config.head_dim, LENGTH, model.config.rope_theta, model.config.rope_scaling)
    twin.cos, twin.sin = (view(model.device.from_numpy(table)) for table in tables)
    return twin
