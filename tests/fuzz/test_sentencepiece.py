"""SentencePiece models: bytes of good ones changed, and the rules of normalisation in them."""

import random
import struct
from itertools import starmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.text.sentencepiece import CharacterMap, build, read_model
from tests.fuzz.mutations import assert_read_or_refused, bounded, mutated
from tests.text.test_sentencepiece import MODELS, SENTENCES, train

TEXT = " ".join(sentence[:20] for sentence in SENTENCES) + " <mask:1>\n ½ﬁ\u0301 \ufdfa</s>"


TEXTS = ["", "a", "ab", "▁", "▁a", "a" * 600, "<0x41>", "\n", "\0", "|", "(", "\\", "<unk>", "</s>", "ſ", "😀"]
SCORES = st.sampled_from(
    [0.0, -1.0, -2.0, -3.5, 1.0] * 9 + [-0.0, 3e38, -3e38, 1e-45, *map(float, ("nan", "inf", "-inf"))]
)
NUMBERS = st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 2**31, 2**63, 2**64 - 1])
WILD = st.one_of(st.just(2**70), SCORES, st.binary(max_size=4))
TEXT_BYTES = st.one_of(st.sampled_from(TEXTS), st.text(min_size=1, max_size=3), st.text(min_size=1, max_size=1)).map(
    str.encode
)
PIECE = st.tuples(st.tuples(st.just(1), TEXT_BYTES), st.tuples(st.just(2), SCORES), st.tuples(st.just(3), NUMBERS))
PIECES = st.lists(PIECE, max_size=8, unique_by=lambda piece: piece[0])
SETTING = st.tuples(st.sampled_from([3, 4, 5, 24, 35, 40, 41, 42, 43]), NUMBERS)
SETTINGS = st.lists(st.one_of(*[SETTING] * 9, st.tuples(st.sampled_from([2, 3, 4, 35, 40]), WILD)), max_size=3)
USUAL = [[(1, b"<unk>"), (3, 2)], [(1, "▁".encode()), (2, -1.0)], [(1, b"t")], [(1, b"th"), (2, 1.0)]]


def encode(path):
    tokenizer = build(read_model(path), added=[])
    tokenizer.decode(tokenizer.encode(TEXT).ids)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("sentencepiece")


@pytest.fixture(scope="module")
def models(directory):
    """A good file's bytes, of each kind of model."""
    return {name: train(directory / "good.model", **MODELS[name]).read_bytes() for name in MODELS}


@pytest.fixture(scope="module")
def charsmap(models, directory):
    path = directory / "good.model"
    path.write_bytes(models["unigram"])
    return read_model(path).charsmap


@settings(max_examples=settings().max_examples // 2)
@pytest.mark.parametrize("name", MODELS)
@given(st.data())
def test_a_mutated_model_encodes_or_is_refused(models, directory, name, data):
    path = directory / "tokenizer.model"
    whole = models[name]
    # The pieces come first; of the rules of normalisation most bytes are alike.
    first, last = data.draw(st.sampled_from([(0, 6000), (0, 100), (len(whole) - 300, len(whole))]))
    path.write_bytes(data.draw(mutated(whole, max(first, 0), min(last, len(whole)))))

    assert_read_or_refused(lambda: encode(path), path)


def varint(value):
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def field(number, value):
    """A field of a protocol buffer: bytes, a varint or a float."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return (
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 5) + struct.pack("<f", value)
    )


@given(PIECES, SETTINGS, SETTINGS)
def test_a_model_of_random_pieces_and_settings_encodes_or_is_refused(directory, pieces, trainer, normalizer):
    messages = [b"".join(starmap(field, piece)) for piece in [*USUAL, *pieces]]
    content = b"".join(field(1, message) for message in messages)
    content += field(2, b"".join(starmap(field, trainer))) + field(3, b"".join(starmap(field, normalizer)))
    path = directory / "tokenizer.model"
    path.write_bytes(content)
    assert_read_or_refused(lambda: encode(path), path)


@settings(max_examples=settings().max_examples // 2)
@given(st.data())
def test_mutated_rules_of_normalisation_apply_or_are_refused(charsmap, data):
    size = int.from_bytes(charsmap[:4], "little")
    first, last = data.draw(
        st.sampled_from([(0, 8), (4, 3000), (4, size), (size - 100, size + 200), (size, len(charsmap))])
    )
    broken = data.draw(mutated(charsmap, first, last))
    rng = random.Random(0)
    texts = [TEXT, "a" * 3000, "".join(chr(rng.randrange(0x20, 0x3000)) for _ in range(300))]
    with bounded():
        try:
            rules = CharacterMap(broken)
        except ValueError:
            return
        for text in texts:
            assert len(rules.apply(text)) <= 64 * len(text)
