"""GGUF in several files, name-00001-of-00003.gguf and on, as the gguf package writes them."""

import gguf
import numpy as np
import pytest

from fastdeploy.models.weights import open_checkpoint
from tests.test_weights import (
    LAYERS,
    LLAMA_METADATA,
    expected_shapes,
    llama_cpp_permuted,
    random_weights,
    to_gguf_name,
)


def write_parts(directory, weights, count, stem="m", **settings):
    """Files of at most `count` tensors each, as llama.cpp's tools write them; their paths."""
    directory.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(directory / f"{stem}.gguf", "llama", split_max_tensors=count, **settings)
    for key, value in LLAMA_METADATA.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, array in weights.items():
        writer.add_tensor(to_gguf_name(name), llama_cpp_permuted(name, array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.glob(f"{stem}-*.gguf"))


@pytest.mark.parametrize("small_first_shard", [False, True])  # with nothing but metadata in the first part
def test_any_part_or_the_folder_opens_all(tmp_path, small_first_shard):
    weights = random_weights()
    parts = write_parts(tmp_path / "parts", weights, 7, small_first_shard=small_first_shard)
    assert len(parts) == 3 + small_first_shard
    for given in (*parts, tmp_path / "parts"):
        checkpoint = open_checkpoint(given)
        assert checkpoint.path == parts[0] and checkpoint.config.num_layers == LAYERS
        checkpoint.check(expected_shapes())
        for name, array in weights.items():
            np.testing.assert_array_equal(checkpoint.read(name).array, array, err_msg=name)


def test_an_installed_package_may_have_parts(tmp_path, monkeypatch):
    parts = write_parts(tmp_path, random_weights(), 7)
    package = tmp_path / "parted_model-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: parted-model\nVersion: 1\n")
    (package / "RECORD").write_text("".join(f"{part.name},,\n" for part in parts))
    monkeypatch.syspath_prepend(tmp_path)
    assert open_checkpoint("parted-model").path == parts[0]


def test_parts_that_are_not_there_are_named(tmp_path):
    parts = write_parts(tmp_path / "parts", random_weights(), 4)
    for part in (parts[0], parts[3]):
        part.unlink()
    for given in (*parts, tmp_path / "parts"):
        with pytest.raises(FileNotFoundError, match="2 of its 5 parts are missing: m-00001-of-00005.gguf, m-00004-of"):
            open_checkpoint(given)


def test_parts_of_different_splits_are_refused(tmp_path):
    five, three = (write_parts(tmp_path / str(count), random_weights(), count) for count in (4, 7))
    two = {name: array for name, array in random_weights().items() if "layers.1" not in name}
    other = write_parts(tmp_path / "other", two, 4)
    assert len(three) == len(other) == 3
    for part, message in [
        (five[1], "one of 5 parts, number 1 from 0, but by its name number 1 of 3"),
        (three[2], "one of 3 parts, number 2 from 0, but by its name number 1 of 3"),
        (other[1], "in a part before it, too|parts with 11 tensors together"),
    ]:
        mixed = tmp_path / "mixed" / "m-00002-of-00003.gguf"
        mixed.parent.mkdir(exist_ok=True)
        for path in (three[0], three[2]):
            (mixed.parent / path.name).write_bytes(path.read_bytes())
        mixed.write_bytes(part.read_bytes())
        with pytest.raises(ValueError, match=message) as raised:
            open_checkpoint(mixed.parent)
        assert str(mixed.parent) in str(raised.value)


def test_a_folder_of_several_models_in_parts_asks_for_one(tmp_path):
    write_parts(tmp_path, random_weights(), 7)
    (first, *_) = write_parts(tmp_path, random_weights(1), 7, stem="n")
    with pytest.raises(ValueError, match="found 2: m-00001-of-00003.gguf, n-00001-of-00003.gguf; give one file's path"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(first).path == first


def test_a_part_that_was_renamed_is_refused(tmp_path):
    (first, *_) = write_parts(tmp_path, random_weights(), 7)
    first.rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="model.gguf: it is one of 3 parts.*give all parts their names back"):
        open_checkpoint(tmp_path / "model.gguf")
