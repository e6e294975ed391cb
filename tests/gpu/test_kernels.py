"""Kernels on a GPU against their NumPy references, and the bits of a token whatever is computed beside it."""

from math import prod

import numpy as np
import pytest

from fastdeploy.kernels import attention
from fastdeploy.kernels.activation import silu_mul, silu_mul_reference
from fastdeploy.kernels.attention import AttentionBatch, attention_reference, paged_attention, split_keys
from fastdeploy.kernels.embedding import embedding, gather_rows
from fastdeploy.kernels.linear import LinearWeight, gated_linear, linear, linear_reference
from fastdeploy.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference
from fastdeploy.kernels.rope import (
    HeadLayout,
    HeadNorms,
    KVBlocks,
    cache_fields,
    rope_and_cache,
    rope_reference,
    rope_tables,
    to_int8_reference,
)
from fastdeploy.kernels.sampling import SamplingState, Steering, allocate_workspace, sample, sample_reference
from tests.gpu.conftest import close

ROUNDED = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-5}  # a result rounded to the type, by norms


def weight(data, bias=None):
    rows, width = data.view.shape
    return LinearWeight(data.view.reshape(rows, width, 1), rows, width, 1, bias)


# Linear layers

ROWS = [1, 7, 16, 17, 64, 65, 130, 300, 1000, 2100]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("features, width", [(96, 128), (1000, 576), (6144, 1024), (512, 8192), (129, 72)])
def test_linear_layers_of_any_size_match_the_reference(features, width, dtype, normal, blank):
    matrix, bias = normal(features, width, dtype=dtype), normal(features, dtype="float32")
    for rows in ROWS:
        x, out = normal(rows, width, dtype=dtype), blank((rows, features), dtype)
        linear(out.view, x.view, weight(matrix, bias.view))
        close(out.values, linear_reference(x.values, matrix.values, bias.values), ROUNDED[dtype])


@pytest.mark.parametrize("features, width", [(4096, 4096), (6144, 1024), (1024, 3072), (512, 8192), (16384, 192)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_row_has_the_same_bits_among_any_number_of_rows(features, width, dtype, normal, blank):
    """In float32, where nothing is rounded away: all kernels and all tiles add in the same order."""
    matrix, x = normal(features, width, dtype=dtype), normal(4096, width, dtype=dtype)
    whole = blank((4096, features), "float32")
    linear(whole.view, x.view, weight(matrix))
    expected = whole.bits
    for rows in (1, 5, 16, 17, 64, 100, 128, 256, 500, 1024):
        out = blank((rows, features), "float32")
        linear(out.view, x.view.rows(rows, 3), weight(matrix))
        np.testing.assert_array_equal(out.bits, expected[3 : 3 + rows], err_msg=f"{rows} rows")


@pytest.mark.parametrize("features, width", [(3072, 1024), (1536, 576), (200, 128), (14336, 256)])
def test_gated_layers_match_the_reference_and_keep_the_bits_of_a_row(features, width, normal, blank):
    matrix, bias = normal(2 * features, width, scale=0.1), normal(2 * features, dtype="float32")
    x, whole = normal(2100, width), blank((2100, features))
    if not gated_linear(whole.view, x.view, weight(matrix, bias.view)):
        pytest.skip("no gated kernel for this GPU")
    expected = silu_mul_reference(linear_reference(x.values, matrix.values, bias.values))
    close(whole.values, expected, ROUNDED["bfloat16"])
    for rows in ROWS:
        out = blank((rows, features))
        gated_linear(out.view, x.view.rows(rows), weight(matrix, bias.view))
        np.testing.assert_array_equal(out.bits, whole.bits[:rows], err_msg=f"{rows} rows")


# Attention


class Sequences:
    """A paged cache of random keys and values, NaN where no key is; attention over parts of its sequences."""

    def __init__(self, rng, put, blank, heads, lengths, block_size, dtype):
        self.heads, self.lengths, self.put, self.blank, self.block_size = heads, lengths, put, blank, block_size
        blocks = [-(-length // block_size) for length in lengths]
        self.tables = np.split(rng.permutation(sum(blocks)), np.cumsum(blocks)[:-1])
        fields = cache_fields(heads, sum(blocks), block_size, dtype)
        arrays = {}
        for name, (shape, part) in fields.items():
            values = rng.integers(-127, 128, shape) if part == "int8" else rng.standard_normal(shape)
            arrays[name] = np.abs(values) / 100 if name.endswith("scales") else values
        for table, length in zip(self.tables, lengths, strict=True):
            for name, array in arrays.items():
                if length % block_size and fields[name][1] != "int8":
                    array[table[-1], :, length % block_size :] = np.nan
        self.parts = {name: put(array, fields[name][1]) for name, array in arrays.items()}
        self.cache = KVBlocks(**{name: part.view for name, part in self.parts.items()})
        activations = "bfloat16" if dtype == "int8" else dtype
        self.qkv = [put(rng.standard_normal((length, heads.qkv_width)), activations) for length in lengths]

    def attend(self, sequences):
        """float32 bits [tokens, H * D] of each (index, first token, one past the last); single tokens come first."""
        decodes = [s for s in sequences if s[2] - s[1] == 1]
        counts = [stop - start for _, start, stop in sequences]
        tables = np.zeros((len(sequences), max(map(len, self.tables)) + 1))
        for row, (index, *_) in enumerate(sequences):
            tables[row, : len(self.tables[index])] = self.tables[index]
        bits = np.concatenate([self.qkv[index].bits[start:stop] for index, start, stop in sequences])
        qkv = self.put(np.zeros(bits.shape), self.qkv[0].dtype)
        qkv._device.write(qkv.view, bits)
        splits = max(-(-length // split_keys()) for length in self.lengths)
        integers = [np.cumsum([0, *counts]), [stop for *_, stop in sequences], tables]
        batch = AttentionBatch(
            len(decodes), len(sequences), max(counts), splits, *(self.put(each, "int32").view for each in integers)
        )
        width = self.heads.num_heads * self.heads.head_dim
        out = self.blank((sum(counts), width), "float32")
        workspace = self.blank((prod(attention.workspace_shape(len(sequences), self.heads, 9000)),), "float32")
        scale = self.heads.head_dim**-0.5
        paged_attention(out.view, qkv.view, self.cache, batch, self.heads, scale, workspace.view)
        return np.split(out.bits, np.cumsum(counts)[:-1])

    def expected(self, index, start, stop):
        keys, values = self.parts["k_cache"].values, self.parts["v_cache"].values
        if "k_scales" in self.parts:
            keys, values = (
                x * self.parts[name].values[..., None] for x, name in ((keys, "k_scales"), (values, "v_scales"))
            )
        heads = self.heads
        q = self.qkv[index].values[start:stop, : heads.num_heads * heads.head_dim]
        q = q.reshape(stop - start, heads.num_heads, heads.head_dim)
        caches = (keys.swapaxes(2, 3), values)
        return attention_reference(q, caches, self.tables[index], stop, heads.head_dim**-0.5).reshape(stop - start, -1)


@pytest.fixture
def sequences(rng, put, blank):
    return lambda *arguments: Sequences(rng, put, blank, *arguments)


LAYOUTS = [(32, 8, 128), (16, 2, 128), (9, 3, 64), (20, 4, 96), (8, 8, 80), (4, 1, 256)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_attention_of_a_mixed_batch_matches_the_reference(layout, block_size, dtype, sequences):
    case = sequences(HeadLayout(*layout), [1, 63, 300, 1500], block_size, dtype)
    parts = [(0, 0, 1), (1, 62, 63), (3, 1499, 1500), (2, 0, 300), (3, 1100, 1400)]
    tolerance = {"float32": 1e-5, "float16": 2e-3}.get(dtype, 1e-2)  # weights are rounded to the type
    for part, found in zip(parts, case.attend(parts), strict=True):
        close(found, case.expected(*part), tolerance)


@pytest.mark.parametrize("layout", [*LAYOUTS[:4], (40, 8, 128), (64, 2, 128)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_a_token_attends_with_the_same_bits_alone_in_a_batch_and_in_a_prompt(layout, dtype, sequences, monkeypatch):
    case = sequences(HeadLayout(*layout), [2500, 700], 64, dtype)
    whole = case.attend([(0, 0, 2500)])[0]
    chunks = np.concatenate([case.attend([(0, start, min(start + 700, 2500))])[0] for start in range(0, 2500, 700)])
    np.testing.assert_array_equal(chunks, whole)
    tokens = [0, 1, 62, 63, 64, 255, 256, 1023, 1024, 1025, 2047, 2048, 2499]
    for parallel in (True, False):
        monkeypatch.setattr(attention, "splits_in_parallel", lambda *_, parallel=parallel: parallel)
        found = case.attend([*((0, token, token + 1) for token in tokens), (1, 100, 700)])
        for token, row in zip(tokens, found, strict=False):
            np.testing.assert_array_equal(row[0], whole[token], err_msg=f"token {token}, in parallel {parallel}")


# What comes before and after attention


@pytest.mark.parametrize(
    "layout", [(32, 8, 128, False), (16, 2, 128, True), (9, 3, 64, False), (6, 2, 80, True)], ids=str
)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_heads_are_turned_and_written_to_their_slots(layout, normed, dtype, rng, put, normal):
    heads, tokens, blocks = HeadLayout(*layout), 77, 9
    qkv = normal(tokens, heads.qkv_width)
    before = qkv.values.reshape(tokens, -1, heads.head_dim)
    positions, slots = rng.integers(0, 500, tokens), rng.permutation(blocks * 16)[:tokens]
    slots[::7] = -1
    tables = [put(table, "float32") for table in rope_tables(heads.head_dim, 512, 1e4)]
    fields = cache_fields(heads, blocks, 16, dtype)
    parts = {name: put(np.full(shape, 5), part) for name, (shape, part) in fields.items()}
    gain = put(rng.uniform(0.5, 2, heads.head_dim), "float32")
    norms = HeadNorms(gain.view, gain.view, 1e-6) if normed else None
    cache = KVBlocks(**{name: part.view for name, part in parts.items()})
    where = (put(positions, "int32").view, put(slots, "int64").view, *(table.view for table in tables))
    rope_and_cache(qkv.view, *where, cache, heads, norms)
    num, kv = heads.num_heads, heads.num_kv_heads
    q, k, v = np.split(before, [num, num + kv], axis=1)
    if normed:
        q, k = (rms_norm_reference(x, gain.values, 1e-6) for x in (q, k))
    q, k = (rope_reference(x, positions, 1e4, heads.interleaved) for x in (q, k))
    close(qkv.values.reshape(tokens, -1, heads.head_dim)[:, :num], q, ROUNDED["bfloat16"])
    for name, rows in (("k", k), ("v", v)):
        stored = parts[f"{name}_cache"].values
        for token in np.flatnonzero(slots >= 0):
            block, offset = divmod(int(slots[token]), 16)
            found = stored[block, :, offset]
            if dtype == "int8":
                expected, scales = to_int8_reference(rows[token])
                close(found * parts[f"{name}_scales"].values[block, :, offset, None], rows[token], 2e-2)
                assert np.abs(found - expected).max() <= 1 and scales.shape == (kv,)
            else:
                close(found, rows[token], ROUNDED["bfloat16"])
        unused = np.setdiff1d(np.arange(blocks * 16), slots)
        assert (stored.swapaxes(1, 2).reshape(blocks * 16, -1)[unused] == 5).all()


@pytest.mark.parametrize("width", [64, 576, 1000, 4096, 10000])
def test_norms_and_activations_match_their_references(width, put, normal, blank):
    x, delta, gain = normal(33, width), normal(33, width), normal(width, dtype="float32")
    out = blank((33, width))
    rms_norm(out.view, x.view, gain.view, 1e-5)
    close(out.values, rms_norm_reference(x.values, gain.values, 1e-5), ROUNDED["bfloat16"])
    total = x.values + delta.values
    add_rms_norm(out.view, x.view, delta.view, gain.view, 1e-5)
    close(x.values, total, ROUNDED["bfloat16"])
    close(out.values, rms_norm_reference(total, gain.values, 1e-5), ROUNDED["bfloat16"])
    both = normal(33, 2 * width)
    silu_mul(out.view, both.view)
    close(out.values, silu_mul_reference(both.values), ROUNDED["bfloat16"])


def test_rows_are_gathered(rng, put, normal, blank):
    table, ids = normal(500, 576), put(rng.integers(0, 500, 40), "int32")
    out = blank((40, 576))
    embedding(out.view, ids.view, weight(table))
    np.testing.assert_array_equal(out.bits, table.bits[ids.bits])
    gather_rows(out.view, table.view, ids.view)
    np.testing.assert_array_equal(out.bits, table.bits[ids.bits])


# Sampling


def steering_rows(rng):
    settings = [(k, p, m) for k in (0, 1, 2, 50, 400) for p in (1.0, 0.9, 0.3, 0.0) for m in (0.0, 0.05)]
    return [
        Steering(float(rng.choice([0.0, 0.3, 1.0])) if k == 2 else 1.0, p, m, top_k=k, seed=int(rng.integers(1 << 50)))
        for k, p, m in settings
    ]


@pytest.mark.parametrize("vocabulary, deviation", [(128256, 3.0), (151936, 1.0), (5003, 2.0)])
def test_the_tokens_drawn_are_those_of_the_reference(vocabulary, deviation, rng, put, blank, device):
    """By the short way and by the long one: sharp distributions and flat ones, ties among them."""
    rows = steering_rows(rng)
    logits = (rng.standard_normal((len(rows), vocabulary)) * deviation).astype(np.float32)
    logits[::3] = np.round(logits[::3] * 4) / 4
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    floats = {name: put([getattr(row, name) for row in rows], "float32").view for name in names}
    whole = {name: put([getattr(row, name) for row in rows], "int32").view for name in ("top_k", "hold_until")}
    edits = {name: put(np.zeros((len(rows), 1)), "int32").view for name in ("edit_ids", "edit_seen")}
    state = SamplingState(
        **floats, **whole, **edits, seed=put([row.seed for row in rows], "int64").view,
        num_edits=put(np.zeros(len(rows)), "int32").view, edit_bias=put(np.zeros((len(rows), 1)), "float32").view,
    )  # fmt: skip
    workspace = allocate_workspace(device.empty, len(rows), vocabulary, 1)
    there, out = put(logits, "float32"), blank((len(rows),), "int32")
    slots, forced = put(np.arange(len(rows)), "int32").view, put(np.full(len(rows), -1), "int32").view
    for position in range(3):
        at = put(np.full(len(rows), position), "int32").view
        sample(out.view, there.view, slots, at, forced, state, workspace)
        expected = [sample_reference(row, steering, position) for row, steering in zip(logits, rows, strict=True)]
        # The device's logarithms are not NumPy's: a race of thousands may be that close, but rarely.
        assert (out.bits == expected).mean() >= 0.95
