"""Mixtures of experts in every format: what a file has quantised stays so, and computes what its values say."""

from __future__ import annotations

import logging
import re

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Storage

from fastdeploy.device import open_device
from fastdeploy.kernels.linear import LinearWeight
from fastdeploy.kernels.moe import FusedExperts
from fastdeploy.models import load_model
from fastdeploy.models.formats import GGUF_FORMATS
from fastdeploy.models.storage import Encoded, StoredTensor
from fastdeploy.models.weights import Checkpoint, open_checkpoint
from tests.blocks import STORAGES, random_blocks
from tests.models.test_decoder import Steps
from tests.models.test_formats import write_gguf
from tests.models.test_sharding import divided_logits, logits_of
from tests.references.families import CASES, prompts, tensors, write_checkpoint

SIZES = {"hidden_size": 256, "head_dim": 32, "intermediate_size": 256, "moe_intermediate_size": 256}
MIXTURES = {name: CASES[name] | SIZES for name in ("qwen3 moe", "ernie moe")}


def load(source, quantization):
    return load_model(source, open_device(), "float32", 64, quantization, progress=False)


def logits(source, quantization):
    """Keys and values are floats: a router may tip over for less than they lose in int8."""
    return Steps(load(source, quantization), "float32").run((0, 0, prompts(MIXTURES["ernie moe"])[-1]))


def feed_forward(model):
    """The last layer's, a mixture in all cases."""
    return model.layers[-1].feed_forward


@pytest.fixture
def quantised_gguf(monkeypatch, tmp_path):
    """quantised_gguf(config, storages): a file whose tensors named like a key of `storages` are random ones."""

    def build(config, storages):
        add_tensor, rng = gguf.GGUFWriter.add_tensor, np.random.default_rng(0)

        def add(writer, name, array):
            storage = next((storage for pattern, storage in storages.items() if re.search(pattern, name)), None)
            if storage is None:
                return add_tensor(writer, name, array)
            blocks = random_blocks(storage, array.size // array.shape[-1], array.shape[-1], rng)
            return add_tensor(writer, name, blocks.reshape(*array.shape[:-1], -1), raw_dtype=Storage[storage])

        monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add)
        return open_checkpoint(write_gguf(tmp_path / "model.gguf", config, tensors(config)))

    return build


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_stay_as_the_file_has_them(name, storage, quantised_gguf, caplog):
    """With float activations they give the logits of the values that the gguf package reads there, bit by bit."""
    source = quantised_gguf(MIXTURES[name], {"_exps|_shexp": storage})
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        mixture = feed_forward(load(source, "exact"))
    assert mixture.gate_up.packed.format.name == mixture.down.packed.format.name == storage
    assert mixture.router.data.dtype == "float32" and "converted" not in caplog.text
    np.testing.assert_array_equal(logits(source, "exact"), logits(source, None))


def test_experts_take_what_they_take_in_the_file(quantised_gguf):
    source = quantised_gguf(MIXTURES["qwen3 moe"], {"(gate|up)_exps": "Q4_K", "down_exps": "Q6_K"})
    mixture = feed_forward(load(source, "auto"))
    in_file = sum(source._tensors[name].nbytes for name in source.names() if ".2.mlp.experts." in name)
    assert mixture.gate_up.packed.nbytes + mixture.down.packed.nbytes <= 1.03 * in_file


@pytest.mark.parametrize("quantization", ["exact", "auto"])
def test_gate_and_up_in_two_formats_keep_both(quantization, quantised_gguf):
    source = quantised_gguf(MIXTURES["ernie moe"], {"gate_exps": "Q4_K", "up_exps": "Q6_K", "down_exps": "Q5_0"})
    gate_up = feed_forward(load(source, quantization)).gate_up
    assert isinstance(gate_up, FusedExperts)
    assert [part.packed.format.name for part in gate_up.parts] == ["Q4_K", "Q6_K"]
    expected, found = logits(source, None), logits(source, quantization)
    if quantization == "exact":
        np.testing.assert_array_equal(found, expected)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.1 * expected.std()


@pytest.mark.parametrize("quantization, storage", [("wint8", "Q8_0"), ("wint4", "Q4_1"), ("w8a8", "Q8_0")])
@pytest.mark.parametrize("name", MIXTURES)
def test_float_experts_become_what_the_mode_says(name, quantization, storage, tmp_path):
    config = MIXTURES[name]
    write_checkpoint(tmp_path, config)
    source = open_checkpoint(tmp_path)
    mixture = feed_forward(load(source, quantization))
    assert mixture.gate_up.packed.format.name == mixture.down.packed.format.name == storage
    assert isinstance(mixture.router, LinearWeight) and mixture.router.data.dtype == "float32"
    rounded = Checkpoint(source.path, source.config, dict(source._tensors))
    for tensor in rounded.names():
        if tensor.endswith("_proj.weight"):
            kind = Storage["Q8_0" if tensor.endswith("v_proj.weight") else storage]
            blocks = gguf.quants.quantize(source.read(tensor).array, kind)
            rounded._tensors[tensor] = floats(gguf.quants.dequantize(blocks, kind))
    original, expected, found = logits(source, None), logits(rounded, None), logits(source, quantization)
    change = np.sqrt(np.mean((expected - original) ** 2))
    assert np.sqrt(np.mean((found - expected) ** 2)) < (2 if quantization.endswith("a8") else 0.1) * change


def floats(values):
    return StoredTensor(values.shape, "float32", "float32", values.nbytes, lambda start, stop: values[start:stop])


def quantised(storage, shape, rng):
    """Random values of a GGUF type, as they are stored."""
    blocks, found = random_blocks(storage, *shape, rng), GGUF_FORMATS[storage]
    values = gguf.quants.dequantize(blocks, Storage[storage])
    encoded = Encoded(found.format, found.layout, lambda start, stop: found.codes(blocks[start:stop]))
    rows = lambda start, stop: values[start:stop]  # noqa: E731
    return StoredTensor(shape, "float32", storage, blocks.nbytes, rows, encoded)


@pytest.mark.parametrize(
    "storages, became, said",
    [
        (["Q4_K", "Q6_K"], "Q8_0", "come as Q4_K, Q6_K; all become Q8_0"),
        (["Q4_0", None], None, "come as Q4_0, floats; all become floats"),
    ],
)
def test_experts_of_several_formats_get_one(storages, became, said, tmp_path, caplog, rng):
    """In a Hugging Face directory each expert's tensors are stored as somebody saw fit."""
    write_checkpoint(tmp_path, MIXTURES["qwen3 moe"])
    source = open_checkpoint(tmp_path)
    for name in source.names():
        expert = re.search(r"experts\.(\d+)\.down", name)
        storage = storages[int(expert[1]) % 2] if expert else None
        if storage:
            source._tensors[name] = quantised(storage, source.shape(name), rng)
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        down = feed_forward(load(source, "exact")).down.packed
    assert (None if isinstance(down, LinearWeight) else down.format.name) == became
    assert f"experts.0.down_proj.weight and the other experts' {said}" in caplog.text
    expected = logits(source, None)
    change = np.median(np.abs(logits(source, "exact") - expected))  # a token may go to another expert for it
    assert change < 0.03 * expected.std() and (change == 0) == (became is None)


@pytest.mark.parametrize("storage", ["Q4_1", "Q4_K", "Q6_K"])
def test_ranks_share_quantised_experts_between_their_groups(storage, quantised_gguf):
    """Half of a block of 256 weights for each rank: the very values of the whole."""
    config = MIXTURES["ernie moe"] | {"num_attention_heads": 8}
    source = quantised_gguf(config, {"_exps|_shexp": storage})
    ids = prompts(config)[-1]
    expected = logits_of(source, ids, "exact")
    found = divided_logits(source, 2, ids, "exact")[0]
    assert np.abs(found - expected).max() < 3e-5 * np.abs(expected).max()


def test_shares_that_cut_groups_are_floats_and_say_so_once_a_matrix(quantised_gguf, caplog):
    config = MIXTURES["qwen3 moe"] | {"moe_intermediate_size": 96}
    source = quantised_gguf(config, {"_exps": "Q4_0"})
    ids = prompts(config)[-1]
    expected = logits_of(source, ids, "exact")
    with caplog.at_level(logging.WARNING, logger="fastdeploy"):
        found = divided_logits(source, 2, ids, "exact")[0]
    assert np.abs(found - expected).max() < 3e-5 * np.abs(expected).max()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 * config["num_hidden_layers"]  # of each rank
    assert "experts.0.down_proj.weight: 48 input features a rank cut groups of 32" in warnings[0]


@pytest.mark.parametrize("quantization", ["exact", "auto"])
def test_a_token_has_the_same_bits_alone_in_chunks_and_in_a_batch(quantization, quantised_gguf):
    source = quantised_gguf(MIXTURES["ernie moe"], {"(gate|up)_exps": "Q4_K", "down_exps": "Q6_K", "_shexp": "Q4_0"})
    steps, ids = Steps(load(source, quantization)), [prompts(MIXTURES["ernie moe"])[-1], [5, 3, 9, 1, 2, 8, 6]]
    together = steps.run((0, 0, ids[0]), (1, 0, ids[1]))
    np.testing.assert_array_equal(steps.run((2, 0, ids[0])), together[: len(ids[0])])
    chunks = [steps.run((3, 0, ids[1][:1])), steps.run((3, 1, ids[1][1:5])), steps.run((3, 5, ids[1][5:]))]
    np.testing.assert_array_equal(np.concatenate(chunks), together[len(ids[0]) :])


def test_widths_that_are_no_whole_groups_stay_floats(tmp_path):
    write_checkpoint(tmp_path, MIXTURES["ernie moe"] | {"moe_intermediate_size": 36})
    source = open_checkpoint(tmp_path)
    mixture = feed_forward(load(source, "w8a8"))
    assert mixture.gate_up.packed.format.name == "Q8_0" and isinstance(mixture.down.packed, LinearWeight)
    expected, found = logits(source, None), logits(source, "w8a8")
    assert 0 < np.sqrt(np.mean((found - expected) ** 2)) < 0.1 * expected.std()


def test_an_expert_that_is_missing_is_named(tmp_path):
    write_checkpoint(tmp_path, MIXTURES["qwen3 moe"])
    source = open_checkpoint(tmp_path)
    del source._tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        load(source, "w4a8")
