"""The kernels that only GPUs launch, run on the CPU backend: their launchers are told that they launch for a GPU.

What is left for tests/gpu is what tensor cores make of it.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from fastdeploy.kernels import activation, attention, embedding, launch, linear, norm, rope
from fastdeploy.kernels.activation import silu_mul_reference
from fastdeploy.kernels.attention import AttentionBatch, attention_reference, paged_attention, workspace_shape
from fastdeploy.kernels.launch import Target, view
from fastdeploy.kernels.linear import LinearWeight, gated_linear, linear_reference
from fastdeploy.kernels.rope import HeadLayout, HeadNorms, KVBlocks, cache_fields, rope_and_cache

AMPERE, HOPPER = Target("cuda", 80, 4), Target("cuda", 90, 4)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(target): launchers choose as for this target; what they launch runs here, one kernel after the other."""

    def choose(target):
        monkeypatch.setattr(launch, "_may_be_early", False)
        for module in (activation, attention, embedding, linear, norm, rope):
            monkeypatch.setattr(module, "target", lambda: target)
        monkeypatch.setattr(attention, "launch", without_options)
        monkeypatch.setattr(linear, "launch", without_options)
        monkeypatch.setattr(rope, "launch", without_options)

    return choose


def without_options(kernel, grid, *arguments, **constexprs):
    """`launch`, without what a CPU has no use for."""
    options = ("num_warps", "num_stages", "launch_pdl")
    launch.launch(kernel, grid, *arguments, **{key: value for key, value in constexprs.items() if key not in options})


def weight(matrix, bias=None):
    rows, width = matrix.view.shape
    return LinearWeight(matrix.view.reshape(rows, width, 1), rows, width, 1, bias)


SHAPES = [(96, 128), (200, 64), (1000, 576), (512, 192)]


@pytest.mark.parametrize("features, width", SHAPES)
@pytest.mark.parametrize("rows", [1, 16, 17, 70, 200])
def test_linear_layers_of_hopper_match_the_reference(features, width, rows, gpu, normal, blank):
    gpu(HOPPER)
    matrix, bias = normal(features, width, dtype="float16"), normal(features)
    x, out = normal(rows, width, dtype="float16"), blank((rows, features))
    linear.linear(out.view, x.view, weight(matrix, bias.view))
    expected = linear_reference(x.values, matrix.values, bias.values)
    np.testing.assert_allclose(out.values, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("features, width", SHAPES)
@pytest.mark.parametrize("rows", [1, 17, 200])
def test_gated_layers_of_hopper_match_the_reference(features, width, rows, gpu, normal, blank):
    gpu(HOPPER)
    matrix, bias = normal(2 * features, width, dtype="float16"), normal(2 * features)
    x, out = normal(rows, width, dtype="float16"), blank((rows, features))
    assert gated_linear(out.view, x.view, weight(matrix, bias.view))
    expected = silu_mul_reference(linear_reference(x.values, matrix.values, bias.values))
    np.testing.assert_allclose(out.values, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "rows, features, width", [(1, 4096, 4096), (64, 6144, 4096), (300, 1024, 2048), (9000, 77, 64)]
)
def test_hopper_gets_about_a_tile_for_each_multiprocessor_or_the_smallest_tiles(rows, features, width):
    rule = linear.hopper_tiles(Target("cuda", 90, 132), rows, features, width)
    tiles = -(-rows // rule["BLOCK_M"]) * -(-features // rule["BLOCK_N"])
    assert tiles >= 0.7 * 132 or rule["BLOCK_N"] == 32 or rows <= 16


@pytest.fixture
def attend(rng, store, blank, normal):
    """attend(heads, length, dtype): a paged sequence, keys by token; `run(parts)` attends with the tokens first to stop
    of each part, float64 [tokens, H * D]; `expected(first, stop)`."""

    def build(heads, length, dtype, block_size=64):
        blocks = -(-length // block_size)
        table = rng.permutation(blocks)
        fields = cache_fields(heads, blocks, block_size, dtype, keys_by_token=True)
        arrays = {name: rng.standard_normal(shape) for name, (shape, _) in fields.items()}
        for array in arrays.values():
            if length % block_size:
                array[table[-1], :, length % block_size :] = np.nan
        parts = {name: store(array, dtype) for name, array in arrays.items()}
        cache = KVBlocks(**{name: part.view for name, part in parts.items()}, keys_by_token=True)
        qkv = normal(length, heads.qkv_width, dtype=dtype)
        scale = heads.head_dim**-0.5

        def run(ranges):
            counts = [stop - first for first, stop in ranges]
            decodes = sum(count == 1 for count in counts)
            tables = np.tile(table, (len(ranges), 1))
            integers = (np.cumsum([0, *counts]), [stop for _, stop in ranges], tables)
            splits = -(-length // attention.split_keys())
            batch = AttentionBatch(
                decodes, len(ranges), max(counts), splits, *(store(each, "int32").view for each in integers)
            )
            chosen = store(np.zeros((sum(counts), heads.qkv_width)), dtype)
            chosen.memory[:] = np.concatenate([qkv.memory[first:stop] for first, stop in ranges])
            out = blank((sum(counts), heads.num_heads * heads.head_dim))
            workspace = blank(workspace_shape(len(ranges), heads, length))
            paged_attention(out.view, chosen.view, cache, batch, heads, scale, workspace.view)
            return np.split(out.values, np.cumsum(counts)[:-1])

        def expected(first, stop):
            q = qkv.values[first:stop, : heads.num_heads * heads.head_dim]
            q = q.reshape(stop - first, heads.num_heads, heads.head_dim)
            caches = parts["k_cache"].values.swapaxes(2, 3), parts["v_cache"].values
            return attention_reference(q, caches, table, stop, scale).reshape(stop - first, -1)

        return SimpleNamespace(run=run, expected=expected)

    return build


@pytest.mark.parametrize("target, dtype", [(AMPERE, "float32"), (HOPPER, "float16")], ids=["one loop", "Hopper"])
@pytest.mark.parametrize("layout", [(4, 2, 64), (6, 2, 80), (8, 1, 128)], ids=str)
@pytest.mark.parametrize("parallel", [True, False], ids=["splits in parallel", "splits in turn"])
def test_attention_as_gpus_do_it_matches_the_reference(target, dtype, layout, parallel, gpu, attend, monkeypatch):
    """Keys by token; one loop over all splits, or the kernel for prompts; totals as products."""
    gpu(target)
    monkeypatch.setattr(attention, "splits_in_parallel", lambda *_: parallel)
    monkeypatch.setattr(attention, "GPU_SPLIT", 128)
    case = attend(HeadLayout(*layout), 333, dtype)
    ranges = [(0, 1), (127, 128), (128, 129), (332, 333), (0, 333), (100, 290)]
    tolerance = 1e-5 if dtype == "float32" else 3e-3  # weights are rounded to the type
    for part, found in zip(ranges, case.run(ranges), strict=True):
        np.testing.assert_allclose(found, case.expected(*part), rtol=0, atol=tolerance, err_msg=str(part))


@pytest.mark.parametrize("interleaved, dtype", [(False, "float32"), (True, "float32"), (True, "int8"), (False, "int8")])
def test_rows_of_many_heads_write_what_single_ones_do(interleaved, dtype, gpu, rng, store, normal, blank):
    """Keys by token, and heads loaded in one piece where pairs lie next to each other: the same numbers, elsewhere."""
    heads, tokens, block_size = HeadLayout(6, 2, 48, interleaved), 21, 16
    given = normal(tokens, heads.qkv_width).memory
    slots = rng.permutation(tokens + 11)[:tokens]
    slots[::5] = -1
    table = [store(rng.standard_normal((50, 24))).view for _ in range(2)]
    gain = normal(48)
    where = (store(rng.integers(0, 50, tokens), "int32").view, store(slots, "int64").view, *table)

    def written(by_token):
        fields = cache_fields(heads, 2, block_size, dtype, keys_by_token=by_token)
        parts = {name: store(np.zeros(shape), part) for name, (shape, part) in fields.items()}
        qkv = store(given.copy())
        cache = KVBlocks(**{name: part.view for name, part in parts.items()}, keys_by_token=by_token)
        rope_and_cache(qkv.view, *where, cache, heads, HeadNorms(gain.view, gain.view, 1e-6))
        found = {name: part.memory for name, part in parts.items()}
        if cache.in_quads:  # [blocks, KVH, M / 4, N, 4]
            found |= {
                f"{x}_cache": found[f"{x}_cache"].swapaxes(3, 4).reshape(2, 2, -1, n) for x, n in (("k", 16), ("v", 48))
            }
        keys = found.pop("k_cache")
        return qkv.memory, keys if by_token else keys.swapaxes(2, 3), *found.values()

    single = written(by_token=False)
    gpu(AMPERE)
    for found, expected in zip(written(by_token=True), single, strict=True):
        if dtype == "int8" and found.dtype == np.int8:
            assert np.abs(found.astype(int) - expected).max() <= 1  # halves, after other roundings
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert view(gain.memory).dtype == "float32"
