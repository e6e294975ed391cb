"""Loading: every tensor is read once, in slices, to its place and type; clear errors where it can't be."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from fastdeploy.device import DTYPE_BYTES, open_device
from fastdeploy.kernels.linear import LinearWeight, linear
from fastdeploy.models import load_model, loading
from fastdeploy.models.gguf import gguf_encoded
from fastdeploy.models.storage import StoredTensor
from fastdeploy.models.weights import Checkpoint
from tests.blocks import SCALES, STORAGES, random_blocks
from tests.models.reference import stored
from tests.models.tiny import BIASED, GROUPED, TIED, UNTIED, checkpoint, random_tensors


def load(source, dtype="float32"):
    return load_model(source, open_device(), dtype, max_positions=64, progress=False)


def unpacked(weight) -> np.ndarray:
    """A LinearWeight as [out_features, in_features], in the type that it is stored in (bfloat16: bits)."""
    dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[weight.data.dtype]
    size = int(np.prod(weight.data.shape))
    memory = (np.ctypeslib.ctypes.c_uint8 * (size * np.dtype(dtype).itemsize)).from_address(weight.data.data_ptr())
    panels = np.frombuffer(memory, dtype).reshape(weight.data.shape)
    return panels.transpose(0, 2, 1).reshape(-1, weight.in_features)[: weight.out_features]


def values(weight) -> np.ndarray:
    found = unpacked(weight)
    return (found.astype(np.uint32) << 16).view(np.float32) if found.dtype == np.uint16 else found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_fused_and_rounded_to_the_dtype(dtype):
    tensors = random_tensors(UNTIED)
    model = load(checkpoint(UNTIED, tensors), dtype)
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}"
        qkv = np.concatenate([tensors[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"])
        gate_up = np.concatenate([tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
        np.testing.assert_array_equal(values(layer.qkv), stored(qkv, dtype))
        np.testing.assert_array_equal(values(layer.feed_forward.gate_up), stored(gate_up, dtype))
        down = stored(tensors[f"{prefix}.mlp.down_proj.weight"], dtype)
        np.testing.assert_array_equal(values(layer.feed_forward.down), down)
    np.testing.assert_array_equal(values(model.lm_head), stored(tensors["lm_head.weight"], dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_load_as_they_are(dtype):
    tensors = random_tensors(TIED)
    model = load(checkpoint(TIED, tensors, dtype), dtype)
    np.testing.assert_array_equal(values(model.embedding), stored(tensors["model.embed_tokens.weight"], dtype))


def test_a_tied_table_is_stored_once():
    model = load(checkpoint(TIED, random_tensors(TIED)))
    assert model.lm_head is model.embedding


def test_reading_in_slices_reads_every_row_once(monkeypatch):
    tensors, read = random_tensors(BIASED), []
    source = checkpoint(BIASED, tensors)
    read_rows = source.read_rows

    def noting(name, start, stop):
        read.append((name, start, stop))
        return read_rows(name, start, stop)

    monkeypatch.setattr(source, "read_rows", noting)
    whole = load(checkpoint(BIASED, tensors))
    monkeypatch.setattr(loading, "SLICE_ELEMENTS", 500)
    sliced = load(source)
    for name, tensor in tensors.items():
        rows = [row for other, start, stop in read if other == name for row in range(start, stop)]
        assert sorted(rows) == list(range(len(tensor)))
    assert len(read) > len(tensors) + 20
    np.testing.assert_array_equal(values(sliced.layers[1].qkv), values(whole.layers[1].qkv))
    np.testing.assert_array_equal(values(sliced.embedding), values(whole.embedding))


def test_auto_is_the_checkpoints_dtype():
    for dtype in ("float32", "bfloat16"):
        config = replace(TIED, dtype=dtype)
        model = load(checkpoint(config, random_tensors(config)), "auto")
        assert model.dtype == dtype == model.embedding.data.dtype


def test_an_architecture_we_do_not_have_is_an_error_that_names_those_we_have():
    config = replace(TIED, architecture="BertModel")
    with pytest.raises(ValueError, match=r"'BertModel'.*LlamaForCausalLM"):
        load(checkpoint(config, {}))


def test_missing_and_unexpected_tensors_are_errors_before_anything_is_read():
    tensors = random_tensors(TIED)
    tensors["stray.weight"] = tensors.pop("model.norm.weight")
    source = checkpoint(TIED, tensors)
    with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight; 1 unexpected: stray.weight"):
        load(source)
    assert len(source.unread()) == len(tensors)


def test_a_tensor_of_another_shape_is_an_error_that_names_both_shapes():
    tensors = random_tensors(TIED)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((52, 35), np.float32)
    with pytest.raises(ValueError, match=r"up_proj.weight \(expected \[52, 36\], found \[52, 35\]\)"):
        load(checkpoint(TIED, tensors))


def test_weights_that_cannot_fit_are_an_error_that_names_the_sizes(monkeypatch):
    device = open_device()
    monkeypatch.setattr(device, "free_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r'the weights take .* GiB as float32, 0.0 GiB are free; .*dtype="bfloat16"'):
        load_model(checkpoint(TIED, random_tensors(TIED)), device, "float32", 64, progress=False)


def test_a_model_may_take_more_than_half_of_the_free_memory(monkeypatch):
    device, allocated = open_device(), []

    def empty(shape, dtype):
        allocated.append(math.prod(shape) * DTYPE_BYTES.get(dtype, 1))
        return make_empty(shape, dtype)

    make_empty = device.empty_weights
    monkeypatch.setattr(device, "empty_weights", empty)
    load_model(checkpoint(TIED, random_tensors(TIED)), device, "float32", 64, progress=False)
    room = int(1.5 * sum(allocated))
    allocated.clear()
    monkeypatch.setattr(device, "free_memory", lambda: room - sum(allocated))
    load_model(checkpoint(TIED, random_tensors(TIED)), device, "float32", 64, progress=False)


# Quantised weights


def quantised_checkpoint(tensors, storages, config=GROUPED, change=None):
    """A checkpoint in which the matrices whose names end with a key of `storages` are random ones of a GGUF type."""
    entries = {}
    for name, tensor in tensors.items():
        storage = next((value for key, value in storages.items() if name.endswith(key)), None)
        if storage is None or tensor.ndim == 1:
            entries[name] = StoredTensor(tensor.shape, "float32", "float32", tensor.nbytes, rows_of(tensor))
            continue
        blocks = random_blocks(storage, *tensor.shape, np.random.default_rng(len(entries)))
        if change is not None:
            change(blocks)
        values = quants.dequantize(blocks, GGMLQuantizationType[storage])
        encoded = gguf_encoded(storage, rows_of(blocks))
        entries[name] = StoredTensor(tensor.shape, "float32", storage, blocks.nbytes, rows_of(values), encoded)
    return Checkpoint(Path("quantised"), config, entries)


def rows_of(array):
    return lambda start, stop: array[start:stop]


def quantised_values(weight) -> np.ndarray:
    """What a weight holds, by multiplying with the identity."""
    out = np.empty((weight.in_features, weight.out_features), np.float32)
    linear(out, np.eye(weight.in_features, dtype=np.float32), weight)
    return out.T


def file_values(source, *names):
    return np.concatenate([source.read(name).array for name in names])


QKV = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]


@pytest.mark.parametrize("storage", STORAGES)
def test_what_the_file_has_quantised_stays_as_it_is(storage, caplog):
    config = replace(GROUPED, hidden_size=256, intermediate_size=512, num_heads=16)
    storages = {"proj.weight": storage, "embed_tokens.weight": storage}
    source = quantised_checkpoint(random_tensors(config), storages, config)
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        model = load_model(source, open_device(), "float32", 64, "exact", progress=False)
    assert model.layers[1].qkv.format.name == model.lm_head.format.name == storage
    np.testing.assert_array_equal(quantised_values(model.layers[1].qkv), file_values(source, *QKV))
    np.testing.assert_array_equal(quantised_values(model.embedding), file_values(source, "model.embed_tokens.weight"))
    assert f"{storage} kept" in caplog.text and "converted" not in caplog.text


def test_a_matrix_of_several_formats_keeps_each_at_its_own_size(caplog):
    source = quantised_checkpoint(random_tensors(GROUPED), {"v_proj.weight": "Q5_0", "proj.weight": "Q4_0"})
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        model = load_model(source, open_device(), "float32", 64, "exact", progress=False)
    qkv = model.layers[1].qkv
    assert [part.format.name for part in qkv.parts] == ["Q4_0", "Q5_0"] and qkv.takes_integers and qkv.wide_inputs
    assert model.layers[1].feed_forward.down.format.name == "Q4_0"
    np.testing.assert_array_equal(quantised_values(qkv), file_values(source, *QKV))
    assert "Q5_0 kept, 2 tensors (v_proj)" in caplog.text and "converted" not in caplog.text


def test_quantisations_that_no_kernel_knows_become_q8_and_the_log_says_so(caplog):
    config = replace(GROUPED, hidden_size=256)
    source = quantised_checkpoint(random_tensors(config), {"v_proj.weight": "Q2_K", "q_proj.weight": "Q4_0"}, config)
    with caplog.at_level(logging.INFO, logger="fastdeploy"):
        model = load_model(source, open_device(), "float32", 64, "exact", progress=False)
    expected = file_values(source, *QKV)
    np.testing.assert_allclose(quantised_values(model.layers[1].qkv), expected, atol=np.abs(expected).max() / 127)
    assert "Q2_K converted to Q8_0, 2 tensors (v_proj)" in caplog.text


@pytest.mark.parametrize("quantization", ["exact", None])
@pytest.mark.parametrize("storage", STORAGES)
def test_scales_that_are_no_numbers_are_named(storage, quantization):
    if storage == "MXFP4":
        spoilt = lambda blocks: np.put(blocks, 0, 255)  # noqa: E731
    else:
        spoilt = lambda blocks: blocks[:, SCALES[storage][-1] :][:, :2].view(np.float16).fill(np.nan)  # noqa: E731
    config = replace(GROUPED, hidden_size=256, intermediate_size=512, num_heads=16)
    source = quantised_checkpoint(random_tensors(config), {"layers.1.mlp.down_proj.weight": storage}, config, spoilt)
    message = (
        rf"quantised: tensor 'model.layers.1.mlp.down_proj.weight' \({storage}\) has .* NaN, infinite or too large"
    )
    with pytest.raises(ValueError, match=message):
        load_model(source, open_device(), "float32", 64, quantization, progress=False)


@pytest.mark.parametrize(
    "quantization, format, steps",
    [("wint8", "Q8_0", 254), ("w8a8", "Q8_0", 254), ("wint4", "Q4_1", 15), ("w4a8", "Q4_1", 15)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_weights_are_quantised_in_loading_but_not_the_tables(quantization, format, steps, dtype):
    tensors = random_tensors(GROUPED)
    source = checkpoint(GROUPED, tensors, dtype)
    model = load_model(source, open_device(), dtype, 64, quantization, progress=False)
    weight = model.layers[1].attention_output
    assert isinstance(model.embedding, LinearWeight) and weight.format.name == format
    assert model.mode.int8_activations == quantization.endswith("a8")
    expected = stored(tensors["model.layers.1.self_attn.o_proj.weight"], dtype)
    span = 2 * np.abs(expected).max()
    assert np.abs(quantised_values(weight) - expected).max() <= span / steps * 0.51


def test_layers_that_are_no_multiple_of_a_group_stay_floats():
    model = load_model(checkpoint(TIED, random_tensors(TIED)), open_device(), "float32", 64, "w8a8", progress=False)
    assert isinstance(model.layers[0].qkv, LinearWeight)


def test_without_quantization_everything_becomes_floats():
    source = quantised_checkpoint(random_tensors(GROUPED), {"proj.weight": "Q4_1"})
    assert isinstance(load(source).layers[0].qkv, LinearWeight)
