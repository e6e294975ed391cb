"""Saved models: what the model computes with, in llama.cpp's names and order; loaded again, they have the same bits."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, quants

from fastdeploy.device import open_device
from fastdeploy.models import load_model
from fastdeploy.models.saving import rounded_to_bfloat16, save
from fastdeploy.models.weights import open_checkpoint
from tests.models import reference
from tests.models.test_calibration import MIXTURE, SEQUENCES, mixture_tensors
from tests.models.test_decoder import Steps, random_ids
from tests.models.tiny import BIASED, GROUPED, QWEN3, UNTIED, checkpoint, random_tensors

VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"<{token_id}>" for token_id in range(131)],
    "tokenizer.ggml.eos_token_id": 7,
}
ERNIE = replace(GROUPED, architecture="Ernie4_5ForCausalLM", rope_interleaved=True)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
}
CONFIGS = {
    "llama": GROUPED,
    "untied": replace(UNTIED, hidden_size=96, intermediate_size=64),
    "biased": replace(BIASED, hidden_size=64, intermediate_size=64, num_heads=4, head_dim=16, num_kv_heads=2),
    "widths of no whole groups": UNTIED,
    "qwen3": QWEN3,
    "ernie": ERNIE,
    **{kind: replace(GROUPED, rope_scaling=scaling) for kind, scaling in SCALINGS.items()},
    "mixture": replace(MIXTURE, rope_interleaved=True),
}


def tensors_of(config):
    return mixture_tensors() if config.mixture else random_tensors(config)


def load(source, quantization, dtype="auto", calibration=None):
    arguments = (source, open_device(), dtype, 512, quantization)
    return load_model(*arguments, progress=False, calibration=calibration)


def saved(tmp_path, config, quantization, dtype="float32", calibration=None):
    """(path, the model that was saved), from tensors in `dtype`."""
    source = checkpoint(replace(config, dtype=dtype), tensors_of(config), dtype)
    model = load(source, quantization, calibration=calibration)
    save(tmp_path / "saved.gguf", model, source, VOCABULARY)
    return tmp_path / "saved.gguf", model


def logits(model):
    return Steps(model).run((0, 0, random_ids(70)))


@pytest.mark.parametrize("quantization, again", [("wint4", "exact"), ("w8a8", "auto"), ("w4a8", "auto"), (None, None)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_gives_the_same_bits(name, quantization, again, tmp_path):
    path, model = saved(tmp_path, CONFIGS[name], quantization, calibration=SEQUENCES)
    loaded = load(open_checkpoint(path), again)
    if name == "llama3":  # GGUF keeps what its scaling divides by in float32
        tolerance = 0.1 if model.mode.int8_activations else 1e-4  # an integer may become the next one
        np.testing.assert_allclose(logits(loaded), logits(model), atol=tolerance)
    else:
        np.testing.assert_array_equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_keeps_its_dtype(dtype, tmp_path):
    path, model = saved(tmp_path, GROUPED, "wint4", dtype)
    loaded = load(open_checkpoint(path), "exact")
    assert loaded.dtype == model.dtype == dtype
    np.testing.assert_array_equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["llama", "qwen3", "ernie", "yarn", "mixture"])
def test_its_configuration_is_that_of_the_model(name, tmp_path):
    path, _ = saved(tmp_path, CONFIGS[name], "wint4")
    found, config = open_checkpoint(path).config, CONFIGS[name]
    scaling = config.rope_scaling and {**config.rope_scaling, "beta_fast": 32.0, "beta_slow": 1.0}
    expected = replace(config, eos_token_ids=(7,), rope_scaling=scaling, dtype="float32")
    assert replace(found, rms_norm_eps=config.rms_norm_eps) == expected
    assert found.rms_norm_eps == pytest.approx(config.rms_norm_eps)


def test_its_blocks_have_the_values_of_the_weights_in_llama_cpps_order(tmp_path):
    path, _ = saved(tmp_path, GROUPED, "wint8")
    tensors, found = random_tensors(GROUPED), {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for ours, theirs, heads in (("q_proj", "attn_q", 6), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        tensor = found[f"blk.1.{theirs}.weight"]
        assert tensor.tensor_type.name == "Q8_0"
        weight = tensors[f"model.layers.1.self_attn.{ours}.weight"]
        if heads:  # as llama.cpp's converter does it
            weight = weight.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(weight.shape)
        error = np.abs(quants.dequantize(tensor.data, tensor.tensor_type) - weight)
        assert error.max() <= np.abs(weight).max() / 254 * 1.15  # a float16's rounding included
    np.testing.assert_array_equal(
        found["blk.0.attn_norm.weight"].data, tensors["model.layers.0.input_layernorm.weight"]
    )


def test_experts_are_one_tensor(tmp_path):
    path, _ = saved(tmp_path, CONFIGS["mixture"], None)
    found, tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}, mixture_tensors()
    experts = [tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"] for expert in range(4)]
    np.testing.assert_array_equal(found["blk.1.ffn_up_exps.weight"].data, np.stack(experts))


def test_what_was_saved_saves_to_the_same_file(tmp_path):
    path, _ = saved(tmp_path, GROUPED, "wint4", "bfloat16")
    again, source = tmp_path / "again.gguf", open_checkpoint(path)
    save(again, load(source, "auto"), source, None)
    first, second = GGUFReader(path), GGUFReader(again)
    keys = {key for key in first.fields if not key.startswith("GGUF.")}
    assert keys == {key for key in second.fields if not key.startswith("GGUF.")}
    for key in keys:
        assert first.fields[key].contents() == second.fields[key].contents(), key
        assert first.fields[key].types == second.fields[key].types, key
    contents = [
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in file.tensors}
        for file in (first, second)
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("storage", ["Q4_0", "Q5_1", "Q2_K"])
def test_a_gguf_files_own_quantisation_stays_and_the_converted_is_what_it_became(storage, tmp_path):
    source = quantised_file(tmp_path / "source.gguf", storage)
    model = load(open_checkpoint(source), "exact")
    save(tmp_path / "saved.gguf", model, open_checkpoint(source), None)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "saved.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == ("Q8_0" if storage == "Q2_K" else storage)
    np.testing.assert_array_equal(logits(load(open_checkpoint(tmp_path / "saved.gguf"), "exact")), logits(model))


def quantised_file(path, storage):
    """A GGUF model of 256 hidden features whose matrices are stored in one quantisation."""
    config = replace(GROUPED, hidden_size=256, intermediate_size=256, num_heads=4, head_dim=64)
    dense = checkpoint(replace(config, dtype="float32"), random_tensors(config))
    save(path, load(dense, None), dense, VOCABULARY)
    floats, kind = GGUFReader(path), gguf.GGMLQuantizationType[storage]
    writer = GGUFWriter(path.with_suffix(".new"), "llama")
    for key, field in floats.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in floats.tensors:
        if "blk" in tensor.name and tensor.data.ndim == 2:
            writer.add_tensor(tensor.name, blocks_of(tensor.data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path.with_suffix(".new").replace(path)


def blocks_of(matrix, kind):
    try:
        return quants.quantize(np.ascontiguousarray(matrix), kind)
    except NotImplementedError:  # the package only reads it: random bytes, with scales that are small numbers
        size = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = np.random.default_rng(0).integers(0, 256, (len(matrix), size), np.uint8)
        blocks[:, -4:] = np.array([0.002, 0.001], np.float16).view(np.uint8)
        return blocks


def test_a_failure_leaves_what_was_there_before(tmp_path, monkeypatch):
    path = tmp_path / "saved.gguf"
    path.write_bytes(b"precious")
    source = checkpoint(GROUPED, random_tensors(GROUPED))
    model = load(source, "wint4")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, model, source, VOCABULARY)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_experts_whose_weights_are_not_divided_by_their_sum_are_refused(tmp_path):
    config = replace(MIXTURE, mixture=replace(MIXTURE.mixture, weight_floor=None))
    with pytest.raises(ValueError, match="weights of experts are not divided"):
        saved(tmp_path, config, "wint4")


def test_rounding_to_bfloat16_is_to_nearest_and_keeps_nan():
    values = np.array([1.0, 1.00390625, 1.01171875, -3e38, 3.4e38, np.inf, np.nan, 1e-40, 0.1], np.float32)
    found = (rounded_to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(found[finite], reference.stored(values[finite], "bfloat16"))
    assert np.isnan(found[~finite]).all()
