"""Quantised checkpoints of Hugging Face, made by hand, against the values that their layouts stand for."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastdeploy.device import open_device
from fastdeploy.models import load_model
from fastdeploy.models.weights import open_checkpoint
from tests.models import reference
from tests.models.quantised_layouts import (
    CASES,
    save,
)
from tests.models.test_decoder import Steps
from tests.models.test_paddle import config_json
from tests.models.tiny import GROUPED, random_tensors

CONFIG = replace(
    GROUPED, hidden_size=128, intermediate_size=256, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32
)
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def write(directory, said, layout, config=CONFIG, dtype="float32", change=lambda tensors: None):
    """A checkpoint whose linear layers are quantised; the values that its tensors stand for, in float64."""
    generator, values, entries = np.random.default_rng(7), random_tensors(config), {}
    for name, array in list(values.items()):
        if "_proj.weight" not in name:
            entries[name] = ("F32", array)
            continue
        parts, values[name] = layout(generator, *array.shape)
        module = name.removesuffix(".weight")
        entries |= {module + (end if end[0] == "_" else f".{end}"): tensor for end, tensor in parts.items()}
    change(entries)
    directory.mkdir(exist_ok=True)
    save(directory / "model.safetensors", entries)
    content = config_json(config) | {"quantization_config": said, "torch_dtype": dtype, "rms_norm_eps": 1e-5}
    (directory / "config.json").write_text(json.dumps(content))
    return values


def logits(directory, quantization, dtype="auto"):
    model = load_model(open_checkpoint(directory), open_device(), dtype, 64, quantization, progress=False)
    return Steps(model).run((0, 0, IDS))


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_the_values_are_those_of_the_layout(case, tmp_path):
    values = write(tmp_path, *CASES[case])
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == set(values)
    for name, expected in values.items():
        found = checkpoint.read(name).array
        np.testing.assert_array_equal(found, expected.astype(np.float32), err_msg=name)
        np.testing.assert_array_equal(checkpoint.read_rows(name, 3, 13).array, found[3:13])


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_values(case, tmp_path):
    expected = reference.logits(CONFIG, write(tmp_path, *CASES[case]), "float32", IDS)
    for quantization, tolerance in {None: 3e-5, "exact": 3e-5, "auto": 2e-2}.items():
        assert distance(logits(tmp_path, quantization), expected) < tolerance, quantization


def log_of_loading(directory, caplog, quantization="auto"):
    with caplog.at_level(logging.INFO, "fastdeploy"):
        logits(directory, quantization)
    return caplog.text


def shuffled(tensors):
    """Another order for each module that has one: q, k and v read the same, but in three orders."""
    generator = np.random.default_rng(5)
    for name, (dtype, array) in list(tensors.items()):
        if name.endswith("g_idx"):
            tensors[name] = (dtype, generator.permutation(array))


def without_most_orders(tensors):
    for name in [name for name in tensors if name.endswith("g_idx") and ".k_proj" not in name and ".up" not in name]:
        del tensors[name]


@pytest.mark.parametrize("change", [shuffled, without_most_orders])
@pytest.mark.parametrize("quantization", ["exact", "auto"])
def test_weights_that_read_the_same_may_have_orders_of_their_own(change, quantization, tmp_path):
    write(tmp_path, GPTQ, gptq(act_order=True), change=change)
    values = {name: open_checkpoint(tmp_path).read(name).array for name in random_tensors(CONFIG)}
    expected = reference.logits(CONFIG, values, "float32", IDS)
    assert distance(logits(tmp_path, quantization), expected) < {"exact": 3e-5, "auto": 2e-2}[quantization]


def test_a_row_in_an_order_has_the_same_bits_alone(tmp_path):
    write(tmp_path, *CASES["gptq, act order"])
    together = logits(tmp_path, "auto")
    steps = Steps(load_model(open_checkpoint(tmp_path), open_device(), "auto", 64, "auto", progress=False))
    alone = np.concatenate([steps.run((0, index, [token])) for index, token in enumerate(IDS)])
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("case", [case for case in CASES if "2 bits" not in case and "3 bits" not in case])
def test_weights_take_no_more_than_a_tenth_more_than_in_the_file(case, tmp_path):
    write(tmp_path, *CASES[case])
    checkpoint = open_checkpoint(tmp_path)
    for name in checkpoint.names():
        if "_proj.weight" in name:
            stored = checkpoint.encoded(name).format.bits_per_weight / 8 * np.prod(checkpoint.shape(name))
            assert stored <= 1.10 * checkpoint._tensor(name).nbytes


def test_the_log_says_what_became_what(tmp_path, caplog):
    write(tmp_path, *CASES["gptq, 3 bits"])
    text = log_of_loading(tmp_path, caplog)
    assert "GPTQ 3 bits kept as int4 with zeros, float16 scales of 64 weights, 7 tensors (q_proj, k_proj" in text


@pytest.mark.parametrize(("said", "expected"), [("float16", "float16"), ("bfloat16", "bfloat16"), (None, "bfloat16")])
def test_the_dtype_is_what_the_configuration_says(said, expected, tmp_path):
    write(tmp_path, *CASES["awq"], dtype=said, change=lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert open_checkpoint(tmp_path).config.dtype == expected


def test_rows_of_no_multiple_of_32_are_floats_and_a_warning_says_so(tmp_path, caplog):
    config = replace(CONFIG, hidden_size=144)
    values = write(
        tmp_path, {**AWQ, "group_size": -1}, lambda generator, rows, width: CASES["awq"][1](generator, rows, width)
    )
    assert values and config
