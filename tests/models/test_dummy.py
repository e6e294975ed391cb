"""Models of random weights, from config.json alone."""

import json

import numpy as np
import pytest

from fastdeploy import LLM, SamplingParams
from fastdeploy.models.dummy import open_dummy
from tests.references.families import CASES

GREEDY = SamplingParams(temperature=0, max_tokens=4)
SHAPES = {"model.embed_tokens.weight": (131, 60), "model.norm.weight": (60,), "a.bias": (60,), "b.weight": (2000, 700)}


def write_config(directory, name="llama", **changes):
    (directory / "config.json").write_text(json.dumps({**CASES[name], **changes}))
    return directory


def opened(directory, seed=0):
    checkpoint = open_dummy(directory, seed)
    for name, shape in SHAPES.items():
        checkpoint.expect(name, shape)
    return checkpoint


def as_float32(tensor):
    return (tensor.array.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "bfloat16" else tensor.array


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_are_those_of_a_fresh_model(tmp_path, dtype):
    checkpoint = opened(write_config(tmp_path, torch_dtype=dtype))
    for name, shape in SHAPES.items():
        tensor = checkpoint.read(name)
        values = as_float32(tensor).astype(np.float64)
        assert (tensor.dtype, values.shape) == (dtype, shape)
        assert abs(values.mean() - name.endswith("norm.weight")) < 0.02 and 0.01 < values.std() < 0.03
    assert len(np.unique(as_float32(checkpoint.read("b.weight")), axis=0)) == SHAPES["b.weight"][0]


def test_values_depend_on_seed_and_name_and_not_on_slices(tmp_path, rng):
    first, same, other = (opened(write_config(tmp_path), seed) for seed in (1, 1, 2))
    for name, (rows, *_) in SHAPES.items():
        whole = as_float32(first.read(name))
        start, stop = sorted(rng.integers(0, rows + 1, 2).tolist())
        np.testing.assert_array_equal(as_float32(same.read_rows(name, start, stop)), whole[start:stop])
        assert not np.array_equal(as_float32(other.read(name)), whole)
    assert not np.array_equal(first.read("a.bias").array, first.read("model.norm.weight").array)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "ernie"])
def test_config_json_is_enough_to_generate(tmp_path, name):
    with LLM(write_config(tmp_path, name), load_format="dummy", max_num_seqs=2) as llm:
        by_ids, by_text = llm.generate([[1, 2, 3], "text"], GREEDY, use_tqdm=False)
        logits = llm.engine.runner.last_logits()
    assert np.isfinite(logits).all() and logits.std() > 0
    assert len(by_ids.outputs.token_ids) == len(by_text.outputs.token_ids) == 4
    assert by_text.prompt_token_ids == list(b"text")


def test_dummy_weights_are_quantised_like_others(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2}
    with LLM(write_config(tmp_path, **sizes), load_format="dummy", quantization="w8a8", max_num_seqs=2) as llm:
        assert len(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].outputs.token_ids) == 4
        assert llm.engine.runner.model.layers[0].qkv.format.name == "Q8_0"


def test_dummies_of_a_quantised_model_are_floats_and_a_warning_says_so(tmp_path, caplog):
    checkpoint = opened(write_config(tmp_path, quantization_config={"quant_method": "fp8"}))
    assert "quantised, by fp8; those that load_format='dummy' makes up are floats" in caplog.text
    assert {checkpoint.storage(name) for name in SHAPES} == {checkpoint.config.dtype}


def test_the_longest_sequence_is_what_the_kv_cache_holds_and_facts_say_so(tmp_path):
    keywords = {"load_format": "dummy", "block_size": 16, "max_num_seqs": 2}
    with LLM(write_config(tmp_path), **keywords) as llm:
        assert llm.facts["max_model_len"] == CASES["llama"]["max_position_embeddings"]
    with LLM(tmp_path, num_gpu_blocks_override=3, **keywords) as llm:
        assert llm.facts["max_model_len"] == 48
    with LLM(tmp_path, num_gpu_blocks_override=3, max_model_len=100, **keywords) as llm:
        assert llm.facts["max_model_len"] == 100


def test_a_model_without_config_json_is_refused(tmp_path):
    for model in (tmp_path, "no-such-model"):
        with pytest.raises(FileNotFoundError, match="needs a directory with config.json"):
            LLM(model, load_format="dummy")
    with pytest.raises(ValueError, match="load_format='random'.*'auto', 'dummy'"):
        LLM(tmp_path, load_format="random")


def test_an_end_that_the_vocabulary_lacks_changes_no_token(tmp_path):
    """Two requests at once, whose rows of logits lie side by side; min_tokens holds ends back by writing to them."""
    said = []
    params = SamplingParams(temperature=0, max_tokens=6, min_tokens=6)
    for ends in (None, 10**6, [CASES["llama"]["vocab_size"], 2**31 + 5]):
        with LLM(write_config(tmp_path, eos_token_id=ends), load_format="dummy", max_num_seqs=2) as llm:
            said.append([each.outputs.token_ids for each in llm.generate([[1, 2, 3], [4]], params, use_tqdm=False)])
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}}, 400),
        ({"sliding_window": 100}, 100),
    ],
)
def test_max_model_len_may_reach_as_far_as_scaled_rope_and_window_let_it(tmp_path, changes, limit):
    keywords = {"load_format": "dummy", "max_num_seqs": 1}
    with LLM(write_config(tmp_path, **changes), **keywords) as llm:
        assert llm.facts["max_model_len"] == limit
        prompt = [1] * (limit - 2)
        assert len(llm.generate([prompt], SamplingParams(ignore_eos=True), use_tqdm=False)[0].outputs.token_ids) == 2
    with pytest.raises(ValueError, match=f"max_model_len={limit + 1}.*at most {limit}"):
        LLM(tmp_path, max_model_len=limit + 1, **keywords)
