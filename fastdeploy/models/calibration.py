"""What the inputs of linear layers are worth: the mean of x^2 of every input feature over a short text.

An error in a weight changes the output by that error times the feature, so this is how much each counts when weights
become four bits (kernels/search.py). The text is calibration.txt: prose, conversation, tables and programs in a dozen
languages, written for this purpose.

The model reads it in floats, layer by layer, before any of its weights is packed:

    embed all sequences;  for every layer: read its weights as floats, run all sequences through it, let them go

So the pass takes the memory of one layer in floats and of one sequence's activations. The statistics are of the float
model: those of one that has its weights in four bits already give the same (SmolLM2: KL 0.072 against 0.073). A
sequence's first token counts as others do, though it looks like an outlier: without it, the KL is 0.113.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdeploy.config import MODES
from fastdeploy.device.host import progress_bar, release_free_memory
from fastdeploy.kernels.attention import AttentionBatch, split_keys
from fastdeploy.kernels.embedding import embedding
from fastdeploy.kernels.launch import TensorView, cdiv, view
from fastdeploy.kernels.linear import LinearWeight, pack
from fastdeploy.kernels.rope import rope_tables
from fastdeploy.models.decoder import Activations, Decoder, Layer, StepInputs
from fastdeploy.models.feed_forward import MLP, MixtureMemory
from fastdeploy.models.loading import WeightLoader, as_float32
from fastdeploy.models.storage import RawTensor
from fastdeploy.models.weights import Checkpoint

if TYPE_CHECKING:
    from fastdeploy.device import Device
    from fastdeploy.text.tokenizer import Tokenizer

logger = logging.getLogger("fastdeploy")

TEXT = Path(__file__).with_name("calibration.txt")
SEQUENCES, LENGTH = 12, 128  # at most, and tokens of each: half as long as the text, for the same KL divergence
BLOCK_SIZE = 64
PRIOR = 16  # tokens that each expert counts as having had besides, with all experts' mean

READERS = {  # the modules that read what `Decoder.watch_layer` shows
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "feed_forward": ("mlp.gate_proj", "mlp.up_proj"),
}


def calibration_sequences(tokenizer: Tokenizer, vocab_size: int) -> list[np.ndarray]:
    """The text as sequences of at most LENGTH token ids, int32; ids that the model doesn't have are left out.

    Of more tokens than SEQUENCES hold, as a vocabulary makes that lacks a script, parts at equal distances are taken.
    No sequences, with a warning, if there are no such tokens.
    """
    ids = np.array(tokenizer.encode(TEXT.read_text(encoding="utf-8")), np.int32)
    ids = ids[ids < vocab_size]
    if not len(ids):
        logger.warning("the tokenizer makes no tokens of the calibration text: four bits are rounded to nearest")
    sequences = [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
    kept = np.linspace(0, len(sequences) - 1, min(SEQUENCES, len(sequences))).astype(int)
    return [sequences[index] for index in kept]


def importance(
    model: Decoder, checkpoint: Checkpoint, sequences: Sequence[np.ndarray], progress: bool
) -> dict[str, np.ndarray]:
    """The mean of x^2 of each input feature, [in_features] float32, by name of the weight that reads it.

    Args:
        model: declared, its weights not read yet; of several ranks, each gets its own input features.
        checkpoint: has all tensors that the model asked for.
        sequences: token ids, at most LENGTH each.
        progress: whether to show a progress bar.

    What overflows to infinity or NaN in the model's dtype is left out, with a warning.
    """
    found: dict[str, np.ndarray] = {}
    layers = model.config.num_layers
    with progress_bar(total=layers, desc="Calibrating", unit=" layers", disable=not progress) as bar:
        sequences_in_model = _Pass(model, checkpoint, sequences)
        for index in range(layers):
            means = sequences_in_model.layer(index)
            found |= {f"model.layers.{index}.{module}.weight": mean for module, mean in means.items()}
            bar.update(1)
    del sequences_in_model
    tokens = sum(map(len, sequences))
    logger.info("%s: weights for 4 bits are chosen by what %d tokens put through the model", checkpoint.path, tokens)
    release_free_memory()
    overflown = [name for name, mean in found.items() if not np.isfinite(mean).all()]
    if overflown:
        logger.warning(
            "%s: the inputs of %d of %d weights overflow %s over the calibration text, so these are rounded to nearest",
            checkpoint.path, len(overflown), len(found), model.dtype,
        )  # fmt: skip
    return {name: mean for name, mean in found.items() if name not in overflown}


class _FloatLayers(WeightLoader):
    """Reads a model's layers in floats, one by one: whoever asks for the next has let go of the last."""

    def __init__(self, model: Decoder, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, model.device, model.dtype, None, model.shard)
        self._model = model

    def layer(self, index: int) -> Layer:
        layer = self._model.read_layer(index, self)
        with progress_bar(disable=True) as silent:
            self.read(silent)
        return layer

    def embeddings(self, ids: np.ndarray) -> LinearWeight:
        """The rows of these tokens alone."""
        rows = [self._checkpoint.read_rows("model.embed_tokens.weight", token, token + 1) for token in ids.tolist()]
        array = np.concatenate([row.array for row in rows])
        weight = self._allocate_floats(len(array), array.shape[1], None, self.dtype)
        pack(weight.data, view(self.device.from_numpy(array), rows[0].dtype), 0)
        return weight

    def _refuse_above(self, needed: int) -> None:
        """What is counted here are all layers, of which there is one at a time."""


class _Pass:
    """All sequences on their way through the model."""

    def __init__(self, model: Decoder, checkpoint: Checkpoint, sequences: Sequence[np.ndarray]) -> None:
        self._model = _in_floats(model)
        self._loader = _FloatLayers(self._model, checkpoint)
        self._lengths = [len(sequence) for sequence in sequences]
        self._memory = self._model.allocate_activations(LENGTH, 1, LENGTH, 1)
        self._cache = self._model.allocate_cache(LENGTH // BLOCK_SIZE, BLOCK_SIZE).layers[0]
        device = model.device
        tokens, places = np.unique(np.concatenate(sequences), return_inverse=True)
        shape = (len(places), model.config.hidden_size)
        self._residual = view(device.empty(shape, self._memory.residual.dtype))  # of all sequences
        ids = view(device.from_numpy(places.astype(np.int32)))
        embedding(self._residual, ids, self._loader.embeddings(tokens), 0, len(tokens))

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """Run layer `index`: the mean squares of what its modules read."""
        layer = self._loader.layer(index)
        inputs = _Inputs(self._model)
        start = 0
        for length in self._lengths:
            memory = replace(self._memory.rows(length), residual=self._residual.rows(length, start))
            step = one_sequence(self._model.device, np.arange(length, dtype=np.int32))  # a layer doesn't look at ids
            self._model.watch_layer(layer, step, self._cache, memory, inputs.add)
            inputs.add_intermediate(layer, memory)
            start += length
        return inputs.means()


def _in_floats(model: Decoder) -> Decoder:
    """The same model with memory for floats, a cache for one layer, and positions for one sequence."""
    twin, config = copy.copy(model), model.config
    twin.mode, twin.all_floats = MODES[None], True
    twin.config = replace(config, num_layers=1)
    tables = rope_tables(config.head_dim, LENGTH, config.rope_theta, config.rope_scaling)
    twin.cos, twin.sin = (view(model.device.from_numpy(table)) for table in tables)
    return twin


def one_sequence(device: Device, ids: np.ndarray) -> StepInputs:
    """A step that is one prompt of these ids, [T] int32, in the cache's first blocks, of BLOCK_SIZE tokens."""
    on_device = lambda array: view(device.from_numpy(array))  # noqa: E731
    length = len(ids)
    positions = np.arange(length, dtype=np.int32)
    attention = AttentionBatch(
        num_decodes=0,
        num_seqs=1,
        max_query_len=length,
        num_splits=cdiv(length, split_keys()),
        cu_seqlens=on_device(np.array([0, length], np.int32)),
        context_lens=on_device(np.array([length], np.int32)),
        block_tables=on_device(np.arange(cdiv(length, BLOCK_SIZE), dtype=np.int32)[None]),
    )
    return StepInputs(on_device(ids), on_device(positions), on_device(positions.astype(np.int64)), attention, length)


@dataclass
class _Sum:
    """Squares of some tokens' features, [in_features]."""

    squares: np.ndarray | float = 0.0
    tokens: int = 0

    def add(self, x: np.ndarray) -> None:
        self.squares = self.squares + np.einsum("tk,tk->k", x, x)
        self.tokens += len(x)

    def mean(self, prior: np.ndarray | float = 0.0, weight: int = 0) -> np.ndarray:
        """With the mean `prior` of `weight` further tokens."""
        return np.asarray((self.squares + weight * prior) / (self.tokens + weight), np.float32)


class _Inputs:
    """What a layer's modules have read so far."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._sums: defaultdict[str, _Sum] = defaultdict(_Sum)  # by what `Decoder.watch_layer` calls it, and more
        self._readers = dict(READERS)
        self._experts: list[_Sum] = []  # of the intermediate features

    def add(self, what: str, x: TensorView) -> None:
        """x: [T, in_features] on the device."""
        self._sums[what].add(self._read(x))

    def add_intermediate(self, layer: Layer, memory: Activations) -> None:
        """What the layer has left in its memory: the input of `down`."""
        network = layer.feed_forward
        if isinstance(network, MLP):
            self._add_down("mlp", memory.mlp.activated.floats)
            return
        config = self._model.config.mixture
        assert config is not None and memory.mixture is not None  # as the layer is one
        self._readers["feed_forward"] = ()
        for expert in range(config.num_experts):
            self._readers["feed_forward"] += tuple(f"mlp.experts.{expert}.{name}_proj" for name in ("gate", "up"))
        if memory.mixture.shared is not None:
            self._readers["feed_forward"] += tuple(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up"))
            self._add_down("mlp.shared_experts", memory.mixture.shared.activated.floats)
        self._add_experts(memory.mixture)

    def means(self) -> dict[str, np.ndarray]:
        """By module."""
        found: dict[str, np.ndarray] = {}
        for what, total in self._sums.items():
            found |= dict.fromkeys(self._readers[what], total.mean())
        if self._experts:
            every = _Sum(
                sum(expert.squares for expert in self._experts), sum(expert.tokens for expert in self._experts)
            )
            for index, expert in enumerate(self._experts):
                found[f"mlp.experts.{index}.down_proj"] = expert.mean(every.mean(), PRIOR)
        return found

    def _add_down(self, module: str, x: TensorView) -> None:
        self._readers[module] = (f"{module}.down_proj",)
        self.add(module, x)

    def _add_experts(self, memory: MixtureMemory) -> None:
        """Rows lie sorted by expert."""
        counts = self._model.device.to_numpy(memory.routing.counts)
        rows = self._read(memory.activated.floats)
        self._experts = self._experts or [_Sum() for _ in counts]
        for total, part in zip(self._experts, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            total.add(part)

    def _read(self, x: TensorView) -> np.ndarray:
        return as_float32(RawTensor(x.dtype, self._model.device.to_numpy(x)))
