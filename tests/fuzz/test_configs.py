"""config.json and generation_config.json: bytes changed, and values of other types and sizes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.models.configs import read_configs
from fastdeploy.models.dummy import open_dummy
from tests.fuzz.mutations import assert_read_or_refused, mutated, mutated_json
from tests.references.families import CASES

GENERATION = {"eos_token_id": [2, 3], "temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
FILES = ("config.json", "generation_config.json")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


def write(directory, **contents):
    for name in FILES:
        content = contents[name.removesuffix(".json")]
        (directory / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@given(st.sampled_from(sorted(CASES)).flatmap(lambda name: mutated_json(CASES[name])))
def test_a_config_of_other_values_is_read_or_refused(directory, config):
    write(directory, config=config, generation_config=GENERATION)
    assert_read_or_refused(lambda: open_dummy(directory, seed=0), directory)


@given(mutated_json(GENERATION))
def test_a_generation_config_of_other_values_is_read_or_refused(directory, generation_config):
    write(directory, config=CASES["llama"], generation_config=generation_config)
    assert_read_or_refused(lambda: read_configs(directory), directory)


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=settings().max_examples // 2)
@given(st.data())
def test_mutated_files_are_read_or_refused(directory, file, data):
    contents = {"config": json.dumps(CASES["qwen3"]).encode(), "generation_config": json.dumps(GENERATION).encode()}
    key = file.removesuffix(".json")
    write(directory, **contents | {key: data.draw(mutated(contents[key]))})
    assert_read_or_refused(lambda: read_configs(directory), directory)
