"""Paddle's pickles: bytes of a good one changed, and programs of random instructions."""

import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.models.pdparams import read_pdparams
from tests.fuzz.mutations import assert_read_or_refused, mutated

ARRAYS = {"a.weight": np.ones((3, 4), np.float32), "b": np.zeros(2, np.float16), "c": np.arange(600, dtype=np.uint16)}
GOOD = pickle.dumps({**ARRAYS, "StructuredToParameterName@@": {"a.weight": "linear_0.w_0"}}, 4)
INSTRUCTIONS = [b")", b"N", b"\x88", b"}", b"(", b"t", b"\x85", b"\x86", b"\x87", b"s", b"u", b"\x94", b"R", b"b", b"0"]
INSTRUCTIONS += [
    b"K\x01",
    b"J\xff\xff\xff\xff",
    b"\x8a\xff" + bytes(255),
    b"\x8a\x08" + b"\x7f" * 8,
    b"h\x00",
    b"h\x01",
]
INSTRUCTIONS += [b"\x8c\x01a", b"C\x04abcd", b"\x93", b"X\xff\xff\xff\xff", b"cnumpy\ndtype\n", b"cos\nsystem\n", b"."]
INSTRUCTIONS += [
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"\x8e" + struct.pack("<Q", 2**63),
    b"\x85\x94h\x00\x86\x94",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("pdparams") / "model_state.pdparams"


def read_first_rows(path):
    for tensor in read_pdparams(path).values():
        if tensor.shape and tensor.shape[0]:
            assert tensor.rows(0, 1).shape == (1, *tensor.shape[1:])


def test_the_good_file_is_read(path):
    path.write_bytes(GOOD)
    assert {name: tensor.shape for name, tensor in read_pdparams(path).items()} == {
        name: array.shape for name, array in ARRAYS.items()
    }


@given(mutated(GOOD))
def test_a_mutated_file_is_read_or_refused(path, content):
    path.write_bytes(content)
    assert_read_or_refused(lambda: read_first_rows(path), path)


@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=40), st.integers(1, 3))
def test_a_random_program_is_read_or_refused(path, program, times):
    path.write_bytes(b"\x80\x04" + b"".join(program) * times + b".")
    assert_read_or_refused(lambda: read_first_rows(path), path)
