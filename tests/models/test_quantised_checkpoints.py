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
