"""Experts in every format: grouped layers give each row what a linear layer of its expert gives, bit by bit."""

from dataclasses import dataclass

import numpy as np
import pytest

from fastdeploy.kernels.activation import silu_mul
from fastdeploy.kernels.formats import FORMATS, TILE, QuantisedWeight, table_of
from fastdeploy.kernels.launch import view
from fastdeploy.kernels.linear import linear
from fastdeploy.kernels.moe import (
    ExpertWeights,
    FusedExperts,
    Routing,
    gated_grouped_linear,
    grouped_linear,
    padded,
    route,
    routing_fields,
)
from fastdeploy.kernels.packing import pack_codes
from fastdeploy.kernels.quantised import GROUP, QuantisedRows, quantise, rows_fields
from fastdeploy.models.formats import GGUF_FORMATS
from tests.blocks import STORAGES, random_blocks, values_of, widths

# tokens, experts, experts of a token, output and input features
SHAPES = [(1, 4, 2, 48, 64), (13, 5, 3, 33, 96), (70, 8, 2, 100, 576), (150, 3, 1, 64, 32)]


def empty_weight(format, rows, width):
    """A weight and the arrays that it lies in, bfloat16 as uint16; padding is 99."""
    fields = format.fields(rows, width).items()
    arrays = {name: np.full(shape, 99, dtype.replace("bfloat16", "uint16")) for name, (shape, dtype) in fields}
    planes = {name: view(arrays[name], dtype) for name, (_, dtype) in fields}
    table = table_of(format)
    return QuantisedWeight(format, rows, width, **planes, table=None if table is None else view(table)), arrays


def experts_of(storage, count, rows, width, rng):
    """Random experts as a file has them, and their values [count, rows, width] in float64."""
    found, values = GGUF_FORMATS[storage], []
    weight, _ = empty_weight(found.format, count * padded(rows), width)
    for expert in range(count):
        blocks = random_blocks(storage, rows, width, rng)
        pack_codes(weight, found.codes(blocks), found.layout, expert * padded(rows))
        values.append(values_of(storage, blocks))
    return ExpertWeights(weight, count, rows), np.stack(values)


@dataclass
class Routed:
    """Where some tokens go: `routing`, and of each sorted row the token and the expert."""

    routing: Routing
    tokens: np.ndarray
    experts: np.ndarray


@pytest.fixture
def routed(blank):
    """routed(logits, k): the tokens with these logits, [T, E], sent to k experts each."""

    def build(logits, top_k):
        tokens, experts = logits.shape
        stored = {name: blank(*field) for name, field in routing_fields(tokens, top_k, experts).items()}
        routing = Routing(**{name: array.view for name, array in stored.items()})
        route(routing, logits)
        return Routed(routing, stored["rows"].memory, np.sort(stored["experts"].memory.reshape(-1)))

    return build


@pytest.fixture
def integers(blank):
    """integers(x): x in 8 bits, or memory for as much as a shape says; and its arrays."""

    def build(x):
        shape = x if isinstance(x, tuple) else x.shape
        stored = {name: blank(*field) for name, field in rows_fields(*shape).items()}
        rows = QuantisedRows(**{name: array.view for name, array in stored.items()})
        if not isinstance(x, tuple):
            quantise(rows, x)
        return rows, stored

    return build


def values_in(stored):
    return stored["values"].memory * np.repeat(stored["scales"].memory.astype(np.float64), GROUP, axis=1)


@pytest.mark.parametrize("in_floats", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("tokens, experts, top_k, out_features, in_features", SHAPES)
def test_each_row_is_multiplied_by_its_expert(
    tokens, experts, top_k, out_features, in_features, storage, in_floats, routed, integers, blank, rng
):
    (width,) = widths(storage, in_features)
    weights, values = experts_of(storage, experts, out_features, width, rng)
    sent = routed(rng.standard_normal((tokens, experts), np.float32), top_k)
    for by_token in (True, False):
        count = tokens if by_token else tokens * top_k
        x, stored = rng.standard_normal((count, width), np.float32), None
        if not in_floats:
            rows, stored = integers(x)
        out = blank((tokens * top_k, out_features))
        grouped_linear(out.view, x if stored is None else rows, weights, sent.routing, by_token)
        read = (x.astype(np.float64) if stored is None else values_in(stored))[sent.tokens if by_token else ...]
        expected = np.einsum("rk,rnk->rn", read, values[sent.experts])
        size = np.einsum("rk,rnk->rn", np.abs(read), np.abs(values[sent.experts]))
        assert (np.abs(out.values - expected) <= 2e-6 * (size + 1)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_bits_that_a_linear_layer_of_its_expert_gives(name, routed, integers, blank, rng):
    count, rows, width = 3, 80, 256
    weight, arrays = empty_weight(FORMATS[name], count * padded(rows), width)
    for array in arrays.values():
        floats = np.issubdtype(array.dtype, np.floating)
        made = rng.standard_normal(array.shape) if floats else rng.integers(0, 0x70, array.shape)
        array[...] = 0x3F80 + made if array.dtype == np.uint16 else made
    sent = routed(rng.standard_normal((20, count), np.float32), 2)
    x = rng.standard_normal((20, width), np.float32)
    for read in (x, integers(x)[0]) if weight.takes_integers else (x,):
        found = blank((40, rows))
        grouped_linear(found.view, read, ExpertWeights(weight, count, rows), sent.routing, by_token=True)
        for expert in range(count):
            tiles = slice(expert * padded(rows) // TILE, (expert + 1) * padded(rows) // TILE)
            alone, parts = empty_weight(FORMATS[name], padded(rows), width)
            for plane, array in parts.items():
                array[...] = arrays[plane][tiles]
            expected, mine = blank((20, padded(rows))), sent.experts == expert
            linear(expected.view, read, alone)
            np.testing.assert_array_equal(found.memory[mine], expected.memory[sent.tokens[mine], :rows])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("tokens, experts, top_k, width, in_features", [(1, 4, 2, 32, 64), (70, 8, 3, 96, 320)])
def test_a_gated_layer_is_a_linear_layer_and_silu_mul(
    tokens, experts, top_k, width, in_features, storage, routed, integers, blank, rng
):
    (in_features,) = widths(storage, in_features)
    weights, _ = experts_of(storage, experts, 2 * width, in_features, rng)
    sent = routed(rng.standard_normal((tokens, experts), np.float32), top_k)
    x, _ = integers(rng.standard_normal((tokens, in_features), np.float32))
    (found, stored), (expected, expected_stored) = (integers((tokens * top_k, width)) for _ in range(2))
    assert gated_grouped_linear(found, x, weights, sent.routing)
    gate_up = blank((tokens * top_k, 2 * width))
    grouped_linear(gate_up.view, x, weights, sent.routing, by_token=True)
    silu_mul(expected, gate_up.view)
    for name, array in stored.items():
        assert array.bits == expected_stored[name].bits, name


@pytest.mark.parametrize("in_floats", [False, True])
@pytest.mark.parametrize("storage", ["Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"])
def test_a_token_has_the_same_bits_alone_and_in_a_batch(storage, in_floats, routed, integers, blank, rng):
    """Whatever the tiles: of one row, of several, of 64."""
    tokens, experts, width = 150, 5, 256
    weights, _ = experts_of(storage, experts, 64, width, rng)
    logits, x = rng.standard_normal((tokens, experts), np.float32), rng.standard_normal((tokens, width), np.float32)

    def by_token(part):
        """What each token gets from each rank's expert: of the grouped layer, and of the gated one."""
        sent, count = routed(logits[part], 2), len(x[part])
        read = x[part] if in_floats else integers(x[part])[0]
        out, (gated, stored) = blank((2 * count, 64)), integers((2 * count, 32))
        grouped_linear(out.view, read, weights, sent.routing, by_token=True)
        order = np.lexsort((sent.experts, sent.tokens))
        made = gated_grouped_linear(gated, read, weights, sent.routing)
        assert made != in_floats
        return [out.memory[order]] + [array.memory[order] for array in stored.values() if made]

    whole = by_token(slice(0, tokens))
    for first, last in [(0, 1), (1, 8), (8, 41), (41, 150)]:
        for found, expected in zip(by_token(slice(first, last)), whole, strict=True):
            np.testing.assert_array_equal(found, expected[2 * first : 2 * last])


def test_experts_in_two_formats_are_written_side_by_side(routed, integers, blank, rng):
    gate, up = (experts_of(storage, 4, 40, 256, rng)[0] for storage in ("Q4_K", "Q6_K"))
    both, sent = FusedExperts((gate, up)), routed(rng.standard_normal((9, 4), np.float32), 2)
    x, _ = integers(rng.standard_normal((9, 256), np.float32))
    out, first, second = blank((18, 80)), blank((18, 40)), blank((18, 40))
    assert both.takes_integers and not gated_grouped_linear(integers((18, 64))[0], x, both, sent.routing)
    grouped_linear(out.view, x, both, sent.routing, by_token=True)
    grouped_linear(first.view, x, gate, sent.routing, by_token=True)
    grouped_linear(second.view, x, up, sent.routing, by_token=True)
    np.testing.assert_array_equal(out.memory, np.concatenate([first.memory, second.memory], axis=1))


def test_no_tokens_is_nothing_to_do(routed, integers, blank, rng):
    weights, sent = experts_of("Q4_0", 4, 64, 32, rng)[0], routed(np.empty((0, 4), np.float32), 2)
    grouped_linear(blank((0, 64)).view, integers((0, 32))[0], weights, sent.routing, by_token=True)
    assert gated_grouped_linear(integers((0, 32))[0], integers((0, 32))[0], weights, sent.routing)


def test_activations_that_experts_do_not_take_are_refused(routed, integers, blank, rng):
    sent, x = routed(rng.standard_normal((3, 4), np.float32), 2), integers((3, 256))[0]
    floating, _ = empty_weight(FORMATS["FP8"], 4 * 64, 256)
    with pytest.raises(TypeError, match="these experts take activations in floats only"):
        grouped_linear(blank((6, 64)).view, x, ExpertWeights(floating, 4, 64), sent.routing, by_token=True)
    weights, _ = experts_of("Q4_0", 4, 64, 256, rng)
    wide = QuantisedRows(x.values, x.scales, x.sums, blank((3, 256), "int8").view, blank((3, 8), "int32").view)
    with pytest.raises(TypeError, match="8 bits or floats, not 16 bits"):
        grouped_linear(blank((6, 64)).view, wide, weights, sent.routing, by_token=True)
    with pytest.raises(ValueError, match="6 rows of gate and up of 64 features don't fill 6 rows of 64 in 8 bits"):
        gated_grouped_linear(integers((6, 64))[0], x, weights, sent.routing)
