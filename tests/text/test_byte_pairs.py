"""Words before byte pairs: each way to cut a text, by the names it goes by; vocab.json and merges.txt."""

import json

import pytest
from tokenizers import pre_tokenizers

from fastdeploy.text.byte_pairs import BYTE_OF_CHARACTER, CUTS, build, cut_named
from fastdeploy.text.tokenizer import load_tokenizer
from tests.text.test_tokenizer import ALPHABET, MERGES, TEXTS, byte_level, random_texts, write_gguf

ENGLISH, OTHERS = "ab 1234 HelloWorld's x.\n\n", "e\u0301 d中文1234,ok ?!a\t b  "
# Of these two texts, by the expressions in the models' tokenizer.json
WORDS = {
    "gpt-2": "ab| 1234| HelloWorld|'s| x|.|\n\n  e|\u0301| d中文|1234|,|ok| ?!|a|\t| b|  ",
    "smollm": "ab| |1|2|3|4| HelloWorld|'s| x|.|\n\n  e|\u0301| d中文|1|2|3|4|,|ok| ?!|a|\t| b|  ",
    "llama-bpe": "ab| |123|4| HelloWorld|'s| x|.\n\n  e|\u0301| d中文|123|4|,ok| ?!|a|\t| b|  ",
    "qwen2": "ab| |1|2|3|4| HelloWorld|'s| x|.\n\n  é| d中文|1|2|3|4|,ok| ?!|a|\t| b|  ",
    "qwen35": "ab| |1|2|3|4| HelloWorld|'s| x|.\n\n  e\u0301| d中文|1|2|3|4|,ok| ?!|a|\t| b|  ",
    "tekken": "ab| |1|2|3|4| Hello|World|'s| x|.\n\n  e\u0301| d中文|1|2|3|4|,ok| ?!|a|\t| b|  ",
    "gpt-4o": "ab| |123|4| Hello|World's| x|.\n\n  e\u0301| d中文|123|4|,ok| ?!|a|\t| b|  ",
    "seed-coder": "ab| |1|2|3|4| HelloWorld|'s| x|.|\n\n  e|\u0301| d中文|1|2|3|4|,ok| ?!|a|\t| b|  ",
    "deepseek-llm": "ab| |1234| HelloWorld|'|s| x|.|\n|\n  e|\u0301| d|中文|1234|,|ok| ?!|a|\t| b|  ",
    "deepseek-coder": "ab| |1|2|3|4| HelloWorld|'|s| x|.|\n|\n  e|\u0301| d|中文|1|2|3|4|,|ok| ?!|a|\t| b|  ",
    "deepseek-v3": "ab| |123|4| HelloWorld|'s| x|.\n\n  e\u0301| d|中文|123|4|,ok| ?!|a|\t| b|  ",
    "falcon": "ab| |123|4| HelloWorld|'|s| x|.|\n\n  e|\u0301| d中文|123|4|,|ok| |?!|a|\t| b|  ",
    "default": "ab| |123|4| HelloWorld|'|s| x|.|\n\n  e|\u0301| d中文|123|4|,|ok| |?!|a|\t| b|  ",
}


def words(cut, text):
    """The words of a text as text."""
    backend = build({"a": 0}, [], cut, "test")
    text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [bytes(BYTE_OF_CHARACTER[character] for character in piece).decode() for piece in pieces]


@pytest.mark.parametrize("name", WORDS)
def test_each_way_cuts_words_as_the_models_tokenizer_does(name):
    english, others = WORDS[name].split("\n  ", 1)
    cut = cut_named(name, "test")
    assert words(cut, ENGLISH) == (english + "\n").split("|")
    assert words(cut, OTHERS) == others.split("|")


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.names.split()[0])
def test_no_way_to_cut_loses_text(cut):
    for text in [*TEXTS, *random_texts(50, seed=1)]:
        backend = build({"a": 0}, [], cut, "test")
        assert "".join(words(cut, text)) == (backend.normalizer.normalize_str(text) if backend.normalizer else text)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("llama3", "llama-bpe"),
        ("llama-v3", "llama-bpe"),
        ("falcon3", "llama-bpe"),
        ("exaone4", "gpt-2"),
        ("llama4", "gpt-4o"),
        ("mellum2", "smollm"),
        ("hunyuan-dense", "deepseek-v3"),
        ("glm5", "glm4"),
    ],
)
def test_aliases_are_the_same_way(alias, name):
    assert cut_named(alias, "test") is cut_named(name, "test")


@pytest.mark.parametrize("alias", ["deepseek-r1-qwen", "megrez"])
def test_aliases_of_qwen2_do_not_compose_characters(alias):
    cut = cut_named(alias, "test")
    assert (cut.expressions, cut.composes) == (cut_named("qwen2", "test").expressions, False)


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_a_gguf_that_names_no_way_gets_llama_cpps_own_and_a_warning(tmp_path, caplog, pre):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre))
    assert [tokenizer.token(token_id) for token_id in tokenizer.encode("12345")] == ["12", "3", "4", "5"]
    assert any("m.gguf names no pre-tokenizer" in record.getMessage() for record in caplog.records)


# --- vocab.json and merges.txt ------------------------------------------------------------------------------------


def write_vocabulary(path, **config):
    """The files of `byte_level()`, with tokenizer_config.json."""
    vocabulary = {token: token_id for token_id, token in enumerate([*ALPHABET, *(m.replace(" ", "") for m in MERGES)])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in MERGES))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_vocabulary_and_merges_are_a_tokenizer(tmp_path):
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = load_tokenizer(write_vocabulary(tmp_path, tokenizer_class="GPT2Tokenizer"))
    for text in [*TEXTS, *random_texts(100, seed=2)]:
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", ""])
def test_lines_of_merges_may_end_in_any_way(tmp_path, end):
    path = write_vocabulary(tmp_path) / "merges.txt"
    path.write_bytes(path.read_bytes().rstrip().replace(b"\n", (end or "\n").encode()) + end.encode())
    assert load_tokenizer(tmp_path).encode("he") == [len(ALPHABET) + MERGES.index("h e")]


def test_added_tokens_of_a_vocabulary_have_their_ids_and_words_are_cut_by_class(tmp_path):
    end = len(ALPHABET) + len(MERGES)
    added = {str(end): {"content": "<|im_end|>", "special": True}}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    tokenizer = load_tokenizer(write_vocabulary(tmp_path, **config))
    assert tokenizer.eos_token_ids == (end,)
    assert [tokenizer.token(token_id) for token_id in tokenizer.encode("12<|im_end|>")] == ["1", "2", "<|im_end|>"]


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda path: (path / "merges.txt").unlink(), FileNotFoundError, "merges.txt: no such file.*vocab.json"),
        (lambda path: (path / "merges.txt").write_text("a b c\n"), ValueError, "merges.txt: the merge 'a b c'; exp"),
        (lambda path: (path / "merges.txt").write_bytes(b"\xff a\n"), ValueError, "merges.txt: 'utf-8' codec"),
        (lambda path: (path / "merges.txt").write_text("ab cd\n"), ValueError, "vocab.json: the merges don't fit"),
        (lambda path: (path / "vocab.json").write_text("[1]"), ValueError, "vocab.json: expected a JSON object"),
        (lambda path: (path / "vocab.json").write_text('{"a": 0.5}'), ValueError, "vocab.json: .*the vocabulary"),
        (lambda path: (path / "vocab.json").write_text('{"a": -1}'), ValueError, "vocab.json: .*the vocabulary"),
        (lambda path: write_vocabulary(path, tokenizer_class="T5Tokenizer"), ValueError, "T5Tokenizer.*GPT2Tokenizer"),
    ],
)
def test_a_vocabulary_that_is_broken_is_refused(tmp_path, spoil, kind, message):
    spoil(write_vocabulary(tmp_path))
    with pytest.raises(kind, match=message):
        load_tokenizer(tmp_path)
