"""safetensors files and the index of several: bytes of the header changed, and values in its JSON."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fastdeploy.models.safetensors import read_safetensors
from fastdeploy.models.weights import open_checkpoint
from tests.fuzz.mutations import assert_read_or_refused, mutated, mutated_json
from tests.test_weights import random_weights, write_directory

WEIGHTS = {"a": np.ones((3, 4), np.float32), "b": np.zeros(2, np.float16), "c": np.ones((), np.float32)}
SHARDS = {"model.embed_tokens.weight": "model-0.safetensors", "model.norm.weight": "model-1.safetensors"}
INDEX = {"metadata": {"total_size": 1}, "weight_map": SHARDS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("safetensors") / "model", random_weights(), shards=2)


@pytest.fixture(scope="module")
def good(directory):
    save_file(WEIGHTS, directory / "good", metadata={"format": "pt"})
    return (directory / "good").read_bytes()


def read_first_rows(path):
    for tensor in read_safetensors(path).values():
        if tensor.num_rows:
            assert tensor.rows(0, 1).shape == (1, *tensor.shape[1:])


@given(st.data())
def test_a_mutated_file_is_read_or_refused(directory, good, data):
    path = directory / "good"
    path.write_bytes(data.draw(mutated(good)))
    assert_read_or_refused(lambda: read_first_rows(path), path)


@given(st.data())
def test_a_header_of_other_values_is_read_or_refused(directory, good, data):
    path, length = directory / "good", int.from_bytes(good[:8], "little")
    header = json.dumps(data.draw(mutated_json(json.loads(good[8 : 8 + length])))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + good[8 + length :])
    assert_read_or_refused(lambda: read_first_rows(path), path)


@given(mutated_json(INDEX))
def test_an_index_of_other_values_is_read_or_refused(directory, index):
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_read_or_refused(lambda: open_checkpoint(directory), path.parent)
