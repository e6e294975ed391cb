import numpy as np
import pytest

from fastdeploy.kernels.embedding import (
    embedding,
    embedding_reference,
    gather_columns,
    gather_rows,
    resolve_ids,
    resolve_ids_reference,
)
from fastdeploy.kernels.linear import LinearWeight, pack, packed_shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("panel", [1, 32])
@pytest.mark.parametrize("vocabulary, width", [(1, 1), (100, 576), (67, 80), (33, 1030)])
def test_embedding_matches_reference(vocabulary, width, panel, dtype, rng, normal, store, blank):
    table = normal(vocabulary, width, dtype=dtype)
    data = blank(packed_shape(vocabulary, width, panel), dtype)
    pack(data.view, table.view)
    ids, out = store(rng.integers(0, vocabulary, 9), "int32"), blank((9, width))
    embedding(out.view, ids.view, LinearWeight(data.view, vocabulary, width, panel))
    np.testing.assert_array_equal(out.values, embedding_reference(ids.memory, table.values))


def test_gather_rows(normal, store, blank):
    x, rows, out = normal(10, 576), store([9, 0, 3, 3], "int32"), blank((4, 576))
    gather_rows(out.view, x.view, rows.view)
    np.testing.assert_array_equal(out.memory, x.memory[[9, 0, 3, 3]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 576, 1030])
def test_gather_columns(width, dtype, rng, normal, store, blank):
    order = rng.permutation(width)
    x, out = normal(5, width, dtype=dtype), blank((5, width), dtype)
    gather_columns(out.view, x.view, store(order, "int32").view)
    np.testing.assert_array_equal(out.memory, x.memory[:, order])


def test_offsets_beyond_31_bits(store, blank):
    """A row that begins past 2^31 elements, in memory of which only that row is ever touched."""
    width = 4096
    row = 2**31 // width + 5
    table = np.zeros((row + 1, width), np.float16)  # the system gives zeroed pages when they are first touched
    table[row] = np.arange(width) % 7
    out = blank((1, width))
    gather_rows(out.view, table, store([row], "int32").view)
    np.testing.assert_array_equal(out.values[0], np.arange(width) % 7)


def test_no_ids_is_nothing_to_do(normal, store, blank):
    gather_rows(blank((0, 64)).view, normal(3, 64).view, store(np.zeros(0), "int32").view)


def test_ids_are_int32(normal, store, blank):
    with pytest.raises(TypeError, match="ids or rows is int64, expected int32"):
        gather_rows(blank((2, 64)).view, normal(3, 64).view, store([0, 1], "int64").view)


@pytest.mark.parametrize("count", [0, 1, 16, 17, 300])
def test_resolve_ids_matches_reference(count, rng, store):
    """Of the sampled ids one is -1, for a row without numbers; nothing beyond the ids is written."""
    sampled = rng.integers(0, 1000, 40)
    sampled[3] = -1
    given = np.where(rng.random(count + 5) < 0.5, rng.integers(0, 1000, count + 5), -1 - rng.integers(0, 40, count + 5))
    ids = store(given, "int32")
    resolve_ids(ids.view.rows(count), store(sampled, "int32").view)
    expected = [*resolve_ids_reference(given[:count], sampled), *given[count:]]
    np.testing.assert_array_equal(ids.memory, expected)
