"""tokenizer.json of every kind of model, with parts replaced: a tokenizer, or a ValueError that names the file."""

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fastdeploy.text.tokenizer import load_tokenizer
from tests.fuzz.mutations import assert_read_or_refused, mutated_json

TEXTS = ["a b ab x1 é中" + "a" * 30, "", "<|end|>你好</s>"]


def complete(model: Any, normalizer: Any, pre_tokenizer: Any, post_processor: Any, decoder: Any) -> Any:
    """The JSON of a tokenizer."""
    backend = tokenizers.Tokenizer(model)
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}
    for name, part in {**parts, "post_processor": post_processor}.items():
        if part is not None:
            setattr(backend, name, part)
    backend.add_special_tokens(["<|end|>"])
    return json.loads(backend.to_str())


BYTES = {token: token_id for token_id, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
SPLIT = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "isolated"), pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]
)
NORMALIZER = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "y"), normalizers.Strip()])
TEMPLATE = processors.TemplateProcessing(single="a $A", special_tokens=[("a", BYTES["a"])])
GOOD = [
    complete(models.BPE({**BYTES, "ab": 256}, [("a", "b")]), NORMALIZER, SPLIT, TEMPLATE, decoders.ByteLevel()),
    complete(
        models.BPE({"a": 0, "##b": 1, "ab": 2}, [("a", "##b")], continuing_subword_prefix="##", unk_token="a"),
        normalizers.Lowercase(), pre_tokenizers.Whitespace(), None, decoders.BPEDecoder(),
    ),
    complete(
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("▁b", -2.0), ("ab", -1.5)], unk_id=0),
        normalizers.Prepend("▁"), pre_tokenizers.Metaspace(), None, decoders.Metaspace(),
    ),
    complete(
        models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[CLS]": 3, "[SEP]": 4}, unk_token="[UNK]"),
        normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(),
        processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3)), decoders.WordPiece(),
    ),
    complete(
        models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"),
        None, pre_tokenizers.Split("b", "removed"), None, None,
    ),
]  # fmt: skip


@settings(max_examples=settings().max_examples * 2)
@given(content=st.sampled_from(GOOD).flatmap(mutated_json))
def test_a_mutated_tokenizer_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    directory = tmp_path_factory.getbasetemp()
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content))

    def read() -> None:
        tokenizer = load_tokenizer(directory)
        for text in TEXTS:
            try:
                ids = tokenizer.encode(text) + tokenizer.encode(text, add_special_tokens=True)
                for token_id in ids[:9]:
                    tokenizer.token_text(token_id)
                tokenizer.decode(ids)
            except ValueError as error:
                assert "tokenizers" in str(error)

    assert_read_or_refused(read, path)
