"""Checkpoints that Paddle wrote: the same model as Hugging Face's layout of it, and no code run to read them."""

import json
import os
import pickle
import random
import re

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from fastdeploy.models import pdparams
from fastdeploy.models.pdparams import read_pdparams
from fastdeploy.models.weights import open_checkpoint
from tests.models.tiny import TIED, UNTIED, random_tensors


def config_json(config):
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def paddle_tensors(tensors, prefix="ernie", fused=True):
    """Hugging Face's tensors as Paddle's libraries name and lay them out."""
    joined = {}
    for name, tensor in tensors.items():
        place = re.sub(r"\b[qkv](?=_proj)", "qkv", re.sub(r"\b(gate|up)(?=_proj)", "up_gate", name)) if fused else name
        joined.setdefault(place, []).append(tensor)
    renamed = {}
    for name, parts in joined.items():
        tensor = np.concatenate(parts)  # q, k, v and gate, up: in the order in which Hugging Face has them
        is_linear = tensor.ndim == 2 and name.endswith(".weight") and "embed_tokens" not in name
        renamed[name.replace("model.", f"{prefix}.")] = np.ascontiguousarray(tensor.T) if is_linear else tensor
    return renamed


def write(path, config, tensors, ending=".safetensors", shards=1):
    """A checkpoint directory; `config`: a ModelConfig or config.json. In shards, each has every so-many-th tensor."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config if isinstance(config, dict) else config_json(config)))
    save = save_file if ending == ".safetensors" else lambda shard, file: paddle.save(shard, str(file), protocol=4)
    stem = {".safetensors": "model", ".pdparams": "model_state"}[ending]
    if shards == 1:
        save(tensors, path / f"{stem}{ending}")
        return path
    weight_map = {name: f"{stem}-{index % shards}{ending}" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file)
    (path / f"{stem}{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("ending", "shards"), [(".safetensors", 1), (".safetensors", 3), (".pdparams", 1), (".pdparams", 2)]
)
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_tensors_equal_those_of_the_other_flavour(tmp_path, config, ending, shards, fused):
    tensors = random_tensors(config)
    written = paddle_tensors(tensors, fused=fused)
    checkpoint = open_checkpoint(write(tmp_path / "paddle", config, written, ending, shards))
    checkpoint.check({name: tensor.shape for name, tensor in tensors.items()})
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    rng = random.Random(0)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name).array, tensor, err_msg=name)
        start, stop = sorted(rng.choices(range(len(tensor) + 1), k=2))
        np.testing.assert_array_equal(checkpoint.read_rows(name, start, stop).array, tensor[start:stop], err_msg=name)


def test_other_models_of_paddle_are_transposed_too(tmp_path):
    tensors = random_tensors(TIED)
    written = paddle_tensors(tensors, prefix="llama", fused=False)
    checkpoint = open_checkpoint(write(tmp_path / "llama", TIED, written, ".pdparams"))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name).array, tensor, err_msg=name)


def test_layers_for_further_tokens_are_no_weights(tmp_path):
    tensors = random_tensors(TIED)
    extra = {"ernie.mtp_block.0.mlp.down_proj.weight": np.ones((2, 3), np.float32)}
    path = write(tmp_path / "mtp", TIED, paddle_tensors(tensors) | extra)
    open_checkpoint(path).check({name: tensor.shape for name, tensor in tensors.items()})


def test_tensors_without_rows_are_neither_split_nor_a_crash(tmp_path):
    names = ["ernie.layers.0.self_attn.qkv_proj.weight", "ernie.layers.0.mlp.up_gate_proj.weight"]
    for shape in [(), (0,), (4, 0), (0, 4)]:
        path = write(tmp_path / str(shape), TIED, {name: np.ones(shape, np.float32) for name in names})
        with pytest.raises(ValueError, match="the tensors don't fit"):
            open_checkpoint(path).check({"model.norm.weight": (4,)})


# --- .pdparams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_paddle_saves_is_read_as_it_is(tmp_path, dtype):
    arrays = {"small": np.arange(6.0).reshape(2, 3), "large": np.random.default_rng(0).normal(size=(300, 200))}
    tensors = {name: paddle.to_tensor(array, dtype="float32").astype(dtype) for name, array in arrays.items()}
    paddle.save(tensors, str(tmp_path / "model_state.pdparams"))
    stored = read_pdparams(tmp_path / "model_state.pdparams")
    assert list(stored) == ["small", "large"]
    for name, tensor in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (dtype, tuple(tensor.shape))
        np.testing.assert_array_equal(stored[name].rows(1, 2), tensor.numpy()[1:2])


def test_a_layers_state_and_its_list_of_names_is_read(tmp_path):
    layer = paddle.nn.Linear(3, 2)
    paddle.save(layer.state_dict(), str(tmp_path / "layer.pdparams"))
    stored = read_pdparams(tmp_path / "layer.pdparams")
    assert set(stored) == {"weight", "bias"}
    np.testing.assert_array_equal(stored["weight"].rows(0, 3), layer.weight.numpy())


class Hostile:
    """Pickled, it is a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("function", [os.system, eval, exec, os.mkdir, getattr])
def test_hostile_pickle_runs_no_code(tmp_path, function, protocol):
    touched = tmp_path / "touched"
    arguments = {os.system: f"mkdir {touched}", os.mkdir: str(touched)}.get(
        function, f"__import__('os').mkdir('{touched}')"
    )
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps({"a": np.ones(3, np.float32), "b": Hostile(function, arguments)}, protocol))
    with pytest.raises(ValueError, match="refused"):
        read_pdparams(path)
    assert not touched.exists()


def test_hostile_state_changes_nothing(tmp_path):
    array = np.ones(3, np.float32)
    function, arguments, state = array.__reduce__()
    assert function.__name__ == "_reconstruct"
    path = tmp_path / "model_state.pdparams"
    for bad in [(*state[:1], (4,), *state[2:]), (*state[:1], (-1, -3), *state[2:]), state[:3], None, {"shape": (3,)}]:
        content = {"a": Hostile(function, *arguments)}
        content["a"].call = (function, arguments, bad)
        path.write_bytes(pickle.dumps(content, 4))
        with pytest.raises(ValueError, match="model_state.pdparams"):
            read_pdparams(path)


@pytest.mark.parametrize(
    "content", [[], 3, {"a": 3}, {"a": {"b": np.ones(3)}}, {"a": np.ones(3)}, {3: np.ones(3, "f4")}]
)
def test_pickles_of_something_else_are_refused(tmp_path, content):
    (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(ValueError, match="only arrays as paddle.save writes them"):
        read_pdparams(tmp_path / "model_state.pdparams")


def test_damaged_files_are_refused_by_name(tmp_path):
    path = tmp_path / "model_state.pdparams"
    paddle.save({f"t{i}": paddle.ones([i + 1, 40]) for i in range(40)}, str(path))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for length in [1, 10, *range(100, len(whole), 4001), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model_state.pdparams"):
            read_pdparams(path)
    for _ in range(300):
        broken = bytearray(whole)
        broken[rng.integers(2000)] = rng.integers(256)
        path.write_bytes(broken)
        try:
            read_pdparams(path)
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"}" + b")" + b"\x85" * 300_000 + b"K\x01s", "expected a flat tuple of at most 32 values at byte 5"),
        (
            b"}" + b")\x94" + b"".join(b"h%bh%b\x86\x94" % (bytes([n]), bytes([n])) for n in range(80)) + b"K\x01s",
            "flat",
        ),
        (b"}" + b"K\x01" * 2 + b"s", "expected names with values at byte 7, found a dict of something else"),
        (b"}" + b"}" * 2 + b"s", "expected names with values at byte 5"),
        (b"}" * 20_000, "expected at most 10000 values that nothing was made of at byte 10002"),
        (b"}0" * 1_100_000, "refused the instruction POP"),
        (b"\x8a\xff" + b"\x7f" * 255, "expected a number of 64 bits at byte 2"),
        (b"\x8b\xff\xff\xff\x7f" + bytes(5000), "byte 2"),
        (b"(" + b"K\x01" * 33 + b"t", "expected a flat tuple of at most 32 values at byte 69"),
        (b"t", "expected a mark before it at byte 2, found none"),
        (b"s", "expected a value before it at byte 2, found nothing"),
        (b"h\x07", "expected a value that was noted before at byte 2, found number 7"),
        (b"K\x01K\x02R", "expected a function and its arguments at byte 6, found an int and an int"),
        (b"K\x01Nb", "expected a call before it at byte 5, found an int"),
        (b"K\x01K\x02\x93", "expected the name of a function at byte 6"),
        (b"", "expected a value before it at byte 2, found nothing"),
        (b"\xff", "expected an instruction of a pickle at byte 2"),
        (b"}\x8c\x01a)s", r"expected an array with shape, dtype and bytes, found a tuple as the entry 'a'"),
    ],
)
def test_what_a_hostile_program_makes_is_refused_where_it_is(tmp_path, program, message):
    """In no time, however deep, long or often doubled it is."""
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(b"\x80\x04" + program + b".")
    with pytest.raises(ValueError, match=message) as raised:
        read_pdparams(path)
    assert str(path) in str(raised.value) and len(str(raised.value)) < 1000


def test_a_value_that_holds_itself_is_refused(tmp_path):
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(b"\x80\x04}\x94\x8c\x01ah\x00s.")
    with pytest.raises(ValueError, match="found a dict as the entry 'a'"):
        read_pdparams(path)


def test_a_program_that_goes_on_and_on_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pdparams, "INSTRUCTIONS", 1000)
    (tmp_path / "model_state.pdparams").write_bytes(b"\x80\x04}" + b"\x8c\x01aNs" * 400 + b".")
    with pytest.raises(ValueError, match="expected the end within 1000 instructions, found more at byte 1667"):
        read_pdparams(tmp_path / "model_state.pdparams")
