import numpy as np
import pytest

from fastdeploy.kernels.activation import silu_mul, silu_mul_reference
from fastdeploy.kernels.launch import Target, target, view
from fastdeploy.kernels.linear import (
    LinearWeight,
    default_panel,
    gated_linear,
    linear,
    linear_reference,
    pack,
    pack_reference,
    packed_shape,
    tiles,
)
from fastdeploy.kernels.quantised import QuantisedRows, rows_fields

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture
def packed(blank):
    """packed(weight, panel, bias): a LinearWeight of the stored matrix, in its own type."""

    def build(weight, panel=32, bias=None):
        rows, width = weight.memory.shape
        data = blank(packed_shape(rows, width, panel), weight.dtype)
        pack(data.view, weight.view)
        return LinearWeight(data.view, rows, width, panel, bias.view if bias else None)

    return build


@pytest.mark.parametrize("panel", [1, 32])
@pytest.mark.parametrize("rows, width", [(1, 1), (31, 7), (96, 576), (100, 130)])
def test_pack_lays_out_panels(rows, width, panel, normal, store):
    weight = normal(rows, width)
    data = store(np.zeros(packed_shape(rows, width, panel)))
    pack(data.view, weight.view)
    np.testing.assert_array_equal(data.memory, pack_reference(weight.memory, panel))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_pack_converts(source, stored, normal, store):
    weight = normal(40, 48, dtype=source)
    data = store(np.zeros(packed_shape(40, 48, 32)), stored)
    pack(data.view, weight.view)
    np.testing.assert_array_equal(data.values, pack_reference(store(weight.values, stored).values, 32))


@pytest.mark.parametrize("cuts", [[64, 128], [5, 37, 101], [1, 2, 3]])
@pytest.mark.parametrize("panel", [1, 32])
def test_slices_packed_one_by_one_make_the_whole(cuts, panel, normal, store):
    weight = normal(130, 72)
    data = store(np.zeros(packed_shape(130, 72, panel)))
    for start, stop in zip([0, *cuts], [*cuts, 130], strict=True):
        pack(data.view, weight.memory[start:stop], row_offset=start)
    np.testing.assert_array_equal(data.memory, pack_reference(weight.memory, panel))


def test_pack_reads_rows_with_gaps(normal, store):
    weight = normal(40, 100)
    data = store(np.zeros(packed_shape(40, 64, 32)))
    pack(data.view, weight.memory[:, 10:74])
    np.testing.assert_array_equal(data.memory, pack_reference(weight.memory[:, 10:74], 32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pack_reads_rows_that_lie_side_by_side(dtype, normal, store):
    weight = store(normal(70, 200).memory, dtype)
    for stored in (dtype, "bfloat16"):
        data = store(np.zeros(packed_shape(100, 70, 32)), stored)
        pack(data.view, weight.memory[:, 7:107].T)
        expected = pack_reference(store(weight.values[:, 7:107].T, stored).values, 32)
        np.testing.assert_array_equal(data.values, expected)


def test_pack_refuses_rows_that_do_not_fit(normal, blank):
    with pytest.raises(ValueError, match="rows 10 to 70 do not fit in 2 panels of 32"):
        pack(blank((2, 16, 32)).view, normal(60, 16).view, row_offset=10)
    with pytest.raises(ValueError, match="expected rows of 16 elements"):
        pack(blank((2, 16, 32)).view, normal(60, 17).view)


@pytest.mark.parametrize("panel, dtype", [(1, "float32"), *((32, dtype) for dtype in DTYPES), (64, "bfloat16")])
@pytest.mark.parametrize("rows, out_features, in_features", [(1, 96, 576), (3, 33, 64), (70, 130, 80), (1100, 70, 32)])
def test_linear_matches_reference(rows, out_features, in_features, panel, dtype, normal, packed, blank):
    x, weight = normal(rows, in_features), normal(out_features, in_features, dtype=dtype)
    out = blank((rows, out_features))
    linear(out.view, x.view, packed(weight, panel))
    expected = linear_reference(x.values, weight.values)
    np.testing.assert_allclose(out.values, expected, rtol=0, atol=4e-5 * np.sqrt(in_features))


@pytest.mark.parametrize("seed", range(12))
def test_linear_on_any_shape(seed, packed, store, blank):
    rng = np.random.default_rng(seed)
    rows, out_features, in_features = rng.integers(1, 90), rng.integers(1, 200), rng.integers(1, 300)
    x = store(rng.standard_normal((rows, in_features)))
    weight = store(rng.standard_normal((out_features, in_features)), DTYPES[seed % 3])
    bias = store(rng.standard_normal(out_features)) if seed % 2 else None
    out = blank((rows, out_features))
    linear(out.view, x.view, packed(weight, 32, bias))
    expected = linear_reference(x.values, weight.values, bias.values if bias else None)
    np.testing.assert_allclose(out.values, expected, rtol=0, atol=1e-6 * in_features + 1e-5)


def test_linear_of_half_precision_activations(normal, packed, blank):
    x, weight, out = normal(5, 64, dtype="bfloat16"), normal(48, 64, dtype="bfloat16"), blank((5, 48), "bfloat16")
    linear(out.view, x.view, packed(weight))
    np.testing.assert_allclose(out.values, linear_reference(x.values, weight.values), rtol=8e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype, normal, packed, blank):
    x, weight = normal(70, 576), packed(normal(100, 576, dtype=dtype))
    whole = blank((70, 100))
    linear(whole.view, x.view, weight)
    for rows in (1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 65):
        part = blank((rows, 100))
        linear(part.view, x.memory[:rows], weight)
        assert part.memory.tobytes() == whole.memory[:rows].tobytes(), f"{rows} rows"
    alone = blank((1, 100))
    linear(alone.view, x.memory[41:42], weight)
    assert alone.bits == whole.memory[41:42].tobytes()


def test_no_rows_is_nothing_to_do(normal, packed, blank):
    linear(blank((0, 96)).view, blank((0, 64)).view, packed(normal(96, 64)))


def test_wrong_shapes_are_named(normal, packed, blank):
    weight = packed(normal(96, 64))
    with pytest.raises(ValueError, match=r"x has shape \(2, 65\), expected \(2, 64\)"):
        linear(blank((2, 96)).view, normal(2, 65).view, weight)
    with pytest.raises(ValueError, match=r"out has shape \(2, 64\), expected \(2, 96\)"):
        linear(blank((2, 64)).view, normal(2, 64).view, weight)
    with pytest.raises(ValueError, match=r"weight data has shape \(3, 64, 32\), expected \(4, 64, 32\)"):
        LinearWeight(weight.data, 100, 64, 32)


def test_tiles_along_k_and_n_do_not_depend_on_the_batch(normal, packed):
    for here in (target(), Target("cuda", 90, 132), Target("hip", "gfx942", 304)):
        weight = packed(normal(96, 576), default_panel(here))
        fixed = {(rule["BLOCK_K"], rule["BLOCK_N"]) for rule in (tiles(here, rows, weight) for rows in range(1, 300))}
        assert len(fixed) == 1


@pytest.mark.parametrize("seed", range(6))
def test_gated_layers_match_the_reference_and_two_kernels(seed, packed, store, blank):
    """In one launch the bits are those of a linear layer and `silu_mul`, whose gate and up stay in memory."""
    rng = np.random.default_rng(seed)
    rows, features, in_features = rng.integers(1, 600), 32 * rng.integers(1, 5), rng.integers(1, 200)
    x, matrix = store(rng.standard_normal((rows, in_features))), rng.standard_normal((2 * features, in_features))
    matrix, bias = store(matrix, DTYPES[seed % 3]), store(rng.standard_normal(2 * features)) if seed % 2 else None
    out, both, then = blank((rows, features)), blank((rows, 2 * features)), blank((rows, features))
    assert gated_linear(out.view, x.view, packed(matrix, 32, bias))
    expected = silu_mul_reference(linear_reference(x.values, matrix.values, bias.values if bias else None))
    np.testing.assert_allclose(out.values, expected, rtol=1e-5, atol=1e-5 * in_features)
    linear(both.view, x.view, packed(matrix, 32, bias))
    silu_mul(then.view, both.view)
    assert out.bits == then.bits


def test_gated_layers_whose_up_begins_within_a_panel_are_left_to_two_kernels(normal, packed, blank):
    assert not gated_linear(blank((3, 40)).view, normal(3, 64).view, packed(normal(80, 64)))


def test_a_gated_layer_whose_output_becomes_integers_is_left_to_two_kernels(normal):
    """A float gate and up before a quantised down, as a GGUF file may have them."""
    fields = rows_fields(3, 64, wide=False)
    out = QuantisedRows(**{name: view(np.zeros(shape, dtype)) for name, (shape, dtype) in fields.items()})
    weight = LinearWeight(normal(128, 96).view.reshape(128, 96, 1), 128, 96, 1)
    assert not gated_linear(out, normal(3, 96).view, weight)
