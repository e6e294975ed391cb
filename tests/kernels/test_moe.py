import numpy as np
import pytest

from fastdeploy.kernels.activation import silu_mul
from fastdeploy.kernels.launch import target
from fastdeploy.kernels.linear import LinearWeight, default_panel, pack, packed_shape
from fastdeploy.kernels.moe import (
    ExpertWeights,
    Routing,
    combine,
    grouped_linear,
    mixture_reference,
    most_tiles,
    padded,
    route,
    route_reference,
    routing_fields,
    tile_rows,
)

SHAPES = [(1, 4, 2), (7, 5, 1), (33, 8, 8), (40, 3, 2), (100, 64, 6), (300, 128, 8), (64, 1, 1), (129, 2, 2)]


@pytest.fixture
def routing(blank):
    """routing(tokens, k, experts): memory that `route` has to fill, by field."""
    return lambda *sizes: {name: blank(shape, dtype) for name, (shape, dtype) in routing_fields(*sizes).items()}


def views(stored: dict) -> Routing:
    return Routing(**{name: tensor.view for name, tensor in stored.items()})


def packed_experts(store, normal, weights: np.ndarray, dtype="float32") -> tuple[ExpertWeights, np.ndarray]:
    """The weights [E, N, K] as kernels take them, and as they were rounded to `dtype`. Padding is NaN."""
    count, rows, width = weights.shape
    panel = default_panel(target())
    data = store(np.full(packed_shape(count * padded(rows), width, panel), np.nan), dtype)
    rounded = store(weights, dtype)
    for expert in range(count):
        pack(data.view, store(weights[expert], "float32").view, expert * padded(rows))
    packed = LinearWeight(data.view, count * padded(rows), width, panel)
    return ExpertWeights(packed, count, rows), rounded.values


@pytest.mark.parametrize("floor", [None, 1e-12, 2.0])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("tokens, experts, top_k", SHAPES)
def test_choice_and_weights_match_the_reference(tokens, experts, top_k, corrected, floor, routing, normal, store, rng):
    logits, out = normal(tokens, experts), routing(tokens, top_k, experts)
    correction = store(rng.normal(size=experts) * 0.2) if corrected else None
    route(views(out), logits.view, correction and correction.view, floor)
    chosen, weights = route_reference(logits.values, top_k, correction and correction.values, floor)
    np.testing.assert_array_equal(out["experts"].values, chosen)
    np.testing.assert_allclose(out["weights"].values, weights, rtol=1e-5)


@pytest.mark.parametrize("tokens, experts, top_k", SHAPES)
def test_pairs_are_sorted_by_expert_and_cut_into_tiles(tokens, experts, top_k, routing, normal):
    out = routing(tokens, top_k, experts)
    route(views(out), normal(tokens, experts).view)
    chosen = out["experts"].values.reshape(-1)
    order = np.argsort(chosen, kind="stable")
    np.testing.assert_array_equal(out["counts"].values, np.bincount(chosen, minlength=experts))
    np.testing.assert_array_equal(out["rows"].values, order // top_k)
    np.testing.assert_array_equal(out["places"].values.reshape(-1)[order], np.arange(tokens * top_k))
    block_m = tile_rows(target(), tokens * top_k, experts)
    cut = [
        (expert, row, min(block_m, end - row))
        for expert, end in enumerate(np.cumsum(out["counts"].values))
        for row in range(end - out["counts"].values[expert], end, block_m)
    ]
    tiles = [out[name].values[: len(cut)] for name in ("tile_experts", "tile_starts", "tile_rows")]
    np.testing.assert_array_equal(np.stack(tiles, axis=1), cut)
    most = most_tiles(tokens * top_k, experts, block_m)
    assert len(cut) <= most <= tokens * top_k
    assert not out["tile_rows"].values[len(cut) : most].any()


def test_equal_probabilities_go_to_the_lower_expert(routing, store):
    out = routing(2, 3, 6)
    route(views(out), store([[0, 1, 1, 0, 1, 0], [5, 5, 5, 5, 5, 5]]).view)
    np.testing.assert_array_equal(out["experts"].values, [[1, 2, 4], [0, 1, 2]])


def test_what_is_no_number_goes_to_some_expert_and_weighs_nan(routing, store):
    logits = np.zeros((3, 5))
    logits[1, 2] = np.nan
    out = routing(3, 2, 5)
    route(views(out), store(logits).view, None, 1e-12)
    assert ((out["experts"].values >= 0) & (out["experts"].values < 5)).all()
    assert np.isnan(out["weights"].values[1]).all() and np.isfinite(out["weights"].values[[0, 2]]).all()


def run_mixture(x, gate_up, down, out, blank, shared=None) -> np.ndarray:
    """The whole mixture of the tokens x, routed as `out` says."""
    tokens, pairs = out.experts.shape[0], out.rows.shape[0]
    hidden = blank((pairs, gate_up.out_features))
    activated = blank((pairs, gate_up.out_features // 2))
    outputs, y = blank((pairs, down.out_features)), blank((tokens, down.out_features))
    grouped_linear(hidden.view, x, gate_up, out, by_token=True)
    silu_mul(activated.view, hidden.view)
    grouped_linear(outputs.view, activated.view, down, out, by_token=False)
    combine(y.view, outputs.view, out, shared)
    return y.memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "tokens, experts, top_k, hidden, intermediate",
    [(1, 4, 2, 36, 20), (13, 5, 3, 64, 48), (70, 8, 2, 100, 33), (150, 3, 1, 32, 64), (40, 64, 6, 24, 16)],
)
def test_a_mixture_matches_the_reference(
    tokens, experts, top_k, hidden, intermediate, dtype, routing, normal, store, blank, rng
):
    x, logits, shared = normal(tokens, hidden), normal(tokens, experts), normal(tokens, hidden)
    gate_up, gate_up_values = packed_experts(store, normal, rng.normal(size=(experts, 2 * intermediate, hidden)), dtype)
    down, down_values = packed_experts(store, normal, rng.normal(size=(experts, hidden, intermediate)), dtype)
    memory = routing(tokens, top_k, experts)
    route(views(memory), logits.view, None, 1e-12)
    chosen, weights = route_reference(logits.values, top_k, None, 1e-12)
    expected = mixture_reference(x.values, gate_up_values, down_values, chosen, weights)
    found = run_mixture(x.view, gate_up, down, views(memory), blank)
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())
    found = run_mixture(x.view, gate_up, down, views(memory), blank, shared.view)
    np.testing.assert_allclose(found, expected + shared.values, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("favourite", ["all", "one", "none"])
def test_an_expert_may_get_all_tokens_or_one_or_none(favourite, routing, normal, store, blank, rng):
    tokens, experts, top_k = 90, 6, 2
    logits = rng.normal(size=(tokens, experts))
    logits[:, 3] = {"all": 50.0, "one": -50.0, "none": -50.0}[favourite]
    if favourite == "one":
        logits[17, 3] = 50.0
    x, logits = normal(tokens, 40), store(logits)
    gate_up, gate_up_values = packed_experts(store, normal, rng.normal(size=(experts, 48, 40)))
    down, down_values = packed_experts(store, normal, rng.normal(size=(experts, 40, 24)))
    memory = routing(tokens, top_k, experts)
    route(views(memory), logits.view)
    assert memory["counts"].values[3] == {"all": tokens, "one": 1, "none": 0}[favourite]
    expected = mixture_reference(x.values, gate_up_values, down_values, *route_reference(logits.values, top_k))
    found = run_mixture(x.view, gate_up, down, views(memory), blank)
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


def test_a_token_has_the_same_bits_alone_and_in_a_batch(routing, normal, store, blank, rng):
    tokens, experts, top_k = 150, 7, 3
    x, logits = normal(tokens, 72), normal(tokens, experts)
    gate_up, _ = packed_experts(store, normal, rng.normal(size=(experts, 80, 72)), "bfloat16")
    down, _ = packed_experts(store, normal, rng.normal(size=(experts, 72, 40)), "bfloat16")
    memory = routing(tokens, top_k, experts)
    route(views(memory), logits.view, None, 1e-12)
    together = run_mixture(x.view, gate_up, down, views(memory), blank)
    for first, last in [(0, 1), (1, 8), (8, 41), (41, 150)]:
        part = views(memory).of(last - first)
        route(part, store(logits.memory[first:last]).view, None, 1e-12)
        found = run_mixture(store(x.memory[first:last]).view, gate_up, down, part, blank)
        np.testing.assert_array_equal(found, together[first:last])


def test_no_tokens_is_nothing_to_do(routing, normal, store, blank, rng):
    gate_up, _ = packed_experts(store, normal, rng.normal(size=(4, 32, 16)))
    down, _ = packed_experts(store, normal, rng.normal(size=(4, 16, 16)))
    memory = views(routing(0, 2, 4))
    route(memory, normal(0, 4).view)
    assert run_mixture(normal(0, 16).view, gate_up, down, memory, blank).shape == (0, 16)


def test_impossible_choices_and_shapes_are_refused(routing, normal, store, rng):
    with pytest.raises(ValueError, match="cannot go to 5 of 4 experts"):
        route(views(routing(3, 5, 4)), normal(3, 4).view)
    experts, _ = packed_experts(store, normal, rng.normal(size=(4, 32, 16)))
    with pytest.raises(ValueError, match="4 experts of 33 features take 256 rows, not 128"):
        ExpertWeights(experts.packed, 4, 33)
