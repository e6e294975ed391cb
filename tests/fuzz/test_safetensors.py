"""safetensors files and the index of several: bytes of the header changed, and values in its JSON."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.models.weights import open_checkpoint
from tests.fuzz.mutations import assert_read_or_refused, mutated, mutated_json
from tests.test_weights import CONFIG_JSON, HIDDEN, random_weights, write_directory

NAMES = ["ernie.layers.0.self_attn.qkv_proj.weight", "ernie.layers.0.mlp.up_gate_proj.weight", "ernie.norm.weight"]
SHAPES = [(HIDDEN, 40), (8, 6), ()]
SHARDS = {"model.embed_tokens.weight": "model-0.safetensors", "model.norm.weight": "model-1.safetensors"}
INDEX = {"metadata": {"total_size": 1}, "weight_map": SHARDS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("safetensors") / "model", random_weights(), shards=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file as Paddle's libraries write it, so that its tensors are renamed, split and transposed, too."""
    weights = {name: np.ones(shape, np.float32) for name, shape in zip(NAMES, SHAPES, strict=True)}
    ernie = CONFIG_JSON | {"architectures": ["Ernie4_5_ForCausalLM"]}
    return write_directory(tmp_path_factory.mktemp("ernie"), weights, ernie) / "model.safetensors"


@pytest.fixture(scope="module")
def good(path):
    return path.read_bytes()


def read_first_rows(path):
    checkpoint = open_checkpoint(path.parent)
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if shape and shape[0]:
            assert checkpoint.read_rows(name, 0, 1).array.shape == (1, *shape[1:])


def test_the_good_file_is_read(path, good):
    read_first_rows(path)


@given(st.data())
def test_a_mutated_file_is_read_or_refused(path, good, data):
    path.write_bytes(data.draw(mutated(good, last=int.from_bytes(good[:8], "little"))))
    assert_read_or_refused(lambda: read_first_rows(path), path)


@given(st.data())
def test_a_header_of_other_values_is_read_or_refused(path, good, data):
    length = int.from_bytes(good[:8], "little")
    header = json.dumps(data.draw(mutated_json(json.loads(good[8 : 8 + length])))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + good[8 + length :])
    assert_read_or_refused(lambda: read_first_rows(path), path)


@given(mutated_json(INDEX))
def test_an_index_of_other_values_is_read_or_refused(directory, index):
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_read_or_refused(lambda: open_checkpoint(directory), path.parent)
