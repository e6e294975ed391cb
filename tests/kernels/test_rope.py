import numpy as np
import pytest

from fastdeploy.kernels.launch import view
from fastdeploy.kernels.norm import rms_norm_reference
from fastdeploy.kernels.rope import (
    HeadLayout,
    HeadNorms,
    KVBlocks,
    cache_fields,
    cache_write_reference,
    rope_and_cache,
    rope_reference,
    rope_tables,
    to_int8_reference,
)

THETA = 10000.0


@pytest.fixture
def step(rng, store, normal):
    """step(heads, tokens, block_size, cache dtype): the arguments of rope_and_cache and the expected results."""

    def build(heads, tokens, block_size, dtype="float32"):
        blocks = tokens // block_size + 3
        positions = rng.integers(0, 500, tokens)
        slots = rng.permutation(blocks * block_size)[:tokens]
        slots[rng.random(tokens) < 0.2] = -1
        layouts = [(heads.head_dim, block_size), (block_size, heads.head_dim)]
        caches = [normal(blocks, heads.num_kv_heads, *layout, dtype=dtype) for layout in layouts]
        qkv = normal(tokens, heads.qkv_width)
        tables = [store(table) for table in rope_tables(heads.head_dim, 500, THETA)]
        arrays = [qkv, store(positions, "int32"), store(slots, "int64"), *tables, *caches]
        return arrays, positions, slots

    return build


def run(arrays, heads, norms=None):
    *inputs, k_cache, v_cache = (array.view for array in arrays)
    rope_and_cache(*inputs, KVBlocks(k_cache, v_cache), heads, norms)


def expected_step(arrays, positions, slots, heads):
    """float64 results: turned q rows, the two caches."""
    qkv = arrays[0].values.reshape(len(positions), -1, heads.head_dim)
    q, k, v = np.split(qkv, [heads.num_heads, heads.num_heads + heads.num_kv_heads], axis=1)
    caches = tuple(cache.values.copy() for cache in arrays[-2:])
    turned = [rope_reference(x, positions, THETA, heads.interleaved) for x in (q, k)]
    cache_write_reference(caches, turned[1], v, slots)
    return turned[0], k, v, caches


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "num_heads, num_kv_heads, head_dim, block_size",
    [(9, 3, 64, 64), (9, 3, 64, 16), (4, 4, 80, 64), (8, 1, 96, 32), (7, 1, 128, 256), (2, 2, 2, 16)],
)
def test_rope_and_cache_match_reference(num_heads, num_kv_heads, head_dim, block_size, interleaved, step):
    heads = HeadLayout(num_heads, num_kv_heads, head_dim, interleaved)
    arrays, positions, slots = step(heads, 13, block_size)
    q, k, v, caches = expected_step(arrays, positions, slots, heads)
    run(arrays, heads)
    after = arrays[0].values.reshape(13, -1, head_dim)
    np.testing.assert_allclose(after[:, :num_heads], q, atol=1e-5)
    np.testing.assert_array_equal(after[:, num_heads:], np.concatenate([k, v], axis=1))
    for cache, expected in zip(arrays[-2:], caches, strict=True):
        np.testing.assert_allclose(cache.values, expected, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(9, 3, 64), (8, 1, 96), (3, 3, 26)])
def test_heads_are_normalised_before_they_are_turned(num_heads, num_kv_heads, head_dim, interleaved, step, normal):
    heads = HeadLayout(num_heads, num_kv_heads, head_dim, interleaved)
    arrays, positions, slots = step(heads, 13, 16)
    query, key = normal(head_dim), normal(head_dim)
    raw = arrays[0].values.reshape(13, -1, head_dim)
    q, k, v = np.split(raw, [num_heads, num_heads + num_kv_heads], axis=1)
    normed = [rms_norm_reference(x, weight.values, 1e-2) for x, weight in ((q, query), (k, key))]
    q, k = (rope_reference(x, positions, THETA, interleaved) for x in normed)
    caches = tuple(cache.values.copy() for cache in arrays[-2:])
    cache_write_reference(caches, k, v, slots)
    run(arrays, heads, HeadNorms(query.view, key.view, 1e-2))
    np.testing.assert_allclose(arrays[0].values.reshape(13, -1, head_dim)[:, :num_heads], q, atol=1e-5)
    for cache, expected in zip(arrays[-2:], caches, strict=True):
        np.testing.assert_allclose(cache.values, expected, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_caches_of_half_precision(dtype, tolerance, step):
    heads = HeadLayout(9, 3, 64)
    arrays, positions, slots = step(heads, 20, 16, dtype)
    *_, caches = expected_step(arrays, positions, slots, heads)
    run(arrays, heads)
    for cache, expected in zip(arrays[-2:], caches, strict=True):
        np.testing.assert_allclose(cache.values, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def written(step, blank):
    """written(heads, block_size, change): what a step of 20 tokens writes to an int8 cache, by name; int8 values are
    -128 and scales NaN before. Then the heads that it was given, [20, KVH, D] of keys and of values, and the slots."""

    def build(heads, block_size, change=lambda v: None):
        arrays, positions, slots = step(heads, 20, block_size)
        change(arrays[0].memory.reshape(20, -1, heads.head_dim)[:, -heads.num_kv_heads :])
        _, k, v, _ = expected_step(arrays, positions, slots, heads)
        fields = cache_fields(heads, 20 // block_size + 3, block_size, "int8")
        parts = {name: blank(shape, dtype) for name, (shape, dtype) in fields.items()}
        rope_and_cache(
            *(array.view for array in arrays[:-2]), KVBlocks(**{name: part.view for name, part in parts.items()}), heads
        )
        turned = rope_reference(k, positions, THETA, heads.interleaved)
        stored = {name: part.memory for name, part in parts.items()}
        stored |= {name: without_fours(part) for name, part in stored.items() if part.ndim == 5}
        return stored, (turned, v), slots

    return build


def without_fours(cache):
    """[blocks, KVH, M / 4, N, 4] as [blocks, KVH, M, N]."""
    return cache.swapaxes(3, 4).reshape(*cache.shape[:2], -1, cache.shape[3])


def tokens_of(cache, slots):
    """int8 heads [T, KVH, D] and scales [T, KVH], of keys and of values, of the tokens with a slot."""
    block_size = cache["k_scales"].shape[2]
    block, offset = np.divmod(slots[slots >= 0], block_size)
    keys = cache["k_cache"][block, :, :, offset], cache["k_scales"][block, :, offset]
    return keys, (cache["v_cache"][block, :, offset], cache["v_scales"][block, :, offset])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "num_heads, num_kv_heads, head_dim, block_size",
    [(9, 3, 64, 64), (4, 4, 80, 16), (7, 1, 128, 256), (2, 2, 2, 16)],
)
def test_int8_caches_hold_the_nearest_of_255_steps(num_heads, num_kv_heads, head_dim, block_size, interleaved, written):
    cache, heads, slots = written(HeadLayout(num_heads, num_kv_heads, head_dim, interleaved), block_size)
    for (found, scales), given in zip(tokens_of(cache, slots), heads, strict=True):
        values, expected_scales = to_int8_reference(given[slots >= 0])
        np.testing.assert_allclose(scales, expected_scales, rtol=1e-5)
        assert (found != values).mean() < 2e-3  # halves that float32 rounds the other way
        steps = expected_scales[..., None]
        assert (np.abs(found * steps - given[slots >= 0]) <= 0.5001 * steps).all()
    kept = (slots >= 0).sum() * num_kv_heads
    for name in ("k_scales", "v_scales"):
        assert np.isfinite(cache[name]).sum() == kept, "one scale for each token kept, nothing else"


def test_int8_values_of_zero_and_values_that_vanish_are_zeros(written):
    def change(v):
        v[0], v[1] = 0, 1e-35

    cache, _, slots = written(HeadLayout(4, 2, 64), 16, change)
    slots = np.where(np.arange(20) < 2, slots, -1)
    values, scales = tokens_of(cache, slots)[1]
    assert (values == 0).all() and (scales < 1e-30).all()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_an_int8_head_that_holds_no_number_has_the_scale_nan(number, written):
    def change(v):
        v[:, 0, 17] = number

    cache, _, slots = written(HeadLayout(4, 2, 64), 16, change)
    (_, key_scales), (_, value_scales) = tokens_of(cache, slots)
    assert np.isfinite(key_scales).all()
    assert np.isnan(value_scales[:, 0]).all() and np.isfinite(value_scales[:, 1]).all()


def test_caches_are_checked(step):
    heads = HeadLayout(4, 2, 64)
    arrays, *_ = step(heads, 3, 16, "float32")
    inputs, k_cache, v_cache = [array.view for array in arrays[:-2]], arrays[-2].view, arrays[-1].view
    with pytest.raises(ValueError, match="a cache of float32 has no use for k_scales"):
        rope_and_cache(*inputs, KVBlocks(k_cache, v_cache, k_cache, v_cache), heads)
    int8 = [view(np.zeros(part.shape, np.int8)) for part in (k_cache, v_cache)]
    with pytest.raises(ValueError, match="a cache of int8 needs k_scales"):
        rope_and_cache(*inputs, KVBlocks(*int8), heads)
    with pytest.raises(TypeError, match="v_cache is int8, expected float32"):
        rope_and_cache(*inputs, KVBlocks(k_cache, int8[1]), heads)


def test_a_token_has_the_same_bits_alone_and_in_a_batch(step):
    heads = HeadLayout(9, 3, 64)
    arrays, *_ = step(heads, 11, 16)
    qkv, caches = arrays[0].memory.copy(), [cache.memory.copy() for cache in arrays[-2:]]
    run(arrays, heads)
    for token in range(11):
        one = slice(token, token + 1)
        inputs = (arrays[1].memory[one], arrays[2].memory[one], arrays[3].view, arrays[4].view)
        rope_and_cache(qkv[one], *inputs, KVBlocks(*map(view, caches)), heads)
    assert qkv.tobytes() == arrays[0].bits
    assert [cache.tobytes() for cache in caches] == [cache.bits for cache in arrays[-2:]]


def test_slots_beyond_31_bits(store, normal, blank):
    """A block that begins past 2^31 elements, in memory of which only that block is ever touched."""
    heads, block_size = HeadLayout(2, 1, 128), 256
    block = 2**31 // (128 * block_size) + 3
    k_cache = np.zeros((block + 1, 1, 128, block_size), np.float16)
    v_cache = np.zeros((block + 1, 1, block_size, 128), np.float16)
    qkv, cache = normal(1, heads.qkv_width), KVBlocks(view(k_cache), view(v_cache))
    cos, sin = (store(table).view for table in rope_tables(128, 4, THETA))
    slots = store([block * block_size + 7], "int64")
    rope_and_cache(qkv.view, store([0], "int32").view, slots.view, cos, sin, cache, heads)
    np.testing.assert_allclose(k_cache[block, 0, :, 7], qkv.memory[0, 256:384], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(v_cache[block, 0, 7], qkv.memory[0, 384:], rtol=1e-3, atol=1e-3)


def test_no_tokens_is_nothing_to_do(step):
    heads = HeadLayout(9, 3, 64)
    arrays, *_ = step(heads, 0, 16)
    run(arrays, heads)


def test_tables_at_far_positions_are_exact_to_float32():
    cos, sin = rope_tables(64, 100_001, 1e5)
    angle = np.longdouble(100_000) * np.longdouble(1e5) ** (-np.arange(32, dtype=np.longdouble) / 32)
    np.testing.assert_allclose(cos[-1], np.cos(angle).astype(np.float64), atol=1e-7)
    np.testing.assert_allclose(sin[-1], np.sin(angle).astype(np.float64), atol=1e-7)


def test_linear_scaling_stretches_positions():
    plain, stretched = rope_tables(64, 100, THETA), rope_tables(64, 400, THETA, {"type": "linear", "factor": 4.0})
    np.testing.assert_allclose(stretched[0][::4], plain[0], atol=1e-6)


def test_divisors_divide_each_frequency():
    divisors = np.linspace(1.0, 8.0, 32)
    cos, sin = rope_tables(64, 50, THETA, {"rope_type": "divisors", "divisors": tuple(divisors)})
    angles = np.outer(np.arange(50), THETA ** (-np.arange(32) / 32) / divisors)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


def test_llama3_scaling_keeps_fast_and_stretches_slow_frequencies():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    plain, scaled = (rope_tables(128, 9, 5e5, choice)[1].astype(np.float64) for choice in (None, scaling))
    np.testing.assert_allclose(scaled[1, 0], plain[1, 0], rtol=1e-6)
    np.testing.assert_allclose(scaled[8, -1], plain[1, -1], rtol=1e-6)
    ratio = np.arcsin(plain[1]) / np.arcsin(scaled[1])
    assert ((ratio > 1 - 1e-6) & (ratio < 8 + 1e-4)).all()
    assert (np.diff(ratio) > -1e-4).all()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def test_yarn_keeps_fast_stretches_slow_frequencies_and_lengthens_the_vectors():
    plain, (cos, sin) = (np.array(rope_tables(128, 9, 1e6, scaling), np.float64) for scaling in (None, YARN))
    length = 1 + 0.1 * np.log(4)
    np.testing.assert_allclose(np.hypot(cos, sin), length, rtol=1e-6)
    np.testing.assert_allclose(sin[1, 0], length * plain[1, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(sin[8, -1], length * plain[1, 2, -1], rtol=1e-6)
    ratio = np.arctan2(plain[1], plain[0])[1] / np.arctan2(sin, cos)[1]
    assert ((ratio > 1 - 1e-5) & (ratio < 4 + 1e-4)).all() and (np.diff(ratio) > -1e-5).all()
    blended = np.flatnonzero((ratio > 1.001) & (ratio < 3.999))  # pairs that turn 32 times to once in 4096 positions
    assert (blended[0], blended[-1]) == (14, 30)


@pytest.mark.parametrize(
    "more, length",
    [
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (1 + 0.1 * np.log(4)) / (1 + 0.05 * np.log(4))),
    ],
)
def test_yarn_lengthens_as_it_is_told(more, length):
    np.testing.assert_allclose(np.hypot(*rope_tables(64, 9, 1e4, YARN | more)), length, rtol=1e-6)


def test_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="'longrope' is not supported; known: default, linear, llama3, yarn, divisors"):
        rope_tables(64, 16, THETA, {"rope_type": "longrope", "factor": 2.0})


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="9 query heads cannot share 2 KV heads evenly"):
        HeadLayout(9, 2, 64)
    with pytest.raises(ValueError, match="head_dim is 65"):
        HeadLayout(8, 2, 65)
