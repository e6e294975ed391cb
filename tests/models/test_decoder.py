"""The decoder against NumPy in float64, and against itself: a row has the same bits in any company."""

import ctypes
import math
from itertools import pairwise

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from fastdeploy.device import open_device
from fastdeploy.kernels.attention import SPLIT, AttentionBatch
from fastdeploy.kernels.launch import ITEM_SIZES, view
from fastdeploy.models import load_model
from fastdeploy.models.decoder import Decoder, StepInputs
from tests.models import reference
from tests.models.tiny import CONFIGS, GROUPED, QWEN3, TIED, UNTIED, checkpoint, random_tensors

BLOCK_SIZE = 16
MAX_TOKENS = 400
MAX_BLOCKS = MAX_TOKENS // BLOCK_SIZE
# Relative to the largest logit. A key near the middle between two numbers of `dtype` may round either way.
TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2, "float16": 3e-3}


class Steps:
    """A model with a cache, and steps laid out for it by hand. Sequence i owns the blocks i, i + 4, i + 8, ..."""

    def __init__(self, model: Decoder, kv_cache_dtype: str = "auto") -> None:
        self.model = model
        self.cache = model.allocate_cache(4 * MAX_BLOCKS, BLOCK_SIZE, kv_cache_dtype)
        self.memory = model.allocate_activations(MAX_TOKENS, MAX_TOKENS, MAX_TOKENS, MAX_TOKENS)

    def run(self, *chunks: tuple[int, int, list[int]], rows: list[int] | None = None) -> np.ndarray:
        """Compute chunks (sequence, start, ids), those of one token first; the logits of all rows, or of `rows`."""
        tokens = [(sequence, start + i, token) for sequence, start, ids in chunks for i, token in enumerate(ids)]
        sequences, positions, ids = np.array(tokens).T
        tables = [[sequence + 4 * block for block in range(MAX_BLOCKS)] for sequence, _, _ in chunks]
        lengths = [len(ids) for _, _, ids in chunks]
        contexts = [start + len(ids) for _, start, ids in chunks]
        attention = AttentionBatch(
            num_decodes=lengths.count(1),
            num_seqs=len(chunks),
            max_query_len=max(lengths),
            num_splits=-(-max(contexts) // SPLIT),
            cu_seqlens=view(np.cumsum([0, *lengths], dtype=np.int32)),
            context_lens=view(np.array(contexts, np.int32)),
            block_tables=view(np.array(tables, np.int32)),
        )
        step = StepInputs(
            ids=view(ids.astype(np.int32)),
            positions=view(positions.astype(np.int32)),
            slots=view((sequences + 4 * (positions // BLOCK_SIZE)) * BLOCK_SIZE + positions % BLOCK_SIZE),
            attention=attention,
            num_tokens=len(ids),
        )
        self.model.attend(step, self.cache, self.memory)
        return self.project(len(ids) if rows is None else len(rows), rows)

    def project(self, count: int, rows: list[int] | None) -> np.ndarray:
        """The logits of `count` rows of the latest step: of all, or of `rows`."""
        logits = np.empty((count, self.model.config.vocab_size), np.float32)
        if count:
            self.model.project(view(logits), None if rows is None else view(np.array(rows, np.int32)), self.memory)
        return logits


def load(config=TIED, dtype="float32", seed=0, quantization=None, kv_cache_dtype="auto") -> Steps:
    tensors = random_tensors(config, seed)
    model = load_model(checkpoint(config, tensors), open_device(), dtype, 512, quantization, progress=False)
    return Steps(model, kv_cache_dtype)


def random_ids(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, TIED.vocab_size, count).tolist()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in CONFIGS), ("tied", "bfloat16"), ("untied", "bfloat16"), ("biased", "float16")],
)
def test_logits_of_a_prompt_equal_the_reference(name, dtype):
    config, ids = CONFIGS[name], random_ids(70)
    expected = reference.logits(config, random_tensors(config), dtype, ids)
    found = load(config, dtype).run((0, 0, ids))
    assert np.abs(found - expected).max() < TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kv_cache_dtype", "tolerance"), [("float32", 3e-5), ("bfloat16", 2e-2), ("float16", 3e-3), ("int8", 5e-2)]
)
def test_logits_with_a_cache_of_any_type_equal_the_reference(kv_cache_dtype, tolerance):
    ids = random_ids(70)
    expected = reference.logits(TIED, random_tensors(TIED), "float32", ids)
    steps = load(TIED, kv_cache_dtype=kv_cache_dtype)
    difference = np.abs(steps.run((0, 0, ids)) - expected).max() / np.abs(expected).max()
    assert difference < tolerance
    assert kv_cache_dtype == "float32" or difference > tolerance / 100  # it is what was asked for
    assert {steps.cache.dtype, *(layer.k_cache.dtype for layer in steps.cache.layers)} == {kv_cache_dtype}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "float32", "bfloat16", "int8"])
def test_a_block_takes_the_bytes_that_are_allocated_for_it(kv_cache_dtype):
    steps = load(UNTIED, "float16", kv_cache_dtype=kv_cache_dtype)
    tensors = [part for layer in steps.cache.layers for part in layer.tensors() if part is not None]
    allocated = sum(math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype] for tensor in tensors)
    assert allocated == 4 * MAX_BLOCKS * steps.model.cache_bytes_per_block(BLOCK_SIZE, kv_cache_dtype)


@pytest.mark.parametrize("config", [GROUPED, QWEN3], ids=["no biases", "biases, head norms"])
@pytest.mark.parametrize(
    ("quantization", "storage", "tolerance"),
    [("wint8", "Q8_0", 3e-5), ("wint4", "Q4_1", 3e-5), ("w8a8", "Q8_0", 2e-2), ("w4a8", "Q4_1", 2e-2)],
)
def test_logits_of_quantised_weights_equal_the_reference_with_their_values(config, quantization, storage, tolerance):
    tensors, ids = random_tensors(config), random_ids(70)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            kind = GGMLQuantizationType["Q8_0" if "v_proj" in name else storage]
            tensors[name] = quants.dequantize(quants.quantize(tensor, kind), kind)
    expected = reference.logits(config, tensors, "float32", ids)
    found = load(config, quantization=quantization).run((0, 0, ids))
    difference = np.abs(found - expected).max()
    assert difference < tolerance * np.abs(expected).max()
    assert quantization.startswith("wint") or difference > 1e-4  # activations are quantised


@pytest.mark.parametrize(("quantization", "stored"), [(None, "bfloat16"), ("wint8", "bfloat16"), ("w8a8", "int8")])
def test_keys_and_values_are_integers_where_activations_are(quantization, stored):
    assert load(GROUPED, "bfloat16", quantization=quantization).cache.dtype == stored


def test_what_norms_write_has_low_bytes_and_the_rest_8_bits():
    steps = load(GROUPED, quantization="w8a8")
    layer, memory = steps.model.layers[0], steps.memory
    mlp = layer.feed_forward
    assert all(memory.hidden.of(weight).low is not None for weight in (layer.qkv, mlp.gate_up))
    assert memory.attended.of(layer.attention_output).low is None and memory.mlp.activated.of(mlp.down).low is None


def test_a_prompt_longer_than_a_split_of_attention_equals_the_reference():
    ids = random_ids(SPLIT + 44)
    expected = reference.logits(TIED, random_tensors(TIED), "float32", ids)
    assert np.abs(load().run((0, 0, ids)) - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "dtype", "kv_cache_dtype"),
    [
        *((name, "float32", "auto") for name in CONFIGS),
        ("untied", "bfloat16", "auto"),
        ("interleaved", "float32", "int8"),
    ],
)
def test_chunks_and_decodes_have_the_bits_of_the_whole_prompt(name, dtype, kv_cache_dtype):
    ids = random_ids(60)
    steps = load(CONFIGS[name], dtype, kv_cache_dtype=kv_cache_dtype)
    whole = steps.run((0, 0, ids))
    cuts = [0, 7, 8, 33, 52, *range(53, 61)]  # prompt chunks, one of them of one token, then decodes
    parts = [steps.run((1, start, ids[start:stop])) for start, stop in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("quantization", ["wint8", "wint4", "w8a8", "w4a8"])
def test_quantised_chunks_and_decodes_have_the_bits_of_the_whole_prompt(quantization):
    ids = random_ids(60)
    steps = load(GROUPED, "bfloat16", quantization=quantization)
    whole = steps.run((0, 0, ids))
    parts = [steps.run((1, start, ids[start:stop])) for start, stop in pairwise([0, 7, 8, 33, 52, *range(53, 61)])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(steps.run((2, 0, ids), rows=[3, 17, 59]), whole[[3, 17, 59]])


def test_decodes_past_a_split_of_attention_have_the_bits_of_the_whole_prompt():
    ids = random_ids(2 * SPLIT // 2 + 20)
    steps = load(UNTIED, "bfloat16")
    whole = steps.run((0, 0, ids))
    steps.run((1, 0, ids[:-4]))
    for position in range(len(ids) - 4, len(ids)):
        np.testing.assert_array_equal(steps.run((1, position, ids[position : position + 1]))[0], whole[position])


def test_rows_of_a_mixed_batch_have_the_bits_they_have_alone():
    a, b, c, d = (random_ids(count, seed) for seed, count in enumerate((41, 18, 50, 23)))
    steps = load(CONFIGS["biased"], "bfloat16")
    alone = [steps.run((sequence, 0, ids)) for sequence, ids in enumerate((a, b, c, d))]
    for sequence, ids in enumerate((a[:-1], b[:-1], c[:10])):  # d comes new
        steps.run((sequence, 0, ids))
    mixed = steps.run((0, 40, a[-1:]), (1, 17, b[-1:]), (2, 10, c[10:]), (3, 0, d))
    np.testing.assert_array_equal(mixed, np.concatenate([alone[0][-1:], alone[1][-1:], alone[2][10:], alone[3]]))


def test_rows_asked_for_have_the_bits_they_have_among_all_rows():
    ids, rows = random_ids(30), [3, 17, 29]
    steps = load()
    np.testing.assert_array_equal(steps.run((0, 0, ids), rows=rows), steps.run((1, 0, ids))[rows])


def test_rows_asked_for_slab_by_slab_have_the_bits_they_have_together():
    ids, rows = random_ids(30), [3, 17, 18, 29]
    steps = load()
    together = steps.run((0, 0, ids), rows=rows)
    slabs = [steps.project(len(slab), slab) for slab in (rows[2:], rows[:2], rows[:1])]
    np.testing.assert_array_equal(np.concatenate(slabs), together[[2, 3, 0, 1, 0]])


def test_a_step_without_logits_still_writes_the_cache():
    ids = random_ids(30)
    steps = load()
    whole = steps.run((0, 0, ids))
    assert steps.run((1, 0, ids[:20]), rows=[]).shape == (0, TIED.vocab_size)
    np.testing.assert_array_equal(steps.run((1, 20, ids[20:])), whole[20:])


def test_slots_never_written_do_not_matter_even_if_they_hold_nan():
    ids = random_ids(19)
    steps = load()
    clean = steps.run((0, 0, ids))
    for part in [part for layer in steps.cache.layers for part in (layer.k_cache, layer.v_cache)]:
        (ctypes.c_float * math.prod(part.shape)).from_address(part.data_ptr())[:] = [math.nan] * math.prod(part.shape)
    np.testing.assert_array_equal(steps.run((0, 0, ids)), clean)
