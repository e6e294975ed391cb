"""Tokenizers as GGUF metadata: read back they give the same ids, ends and templates; those without a form give None."""

from pathlib import Path

import pytest
import tokenizers
from gguf import GGUFValueType, GGUFWriter
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from fastdeploy.text import byte_pairs
from fastdeploy.text.gguf_vocabulary import vocabulary_metadata
from fastdeploy.text.sentencepiece import UNUSED
from fastdeploy.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.test_sentencepiece import MODELS, random_texts, train
from tests.text.test_tokenizer import ALPHABET, MERGES, TEXTS, byte_fallback, byte_level

NOWHERE = Path("no folder")
VALUE_TYPES = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, bool: GGUFValueType.BOOL}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ITEM_TYPES = {str: GGUFValueType.STRING, int: GGUFValueType.INT32, float: GGUFValueType.FLOAT32}


def read_back(metadata, path):
    """The tokenizer of a GGUF file with this metadata."""
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, ITEM_TYPES[type(value[0])])
        else:
            writer.add_key_value(key, value, VALUE_TYPES[type(value)])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return load_tokenizer(path)


def same(first, second, texts=TEXTS):
    for text in texts:
        for special in (False, True):
            assert first.encode(text, special) == second.encode(text, special), text
        ids = first.encode(text)
        assert first.decode(ids) == second.decode(ids), text


def with_cut(cut):
    tokens = ALPHABET + [merge.replace(" ", "") for merge in MERGES]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return byte_pairs.build(vocabulary, [tuple(merge.split()) for merge in MERGES], cut, "test")


@pytest.mark.parametrize("cut", byte_pairs.CUTS[1:], ids=lambda cut: cut.names.split()[0])
def test_every_way_to_cut_a_text_is_named(cut, tmp_path):
    backend = with_cut(cut)
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens([AddedToken("你好", normalized=False)])
    tokenizer = Tokenizer(backend, {"eos_token": "<|end|>"})
    metadata = vocabulary_metadata(tokenizer, NOWHERE, tokenizer.vocab_size)
    named = byte_pairs.CUT_BY_NAME[metadata["tokenizer.ggml.pre"]]
    assert (named.expressions, named.ignores_merges, named.composes) == (
        cut.expressions, cut.ignores_merges, cut.composes,
    )  # fmt: skip
    found = read_back(metadata, tmp_path / "vocabulary.gguf")
    same(tokenizer, found, [*TEXTS, "a<|end|>你好 b"])
    assert found.eos_token_ids == tokenizer.eos_token_ids and found.special_token_ids == tokenizer.special_token_ids


def test_digits_by_themselves_are_the_same_cut_as_their_expression(tmp_path):
    backend = with_cut(byte_pairs.CUT_BY_NAME["smollm"])
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = Tokenizer(backend)
    metadata = vocabulary_metadata(tokenizer, NOWHERE, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    same(tokenizer, read_back(metadata, tmp_path / "vocabulary.gguf"))


def test_a_sentencepiece_tokenizer_json_becomes_scores(tmp_path):
    like_llama = byte_fallback()
    tokens = ["<unk>", "▁", "a", "t", "h", "e", "中", "▁a", "▁▁", "he", "the", "▁the", *BYTES]
    merges = [("h", "e"), ("▁", "a"), ("t", "he"), ("▁", "the"), ("▁", "▁")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer, backend.decoder = like_llama.normalizer, like_llama.decoder
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = Tokenizer(backend, {"unk_token": "<unk>"})
    metadata = vocabulary_metadata(tokenizer, NOWHERE, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.model"] == "llama"
    same(tokenizer, read_back(metadata, tmp_path / "vocabulary.gguf"), ["a the b", "  a  中 é", "xyz 12"])


def test_a_tokenizer_model_keeps_its_pieces(tmp_path):
    train(tmp_path / "tokenizer.model", **MODELS["like Llama 2's"])
    tokenizer = load_tokenizer(tmp_path)
    metadata = vocabulary_metadata(tokenizer, tmp_path, tokenizer.vocab_size)
    same(tokenizer, read_back(metadata, tmp_path / "vocabulary.gguf"), list(random_texts("latin", 60)))


def test_templates_begin_of_sequence_and_ends_come_along(tmp_path):
    backend = byte_level()
    backend.add_special_tokens(["<s>", "<|eot_id|>"])
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    ends = [backend.token_to_id(token) for token in ("<|eot_id|>", "<|end|>")]
    tokenizer = Tokenizer(backend, {"bos_token": "<s>"}, ends, templates)
    metadata = vocabulary_metadata(tokenizer, NOWHERE, tokenizer.vocab_size)
    found = read_back(metadata, tmp_path / "vocabulary.gguf")
    assert found.chat_template == templates
    assert set(found.eos_token_ids) == set(ends)
    assert found.bos_token_id == tokenizer.bos_token_id
    assert found.encode("a", add_special_tokens=True) == tokenizer.encode("a", add_special_tokens=True)


def test_rows_of_the_embedding_without_a_token_are_unused_ones(tmp_path):
    tokenizer = Tokenizer(byte_level())
    metadata = vocabulary_metadata(tokenizer, NOWHERE, tokenizer.vocab_size + 5)
    assert len(set(metadata["tokenizer.ggml.tokens"])) == tokenizer.vocab_size + 5
    assert metadata["tokenizer.ggml.token_type"][-5:] == [UNUSED] * 5
    same(tokenizer, read_back(metadata, tmp_path / "vocabulary.gguf"))


def unigram():
    return tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))


def cut_at_spaces():
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


def lower_cased():
    backend = byte_level()
    backend.normalizer = normalizers.Lowercase()
    return backend


@pytest.mark.parametrize("make", [unigram, cut_at_spaces, lower_cased])
def test_what_gguf_has_no_form_for_is_none(make):
    tokenizer = Tokenizer(make())
    assert vocabulary_metadata(tokenizer, NOWHERE, tokenizer.vocab_size) is None
