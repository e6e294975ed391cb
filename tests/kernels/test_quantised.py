from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Storage

from fastdeploy.kernels.activation import silu_mul, silu_mul_reference
from fastdeploy.kernels.embedding import embedding, embedding_reference
from fastdeploy.kernels.launch import view
from fastdeploy.kernels.linear import LinearWeight, gated_linear, linear, pack, packed_shape
from fastdeploy.kernels.norm import add_rms_norm, rms_norm
from fastdeploy.kernels.quantised import (
    QuantisedRows,
    QuantisedWeight,
    dequantise_reference,
    pack_blocks,
    pack_floats,
    pack_reference,
    packed_fields,
    per_group_reference,
    quantise,
    quantise_reference,
    quantised_linear,
    quantised_linear_reference,
    rows_fields,
)

STORAGES = ("Q4_0", "Q4_1", "Q8_0")
KIND = {"Q4_0": "q4", "Q4_1": "q4", "Q8_0": "q8"}


@dataclass
class Packed:
    """A weight, the arrays that it lies in, and its values as the gguf package reads them."""

    weight: QuantisedWeight
    arrays: dict
    values: np.ndarray


@pytest.fixture
def packed(rng, blank, store):
    """packed(storage, rows, width, bias=None): a random matrix, quantised by the gguf package."""

    def build(storage, rows, width, bias=None):
        blocks = blocks_of(storage, rng.standard_normal((rows, width), np.float32))
        arrays = unfilled(storage, rows, width)
        weight = weight_of(arrays, rows, width, store(bias).view if bias is not None else None)
        pack_blocks(weight, halfwords(blocks, storage), storage)
        values = gguf.quants.dequantize(blocks, Storage[storage]).astype(np.float64)
        return Packed(weight, arrays, values)

    def unfilled(storage, rows, width):
        fields = packed_fields(KIND[storage], rows, width)
        return {name: np.full(shape, 99, dtype) for name, (shape, dtype) in fields.items()}

    return build


def blocks_of(storage, matrix):
    return gguf.quants.quantize(matrix, Storage[storage])


def halfwords(blocks, storage):
    size = gguf.GGML_QUANT_SIZES[Storage[storage]][1] // 2
    return blocks.view(np.uint16).reshape(len(blocks), -1, size)


def weight_of(arrays, rows, width, bias=None):
    views = {name: view(array) for name, array in arrays.items()}
    return QuantisedWeight(views["data"], views["scales"], views.get("minimums"), rows, width, bias)


def blank_rows(blank, rows, width, wide=False):
    stored = {name: blank(shape, dtype) for name, (shape, dtype) in rows_fields(rows, width, wide).items()}
    return QuantisedRows(**{name: array.view for name, array in stored.items()}), stored


def integers_in(stored):
    """The integers of `QuantisedRows`: 8 bits, or 16 in two bytes."""
    high = stored["values"].memory.astype(np.int64)
    return 256 * high + stored["low"].memory if "low" in stored else high


def quantised_rows(blank, x, wide=False):
    """x [T, K] in 8 or 16 bits, and the values that it then has."""
    rows, stored = blank_rows(blank, *x.memory.shape, wide)
    quantise(rows, x.view)
    return rows, dequantise_reference(integers_in(stored), stored["scales"].memory)


def integers_of(storage, blocks):
    """(q, d, m) of the blocks as GGUF defines them."""
    raw = blocks.reshape(len(blocks), -1, gguf.GGML_QUANT_SIZES[Storage[storage]][1])
    scales = np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0]
    if storage == "Q8_0":
        return raw[..., 2:].view(np.int8).reshape(len(blocks), -1), scales, None
    pairs = raw[..., 2:] if storage == "Q4_0" else raw[..., 4:]
    q = np.concatenate([pairs & 15, pairs >> 4], -1).reshape(len(blocks), -1)
    minimums = -8 * scales if storage == "Q4_0" else np.ascontiguousarray(raw[..., 2:4]).view(np.float16)[..., 0]
    return q, scales, minimums


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows, width", [(16, 32), (64, 576), (37, 96)])
def test_pack_lays_out_tiles_and_changes_no_value(rows, width, storage, rng):
    blocks = blocks_of(storage, rng.standard_normal((rows, width), np.float32))
    fields = packed_fields(KIND[storage], rows, width)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in fields.items()}
    pack_blocks(weight_of(arrays, rows, width), halfwords(blocks, storage), storage)
    q, scales, minimums = integers_of(storage, blocks)
    np.testing.assert_array_equal(arrays["data"], pack_reference(q))
    np.testing.assert_array_equal(arrays["scales"], per_group_reference(scales))
    if minimums is not None:
        np.testing.assert_array_equal(arrays["minimums"], per_group_reference(minimums))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("cuts", [[64, 80], [5, 37, 101], [1, 2, 3]])
def test_slices_packed_one_by_one_make_the_whole(cuts, storage, rng):
    blocks = blocks_of(storage, rng.standard_normal((130, 64), np.float32))
    fields = packed_fields(KIND[storage], 130, 64)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in fields.items()}
    for start, stop in zip([0, *cuts], [*cuts, 130], strict=True):
        pack_blocks(weight_of(arrays, 130, 64), halfwords(blocks[start:stop], storage), storage, row_offset=start)
    q, scales, _ = integers_of(storage, blocks)
    np.testing.assert_array_equal(arrays["data"], pack_reference(q))
    np.testing.assert_array_equal(arrays["scales"], per_group_reference(scales))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("rows, width, cuts", [(16, 32, []), (64, 576, [5, 37]), (37, 96, [1, 20])])
def test_floats_are_packed_as_gguf_quantises_them(rows, width, cuts, storage, dtype, normal):
    matrix = normal(rows, width, dtype=dtype)
    matrix.memory[3] = matrix.memory[3, 0]  # a row of equal values
    fields = packed_fields(KIND[storage], rows, width)
    arrays = {name: np.zeros(shape, kind) for name, (shape, kind) in fields.items()}
    for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
        part = view(np.ascontiguousarray(matrix.memory[start:stop]), matrix.view.dtype)
        pack_floats(weight_of(arrays, rows, width), part, row_offset=start)
    q, scales, minimums = integers_of(storage, blocks_of(storage, matrix.values.astype(np.float32)))
    np.testing.assert_array_equal(arrays["scales"], per_group_reference(scales))
    if minimums is not None:
        np.testing.assert_array_equal(arrays["minimums"], per_group_reference(minimums))
    expected = pack_reference(q)
    if storage == "Q4_1":  # nibble by nibble
        found, expected = (np.stack([data & 15, data >> 4]).astype(int) for data in (arrays["data"], expected))
    else:
        found = arrays["data"].astype(int)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 2e-3  # halves that one fused multiply-add rounds the other way


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, width", [(1, 32), (5, 576), (3, 1536)])
@pytest.mark.parametrize("wide, most, error, others", [(False, 127, 1e-4, 1e-3), (True, 127 * 256, 1e-2, 5e-3)])
def test_activations_are_rounded_to_the_nearest_step(wide, most, error, others, rows, width, dtype, normal, blank):
    x = normal(rows, width, dtype=dtype)
    out, stored = blank_rows(blank, rows, width, wide)
    quantise(out, x.view)
    integers, scales = quantise_reference(x.values, most)
    np.testing.assert_allclose(stored["scales"].memory, scales, rtol=1e-6)
    found = integers_in(stored)
    exact = x.values / np.repeat(scales, 32, axis=1)
    assert np.abs(found - exact).max() <= 0.5 + error
    from_half = np.abs(np.abs(exact - np.trunc(exact)) - 0.5)
    wrong = found != integers  # where float32 rounds the other way: close to halves, and seldom but for halves
    assert (from_half[wrong] < error).all()
    assert (wrong & (from_half > 1e-9)).mean() < others
    sums = found.reshape(rows, -1, 32).sum(2) * stored["scales"].memory
    np.testing.assert_allclose(stored["sums"].memory, sums, rtol=1e-6, atol=1e-6)


def test_zeros_and_vanishing_activations_become_zeros(store, blank):
    x = store(np.repeat([0.0, 1e-42, -1e-35, 1e-20], 32)[None])
    out, stored = blank_rows(blank, 1, 128)
    quantise(out, x.view)
    np.testing.assert_array_equal(stored["values"].memory.reshape(4, 32)[:, 0], [0, 0, 0, 127])
    assert np.isfinite(stored["sums"].memory).all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_comes_out_as_nan_in_its_own_row(bad, storage, wide, normal, packed, store, blank):
    values = normal(3, 64).values.copy()
    values[1, 40] = bad
    x, out = blank_rows(blank, 3, 64, wide)[0], blank((3, 20))
    quantise(x, store(values).view)
    linear(out.view, x, packed(storage, 20, 64).weight)
    np.testing.assert_array_equal(np.isnan(out.values), np.repeat([[False], [True], [False]], 20, axis=1))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows, out_features, in_features", [(1, 96, 576), (3, 33, 64), (70, 130, 96), (8, 16, 1536)])
def test_integer_product_agrees_with_numpy_on_the_quantised_values(
    rows, out_features, in_features, storage, wide, normal, packed, blank
):
    bias = np.linspace(-1, 1, out_features) if rows == 3 else None
    weight = packed(storage, out_features, in_features, bias)
    x, values = quantised_rows(blank, normal(rows, in_features), wide)
    out = blank((rows, out_features))
    quantised_linear(out.view, x, weight.weight)
    expected = quantised_linear_reference(values, weight.values, bias)
    size = np.abs(values) @ np.abs(weight.values).T + 1
    assert (np.abs(out.values - expected) <= 1e-6 * size).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows, out_features, in_features", [(1, 96, 576), (3, 33, 64), (70, 130, 96)])
def test_float_product_has_the_bits_of_the_dequantised_matrix(
    rows, out_features, in_features, storage, normal, packed, store, blank
):
    weight, x = packed(storage, out_features, in_features), normal(rows, in_features)
    out, expected = blank((rows, out_features)), blank((rows, out_features))
    linear(out.view, x.view, weight.weight)
    dense, data = store(weight.values), blank(packed_shape(out_features, in_features, 32))
    pack(data.view, dense.view)
    linear(expected.view, x.view, LinearWeight(data.view, out_features, in_features, 32))
    np.testing.assert_array_equal(out.memory, expected.memory)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("storage", ["Q4_1", "Q8_0"])
def test_a_row_has_the_same_bits_in_every_batch(storage, bits, normal, packed, blank, store):
    x, weight = normal(70, 576), packed(storage, 100, 576).weight

    def product(rows):
        chosen = store(x.memory[rows])
        out = blank((len(chosen.memory), 100))
        linear(out.view, chosen.view if bits == 32 else quantised_rows(blank, chosen, bits == 16)[0], weight)
        return out.memory

    whole = product(slice(0, 70))
    for rows in (1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 65):
        np.testing.assert_array_equal(product(slice(0, rows)), whole[:rows])
    np.testing.assert_array_equal(product(slice(41, 42)), whole[41:42])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows, width, in_features", [(1, 64, 576), (3, 96, 64), (70, 160, 96), (16, 32, 1536)])
def test_a_gated_layer_is_a_linear_layer_and_silu_mul(
    rows, width, in_features, storage, wide, normal, packed, blank, store
):
    bias = np.linspace(-1, 1, 2 * width) if rows == 3 else None
    weight = packed(storage, 2 * width, in_features, bias)
    x, values = quantised_rows(blank, normal(rows, in_features), wide)
    out, stored = blank_rows(blank, rows, width)
    assert gated_linear(out, x, weight.weight)
    gate_up = blank((rows, 2 * width))
    linear(gate_up.view, x, weight.weight)
    expected, expected_stored = blank_rows(blank, rows, width)
    silu_mul(expected, gate_up.view)
    for name, array in stored.items():
        assert array.memory.tobytes() == expected_stored[name].memory.tobytes(), name
    exact = silu_mul_reference(quantised_linear_reference(values, weight.values, bias))
    steps = np.repeat(stored["scales"].memory, 32, axis=1)
    assert (np.abs(stored["values"].memory * steps - exact) <= 0.501 * steps + 1e-5 * np.abs(exact).max()).all()


def test_a_gated_row_has_the_same_bits_in_every_batch(normal, packed, blank, store):
    x, weight = normal(70, 96), packed("Q4_1", 128, 96).weight

    def gated(rows):
        chosen = store(x.memory[rows])
        out, stored = blank_rows(blank, len(chosen.memory), 64)
        gated_linear(out, quantised_rows(blank, chosen)[0], weight)
        return {name: array.memory for name, array in stored.items()}

    whole = gated(slice(0, 70))
    for rows in (slice(0, 1), slice(0, 8), slice(3, 20), slice(41, 42), slice(0, 65)):
        for name, array in gated(rows).items():
            np.testing.assert_array_equal(array, whole[name][rows])


def test_no_rows_is_nothing_to_do(packed, blank):
    weight = packed("Q4_1", 48, 64).weight
    linear(blank((0, 48)).view, blank((0, 64)).view, weight)
    linear(blank((0, 48)).view, blank_rows(blank, 0, 64)[0], weight)
    gated_linear(blank_rows(blank, 0, 32)[0], blank_rows(blank, 0, 64)[0], packed("Q4_1", 64, 64).weight)


def test_what_does_not_fit_is_named(packed, normal, blank):
    with pytest.raises(ValueError, match="rows of 100 elements cannot be quantised in groups of 32"):
        packed_fields("q4", 16, 100)
    with pytest.raises(ValueError, match="'q5' is no kind of quantised weight; there are q4, q8"):
        packed_fields("q5", 16, 64)
    weight = packed("Q4_1", 48, 64)
    blocks = halfwords(blocks_of("Q8_0", np.zeros((8, 64), np.float32)), "Q8_0")
    with pytest.raises(ValueError, match="blocks of Q8_0 cannot be packed as q4"):
        pack_blocks(weight.weight, blocks, "Q8_0")
    with pytest.raises(ValueError, match=r"x has shape \(2, 96\), expected \(2, 64\)"):
        linear(blank((2, 48)).view, normal(2, 96).view, weight.weight)
    with pytest.raises(ValueError, match="gate and up of 48 features don't fill rows of 32 in 8 bits"):
        gated_linear(blank_rows(blank, 2, 32)[0], blank_rows(blank, 2, 64)[0], weight.weight)
    with pytest.raises(ValueError, match=r"out has shape \(2, 40\), expected \(2, 48\)"):
        linear(blank((2, 40)).view, normal(2, 64).view, weight.weight)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows, width", [(100, 576), (33, 1056)])
def test_embedding_from_a_quantised_table(rows, width, storage, rng, packed, store, blank):
    table = packed(storage, rows, width)
    ids, out = store(rng.integers(0, rows, 9), "int32"), blank((9, width))
    embedding(out.view, ids.view, table.weight)
    np.testing.assert_array_equal(out.values, embedding_reference(ids.memory, table.values))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [64, 96, 576, 1536])
def test_norms_and_gate_quantise_what_they_would_write_as_floats(width, wide, normal, blank):
    def assert_quantised(write):
        floats = blank((5, width))
        write(floats.view)
        rows, stored = blank_rows(blank, 5, width, wide)
        write(rows)
        expected, expected_stored = blank_rows(blank, 5, width, wide)
        quantise(expected, floats.view)
        np.testing.assert_allclose(stored["scales"].memory, expected_stored["scales"].memory, rtol=1e-6)
        different = integers_in(stored) - integers_in(expected_stored)
        assert np.abs(different).max() <= 1 and (different != 0).mean() < 1e-2
        np.testing.assert_allclose(
            stored["sums"].memory,
            integers_in(stored).reshape(5, -1, 32).sum(2) * stored["scales"].memory,
            rtol=1e-6,
            atol=1e-6,
        )

    x, gain, gate_up = normal(5, width), normal(width), normal(5, 2 * width)
    residual, zeros = normal(5, width), blank((5, width))
    zeros.memory[:] = 0
    assert_quantised(lambda out: rms_norm(out, x.view, gain.view, 1e-5))
    assert_quantised(lambda out: add_rms_norm(out, residual.view, zeros.view, gain.view, 1e-5))
    assert_quantised(lambda out: silu_mul(out, gate_up.view))
