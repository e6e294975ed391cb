"""A tokenizer as GGUF metadata: what `tokenizer.py` reads there, and llama.cpp.

GGUF knows two kinds that we have: byte-level BPE ("gpt2", tokens and merges, and a name for the way a text is cut into
words) and SentencePiece's BPE ("llama", tokens and scores: the better of two merges is the one whose token has the
higher score). Others, and ways to cut that have no name, can't be written down.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastdeploy.text import sentencepiece
from fastdeploy.text.byte_pairs import CUTS, GPT2, Cut
from fastdeploy.text.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from fastdeploy.text.tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
LOWEST = -1e9  # the score of what no merge makes


def vocabulary_metadata(tokenizer: Tokenizer, path: Path, vocab_size: int) -> dict[str, Any] | None:
    """GGUF keys and values that make this tokenizer again, None if there are none.

    Args:
        tokenizer: of a model that is no GGUF file.
        path: the model's directory.
        vocab_size: rows of the embedding: so many tokens are written, unused ones at the end.
    """
    model = path / "tokenizer.model"
    if not (path / "tokenizer.json").exists() and model.exists():
        found = _of_sentencepiece(sentencepiece.read_model(model))
    else:
        found = _of_backend(tokenizer)
    if found is None:
        return None
    tokens, types = found["tokens"], found["token_type"]
    for text, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        while len(tokens) <= token_id:
            tokens.append(f"[PAD{len(tokens)}]")
            types.append(UNUSED)
        tokens[token_id] = text
    for token_id, token in tokenizer.backend.get_added_tokens_decoder().items():
        if types[token_id] not in (UNKNOWN, BYTE):
            types[token_id] = CONTROL if token.special else USER_DEFINED
    missing = range(len(tokens), vocab_size)
    found["tokens"] = [*tokens, *(f"[PAD{token_id}]" for token_id in missing)][:vocab_size]
    found["token_type"] = [*types, *(UNUSED for _ in missing)][:vocab_size]
    if "scores" in found:
        found["scores"] = [*found["scores"], *(LOWEST for _ in range(vocab_size))][:vocab_size]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return metadata | _special_ids(tokenizer, vocab_size) | _templates(tokenizer)


def _of_sentencepiece(model: sentencepiece.SentencePieceModel) -> dict[str, Any] | None:
    if model.algorithm != sentencepiece.BPE or model.charsmap or model.remove_extra_whitespaces:
        return None
    return {
        "model": "llama",
        "tokens": [piece.text for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [piece.type for piece in model.pieces],
        "add_space_prefix": model.add_dummy_prefix,
    }


def _of_backend(tokenizer: Tokenizer) -> dict[str, Any] | None:
    try:
        content = json.loads(tokenizer.backend.to_str())
    except Exception:  # tokenizers raises that itself, for parts written in Python
        return None
    model = content["model"]
    if model["type"] != "BPE":
        return None
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if [model["vocab"][token] for token in tokens] != list(range(len(tokens))):
        return None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if tokenizer.is_byte_level:
        cut, types = _cut(content, model.get("ignore_merges", False)), [NORMAL] * len(tokens)
        if cut is None:
            return None
        name = cut.names.split()[0]
        return {"model": "gpt2", "pre": name, "tokens": tokens, "token_type": types, "merges": merges}
    if not model.get("byte_fallback") or content["normalizer"] is None:
        return None
    return {
        "model": "llama",
        **_scored(tokens, merges, model.get("unk_token")),
        "add_space_prefix": _has_prefix(content),
    }


def _scored(tokens: list[str], merges: list[str], unknown: str | None) -> dict[str, Any]:
    """Scores in whose order the merges are made: of a token, minus the rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    types = [BYTE if BYTE_TOKEN.fullmatch(token) else UNKNOWN if token == unknown else NORMAL for token in tokens]
    scores = [float(-ranks[token]) if token in ranks else LOWEST for token in tokens]
    return {"tokens": tokens, "scores": scores, "token_type": types}


def _has_prefix(content: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    steps = content["normalizer"].get("normalizers", [content["normalizer"]])
    return any(step["type"] == "Prepend" for step in steps)


def _cut(content: dict[str, Any], ignores_merges: bool) -> Cut | None:
    """The known way to cut a text into words that is this one."""
    pre = content["pre_tokenizer"]
    expressions = []
    for step in pre.get("pretokenizers", [pre]):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            expressions.append(step["pattern"].get("Regex"))
        elif step["type"] == "Digits" and step["individual_digits"]:
            expressions.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            expressions += [GPT2] * step["use_regex"]
        else:
            return None
    normalizer = content["normalizer"]
    composes = normalizer is not None and normalizer["type"] == "NFC"
    if normalizer is not None and not composes:
        return None
    wanted = (tuple(expressions), ignores_merges, composes)
    return next((cut for cut in CUTS if (cut.expressions, cut.ignores_merges, cut.composes) == wanted), None)


def _special_ids(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for name, key in {"bos_token": "bos", "unk_token": "unknown", "pad_token": "padding"}.items():
        token = tokenizer.named_tokens.get(name)
        token_id = None if token is None else tokenizer.backend.token_to_id(token)
        if token_id is not None and token_id < vocab_size:
            metadata[f"tokenizer.ggml.{key}_token_id"] = token_id
    ends = [token_id for token_id in tokenizer.eos_token_ids if token_id < vocab_size]
    for key, token_id in zip(("eos", "eot", "eom"), ends):
        metadata[f"tokenizer.ggml.{key}_token_id"] = token_id
    bos = tokenizer.bos_token_id
    metadata["tokenizer.ggml.add_bos_token"] = bos is not None and tokenizer.encode("a", True)[:1] == [bos]
    return metadata


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    suffix = lambda name: "" if name == "default" else f".{name}"  # noqa: E731
    return {f"tokenizer.chat_template{suffix(name)}": text for name, text in templates.items()}
