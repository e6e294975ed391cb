from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Storage

from fastdeploy.kernels.activation import silu_mul, silu_mul_reference
from fastdeploy.kernels.embedding import embedding, embedding_reference
from fastdeploy.kernels.formats import (
    FORMATS,
    Format,
    QuantisedWeight,
    dequantise_reference,
    pack_reference,
    per_group_reference,
    table_of,
)
from fastdeploy.kernels.launch import view
from fastdeploy.kernels.linear import LinearWeight, gated_linear, linear, pack, packed_shape
from fastdeploy.kernels.norm import add_rms_norm, rms_norm
from fastdeploy.kernels.packing import BYTES, PAIRS, Bits, Codes, Layout, pack_codes, pack_floats
from fastdeploy.kernels.quantised import (
    LOW_BIAS,
    QuantisedRows,
    activations_reference,
    quantise,
    quantise_reference,
    quantised_linear,
    quantised_linear_reference,
    rows_fields,
)
from fastdeploy.models.formats import GGUF_FORMATS
from tests.blocks import STORAGES, random_blocks, values_of, widths

# With activations of 8 bits, and of 16 where the kernel has a branch of its own.
CASES = [(storage, False) for storage in STORAGES] + [(storage, True) for storage in ("Q4_1", "Q5_0", "Q8_0", "Q6_K")]


@dataclass
class Packed:
    """A weight, the arrays that it lies in, and its values in float64."""

    weight: QuantisedWeight
    arrays: dict
    values: np.ndarray


@pytest.fixture
def packed(rng, store):
    """packed(storage, rows, width, bias=None): a random matrix as a file has it, of a width that it can have."""

    def build(storage, rows, width, bias=None):
        (width,) = widths(storage, width)
        found = GGUF_FORMATS[storage]
        blocks = random_blocks(storage, rows, width, rng)
        arrays = unfilled(found.format, rows, width)
        weight = weight_of(found.format, arrays, rows, width, store(bias).view if bias is not None else None)
        pack_codes(weight, found.codes(blocks), found.layout)
        return Packed(weight, arrays, values_of(storage, blocks))

    return build


def unfilled(format, rows, width, value=99):
    """Arrays for the planes of a weight; bfloat16 as uint16."""
    fields = format.fields(rows, width).items()
    return {name: np.full(shape, value, dtype.replace("bfloat16", "uint16")) for name, (shape, dtype) in fields}


def weight_of(format, arrays, rows, width, bias=None):
    dtypes = {name: dtype for name, (_, dtype) in format.fields(rows, width).items()}
    planes = {name: view(array, dtypes[name]) for name, array in arrays.items()}
    table = table_of(format)
    planes["table"] = None if table is None else view(table)
    return QuantisedWeight(format, rows, width, **planes, bias=bias)


def as_numbers(array):
    """Scales as they are; bfloat16, whose bits come as uint16, as float32."""
    if array is None or array.dtype != np.uint16:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def blank_rows(blank, rows, width, wide=False):
    stored = {name: blank(shape, dtype) for name, (shape, dtype) in rows_fields(rows, width, wide).items()}
    return QuantisedRows(**{name: array.view for name, array in stored.items()}), stored


def with_outliers(x):
    """x with a large element in some groups of some rows, so that some groups take low bytes and some don't."""
    rows, width = x.memory.shape
    for row in range(0, rows, 3):
        x.memory[row, (7 * row % (width // 32)) * 32 + row % 32] *= 50
    return x


def low_bytes_in(stored):
    """The low bytes of `QuantisedRows` [T, K], zeros where a group has none."""
    has_low = np.repeat(stored["low_sums"].memory != 0, 32, axis=1)
    return np.where(has_low, stored["low"].memory.astype(np.int64), 0)


def steps_in(stored):
    """What the bytes of `QuantisedRows` stand for [T, K], in steps of the scales."""
    return stored["values"].memory + (low_bytes_in(stored) / 128 if "low" in stored else 0.0)


def quantised_rows(blank, x, wide=False):
    """x [T, K] in 8 or 16 bits, and the values that it then has."""
    rows, stored = blank_rows(blank, *x.memory.shape, wide)
    quantise(rows, x.view)
    return rows, activations_reference(steps_in(stored), stored["scales"].memory)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("rows, width, first, cuts", [(16, 32, 0, []), (64, 576, 0, [64]), (37, 96, 64, [1, 2, 20])])
def test_pack_lays_out_what_the_reference_does(rows, width, first, cuts, bits, rng):
    """Whatever slices of rows it is done in, and wherever the weights begin in a row of the file."""
    integers = rng.integers(0, 1 << bits, (rows, first + width), dtype=np.uint8)
    scales = rng.standard_normal((rows, width // 32)).astype(np.float16)
    format = FORMATS[{4: "Q4_0", 5: "Q5_0", 6: "Q6_K", 8: "Q8_0"}[bits]].narrowed(0, 32)
    factors = rng.integers(-128, 128, (rows, width // 32, 2), dtype=np.int8) if bits == 6 else None
    arrays = unfilled(format, rows, width, 0)
    weight, layout = weight_of(format, arrays, rows, width), BYTES
    blocks = integers
    if bits < 8:  # first the low nibbles of the row in pairs, then the upper bits, in a byte each
        blocks = np.concatenate([integers[:, ::2] & 15 | integers[:, 1::2] << 4, integers >> 4], axis=1)
        size, half = blocks.shape[1], integers.shape[1] // 2
        high = Bits(half, 1, 1, bits - 4) if bits > 4 else None
        layout = Layout(first + width, size, PAIRS.low, high)
    for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
        part = Codes(*(array if array is None else array[start:stop] for array in (blocks, scales, None, factors)))
        pack_codes(weight, part, layout, row_offset=start, first=first)
    expected = pack_reference(format, integers[:, first:])
    expected["scales"] = per_group_reference(scales)
    if factors is not None:
        expected["factors"] = per_group_reference(factors)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_weight_takes_at_most_a_tenth_more_than_in_the_file(storage):
    weights, size = gguf.GGML_QUANT_SIZES[Storage[storage]]
    assert FORMATS[storage].bits_per_weight <= 1.06 * 8 * size / weights


# All pairs of two properties, but not all of four: every combination is two kernels to compile.
ANY_FORMATS = [
    ([(4, 8), (8, 0)][(i + j) % 2], scale, [32, 64, 128][(i + j) % 3], minimum)
    for i, scale in enumerate(["float16", "bfloat16", "float32"])
    for j, minimum in enumerate([None, "float16", "uint8", "int16"])
]


@pytest.mark.parametrize("bits_and_offset, scale, span, minimum", ANY_FORMATS)
def test_scales_of_any_type_and_zero_points_give_the_values_that_they_mean(bits_and_offset, scale, span, minimum, rng):
    rows, width, (bits, offset) = 37, 256, bits_and_offset
    format = Format("any", bits, 0 if minimum else offset, span=span, scale=scale, minimum=minimum)
    integers = rng.integers(0, 1 << bits, (rows, width), dtype=np.uint8)
    scales = rng.standard_normal((rows, width // span)).astype(np.float32)
    stored = scales.astype(np.float16) if scale == "float16" else scales
    stored = (scales.view(np.uint32) >> 16).astype(np.uint16) if scale == "bfloat16" else stored
    minimums = None
    if minimum is not None:
        minimums = (
            rng.integers(0, 256, scales.shape).astype(minimum) if "int" in minimum else (scales * 3).astype(minimum)
        )
    arrays = unfilled(format, rows, width)
    weight = weight_of(format, arrays, rows, width)
    layout = BYTES if bits == 8 else PAIRS
    blocks = integers if bits == 8 else integers[:, ::2] | integers[:, 1::2] << 4
    pack_codes(weight, Codes(blocks, stored, minimums), layout)
    values = integers.view(np.int8) if bits == 8 else integers
    expected = dequantise_reference(format, values, as_numbers(stored), minimums)
    out = np.empty((width, rows), np.float32)
    linear(out, np.eye(width, dtype=np.float32), weight)
    np.testing.assert_allclose(out.T, expected, rtol=2e-7, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("rows, width, cuts", [(16, 32, []), (64, 576, [5, 37]), (37, 96, [1, 20])])
def test_floats_are_packed_as_gguf_quantises_them(rows, width, cuts, storage, dtype, normal):
    matrix = normal(rows, width, dtype=dtype)
    matrix.memory[3] = matrix.memory[3, 0]  # a row of equal values
    found = GGUF_FORMATS[storage]
    arrays, expected = (unfilled(found.format, rows, width, 0) for _ in range(2))
    for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
        part = view(np.ascontiguousarray(matrix.memory[start:stop]), matrix.view.dtype)
        pack_floats(weight_of(found.format, arrays, rows, width), part, row_offset=start)
    blocks = gguf.quants.quantize(matrix.values.astype(np.float32), Storage[storage])
    pack_codes(weight_of(found.format, expected, rows, width), found.codes(blocks), found.layout)
    for name in arrays.keys() - {"data"}:
        np.testing.assert_array_equal(arrays[name], expected[name])
    expected = expected["data"]
    if storage == "Q4_1":  # nibble by nibble
        found, expected = (np.stack([data & 15, data >> 4]).astype(int) for data in (arrays["data"], expected))
    else:
        found = arrays["data"].astype(int)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 2e-3  # halves that one fused multiply-add rounds the other way


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, width", [(1, 32), (5, 576), (3, 1536)])
def test_activations_are_rounded_to_the_nearest_step(rows, width, dtype, normal, blank):
    x = normal(rows, width, dtype=dtype)
    out, stored = blank_rows(blank, rows, width)
    quantise(out, x.view)
    integers, scales = quantise_reference(x.values)
    np.testing.assert_allclose(stored["scales"].memory, scales, rtol=1e-6)
    found = stored["values"].memory.astype(int)
    exact = x.values / np.repeat(scales, 32, axis=1)
    assert np.abs(found - exact).max() <= 0.5 + 1e-4
    from_half = np.abs(np.abs(exact - np.trunc(exact)) - 0.5)
    wrong = found != integers  # where float32 rounds the other way: close to halves, and seldom but for halves
    assert (from_half[wrong] < 1e-4).all()
    assert (wrong & (from_half > 1e-9)).mean() < 1e-3
    np.testing.assert_array_equal(stored["sums"].memory, found.reshape(rows, -1, 32).sum(2))


@pytest.mark.parametrize("rows, width", [(1, 32), (7, 64), (13, 576), (9, 1536)])
def test_groups_of_outliers_take_16_bits(rows, width, normal, blank):
    x = with_outliers(normal(rows, width))
    out, stored = blank_rows(blank, rows, width, wide=True)
    quantise(out, x.view)
    grouped = x.memory.astype(np.float64).reshape(rows, -1, 32)
    largest, rms = np.abs(grouped).max(axis=2), np.sqrt((grouped**2).mean(axis=(1, 2)))
    has_low = largest > 8 * rms[:, None]
    assert has_low.any() == (width > 64) and not has_low.all()
    np.testing.assert_array_equal(stored["low_sums"].memory != 0, has_low)
    np.testing.assert_allclose(stored["scales"].memory, largest / 127, rtol=1e-6)
    error = np.abs(steps_in(stored).reshape(grouped.shape) - grouped / (largest / 127)[..., None]).max(axis=2)
    assert (error <= np.where(has_low, 0.51 / 128, 0.51)).all()
    sums = low_bytes_in(stored).reshape(grouped.shape).sum(axis=2)
    np.testing.assert_array_equal(stored["low_sums"].memory, np.where(has_low, sums + LOW_BIAS.value, 0))
    np.testing.assert_array_equal(stored["sums"].memory, stored["values"].memory.reshape(grouped.shape).sum(2))


def test_zeros_and_vanishing_activations_become_zeros(store, blank):
    x = store(np.repeat([0.0, 1e-42, -1e-35, 1e-20], 32)[None])
    out, stored = blank_rows(blank, 1, 128)
    quantise(out, x.view)
    np.testing.assert_array_equal(stored["values"].memory.reshape(4, 32)[:, 0], [0, 0, 0, 127])
    np.testing.assert_array_equal(stored["sums"].memory, [[0, 0, 0, 32 * 127]])


@pytest.mark.parametrize("storage, wide", CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_comes_out_as_nan_in_its_own_row(bad, storage, wide, normal, packed, store, blank):
    (width,) = widths(storage, 64)
    values = normal(3, width).values.copy()
    values[1, 40] = bad
    x, out = blank_rows(blank, 3, width, wide)[0], blank((3, 20))
    quantise(x, store(values).view)
    linear(out.view, x, packed(storage, 20, width).weight)
    np.testing.assert_array_equal(np.isnan(out.values), np.repeat([[False], [True], [False]], 20, axis=1))


@pytest.mark.parametrize("storage, wide", CASES)
@pytest.mark.parametrize("rows, out_features, in_features", [(1, 96, 576), (3, 33, 64), (70, 130, 96), (8, 16, 1536)])
def test_integer_product_agrees_with_numpy_on_the_quantised_values(
    rows, out_features, in_features, storage, wide, normal, packed, blank
):
    bias = np.linspace(-1, 1, out_features) if rows == 3 else None
    (in_features,) = widths(storage, in_features)
    weight = packed(storage, out_features, in_features, bias)
    x, values = quantised_rows(blank, with_outliers(normal(rows, in_features)), wide)
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
    (in_features,) = widths(storage, in_features)
    weight, x = packed(storage, out_features, in_features), normal(rows, in_features)
    out, expected = blank((rows, out_features)), blank((rows, out_features))
    linear(out.view, x.view, weight.weight)
    dense, data = store(weight.values), blank(packed_shape(out_features, in_features, 32))
    pack(data.view, dense.view)
    linear(expected.view, x.view, LinearWeight(data.view, out_features, in_features, 32))
    np.testing.assert_array_equal(out.memory, expected.memory)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_a_row_has_the_same_bits_in_every_batch(storage, bits, normal, packed, blank, store):
    (width,) = widths(storage, 576)
    x, weight = with_outliers(normal(130, width)), packed(storage, 100, width).weight

    def product(rows):
        chosen = store(x.memory[rows])
        out = blank((len(chosen.memory), 100))
        linear(out.view, chosen.view if bits == 32 else quantised_rows(blank, chosen, bits == 16)[0], weight)
        return out.memory

    whole = product(slice(0, 130))
    for rows in (1, 2, 3, 5, 8, 9, 16, 17, 33, 65, 121):
        np.testing.assert_array_equal(product(slice(0, rows)), whole[:rows])
    np.testing.assert_array_equal(product(slice(41, 42)), whole[41:42])


@pytest.mark.parametrize("storage, wide", CASES)
@pytest.mark.parametrize("rows, width, in_features", [(1, 64, 576), (3, 96, 64), (70, 160, 96), (16, 32, 1536)])
def test_a_gated_layer_is_a_linear_layer_and_silu_mul(
    rows, width, in_features, storage, wide, normal, packed, blank, store
):
    bias = np.linspace(-1, 1, 2 * width) if rows == 3 else None
    (in_features,) = widths(storage, in_features)
    weight = packed(storage, 2 * width, in_features, bias)
    x, values = quantised_rows(blank, with_outliers(normal(rows, in_features)), wide)
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


def test_fp8_weights_are_the_floats_that_their_codes_stand_for(rng):
    format, rows, width = FORMATS["FP8"], 37, 256
    codes = rng.integers(0, 255, (rows, width), dtype=np.uint8) & 0xFE  # without NaN
    scales = rng.uniform(0.5, 1.5, (rows, 2)).astype(np.float32)
    weight = weight_of(format, unfilled(format, rows, width), rows, width)
    pack_codes(weight, Codes(codes, scales), BYTES)
    out = np.empty((width, rows), np.float32)
    linear(out, np.eye(width, dtype=np.float32), weight)
    sign, exponent, mantissa = np.where(codes > 127, -1.0, 1.0), codes >> 3 & 15, (codes & 7) / 8
    power = np.where(exponent > 0, 2.0 ** (exponent.astype(int) - 7) * (1 + mantissa), 2.0**-6 * mantissa)
    np.testing.assert_allclose(out.T, sign * power * np.repeat(scales, 128, axis=1), rtol=2e-7)
    np.testing.assert_allclose(out.T, dequantise_reference(format, codes, scales), rtol=2e-7)


def test_no_rows_is_nothing_to_do(packed, blank):
    weight = packed("Q4_1", 48, 64).weight
    linear(blank((0, 48)).view, blank((0, 64)).view, weight)
    linear(blank((0, 48)).view, blank_rows(blank, 0, 64)[0], weight)
    gated_linear(blank_rows(blank, 0, 32)[0], blank_rows(blank, 0, 64)[0], packed("Q4_1", 64, 64).weight)


def test_what_does_not_fit_is_named(packed, normal, blank):
    with pytest.raises(ValueError, match="rows of 100 elements cannot be quantised in groups of 32"):
        FORMATS["Q4_1"].fields(16, 100)
    with pytest.raises(ValueError, match="rows of 320 elements cannot be quantised in groups of 256"):
        FORMATS["Q4_K"].fields(16, 320)
    with pytest.raises(ValueError, match="Q4_K: parts from 0 to 16 cut groups of 32 weights"):
        FORMATS["Q4_K"].narrowed(0, 16)
    weight = packed("Q4_1", 48, 64)
    with pytest.raises(ValueError, match="floats become Q4_1 or Q8_0, not Q5_0"):
        pack_floats(packed("Q5_0", 48, 64).weight, normal(48, 64).view)
    found, blocks = GGUF_FORMATS["Q4_1"], np.zeros((8, 20), np.uint8)
    with pytest.raises(ValueError, match="weights 0 to 64 of rows of 20 bytes, which take 40"):
        pack_codes(weight.weight, found.codes(blocks), found.layout)
    with pytest.raises(ValueError, match="rows 44 to 52 of a weight with 48 rows"):
        pack_codes(weight.weight, found.codes(np.zeros((8, 40), np.uint8)), found.layout, row_offset=44)
    floats = Format("FP8", 8, span=64, scale="float32", floating=True)
    with pytest.raises(TypeError, match="weights in FP8 take activations in floats only"):
        float_weight = weight_of(floats, unfilled(floats, 48, 64), 48, 64)
        linear(blank((2, 48)).view, blank_rows(blank, 2, 64)[0], float_weight)
    with pytest.raises(ValueError, match=r"x has shape \(2, 96\), expected \(2, 64\)"):
        linear(blank((2, 48)).view, normal(2, 96).view, weight.weight)
    with pytest.raises(ValueError, match="gate and up of 48 features don't fill rows of 32 in 8 bits"):
        gated_linear(blank_rows(blank, 2, 32)[0], blank_rows(blank, 2, 64)[0], weight.weight)
    with pytest.raises(ValueError, match=r"out has shape \(2, 40\), expected \(2, 48\)"):
        linear(blank((2, 40)).view, normal(2, 64).view, weight.weight)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows, width", [(100, 576), (33, 1056)])
def test_embedding_from_a_quantised_table(rows, width, storage, rng, packed, store, blank):
    (width,) = widths(storage, width)
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
        different = steps_in(stored) - steps_in(expected_stored)
        assert np.abs(different).max() <= 1 and (different != 0).mean() < 1e-2
        np.testing.assert_array_equal(stored["sums"].memory, stored["values"].memory.reshape(5, -1, 32).sum(2))
        if wide:
            has_low = expected_stored["low_sums"].memory != 0
            assert has_low.any() == (width > 64) and not has_low.all()
            np.testing.assert_array_equal(stored["low_sums"].memory != 0, has_low)

    x, gain, gate_up = with_outliers(normal(5, width)), normal(width), normal(5, 2 * width)
    residual, zeros = with_outliers(normal(5, width)), blank((5, width))
    zeros.memory[:] = 0
    assert_quantised(lambda out: rms_norm(out, x.view, gain.view, 1e-5))
    assert_quantised(lambda out: add_rms_norm(out, residual.view, zeros.view, gain.view, 1e-5))
    if not wide:
        assert_quantised(lambda out: silu_mul(out, gate_up.view))
