from types import SimpleNamespace

import numpy as np
import pytest

from fastdeploy.kernels import attention
from fastdeploy.kernels.attention import SPLIT, AttentionBatch, attention_reference, paged_attention, workspace_shape
from fastdeploy.kernels.attention_int8 import int8_attention_reference
from fastdeploy.kernels.launch import view
from fastdeploy.kernels.quantised import QuantisedRows, quantise_reference, rows_fields
from fastdeploy.kernels.rope import CACHE_DTYPES, HeadLayout, KVBlocks, cache_fields

HEADS = HeadLayout(9, 3, 64)
CHUNKED = [(64, 16, "float32"), (64, 64, "float32"), (96, 128, "float32"), (64, 64, "int8"), (80, 16, "int8")]


@pytest.fixture
def attend(rng, normal, store, blank):
    """A cache with sequences of random keys in it, and `run(sequences)` that attends with some of their tokens.

    Sequences are (index, first token, one past the last token); those of one token are decodes and come first. Queries
    belong to tokens: the same token has the same query in every run. Slots beyond a context hold NaN, or, in an int8
    cache, a scale that is NaN.
    """

    def build(heads, lengths, block_size=16, dtype="float32"):
        blocks = [-(-length // block_size) for length in lengths]
        tables = np.split(rng.permutation(sum(blocks)), np.cumsum(blocks)[:-1])
        parts = {
            name: store(random_part(rng, shape, part_dtype), part_dtype)
            for name, (shape, part_dtype) in cache_fields(heads, sum(blocks), block_size, dtype).items()
        }
        cache = KVBlocks(**{name: part.view for name, part in parts.items()})
        if dtype == "int8":
            reference, caches = int8_attention_reference, tuple(part.values for part in parts.values())
        else:
            reference, caches = attention_reference, (parts["k_cache"].values, parts["v_cache"].values)
        for table, length in zip(tables, lengths, strict=True):
            for part in parts.values():
                if length % block_size and part.dtype != "int8":
                    tokens = part.memory if part is parts.get("v_cache") else np.moveaxis(part.memory, -1, 2)
                    tokens[table[-1], :, length % block_size :] = store(np.nan, part.dtype).memory
        qkvs = [normal(length, heads.qkv_width) for length in lengths]
        scale = heads.head_dim**-0.5

        def run(sequences, num_splits=None, integers=False):
            """What attention gives for each sequence; `integers`: that as `QuantisedRows`, and the floats."""
            decodes = [s for s in sequences if s[2] - s[1] == 1]
            counts = [stop - start for _, start, stop in sequences]
            contexts = [stop for *_, stop in sequences]
            padded = np.zeros((len(sequences), max(blocks) + 1), np.int32)
            for row, (index, *_) in enumerate(sequences):
                padded[row, : blocks[index]] = tables[index]
            qkv = store(np.concatenate([qkvs[index].memory[start:stop] for index, start, stop in sequences]))
            splits = num_splits or max([1, *(-(-stop // SPLIT) for *_, stop in decodes)])
            batch = AttentionBatch(
                num_decodes=len(decodes), num_seqs=len(sequences), max_query_len=max(counts), num_splits=splits,
                cu_seqlens=store(np.cumsum([0, *counts]), "int32").view,
                context_lens=store(contexts, "int32").view, block_tables=store(padded, "int32").view,
            )  # fmt: skip
            out = blank((sum(counts), heads.num_heads * heads.head_dim))
            workspace = blank(workspace_shape(len(sequences), heads, splits * SPLIT))
            paged_attention(out.view, qkv.view, cache, batch, heads, scale, workspace.view)
            if integers:
                fields = rows_fields(*out.memory.shape).items()
                stored = {name: blank(shape, dtype) for name, (shape, dtype) in fields}
                rows = QuantisedRows(**{name: part.view for name, part in stored.items()})
                paged_attention(rows, qkv.view, cache, batch, heads, scale, workspace.view)
                return {name: part.memory for name, part in stored.items()}, out.memory
            return np.split(out.memory, np.cumsum(counts)[:-1])

        def expected(index, start, stop):
            width = heads.num_heads * heads.head_dim
            q = qkvs[index].values[start:stop, :width].reshape(stop - start, heads.num_heads, heads.head_dim)
            return reference(q, caches, tables[index], stop, scale).reshape(stop - start, width)

        return SimpleNamespace(run=run, expected=expected, integers=dtype == "int8")

    return build


def random_part(rng, shape, dtype):
    """Keys, values or scales."""
    if dtype == "int8":
        return rng.integers(-127, 128, shape)
    return rng.uniform(0.001, 0.03, shape) if len(shape) == 3 else rng.standard_normal(shape)


@pytest.fixture(params=[True, False], ids=["splits in parallel", "splits in turn"])
def parallel(request, monkeypatch):
    monkeypatch.setattr(attention, "splits_in_parallel", lambda *_: request.param)


def check(case, sequences, tolerance=1e-5):
    """Of integers, one in 100 may have been rounded the other way, from floats that differ in their last bits."""
    for sequence, attended in zip(sequences, case.run(sequences), strict=True):
        errors = np.abs(attended - case.expected(*sequence))
        assert np.isfinite(errors).all() and (errors > tolerance).mean() <= (0.01 if case.integers else 0), sequence
        assert errors.max() <= (0.02 if case.integers else tolerance), sequence


DECODES = [(64, 16), (64, 64), (64, 256), (80, 32), (96, 64), (128, 128)]


@pytest.mark.parametrize(
    "head_dim, block_size, dtype",
    [*((*shape, "float32") for shape in DECODES), (64, 64, "int8"), (80, 32, "int8"), (64, 256, "int8")],
)
def test_decodes_match_reference(head_dim, block_size, dtype, attend, parallel):
    lengths = [1, 15, 16, 17, 255, 256, 257, 700]
    case = attend(HeadLayout(9, 3, head_dim), lengths, block_size, dtype)
    check(case, [(index, length - 1, length) for index, length in enumerate(lengths)])


@pytest.mark.parametrize("heads", [HeadLayout(9, 3, 64), HeadLayout(2, 2, 96), HeadLayout(4, 1, 128)])
def test_integers_for_the_layer_that_follows_are_the_floats_quantised(heads, attend, parallel):
    case = attend(heads, [300, 17, 70, 5], 64)
    stored, floats_ = case.run([(0, 299, 300), (1, 16, 17), (2, 10, 70), (3, 0, 5)], integers=True)
    integers, scales = quantise_reference(floats_)
    np.testing.assert_allclose(stored["scales"], scales, rtol=1e-6)
    different = stored["values"].astype(int) - integers
    assert np.abs(different).max() <= 1 and (different != 0).mean() < 1e-2
    np.testing.assert_array_equal(stored["sums"], stored["values"].astype(int).reshape(*scales.shape, 32).sum(2))


def test_heads_that_share_a_group_are_not_written_as_integers(attend):
    with pytest.raises(ValueError, match="heads of 80 can't be written as whole groups of 32 in 8 bits"):
        attend(HeadLayout(2, 2, 80), [5], 64).run([(0, 0, 5)], integers=True)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(1, 1), (4, 4), (14, 2), (20, 1)])
def test_decodes_of_any_group(num_heads, num_kv_heads, attend, parallel):
    case = attend(HeadLayout(num_heads, num_kv_heads, 64), [300, 31])
    check(case, [(0, 299, 300), (1, 30, 31)])


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_caches_of_every_type(dtype, attend):
    case = attend(HEADS, [300, 77], dtype=dtype)
    check(case, [(0, 299, 300), (1, 0, 77)])


@pytest.mark.parametrize("head_dim, block_size", [(64, 16), (64, 64), (64, 256), (80, 32), (128, 128)])
def test_prompts_match_reference(head_dim, block_size, attend):
    lengths = [1, 2, 5, 64, 300, 530]
    case = attend(HeadLayout(6, 2, head_dim), lengths, block_size)
    check(case, [(index, 0, length) for index, length in enumerate(lengths)])


@pytest.mark.parametrize("seed, dtype", [*((seed, "float32") for seed in range(6)), *((s, "int8") for s in range(4))])
def test_mixed_batches_match_reference(seed, dtype, attend):
    rng = np.random.default_rng(seed)
    group, kv_heads = rng.integers(1, 8), rng.integers(1, 4)
    heads = HeadLayout(int(group * kv_heads), int(kv_heads), int(rng.choice([32, 64, 80, 96])))
    lengths = rng.integers(2, 600, 7).tolist()
    case = attend(heads, lengths, int(rng.choice([16, 32, 64, 128])), dtype)
    starts = [length - 1 for length in lengths[:3]] + [int(rng.integers(0, length - 1)) for length in lengths[3:]]
    check(case, list(zip(range(7), starts, lengths, strict=True)))


@pytest.mark.parametrize("head_dim, block_size, dtype", CHUNKED)
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(head_dim, block_size, dtype, attend):
    case = attend(HeadLayout(9, 3, head_dim), [600, 40], block_size, dtype)
    (whole,) = case.run([(0, 0, 600)])
    for cuts in ([256], [1, 2, 3, 4, 100], [257, 258, 511], [599]):
        for start, stop in zip([0, *cuts], [*cuts, 600], strict=True):
            part = case.run([(0, start, stop)])[0]
            assert part.tobytes() == whole[start:stop].tobytes(), f"tokens {start} to {stop} of a prompt"
            mixed = case.run([(0, start, stop), (1, 0, 40)])[0]
            assert mixed.tobytes() == part.tobytes(), "beside another prompt"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_decode_has_the_same_bits_however_it_is_run(dtype, attend, monkeypatch):
    lengths = [1, 256, 257, 1000, 1024, 33]
    case = attend(HEADS, lengths, dtype=dtype)
    decodes = [(index, length - 1, length) for index, length in enumerate(lengths)]
    together = case.run(decodes)
    prompts = [case.run([(index, 0, length)])[0][-1:] for index, length in enumerate(lengths)]
    for choice in (True, False):
        monkeypatch.setattr(attention, "splits_in_parallel", lambda *_, choice=choice: choice)
        for decode, expected, last_of_prompt in zip(decodes, together, prompts, strict=True):
            alone = case.run([decode])[0]
            assert alone.tobytes() == expected.tobytes() == last_of_prompt.tobytes()
            assert case.run([decode], num_splits=7)[0].tobytes() == expected.tobytes(), "more splits than needed"


def test_padding_sequences_give_zeros(attend, store, blank, normal, parallel):
    lens, tables = store([0, 20], "int32"), store(np.zeros((2, 2)), "int32")
    batch = AttentionBatch(2, 2, 1, 2, store([0, 1, 2], "int32").view, lens.view, tables.view)
    out, workspace = blank((2, 9 * 64)), blank(workspace_shape(2, HEADS, 512))
    cache = KVBlocks(normal(2, 3, 64, 16).view, normal(2, 3, 16, 64).view)
    paged_attention(out.view, normal(2, HEADS.qkv_width).view, cache, batch, HEADS, 0.125, workspace.view)
    assert (out.memory[0] == 0).all()
    assert np.isfinite(out.memory[1]).all()


def test_blocks_beyond_31_bits(store, blank, normal):
    """A block that begins past 2^31 elements, in memory of which only that block is ever touched."""
    heads, block_size = HeadLayout(2, 1, 128), 256
    block = 2**31 // (128 * block_size) + 3
    k_cache = np.zeros((block + 1, 1, 128, block_size), np.float16)
    v_cache = np.zeros((block + 1, 1, block_size, 128), np.float16)
    v_cache[block, 0, 0] = np.arange(128)
    batch = AttentionBatch(
        1, 1, 1, 1, store([0, 1], "int32").view, store([1], "int32").view, store([[block]], "int32").view
    )
    out, cache = blank((1, 256)), KVBlocks(view(k_cache), view(v_cache))
    paged_attention(out.view, normal(1, 512).view, cache, batch, heads, 0.1, blank((1,)).view)
    np.testing.assert_array_equal(out.memory, [[*range(128), *range(128)]])


def test_no_sequences_is_nothing_to_do(store, blank, normal):
    batch = AttentionBatch(
        0, 0, 0, 1, store([0], "int32").view, store(np.zeros(0), "int32").view, store(np.zeros((0, 4)), "int32").view
    )
    cache = KVBlocks(normal(2, 3, 64, 16).view, normal(2, 3, 16, 64).view)
    nothing, qkv = blank((0, 9 * 64)), blank((0, HEADS.qkv_width))
    paged_attention(nothing.view, qkv.view, cache, batch, HEADS, 0.1, blank((1,)).view)


def test_bad_arguments_are_named(store, blank, normal, monkeypatch):
    monkeypatch.setattr(attention, "splits_in_parallel", lambda *_: True)
    batch = AttentionBatch(
        1, 1, 1, 4, store([0, 1], "int32").view, store([900], "int32").view, store(np.zeros((1, 64)), "int32").view
    )

    def run(block_size=16, workspace=10**6, kv_heads=3):
        cache = KVBlocks(normal(2, kv_heads, 64, block_size).view, normal(2, kv_heads, block_size, 64).view)
        out, qkv, space = blank((1, 9 * 64)), normal(1, HEADS.qkv_width), blank((workspace,))
        paged_attention(out.view, qkv.view, cache, batch, HEADS, 0.1, space.view)

    with pytest.raises(ValueError, match="block_size is 24; attention takes powers of two from 16 to 256"):
        run(block_size=24)
    with pytest.raises(ValueError, match="the workspace has 100 elements; 4 splits need 2376"):
        run(workspace=100)
    with pytest.raises(ValueError, match=r"k_cache has shape \(2, 4, 64, 16\), expected \(2, 3, 64, 16\)"):
        run(kv_heads=4)
