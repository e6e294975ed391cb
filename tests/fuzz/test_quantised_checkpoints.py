"""Quantised checkpoints: headers whose tensors are others than their configuration says, and other configurations."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.models.weights import open_checkpoint
from tests.fuzz.mutations import assert_read_or_refused, mutated, mutated_json
from tests.models.quantised_layouts import CASES
from tests.models.test_quantised_checkpoints import write

NAMES = ["gptq, act order", "awq", "packed int4, zeros", "fp8, blocks", "mxfp4"]
EACH = settings(max_examples=80)


class Good:
    """A checkpoint as it was written."""

    def __init__(self, directory, name):
        self.directory = directory
        write(directory, *CASES[name])
        self.weights = (directory / "model.safetensors").read_bytes()
        self.config = json.loads((directory / "config.json").read_text())
        self.header_length = int.from_bytes(self.weights[:8], "little")

    def with_other(self, weights=None, said=None):
        """The directory, with other bytes or another quantisation."""
        config = self.config if said is None else self.config | {"quantization_config": said}
        (self.directory / "model.safetensors").write_bytes(self.weights if weights is None else weights)
        (self.directory / "config.json").write_text(json.dumps(config))
        return self.directory


@pytest.fixture(scope="module", params=NAMES)
def good(request, tmp_path_factory):
    return Good(tmp_path_factory.mktemp("quantised"), request.param)


def read_all(directory):
    """The first rows of every tensor, as floats and as kernels take them."""
    checkpoint = open_checkpoint(directory)
    for name in checkpoint.names():
        count = min(3, checkpoint.shape(name)[0]) if checkpoint.shape(name) else 0
        assert checkpoint.read_rows(name, 0, count).array.shape[:1] == (count,)
        if checkpoint.encoded(name) is not None:
            assert len(checkpoint.read_codes(name, 0, count).blocks) == count


def test_the_good_checkpoint_is_read(good):
    read_all(good.with_other())


@EACH
@given(st.data())
def test_another_configuration_is_read_or_refused(good, data):
    directory = good.with_other(said=data.draw(mutated_json(good.config["quantization_config"])))
    assert_read_or_refused(lambda: read_all(directory), directory)


@EACH
@given(st.data())
def test_a_header_of_other_values_is_read_or_refused(good, data):
    start = 8 + good.header_length
    header = json.dumps(data.draw(mutated_json(json.loads(good.weights[8:start])))).encode()
    directory = good.with_other(struct.pack("<Q", len(header)) + header + good.weights[start:])
    assert_read_or_refused(lambda: read_all(directory), directory)


@EACH
@given(st.data())
def test_other_bytes_are_read_or_refused(good, data):
    directory = good.with_other(data.draw(mutated(good.weights, first=good.header_length)))
    assert_read_or_refused(lambda: read_all(directory), directory)
