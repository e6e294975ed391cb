"""GGUF files: bytes of the header changed, whole and in parts, and metadata of other types and sizes."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.models.weights import open_checkpoint
from tests.fuzz.mutations import assert_read_or_refused, mutated, mutated_json
from tests.models.test_gguf_parts import write_parts
from tests.test_weights import HIDDEN, LLAMA_METADATA, Quantization, random_weights, write_gguf

TOKENS = {"tokenizer.ggml.tokens": [f"t{index}" for index in range(40)], "tokenizer.ggml.scores": [0.5] * 40}
METADATA = LLAMA_METADATA | TOKENS | {"split.count": 1, "general.alignment": 32, "tokenizer.chat_template": "{{ x }}"}
MIXTURE = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32, "expert_shared_count": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def good(directory):
    return write_gguf(directory / "good", random_weights(), METADATA, quantization=Quantization.Q4_0).read_bytes()


@pytest.fixture(scope="module")
def mixture(directory):
    """A file with stacked experts and rope divisors."""
    own = {key.removeprefix("llama."): value for key, value in LLAMA_METADATA.items()} | MIXTURE
    weights = {"blk.0.ffn_up_exps.weight": np.ones((2, 32, HIDDEN)), "rope_freqs.weight": np.ones(4)}
    weights |= {"blk.0.exp_probs_b.bias": np.ones(2), "blk.0.ffn_gate_inp.weight": np.ones((2, HIDDEN))}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    metadata = {f"ernie4_5-moe.{key}": value for key, value in own.items()}
    return write_gguf(directory / "mixture", weights, metadata, architecture="ernie4_5-moe").read_bytes()


def read_first_rows(path):
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        assert checkpoint.read_rows(name, 0, 1).array.shape == (1, *shape[1:])


def test_the_good_files_are_read(directory, good, mixture):
    for content in (good, mixture):
        (directory / "m.gguf").write_bytes(content)
        read_first_rows(directory / "m.gguf")


@pytest.mark.parametrize("name", ["good", "mixture"])
@settings(max_examples=settings().max_examples // 2)
@given(st.data())
def test_a_mutated_file_is_read_or_refused(directory, request, name, data):
    whole, path = request.getfixturevalue(name), directory / "m.gguf"
    header = whole.rindex(b".weight") + 40
    path.write_bytes(data.draw(mutated(whole, last=header)))
    assert_read_or_refused(lambda: read_first_rows(path), path)


@settings(max_examples=settings().max_examples // 4)
@given(st.data())
def test_a_mutated_part_is_read_or_refused(tmp_path_factory, data):
    parts = write_parts(tmp_path_factory.mktemp("parts"), random_weights(), 7)
    part = data.draw(st.sampled_from(parts))
    whole = part.read_bytes()
    header = whole.index(b"split.tensors.count") + 24 if part != parts[0] else 2000
    part.write_bytes(data.draw(mutated(whole, last=header)))
    assert_read_or_refused(lambda: read_first_rows(parts[1]), part.parent)


def writable(value):
    """Whether the writer can put it in a file."""
    if isinstance(value, list):
        return all(map(writable, value)) and len(set(map(type, value))) == 1 and not isinstance(value[0], list)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() == value
    if isinstance(value, float):
        return not 1e38 < abs(value) < float("inf")
    return isinstance(value, int) and 0 <= value < 2**32


@settings(max_examples=settings().max_examples // 2)
@given(mutated_json(METADATA))
def test_metadata_of_other_types_and_sizes_are_read_or_refused(directory, metadata):
    if isinstance(metadata, dict):
        usable = {key: value for key, value in metadata.items() if key.isprintable() and writable(value)}
        path = write_gguf(directory / "m.gguf", random_weights(), usable)
        assert_read_or_refused(lambda: read_first_rows(path), path)


@given(st.sampled_from(["Q", "q", "d"]), st.sampled_from(sorted(LLAMA_METADATA)), st.integers(0, 63))
def test_long_numbers_are_read_or_refused(directory, form, key, bit):
    path = directory / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in LLAMA_METADATA.items():
        if name == key:
            {"Q": writer.add_uint64, "q": writer.add_int64, "d": writer.add_float64}[form](
                name, -(2**bit) if form == "q" else 2**bit
            )
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_read_or_refused(lambda: read_first_rows(path), path)
