"""Byte-level BPE from a vocabulary and merges, as GGUF metadata or vocab.json and merges.txt have them.

A text is cut into words by regular expressions, one after the other: what an expression matches is a word of its own,
and so is what lies between two matches. Then the bytes of each word are merged. The files name the expressions, or do
not even that, so they stand here: a row for each way to cut, with the names it goes by. Names and expressions are those
of llama.cpp's table (src/llama-vocab.cpp); where it rewrites an expression for its own engine, that of the models'
tokenizer.json.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fastdeploy.text.backend import failures_as_errors

logger = logging.getLogger("fastdeploy")

# Pieces of expressions, from the models' own tokenizer.json
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORD, SIGNS, SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
# Letters with two cases, without those that Unicode has had since: the models' files list them one by one.
DEEPSEEK_LETTERS = (
    r"[[\p{Lu}\p{Ll}\p{Lt}]&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2D}\x{A790}-\x{A7FA}"
    r"\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7CB}\x{1DF00}-\x{1DF1E}"
    r"\x{10D40}-\x{10D8F}]]"
)
DEEPSEEK_SIGNS = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"
DEEPSEEK_EAST_ASIAN = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]"
DEEPSEEK3_EAST_ASIAN = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"
DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cased_words(ending: str = "") -> str:
    """Words cut where lower case is followed by upper, each with what may stand at its end."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{UPPER}*{LOWER}+{ending}|{start}{UPPER}+{LOWER}*{ending}"


@dataclass(frozen=True)
class Cut:
    """A way to cut a text into words.

    names: what files call it. expressions: applied one after the other. ignores_merges: a word that is a token is taken
    as it is, whether or not merges lead to it. adds_bos: `encode(add_special_tokens=True)` begins with BOS, unless the
    file says otherwise. composes: the text is brought to Unicode's form NFC first.
    """

    names: str
    expressions: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    composes: bool = False


DEFAULT = Cut("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2.removesuffix(r"|\s+"), r"\p{N}+", r"[0-9][0-9][0-9]"))
_LLAMA3 = rf"{ENDINGS}|{WORD}|\p{{N}}{{1,3}}|{SIGNS}|{SPACES}"
_GPT4O = rf"{_cased_words(f'{ENDINGS}?')}|\p{{N}}{{1,3}}|{SIGNS_AND_SLASHES}|{SPACES}"
_QWEN2 = rf"{ENDINGS}|{WORD}|\p{{N}}|{SIGNS}|{SPACES}"
CUTS = (
    DEFAULT,
    Cut(
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion "
        "granite-docling exaone4",
        (GPT2,),
    ),
    Cut("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", (r"\p{N}", GPT2)),
    Cut(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        (_LLAMA3,), ignores_merges=True, adds_bos=True,
    ),
    Cut("dbrx smaug-bpe chatglm-bpe", (_LLAMA3,)),
    Cut("glm4 glm5", (_LLAMA3,), ignores_merges=True),
    Cut("minicpm5", (r"\p{N}{1,3}", _LLAMA3), ignores_merges=True),
    Cut("ufakzeka", (_QWEN2.removeprefix(f"{ENDINGS}|"),)),
    Cut("qwen2", (_QWEN2,), composes=True),
    Cut("deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", (_QWEN2,)),
    Cut(
        "qwen35",
        (rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",),
    ),
    Cut("tekken", (rf"{_cased_words()}|\p{{N}}|{SIGNS_AND_SLASHES}|{SPACES}",), ignores_merges=True, adds_bos=True),
    Cut("gpt-4o llama4 kanana2 talkie minimax-m2", (_GPT4O,)),
    Cut("tiny_aya cohere2moe", (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    Cut("seed-coder", (rf"{ENDINGS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",)),
    Cut(
        "deepseek-llm",
        (r"[\r\n]", rf"\s?{DEEPSEEK_LETTERS}+", DEEPSEEK_SIGNS, r"\s+$", rf"{DEEPSEEK_EAST_ASIAN}+", r"\p{N}+"),
    ),
    Cut("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"{DEEPSEEK_EAST_ASIAN}+", r"\p{N}")),
    Cut("deepseek-v3 hunyuan-dense joyai-llm hy_v4", (r"\p{N}{1,3}", DEEPSEEK3_EAST_ASIAN, DEEPSEEK3_WORDS)),
    Cut("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", GPT2.removesuffix(r"|\s+"), r"[0-9][0-9][0-9]")),
    Cut(
        "bailingmoe bailingmoe2 llada-moe",
        (rf"'(?i:[sdmt]|ll|ve|re)|{WORD}|\p{{N}}|{SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    Cut("poro-chat bloom gpt3-finnish", (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    Cut("viking", (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
)  # fmt: skip
CUT_BY_NAME = {name: cut for cut in CUTS for name in cut.names.split()}


def cut_named(name: str | None, source: str) -> Cut:
    """The way to cut that a file names; llama.cpp's own, with a warning, for one that names none or "default".

    Raises ValueError for a name that we don't know.
    """
    if name in (None, "", "default"):
        logger.warning("%s names no pre-tokenizer (tokenizer.ggml.pre): words are cut llama.cpp's default way", source)
        return DEFAULT
    if name not in CUT_BY_NAME:
        known = ", ".join(CUT_BY_NAME)
        raise ValueError(f"{source}: tokenizer.ggml.pre is {name!r:.80}; known are {known}; pass tokenizer=")
    return CUT_BY_NAME[name]


def merge_pairs(merges: Sequence[str], source: str) -> list[tuple[str, str]]:
    """Merges as files spell them, "h e", in two parts. Raises ValueError, beginning with `source`, for others."""
    pairs = []
    for merge in merges:
        first, _, second = merge.partition(" ")
        if not first or not second or " " in second:
            raise ValueError(f"{source}: the merge {merge!r:.80}; expected two tokens, a space between")
        pairs.append((first, second))
    return pairs


def build(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    cut: Cut,
    source: str,
    add_prefix_space: bool = False,
) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary and its merges, the most important one first.

    add_prefix_space: a text begins with a space, whether or not it has one. Raises ValueError, naming `source`, for
    merges of what is no token.
    """
    with failures_as_errors(f"{source}: the merges don't fit the vocabulary"):
        model = models.BPE(vocab=dict(vocabulary), merges=list(merges), ignore_merges=cut.ignores_merges)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC() if cut.composes else None
    *first, last = cut.expressions  # tokenizers knows GPT-2's by itself, and is faster with it
    steps = [_split(expression) for expression in (first if last == GPT2 else cut.expressions)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=last == GPT2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(expression), behavior="isolated")


def _characters_of_bytes() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable bytes of Latin-1 stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF_CHARACTER = _characters_of_bytes()
