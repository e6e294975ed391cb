"""SentencePiece models, trained here on a few sentences, against the sentencepiece package itself."""

import io
import json
import random
import struct

import gguf
import pytest
import sentencepiece as reference

from fastdeploy.text.sentencepiece import (
    BYTE,
    CONTROL,
    UNKNOWN,
    UNUSED,
    CharacterMap,
    Normalizer,
    Piece,
    build,
    read_model,
)
from fastdeploy.text.tokenizer import StreamingDetokenizer, load_tokenizer
from tests.fuzz.mutations import bounded

SENTENCES = [
    "The quick brown fox jumps over the lazy dog while 42 engineers measure how many tokens a second it writes.",
    "Über den Wolken muß die Freiheit größtenteils auf Französisch sein: déjà vu, naïve façade, œuvre.",
    "Быстрая коричневая лиса перепрыгивает через ленивую собаку, пока инженеры считают, сколько слов она пишет.",
    "敏捷的棕色狐狸跳过了懒狗。工程师们在计算机器每秒能写多少个词。北京是中华人民共和国的首都，人口超过两千万。",
    "الثعلب البني السريع يقفز فوق الكلب الكسول بينما يقيس المهندسون عدد الكلمات التي تكتبها الآلة في الثانية.",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है जबकि इंजीनियर गिनते हैं कि मशीन प्रति सेकंड कितने शब्द लिखती है।",
]
SCRIPTS = {  # with the characters that normalisation takes apart or puts together
    "latin": [(0x20, 0x250), (0x300, 0x370), (0x1E00, 0x1F00)],
    "cyrillic": [(0x400, 0x530)],
    "chinese": [(0x3000, 0x3200), (0x4E00, 0x4F00), (0xFF00, 0xFFEF)],
    "arabic": [(0x600, 0x700), (0xFB50, 0xFE00)],
    "devanagari": [(0x900, 0xA00)],
}
BETWEEN = [" ", "  ", "", "\n", "▁", "1", "\t", "<mask:1>", "<sep>", "!", "<0x41>", "\U0001f600", "\u200b"]
MODELS = {
    "like Llama 2's": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False},
    "bpe": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["<mask:1>", "<sep>"]},
    "unigram": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    "unigram with bytes": {
        "model_type": "unigram",
        "normalization_rule_name": "nfkc",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<mask:1>", "<sep>"],
        "control_symbols": ["<cls>"],
    },
}


def train(path, **settings):
    """A tokenizer.model of some hundred pieces."""
    rng = random.Random(0)
    parts = [sentence.split() for sentence in SENTENCES for _ in range(100)]
    lines = [" ".join(words[rng.randrange(len(words)) :]) for words in parts] + SENTENCES
    file = io.BytesIO()
    common = {"vocab_size": 700, "hard_vocab_limit": False, "character_coverage": 0.99, "num_threads": 1}
    settings = {"normalization_rule_name": "identity", "minloglevel": 2, **common, **settings}
    reference.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **settings)
    path.write_bytes(file.getvalue())
    return path


@pytest.fixture(scope="module", params=MODELS)
def model_path(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp("model") / "tokenizer.model", **MODELS[request.param])


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory):
    return train(tmp_path_factory.mktemp("llama") / "tokenizer.model", **MODELS["like Llama 2's"])


def random_texts(script, count=400, seed=0):
    """Random characters of a script, and words of all scripts with all that may stand between them."""
    rng = random.Random(f"{script} {seed}")
    alphabet = [chr(code) for begin, end in SCRIPTS[script] for code in range(begin, end)]
    words = " ".join(SENTENCES).split()
    for _ in range(count // 2):
        yield "".join(rng.choices(alphabet, k=rng.randrange(20)))
        parts = (rng.choice(BETWEEN) + rng.choice([rng.choice(words), *rng.choices(alphabet, k=1)]) for _ in range(8))
        yield "".join(parts) + rng.choice(["", " ", "  "])


@pytest.mark.parametrize("script", SCRIPTS)
def test_ids_and_text_equal_sentencepieces(model_path, script):
    theirs, model = reference.SentencePieceProcessor(model_file=str(model_path)), read_model(model_path)
    ours = build(model, added=[])
    for text in random_texts(script):
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text), text
        if model.byte_fallback and not text.startswith("▁"):  # of such spaces it strips several
            assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("script", SCRIPTS)
def test_normalisation_equals_sentencepieces(model_path, script):
    theirs, model = reference.SentencePieceNormalizer(model_file=str(model_path)), read_model(model_path)
    kept = ["<mask:1>", "<sep>"] if "<sep>" in {piece.text for piece in model.pieces} else []
    ours = Normalizer(model.charsmap, kept, model.add_dummy_prefix, model.remove_extra_whitespaces)
    for text in random_texts(script, seed=1):
        if text:
            assert ours.text(text) == theirs.normalize(text), text


def test_control_pieces_written_in_the_text_are_tokens_and_cut_it_in_segments(llama_path):
    ours, theirs = load_tokenizer(llama_path.parent), reference.SentencePieceProcessor(model_file=str(llama_path))
    assert ours.encode("</s>the fox</s> dog") == [2, *theirs.encode("the fox"), 2, *theirs.encode(" dog")]
    assert ours.decode(ours.encode("the</s> fox")) == "the  fox"  # the segment's own space, and that of its prefix
    assert ours.encode("the fox", add_special_tokens=True) == [1, *theirs.encode("the fox")]
    assert (ours.named_tokens["bos_token"], ours.eos_token_ids) == ("<s>", (2,))


def test_streamed_pieces_make_up_the_whole(llama_path):
    tokenizer, rng = load_tokenizer(llama_path.parent), random.Random(0)
    for _ in range(100):
        ids = rng.choices(range(tokenizer.vocab_size), k=40)
        stream = StreamingDetokenizer(tokenizer)
        assert "".join([*map(stream.add, ids), stream.finish()]) == tokenizer.decode(ids)


def test_files_beside_the_model_add_tokens_and_switches(llama_path, tmp_path):
    theirs = reference.SentencePieceProcessor(model_file=str(llama_path))
    size = theirs.vocab_size()
    config = {
        "added_tokens_decoder": {str(size + 1): {"content": "<|end|>", "special": True}, "1": {"content": "<s>"}},
        "additional_special_tokens": ["<|image|>"],
        "pad_token": {"content": "<|end|>"},
        "add_bos_token": False,
        "chat_template": "{{ messages[0].content }}<|end|>",
    }
    (tmp_path / "tokenizer.model").write_bytes(llama_path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<tool>fox<|end|><|image|>") == [size, *theirs.encode("fox"), size + 1, size + 2]
    assert tokenizer.encode("fox", add_special_tokens=True) == theirs.encode("fox")
    assert tokenizer.decode([size, size + 1]) == "<tool>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "fox"}]) == "fox<|end|>"


@pytest.mark.parametrize(
    ("switches", "text", "begins"),
    [
        ({"legacy": False}, "the fox</s>dog", (True, False)),
        ({"legacy": True}, "the fox</s>dog", (True, True)),
        ({"add_prefix_space": False}, "the fox</s>dog", (False, False)),
    ],
)
def test_where_segments_begin_with_a_space(llama_path, tmp_path, switches, text, begins):
    (tmp_path / "tokenizer.model").write_bytes(llama_path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(switches))
    tokenizer = load_tokenizer(tmp_path)
    spelt = "".join(tokenizer.token(token_id) for token_id in tokenizer.encode(text)).split("</s>")
    assert tuple(segment.startswith("▁") for segment in spelt) == begins
    assert tokenizer.decode(tokenizer.encode(text)).startswith("the fox")


def write_gguf(path, pieces, **ids):
    """A GGUF with these pieces; ids: bos=1 for tokenizer.ggml.bos_token_id and so on."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([piece.type for piece in pieces])
    for name, token_id in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_gives_the_same_ids(llama_path, tmp_path):
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", read_model(llama_path).pieces, bos=1))
    theirs = reference.SentencePieceProcessor(model_file=str(llama_path))
    for script in SCRIPTS:
        for text in random_texts(script, count=50, seed=2):
            assert ours.encode(text) == theirs.encode(text), text
    assert ours.encode("fox", add_special_tokens=True) == [1, *theirs.encode("fox")]


@pytest.mark.parametrize("ids", [{}, {"unknown": 0}])
@pytest.mark.parametrize("names", ["[PAD{}]", "<unused>", ""], ids=["numbered", "alike", "nameless"])
@pytest.mark.parametrize("kind", [UNKNOWN, UNUSED, CONTROL])
def test_a_gguf_filled_up_with_pieces_gives_the_same_ids(llama_path, tmp_path, kind, names, ids):
    padding = [Piece(names.format(number), -1000.0, kind) for number in range(5)]
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", read_model(llama_path).pieces + padding, **ids))
    theirs = reference.SentencePieceProcessor(model_file=str(llama_path))
    assert ours.vocab_size == theirs.vocab_size() + 5
    for text in random_texts("latin", count=50, seed=3):
        assert ours.encode(text) == theirs.encode(text), text


def with_pieces(path, texts, kind):
    """The model with more pieces at its end: repeated fields of a protocol buffer go on wherever they stand."""
    more = b""
    for text in map(str.encode, texts):
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1000.0) + b"\x18" + bytes([kind])
        more += b"\x0a" + bytes([len(piece)]) + piece
    path.write_bytes(path.read_bytes() + more)
    return path


@pytest.mark.parametrize(("name", "unused"), [("like Llama 2's", "[PAD1]"), ("unigram", "quickquick")])
def test_a_model_filled_up_with_unused_pieces_gives_the_same_ids(tmp_path, name, unused):
    path = with_pieces(train(tmp_path / "tokenizer.model", **MODELS[name]), [unused, unused + unused], UNUSED)
    theirs, ours = reference.SentencePieceProcessor(model_file=str(path)), build(read_model(path), added=[])
    for text in [unused, f"a {unused}{unused} b", *random_texts("latin", count=50, seed=4)]:
        assert ours.encode(text).ids == theirs.encode(text), text


def test_an_unused_piece_that_merges_make_is_refused(llama_path, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_path.read_bytes())
    with pytest.raises(ValueError, match="unused piece 'ee' is one that merges make"):
        read_model(with_pieces(tmp_path / "tokenizer.model", ["ee"], UNUSED))


def test_types_of_pieces_are_read(llama_path):
    model = read_model(llama_path)
    assert model.texts(CONTROL) == ["<s>", "</s>"]
    assert model.texts(BYTE) == [f"<0x{byte:02X}>" for byte in range(256)]


def test_damaged_models_are_refused_by_name(llama_path, tmp_path):
    good, path = llama_path.read_bytes(), tmp_path / "tokenizer.model"
    for content in [b"", b"no model", b"\xff" * 40, good[:-1], good[:1], good[1:], good + good]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (b"\x0a\xc4\x84\x3d\x0a\xc0\x84\x3d" + b"a" * 1_000_000, "at most 512 characters, found 'aaa.*of 1000000"),
        (b"\x0a" + b"\xff" * 1000, "expected a number of at most ten bytes at byte \\d+ of the model"),
        (b"\x0a\x00", "expected a text and a finite score of piece 700, found ''"),
        (b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f", "a finite score of piece 700, found 'a' and nan"),
        (b"\x0a\x03\x0a\x01\xff", "the text of piece 700: 'utf-8' codec can't decode"),
        (b"\x0a\x02\x0a\xff", "expected a whole field at byte 0 of piece 700|a number of at most ten bytes"),
        (b"\x0a\x02\x08\x01", "expected wire type 2 for field 1 at byte 0 of piece 700, found 0"),
        (b"\x08\x01", "expected wire type 2 for field 1 at byte \\d+ of the model, found 0"),
        (b"\x0b", "expected a whole field at byte \\d+ of the model, found one of wire type 3"),
        (b"\x1a\x08\x12\x06\x08\0\0\0ab", "rules of normalisation: expected 8 bytes, found 2"),
        (b"\x1a\x0c\x12\x0a\x04\0\0\0\x00\x01\x00\x80ab", "rules of normalisation lead to no text"),
        (b"\x1a\x0c\x12\x0a\x04\0\0\0\x00\x05\x00\x00a\0", "rules of normalisation lead to no text"),
    ],
)
def test_what_a_hostile_model_says_is_refused_where_it_is(llama_path, tmp_path, added, message):
    """At once, however long it is."""
    (tmp_path / "tokenizer.model").write_bytes(llama_path.read_bytes() + added)
    with pytest.raises(ValueError, match=message) as raised:
        read_model(tmp_path / "tokenizer.model")
    assert str(tmp_path / "tokenizer.model") in str(raised.value) and len(str(raised.value)) < 1000


def test_rules_of_normalisation_that_go_round_end():
    """Where every character leads back to the same place, and so any text were the beginning of a rule."""
    units = [0] * 512
    units[0] = 97 << 10  # the root's children lie around 97; that of "a" at 0, whose children lie around 97 in turn
    units[0] |= 97
    rules = CharacterMap(len(units * 4).to_bytes(4, "little") + struct.pack("<512I", *units) + b"\0")
    with bounded():
        assert rules.apply("a" * 20_000) == "a" * 20_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "char"}, "model type 4; known are 1, unigram, and 2, BPE"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "spaces as suffixes"),
    ],
)
def test_models_of_other_kinds_are_refused(tmp_path, settings, message):
    path = train(tmp_path / "tokenizer.model", **settings)
    with pytest.raises(ValueError, match=message):
        read_model(path)


def test_added_tokens_that_cannot_have_their_ids_are_refused(llama_path, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_path.read_bytes())
    for added, message in [
        ({"<tool>": 9999}, "'<tool>' has id 9999, but would get 700"),
        ({"<tool>": "x"}, "must be a number"),
    ]:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
