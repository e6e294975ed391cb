"""SentencePiece models as a `tokenizers.Tokenizer`: the same ids as the sentencepiece package gives, without it.

A `tokenizer.model` is a protocol buffer. Of its messages only a few fields matter here, by number:

    ModelProto      1 pieces (repeated)   2 trainer_spec   3 normalizer_spec
    SentencePiece   1 piece   2 score (float)   3 type
    TrainerSpec     3 model_type   24 treat_whitespace_as_suffix   35 byte_fallback   40-43 unk, bos, eos, pad ids
    NormalizerSpec  2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces   5 escape_whitespaces

Text is normalised first (`Normalizer`), "Hello  world" -> "▁Hello▁world", then cut into pieces. BPE merges the two
neighbours whose union is the piece of the best score, until no two are left whose union is one: the same as byte-pair
merges, one for every way to cut a piece in two pieces, the best pieces first. Unigram looks for the pieces with the
largest sum of scores. What has no piece becomes its UTF-8 bytes, "<0xE4>", if the model has such pieces, else unknown.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import math
import re
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, NormalizedString, decoders, models, normalizers, pre_tokenizers

from fastdeploy.models.storage import read_file

SPACE = "▁"  # U+2581, how pieces spell a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # the types of a piece
UNIGRAM, BPE = 1, 2
NAMED_IDS = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}  # field, default
FILE_BYTES = 16 << 20  # of a tokenizer.model; those of 256,000 pieces have 5 MB
PIECE_LENGTH = 512  # characters; the trainer's own limit is 16 unless told otherwise
RULE_LENGTH = 64  # characters that a rule of normalisation takes or makes; those of NFKC make 18
EVERYTHING = tokenizers.Regex(r"[\s\S]+")


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model, or the metadata of a GGUF file, says of a SentencePiece tokenizer.

    algorithm: UNIGRAM or BPE; charsmap: SentencePiece's compiled rules of normalisation, b"" for none; named_tokens:
    "bos_token" and the like -> its text.
    """

    pieces: list[Piece]
    algorithm: int
    byte_fallback: bool
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    named_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def unknown_id(self) -> int:
        """The piece that stands for what has none. Others of its type may fill the vocabulary up."""
        ids = [token_id for token_id, piece in enumerate(self.pieces) if piece.type == UNKNOWN]
        named = self.named_tokens.get("unk_token")
        if len(ids) != 1 and named is not None:
            return next(token_id for token_id, piece in enumerate(self.pieces) if piece.text == named)
        return ids[0] if ids else 0

    def texts(self, *types: int) -> list[str]:
        """The pieces of these types."""
        return [piece.text for piece in self.pieces if piece.type in types]


def read_model(path: Path) -> SentencePieceModel:
    """A tokenizer.model. Raises FileNotFoundError or ValueError, naming the file, if it is none or asks for what we
    don't have."""
    content = read_file(path, FILE_BYTES)
    try:
        top = _message(content, MODEL, "the model")
        trainer = _message(b"".join(top[2]), TRAINER, "the trainer's settings")
        normalizer = _message(b"".join(top[3]), NORMALIZER, "the normalizer's settings")
        pieces = [_piece(message, f"piece {place}") for place, message in enumerate(top[1])]
        ids = {name: _last(trainer, number, default) for name, (number, default) in NAMED_IDS.items()}
        model = SentencePieceModel(
            pieces=pieces,
            algorithm=_last(trainer, 3, UNIGRAM),
            byte_fallback=bool(_last(trainer, 35, 0)),
            charsmap=_last(normalizer, 2, b""),
            add_dummy_prefix=bool(_last(normalizer, 3, 1)),
            remove_extra_whitespaces=bool(_last(normalizer, 4, 1)),
            named_tokens={name: pieces[token_id].text for name, token_id in ids.items() if 0 <= token_id < len(pieces)},
        )
        if model.charsmap:
            CharacterMap(model.charsmap)
    except ValueError as error:
        raise ValueError(
            f"{path}: not a SentencePiece model, or a damaged one: {error}; download it again, or pass tokenizer="
        ) from None
    if _last(trainer, 24, 0) or not _last(normalizer, 5, 1):
        raise ValueError(f"{path}: spaces as suffixes, or unescaped, are not available; pass tokenizer=")
    check(model, str(path))
    return model


def check(model: SentencePieceModel, source: str) -> None:
    """Raises ValueError, naming `source`, for a model that `build` can't build."""
    texts = [piece.text for piece in model.pieces]
    if not texts or len(set(texts)) != len(texts):
        raise ValueError(f"{source}: expected different pieces, found {len(texts)}, {len(set(texts))} different ones")
    longest = max(texts, key=len)
    if len(longest) > PIECE_LENGTH:
        found = f"{reprlib.repr(longest)} of {len(longest)}"
        raise ValueError(f"{source}: expected pieces of at most {PIECE_LENGTH} characters, found {found}")
    if model.algorithm not in (UNIGRAM, BPE):
        raise ValueError(f"{source}: model type {model.algorithm}; known are 1, unigram, and 2, BPE; pass tokenizer=")
    if model.algorithm == BPE:
        _check_unused(model, source)


def _check_unused(model: SentencePieceModel, source: str) -> None:
    """Raises ValueError if merges lead to an unused piece: SentencePiece then takes it apart again, byte pairs can't.

    Where none do, it only fills the vocabulary up.
    """
    made = set(model.texts(NORMAL))
    for text in sorted(model.texts(UNUSED), key=len):
        if len(text) == 1 or any(text[:cut] in made and text[cut:] in made for cut in range(1, len(text))):
            raise ValueError(f"{source}: the unused piece {text!r:.80} is one that merges make; pass tokenizer=")


def build(model: SentencePieceModel, added: list[AddedToken], prefix_first_only: bool = False) -> tokenizers.Tokenizer:
    """The tokenizer of a checked model.

    `added`: tokens to look for in the text before anything else; those that are no pieces get the ids that follow.
    Text between two such tokens is normalised by itself and so begins with a space, as SentencePiece has it. With
    `prefix_first_only` only what begins the whole text does, as "legacy": false asks of transformers, which has that
    for models without rules of normalisation.
    """
    backend = tokenizers.Tokenizer(_byte_pairs(model) if model.algorithm == BPE else _unigram(model))
    special = {text: AddedToken(text, special=True, normalized=False) for text in model.texts(UNKNOWN, CONTROL)}
    known = special | {token.content: token for token in added}
    backend.add_tokens(list(known.values()))
    # These are a part of the sentence: found after it was normalised, and no segment begins behind them.
    kept = [text for text in model.texts(USER_DEFINED) if text not in known]
    backend.add_tokens([AddedToken(text, special=False, normalized=True) for text in kept])
    if prefix_first_only and not (model.charsmap or model.remove_extra_whitespaces):
        scheme = "first" if model.add_dummy_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    else:
        normalizer = Normalizer(model.charsmap, kept, model.add_dummy_prefix, model.remove_extra_whitespaces)
        backend.normalizer = normalizers.Normalizer.custom(normalizer)
        normalizer.awake = True
        if model.algorithm == UNIGRAM:
            backend.pre_tokenizer = _unigram_split(model)
    strips = model.add_dummy_prefix or model.remove_extra_whitespaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", left=1)] * strips)
    return backend


def _byte_pairs(model: SentencePieceModel) -> models.BPE:
    score = {piece.text: piece.score for piece in model.pieces if piece.type == NORMAL}
    same = {text: text for text in score}  # a merge of the vocabulary's own strings, not of copies, is small
    merges = [
        (same[text[:cut]], same[text[cut:]])
        for text in sorted(score, key=lambda text: -score[text])
        for cut in range(1, len(text))
        if text[:cut] in same and text[cut:] in same
    ]
    vocabulary = {piece.text: token_id for token_id, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.unknown_id].text
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)


def _unigram(model: SentencePieceModel) -> models.Unigram:
    vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(vocabulary, unk_id=model.unknown_id, byte_fallback=model.byte_fallback)


def _unigram_split(model: SentencePieceModel) -> pre_tokenizers.PreTokenizer:
    """Cuts "<0x41>" in the text behind its "<": Unigram, unlike merges, would find the piece that stands for a byte."""
    hidden = model.texts(UNKNOWN, CONTROL, UNUSED, BYTE)
    pattern = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in hidden if len(text) > 1)
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


class Normalizer:
    """SentencePiece's normalisation, for `tokenizers` to call.

    `tokenizers.normalizers.Precompiled` reads the same rules, but applies them by grapheme clusters: it loses marks.
    Asleep it changes nothing: tokenizers normalises added tokens, too, which must stay as they are.
    """

    def __init__(self, charsmap: bytes, kept: list[str], add_prefix: bool, remove_extra_whitespaces: bool):
        self.awake = False
        self._rules = CharacterMap(charsmap) if charsmap else None
        longest_first = sorted(map(re.escape, kept), key=len, reverse=True)
        self._kept = re.compile(f"({'|'.join(longest_first)})") if kept else None
        self._add_prefix = add_prefix
        self._remove_extra_whitespaces = remove_extra_whitespaces

    def normalize(self, normalized: NormalizedString) -> None:
        if self.awake:
            normalized.replace(EVERYTHING, self.text(normalized.normalized))

    def text(self, text: str) -> str:
        """`text`, not empty, as pieces spell it."""
        if self._rules is not None:
            parts = self._kept.split(text) if self._kept else [text]  # every second one is to be kept
            text = "".join(part if index % 2 else self._rules.apply(part) for index, part in enumerate(parts))
        if self._remove_extra_whitespaces:
            text = re.sub("  +", " ", text.strip(" "))
        text = " " * self._add_prefix + text
        if self._remove_extra_whitespaces:
            text = text.rstrip(" " + SPACE)
        return text.replace(" ", SPACE)


class CharacterMap:
    """Rules text -> text, of which the longest applies at each place.

        size u32 | double array of u32 | texts, each up to a 0 byte

    The double array is a trie over UTF-8 bytes (darts-clone): unit XOR its offset XOR a byte is the place of the child
    for that byte, if that has the byte as label; XOR 0 that of the value, where the text begins.
    """

    def __init__(self, charsmap: bytes):
        size = int.from_bytes(charsmap[:4], "little")
        if not 4 <= size <= len(charsmap) - 4 or size % 4:
            raise ValueError(f"its rules of normalisation: expected {size} bytes, found {len(charsmap) - 4}")
        self._units = struct.unpack_from(f"<{size // 4}I", charsmap, 4)
        self._texts = charsmap[4 + size :]
        self._check()
        self._unchanged: set[str] = set()  # characters with which no rule begins: most of a text

    def _check(self) -> None:
        """Raises ValueError unless every rule leads to a text, so that `apply` can't fail."""
        units = np.array(self._units, dtype=np.int64)
        has_value = np.flatnonzero((units & HAS_VALUE != 0) & (units <= VALUE))
        places = has_value ^ _offset(units[has_value])
        no_text = ValueError("its rules of normalisation lead to no text")
        if (places >= len(units)).any():
            raise no_text
        values, texts = units[places] & VALUE, np.frombuffer(self._texts, dtype=np.uint8)
        # A byte 0b10...... goes on with a character; the last byte ends a text.
        if (values >= len(texts)).any() or (texts[values] >> 6 == 2).any() or texts[-1:].any():
            raise no_text
        longest = max(map(len, self._texts.decode().split("\0")))
        if longest > RULE_LENGTH:
            raise ValueError(f"its rules of normalisation make {longest} characters of one; expected {RULE_LENGTH}")

    def apply(self, text: str) -> str:
        """`text` with the rules applied from left to right."""
        pieces, start = [], 0
        while start < len(text):
            piece, length = (text[start], 1) if text[start] in self._unchanged else self._longest(text, start)
            pieces.append(piece)
            start += length
        return "".join(pieces)

    def _longest(self, text: str, start: int) -> tuple[str, int]:
        """What the longest rule makes of text[start:], and of how many characters; the first one without a rule."""
        found = text[start], 1
        place = _offset(self._units[0])
        for end in range(start, min(start + RULE_LENGTH, len(text))):
            for byte in text[end].encode():
                place ^= byte
                unit = self._units[place] if place < len(self._units) else 0
                if unit & LABEL != byte:
                    if end == start:
                        self._unchanged.add(text[start])
                    return found
                place ^= _offset(unit)
            if unit & HAS_VALUE:
                value = self._units[place] & VALUE
                found = self._texts[value : self._texts.index(0, value)].decode(), end + 1 - start
        return found


HAS_VALUE, LABEL, VALUE = 1 << 8, 1 << 31 | 0xFF, (1 << 31) - 1  # of a unit of the double array


def _offset(unit: Any) -> Any:
    """Of a unit, or of each unit of an array."""
    return unit >> 10 << ((unit & 1 << 9) >> 6)


# --- The protocol buffer ------------------------------------------------------------------------------------------

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types
SIZES = {FIXED64: 8, FIXED32: 4}
# The fields that matter of each message, by number, and their wire types.
MODEL = {1: LENGTH, 2: LENGTH, 3: LENGTH}
PIECE = {1: LENGTH, 2: FIXED32, 3: VARINT}
TRAINER = {3: VARINT, 24: VARINT, 35: VARINT} | {number: VARINT for number, _ in NAMED_IDS.values()}
NORMALIZER = {2: LENGTH, 3: VARINT, 4: VARINT, 5: VARINT}


def _message(message: bytes, fields: Mapping[int, int], what: str) -> dict[int, list[Any]]:
    """The values of each field in `fields`, number -> wire type: int for a varint, else bytes.

    Raises ValueError, saying at which byte of `what`, for what is no protocol buffer of this kind.
    """
    found: dict[int, list[Any]] = {number: [] for number in fields}
    place = 0
    while place < len(message):
        start = place
        key, place = _varint(message, place, what)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value: int | bytes
            value, place = _varint(message, place, what)
        else:
            length = SIZES.get(wire)
            if wire == LENGTH:
                length, place = _varint(message, place, what)
            if length is None or length > len(message) - place:
                raise ValueError(f"expected a whole field at byte {start} of {what}, found one of wire type {wire}")
            value = message[place : place + length]
            place += length
        if number in fields:
            if wire != fields[number]:
                expected = f"wire type {fields[number]} for field {number} at byte {start} of {what}"
                raise ValueError(f"expected {expected}, found {wire}")
            found[number].append(value)
    return found


def _varint(message: bytes, place: int, what: str) -> tuple[int, int]:
    """The number that begins at `place`, seven bits a byte from the lowest on, and where it ends."""
    value = 0
    for index, byte in enumerate(message[place : place + 10]):  # 64 bits
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, place + index + 1
    raise ValueError(f"expected a number of at most ten bytes at byte {place} of {what}")


def _last(message: Mapping[int, list[Any]], number: int, default: Any) -> Any:
    """A field's value; of several, the last counts."""
    return message[number][-1] if message[number] else default


def _piece(message: bytes, what: str) -> Piece:
    values = _message(message, PIECE, what)
    (score,) = struct.unpack("<f", _last(values, 2, bytes(4)))
    try:
        text = _last(values, 1, b"").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the text of {what}: {error}") from None
    if not text or not math.isfinite(score):
        raise ValueError(f"expected a text and a finite score of {what}, found {reprlib.repr(text)} and {score}")
    return Piece(text, score, _last(values, 3, NORMAL))
